"""Pruned recurrent modules: layers and directions of different sizes, and what their units do."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import greedyprune
from greedyprune.graph.costs import count_flops
from greedyprune.surgery import recurrent
from greedyprune.surgery.cut import masked

CLASSES = {nn.LSTM: recurrent.LSTM, nn.GRU: recurrent.GRU, nn.RNN: recurrent.RNN}
NAMES = "num_layers", "bidirectional", "batch_first", "bias"
OPTIONS = [
    dict(zip(NAMES, values, strict=True))
    for values in itertools.product((1, 3), (False, True), (False, True), (False, True))
]  # fmt: skip
each_kind = pytest.mark.parametrize("kind", CLASSES)


def assert_same(outputs: Any, expected: Any) -> None:
    def tensors(outputs: Any, states: Any) -> list[Tensor]:
        packed = isinstance(outputs, PackedSequence)
        return [outputs.data if packed else outputs, *tree_leaves(states)]

    for one, other in zip(tensors(*outputs), tensors(*expected), strict=True):
        assert one.shape == other.shape
        assert close(one, other, 1e-12)


@each_kind
@pytest.mark.parametrize("options", OPTIONS)
def test_the_forward_gives_what_torchs_gives(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, x = kind(5, 6, **options).double(), torch.randn(7, 4, 5).double()
    own = copy.deepcopy(module)
    own.__class__ = CLASSES[kind]
    samples = 7 if options["batch_first"] else 4
    h = torch.randn(options["num_layers"] * (1 + options["bidirectional"]), samples, 6).double()
    states = (h, h * 2) if kind is nn.LSTM else h
    packed = pack_padded_sequence(
        torch.randn(samples, 7, 5).double(), [3, 7, 2, 7, 1, 4, 5][:samples],
        batch_first=True, enforce_sorted=False,
    )  # fmt: skip
    for inputs in (x, packed):
        assert_same(own(inputs), module(inputs))
        assert_same(own(inputs, states), module(inputs, states))
    single = (h[:, 0], h[:, 0] * 2) if kind is nn.LSTM else h[:, 0]
    one = x[0] if options["batch_first"] else x[:, 0]
    assert_same(own(one), module(one))
    assert_same(own(one, single), module(one, single))


class Tagger(nn.Module):
    """An embedding, a recurrent module and a head of two layers."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        width = 20 if options.get("bidirectional") else 10
        self.embed, self.body = nn.Embedding(20, 8), kind(8, 10, batch_first=True, **options)
        self.first, self.last = nn.Linear(width, 12), nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.first(self.body(self.embed(tokens))[0]).relu())


def tagger(kind: Any, samples: int = 24, **options: Any) -> tuple[Tagger, Tensor]:
    torch.manual_seed(0)
    model = Tagger(kind, **options).double().eval()
    for parameter in model.body.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, torch.randint(20, (samples, 6))


def selected(model: nn.Module, x: Tensor, **options: Any) -> greedyprune.Selection:
    options = {"objective": "imitation", "progress": False} | options
    return greedyprune.select(model, x, **options)


def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@each_kind
@pytest.mark.parametrize("bias", [False, True])
def test_layers_and_directions_of_different_sizes(kind: Any, bias: bool, tmp_path: Path) -> None:
    model, x = tagger(kind, num_layers=2, bidirectional=True, bias=bias)
    names = [*greedyprune.layers(model, x)]
    assert names == ["embed", *(f"body.{name}" for name in (
        "weight_ih_l0", "weight_ih_l0_reverse", "weight_ih_l1", "weight_ih_l1_reverse"
    )), "first"]  # fmt: skip
    sizes = dict(zip(names, (5, 3, 4, 6, 7, 8), strict=True))
    selection = selected(model, x, size=sizes)
    small, full = greedyprune.prune(model, selection), masked(model, selection)
    assert type(small.body) is CLASSES[kind]
    assert (small.body.input_size, small.body.hidden_size) == (5, (3, 4, 6, 7))
    expected = outputs_of(full, x)
    assert close(outputs_of(small, x), expected, 1e-12)
    for name in names[1:-1]:  # a column of weight_hh more would be seen
        weight = full.get_parameter(name.replace("ih", "hh"))
        saved, at = weight.detach().clone(), selection.layers[name].slices[name]
        with torch.no_grad():
            weight.index_fill_(1, selection.layers[name].kept[:1], 0)
        assert not close(outputs_of(full, x), expected, 1e-6)
        weight.data = saved
        assert at.width == len(weight) // 10
    params, flops = selection.change("params"), selection.change("flops")
    assert params[1] == sum(parameter.numel() for parameter in small.parameters())
    assert flops == tuple(count_flops(m, lambda m=m: m(x))[1] for m in (model, small))
    greedyprune.save_pruned(small, tmp_path / "small.safetensors")
    torch.save(small, tmp_path / "small.pt")
    for again in (
        greedyprune.load_pruned(tmp_path / "small.safetensors", lambda: copy.deepcopy(model)),
        torch.load(tmp_path / "small.pt", weights_only=False),
    ):
        assert type(again.body) is CLASSES[kind]
        assert torch.equal(outputs_of(again, x), outputs_of(small, x))


@each_kind
def test_one_size_keeps_torchs_class_and_a_second_pruning_may_give_it_back(kind: Any) -> None:
    model, x = tagger(kind, num_layers=2)
    first = greedyprune.prune(model, selected(model, x, size={
        "embed": 4, "body.weight_ih_l0": 8, "body.weight_ih_l1": 5, "first": 6,
    }))  # fmt: skip
    assert type(first.body) is CLASSES[kind]
    second = greedyprune.prune(first, selected(first, x, size=5, layers=["body.weight_ih_l0"]))
    for small in (second, greedyprune.prune(model, selected(model, x, size=0.5))):
        assert type(small.body) is kind
        assert small.body.hidden_size == small.body.weight_hh_l1.shape[1] == 5
        assert small.body.input_size == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_kind
def test_flops_are_those_of_both_products_in_every_step(kind: Any, dtype: torch.dtype) -> None:
    model, x = tagger(kind, num_layers=2, bidirectional=True)
    model = model.to(dtype)
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    inputs = outputs_of(model.embed, x)
    counted = count_flops(model.body, lambda: model.body(inputs))[1]
    assert counted == 2 * x.numel() * 10 * gates * 2 * (8 + 10 + 20 + 10)
    rows = greedyprune.layers(model, x)
    assert rows["body.weight_ih_l1"].flops == 2 * x.numel() * 10 * (gates * (20 + 10) + 12)


def test_a_budget_is_what_the_pruned_model_has() -> None:
    model, x = tagger(nn.LSTM, num_layers=2)
    dense = count_flops(model, lambda: model(x))[1]
    for budget in (greedyprune.Budget(flops=0.5), greedyprune.Budget(params=0.5)):
        selection = selected(model, x, size=budget)
        small = greedyprune.prune(model, selection)
        costs = [
            count_flops(small, lambda small=small: small(x))[1] / dense,
            sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters()),
        ]
        assert costs[selection.budget.what == "params"] == pytest.approx(selection.budget.reached)
        assert selection.budget.reached <= 0.5


@pytest.mark.parametrize("sequential", [True, False])
def test_a_later_layer_is_judged_by_what_the_recurrence_gives_without_units(
    sequential: bool,
) -> None:
    """In sequence the loss of `first` is its consumer's error in the pruned network."""
    model, x = tagger(nn.GRU, 60)
    body = "body.weight_ih_l0"
    selection = selected(
        model, x, layers=[body, "first"], size=0.5,
        objective=greedyprune.Imitation(sequential=sequential),
    )  # fmt: skip
    small = greedyprune.prune(model, selection)
    error = (outputs_of(small, x) - outputs_of(model, x)).square().mean()
    loss = float(selection.layers["first"].losses[-1])
    assert (loss == pytest.approx(float(error), rel=1e-5)) == sequential


def test_the_network_s_loss_runs_the_recurrence_without_units() -> None:
    model, x = tagger(nn.LSTM, 60, num_layers=2)
    targets = torch.randn(60, 6, 3).double()
    names = [f"body.weight_ih_l{i}" for i in range(2)]
    selection = greedyprune.select(
        model, (x, targets), layers=names, size=4, loss="mse", weights="none", objective="loss",
        progress=False,
    )  # fmt: skip
    first = greedyprune.Selection({names[0]: selection.layers[names[0]]})
    losses = [
        float((outputs_of(net, x) - targets).square().mean())
        for net in (model, masked(model, first))
    ]
    found = [float(selection.layers[name].dense_loss) for name in names]
    assert found == pytest.approx(losses, rel=1e-5)
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)


def test_refit_brings_the_outputs_nearer() -> None:
    model, x = tagger(nn.LSTM, 600, num_layers=2, bidirectional=True)
    selection = selected(model, x, size=0.5, weights="none")
    dense, errors = outputs_of(model, x), []
    for small in (
        greedyprune.prune(model, selection), greedyprune.refit(model, selection, x),
        greedyprune.refit(model, selection, x, epochs=20),
    ):  # fmt: skip
        errors.append(float((outputs_of(small, x) - dense).square().sum()))
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.95 * errors[1]


def test_units_that_another_tool_has_kept() -> None:
    model, x = tagger(nn.GRU, 60)
    kept = [0, 3, 4, 9]
    small = greedyprune.refit(model, {"body.weight_ih_l0": kept}, x, progress=False)
    rows = torch.tensor([gate * 10 + unit for gate in range(3) for unit in kept])
    assert torch.equal(small.body.weight_hh_l0, model.body.weight_hh_l0[rows][:, kept])
    selection = selected(model, x, layers=["body.weight_ih_l0"], size=4, weights="none")
    pruned = greedyprune.prune(model, selection)
    again = greedyprune.refit(model, pruned, x, progress=False)
    assert torch.equal(again.body.weight_hh_l0, pruned.body.weight_hh_l0)


class Two(nn.Module):
    """An encoder whose states start a decoder, or are read layer by layer."""

    def __init__(self, kind: Any, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.encoder, self.decoder = (kind(5, 8, 2, batch_first=True) for _ in range(2))
        self.head, self.read = nn.Linear(8, 3), read

    def forward(self, x: Tensor) -> Tensor:
        _, states = self.encoder(x[:, :4])
        return self.head(self.decoder(x[:, 4:], self.read(states))[0])


@each_kind
@pytest.mark.parametrize("whole", [False, True])
def test_states_that_are_passed_on(kind: Any, whole: bool) -> None:
    """As they are, they tie the same layer of both; what is computed from all ties all layers."""
    torch.manual_seed(0)

    def read(states: Any) -> Any:
        halves = [state * 0.5 if whole else state for state in tree_leaves(states)]
        return tuple(halves) if kind is nn.LSTM else halves[0]

    model, x = Two(kind, read).double().eval(), torch.randn(20, 7, 5).double()
    names = [f"{module}.weight_ih_l{i}" for i in range(2) for module in ("encoder", "decoder")]
    table = greedyprune.layers(model, x)
    assert [{*row.producers} for row in table.values()] == (
        [{*names}] if whole else [{*names[:2]}, {*names[2:]}]
    )
    sizes = dict(zip(table, (3, 5), strict=False))
    selection = selected(model, x, size=sizes)
    small = greedyprune.prune(model, selection)
    assert type(small.encoder) is type(small.decoder) is (kind if whole else CLASSES[kind])
    expected = outputs_of(masked(model, selection), x)
    assert close(outputs_of(small, x), expected, 1e-12)
    assert not close(expected, outputs_of(model, x), 1e-3)


def test_the_states_of_layers_of_different_sizes() -> None:
    model, x = tagger(nn.LSTM, num_layers=2)
    small = greedyprune.prune(model, selected(model, x, size={
        "embed": 8, "body.weight_ih_l0": 4, "body.weight_ih_l1": 7, "first": 12,
    }))  # fmt: skip
    with torch.no_grad():
        outputs, (h, c) = small.body(small.embed(x))
    assert [state.shape for state in h] == [state.shape for state in c] == [(24, 4), (24, 7)]
    assert torch.equal(h[-1], outputs[:, -1])
    assert torch.equal(h[-1, :, 2:], outputs[:, -1, 2:])
    assert torch.equal(h.select(0, 1), h.unbind()[1])
    assert not hasattr(h, "no_such_name")
    assert [state.shape for state in copy.deepcopy(h)] == [(24, 4), (24, 7)]
    with pytest.raises(RuntimeError, match=r"'mean': the states .* different sizes, \[4, 7\]"):
        h.mean(0)
    for states in (h.select, h.unbind):
        with pytest.raises(RuntimeError, match="dim: found 1"):
            states(1, 0) if states == h.select else states(1)
    with pytest.raises(RuntimeError, match=r"Expected hidden sizes \[4, 7\] of 24 samples, got"):
        small.body(small.embed(x), (torch.zeros(2, 24, 10).double(),) * 2)


def test_a_pruned_module_trains_and_starts_anew() -> None:
    model, x = tagger(nn.GRU, num_layers=2)
    sizes = {"embed": 8, "body.weight_ih_l0": 4, "body.weight_ih_l1": 7, "first": 12}
    small = greedyprune.prune(model, selected(model, x, size=sizes)).train()
    small.body.dropout = 0.5
    assert not torch.equal(small(x), small(x))  # between the layers
    small(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    small.body.reset_parameters()
    for i, size in enumerate((4, 7)):
        largest = float(small.body.get_parameter(f"weight_hh_l{i}").data.abs().max())
        assert 0.8 * size**-0.5 < largest <= size**-0.5


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: Any) -> None:
    torch.manual_seed(0)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head, self.two = kind(5, 8), nn.Linear(8, 3), kind is nn.LSTMCell

        def forward(self, x: Tensor) -> Tensor:
            state, outputs = None, []
            for step in x.unbind(1):
                state = self.cell(step, state)
                outputs.append(self.head(state[0] if self.two else state))
            return torch.stack(outputs, 1)

    model, x = Loop().double().eval(), torch.randn(20, 4, 5).double()
    selection = selected(model, x, size=3)
    small = greedyprune.prune(model, selection)
    assert (small.cell.input_size, small.cell.hidden_size) == (5, 3)
    assert close(outputs_of(small, x), outputs_of(masked(model, selection), x), 1e-12)
    assert selection.change("flops")[1] == count_flops(small, lambda: small(x))[1]
