"""Sizes for a budget, in multiples and uniform, and what a model costs before and after."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS, Inputs, data_of, network, outputs_of
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import greedyprune
from greedyprune import Budget, Imitation
from greedyprune.data.batches import Batch
from greedyprune.graph.structure import analyse, find_groups
from greedyprune.sizes.curves import Curves
from greedyprune.sizes.kinds import sizes_in_one_share


def count(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        outputs_of(model, inputs)
    return {
        "flops": counter.get_total_flops(),
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }


class ClassToken(nn.Module):
    """A module takes a view of a parameter, as the blocks of CaiT and PiT take class tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 5))
        self.token_block = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        self.block = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.token_block(self.token.expand(len(x), -1))


def test_costs_where_a_module_takes_a_view_of_a_parameter() -> None:
    """torch's counter failed with "Expected gradient function to be set"."""
    torch.manual_seed(0)
    model, x = ClassToken(), torch.randn(20, 5)
    model.block[0].weight.requires_grad_(False)
    required = [parameter.requires_grad for parameter in model.parameters()]
    flops = count(model.requires_grad_(False), x)["flops"]
    for parameter, value in zip(model.parameters(), required, strict=True):
        parameter.requires_grad_(value)
    assert set(greedyprune.layers(model, x)) == {"token_block.0", "block.0"}
    selection = greedyprune.select(model, x, size=Budget(flops=0.6))
    assert selection.costs is not None and selection.costs["flops"].dense == flops
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    greedyprune.prune(model, selection)


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_those_of_the_pruned_model(name: str, tmp_path: object) -> None:
    model, inputs = network(name)
    whole = greedyprune.select(model, data_of(inputs), objective="imitation", size=0.7)
    whole.save(f"{tmp_path}/selection.safetensors")
    loaded = greedyprune.Selection.load(f"{tmp_path}/selection.safetensors")
    before = count(model, inputs)
    for selection in (whole, whole.at(1), loaded):
        after = count(greedyprune.prune(model, selection), inputs)
        text = Console(width=200, file=StringIO())
        text.print(selection.summary())
        for what in ("params", "flops"):
            assert selection.change(what) == (before[what], after[what])
            assert f"{before[what]:,}" in text.file.getvalue()
            assert f"{after[what]:,}" in text.file.getvalue()
    alone = greedyprune.Selection(whole.layers)
    assert alone.change("params") is None
    assert alone.summary().caption is None


def relative_losses(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Of every layer by itself, as a share of what it loses without units."""
    selection = greedyprune.select(
        model, data_of(inputs), objective=Imitation(sequential=False, swaps=0), size=1.0
    )
    outputs: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        empty = copy.deepcopy(module)
        nn.init.zeros_(empty.weight)
        outputs.append((out - empty.forward(*args)).double().flatten())

    losses = {}
    for name, layer in selection.layers.items():
        outputs.clear()
        handles = [model.get_submodule(n).register_forward_hook(record) for n in layer.outputs]
        outputs_of(model, inputs)
        for handle in handles:
            handle.remove()
        losses[name] = layer.losses / torch.cat(outputs).square().mean()
    return losses


def tried_out(
    selection: greedyprune.Selection, losses: Mapping[str, Tensor], what: str, share: float,
    allowed: Mapping[str, Sequence[int]],
) -> float:  # fmt: skip
    """The lowest sum of losses within a budget, by trying all widths."""
    cost = selection.costs[what]
    every = (dict(zip(allowed, w, strict=True)) for w in itertools.product(*allowed.values()))
    return min(
        sum(float(losses[name][k - 1]) for name, k in widths.items())
        for widths in every
        if cost.at(widths) <= share * cost.dense
    )


@pytest.mark.parametrize("name", ["resnet", "vgg", "mobilenet", "excited", "llama", "gpt2"])
@pytest.mark.parametrize(("what", "share", "round_to"), [("flops", 0.8, None), ("params", 0.95, 4)])
def test_a_budget_s_widths_lose_least(
    name: str, what: str, share: float, round_to: int | None
) -> None:
    model, inputs = network(name)
    selection = greedyprune.select(
        model, data_of(inputs), objective="imitation", size=Budget(**{what: share}),
        round_to=round_to,
    )  # fmt: skip
    report = selection.budget
    assert (report.what, report.share, report.gap) == (what, share, 0)
    before, after = count(model, inputs), count(greedyprune.prune(model, selection), inputs)
    assert after[what] <= share * before[what]
    assert report.reached == after[what] / before[what]

    losses, allowed = relative_losses(model, inputs), {}
    heads = {"llama": 4, "gpt2": 6}.get(name)  # features a head
    for layer, (units, _, _) in NETWORKS[name][1].items():
        channels = heads if heads and "attn" in layer else 1
        allowed[layer] = [w for w in range(1, units + 1)
                          if w == units or w * channels % (round_to or 1) == 0]  # fmt: skip
        assert len(selection.layers[layer].kept) in allowed[layer]
    assert report.objective == pytest.approx(
        tried_out(selection, losses, what, share, allowed), rel=1e-5
    )
    sizes = {layer: len(selected.kept) for layer, selected in selection.layers.items()}
    assert sum(float(losses[n][k - 1]) for n, k in sizes.items()) == pytest.approx(
        report.objective, rel=1e-5
    )
    again = greedyprune.select(model, data_of(inputs), objective="imitation", size=sizes)
    for layer, selected in selection.layers.items():
        assert selected.order.equal(again.layers[layer].order)


def test_a_budget_survives_its_file(tmp_path: object) -> None:
    model, inputs = network("vgg")
    selection = greedyprune.select(
        model, [inputs], objective="imitation", weights="counts", size=Budget(params=0.5)
    )
    selection.save(f"{tmp_path}/selection.safetensors")
    loaded = greedyprune.Selection.load(f"{tmp_path}/selection.safetensors")
    assert loaded.budget == selection.budget
    assert loaded.costs == selection.costs
    assert selection.at(1).budget is None
    assert "params 0." in loaded.summary().caption


class Stack(nn.Module):
    """Two feed-forward blocks of one kind and one that is larger."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(8, n) for n in (16, 16, 20))
        self.down = nn.ModuleList(nn.Linear(n, 8) for n in (16, 16, 20))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return x


def test_uniform_widths() -> None:
    torch.manual_seed(0)
    model, inputs = Stack(), torch.randn(100, 8)
    with torch.no_grad():
        model.up[1].weight[4:] = 0  # four of its units do
    free, shared = (
        greedyprune.select(
            model, [inputs], objective="imitation", size=Budget(flops=0.6, uniform=uniform)
        )
        for uniform in (False, True)
    )
    sizes = [[len(layer.kept) for layer in s.layers.values()] for s in (free, shared)]
    assert sizes[0][0] != sizes[0][1]
    assert sizes[1][0] == sizes[1][1]
    losses = list(relative_losses(model, inputs).values())
    cost = shared.costs["flops"]
    best = min(
        float(losses[0][k - 1] + losses[1][k - 1] + losses[2][j - 1])
        for k in range(1, 17)
        for j in range(1, 21)
        if cost.at({"up.0": k, "up.1": k, "up.2": j}) <= 0.6 * cost.dense
    )
    assert shared.budget.objective == pytest.approx(best, rel=1e-5)


def test_layers_of_a_kind_that_share_weights() -> None:
    """Consecutive convolutions of one width: the cost grows with its square."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(3)]
    model = nn.Sequential(*(m for c in convs for m in (c, nn.ReLU())), nn.Conv2d(6, 2, 1)).eval()
    inputs = torch.randn(8, 3, 8, 8)
    groups = find_groups(model, analyse(model, Batch((inputs,), {}, None)), None)
    selection = greedyprune.select(model, [inputs], size=Budget(flops=0.5, uniform=True))
    assert len({len(layer.kept) for layer in selection.layers.values()}) == 1
    cost = selection.costs["flops"]
    kinds = [groups[:2], groups[2:]]
    sizes_of = [sizes_in_one_share(kind, 1) for kind in kinds]
    nothing = [np.zeros(len(sizes)) for sizes in sizes_of]
    curves = Curves.of(kinds, sizes_of, nothing, {"flops": [cost]}, uniform=False)
    problem = curves.knapsack(cost, cost.dense)
    for k, j in itertools.product(range(1, 7), repeat=2):
        widths = {"0": k, "2": k, "4": j}
        assert problem.cost(np.array([k - 1, j - 1])) == pytest.approx(
            cost.at(widths) - cost.at(dict.fromkeys(widths, 0))
        )


@pytest.mark.filterwarnings("ignore:round_to. ")
def test_sizes_in_multiples() -> None:
    model, inputs = network("resnet")

    def sizes(model: nn.Module, inputs: object, **options: object) -> list[int]:
        selection = greedyprune.select(model, inputs, objective="imitation", **options)
        return [len(layer.kept) for layer in selection.layers.values()]

    assert sizes(model, [inputs], size=0.5, round_to=3) == [3, 9]  # of 4 of 8, of 8 of 16
    assert sizes(model, [inputs], size={"3.conv1": 1, "4.conv1": 12}, round_to=8) == [8, 16]
    assert sizes(model, [inputs], size=0.9, round_to=3) == [8, 15]  # 7: of 6 and 8 the larger
    assert sizes(model, [inputs], size=1, round_to=32) == [8, 16]
    model, inputs = network("llama")
    assert sizes(model, inputs, size=0.5, round_to=8) == [2, 8]  # heads of 4 numbers, 2 at a time


BAD: list[tuple[dict, str]] = [
    (
        {"size": Budget(flops=0.5), "steps": 5},
        r"steps: found size=Budget\(.* and steps=5, ",
    ),
    ({"size": Budget(flops=0.5), "tolerance": 0.1}, "size: found a Budget and tolerance, expected"),
    ({"size": Budget(flops=0.01)}, r"flops: found 0.01, but the smallest sizes .* leave 0.\d+ of"),
    ({"size": Budget(flops=0.9), "memory_limit": 100}, r"memory_limit: found 100 bytes, but"),
    ({"round_to": 0}, "round_to: found 0, expected at least 1"),
    ({"round_to": "8"}, "round_to: found '8', expected an int"),
    ({"round_to": 8, "steps": 5}, "round_to: found 8 with steps, expected a size"),
    ({"round_to": 8, "tolerance": 0.1}, "round_to: found 8 with tolerance, expected a size"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_budgets(options: dict, message: str) -> None:
    model, inputs = network("vgg")
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        greedyprune.select(model, [inputs], objective="imitation", **options)
    assert len(str(caught.value).splitlines()) == 1


BAD_SHARES: list[tuple[dict, type[Exception], str]] = [
    ({}, ValueError, "Budget: found none, expected at least one of flops, params, latency, memory"),
    ({"flops": 0.5, "memory": 2}, ValueError, r"memory: found 2, expected a share in \(0, 1\]"),
    ({"flops": 0.5, "min_share": -1}, ValueError, r"min_share: found -1, expected a share in \["),
    ({"flops": 0.5, "min_share": "a"}, TypeError, r"min_share: found 'a', expected a share in \["),
    ({"flops": 0.5, "deploy": len}, ValueError, "deploy: found one without latency, expected a"),
    ({"latency": 0.5, "deploy": 1}, TypeError, "deploy: found 1, expected a function of the model"),
    ({"flops": 0.5, "keep": 3}, TypeError, "keep: found 3, expected names or patterns of layers"),
    ({"flops": 0.5, "keep": ["a", 3]}, TypeError, r"keep: found \['a', 3\], expected names or"),
    ({"flops": 0}, ValueError, r"flops: found 0, expected a share in \(0, 1\]"),
    ({"params": 1.5}, ValueError, r"params: found 1.5, expected a share in \(0, 1\]"),
    ({"latency": -0.5}, ValueError, r"latency: found -0.5, expected a share in \(0, 1\]"),
    ({"flops": "half"}, TypeError, r"flops: found 'half', expected a share in \(0, 1\]"),
    ({"flops": float("inf")}, TypeError, r"flops: found inf, expected a share in \(0, 1\]"),
    ({"flops": 0.5, "uniform": 1}, TypeError, "uniform: found 1, expected True or False"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD_SHARES)
def test_bad_shares(options: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        Budget(**options)
    assert len(str(caught.value).splitlines()) == 1


def test_a_budget_takes_two_passes() -> None:
    model, inputs = network("mobilenet")
    with pytest.raises(ValueError, match="data: found an iterator for a budget"):
        greedyprune.select(model, iter([inputs]), size=Budget(flops=0.5))


@pytest.mark.parametrize(
    ("keep", "left", "share"),
    [("0", {"4", "8"}, 0.95), (["[04]"], {"8"}, 0.995), (("8",), {"0", "4"}, 0.6)],
)
def test_layers_that_a_budget_keeps(keep: Any, left: set[str], share: float) -> None:
    model, inputs = network("vgg")
    selection = greedyprune.select(model, [inputs], size=Budget(flops=share, keep=keep))
    assert set(selection.layers) == left
    whole = {"0", "4", "8"} - left
    assert {name for name, reason in selection.refused.items() if "keep" in reason} == whole
    small = greedyprune.prune(model, selection)
    after, before = count(small, inputs), count(model, inputs)
    assert after["flops"] <= share * before["flops"]
    for name in whole:
        assert len(small.get_parameter(f"{name}.weight")) == len(
            model.get_parameter(f"{name}.weight")
        )


def test_a_block_and_a_layer_inside_heads_that_are_kept() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model, x = (
        nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)),
        torch.randn(20, 5, 16),
    )
    selection = greedyprune.select(model, x, size=Budget(params=0.9, keep="0.layers.1"))
    assert {name.split(".")[2] for name in selection.layers} == {"0"}
    name = "0.layers.0.self_attn.in_proj_weight[query-key]"
    inside = [name, name.replace("query-key", "value")]
    layers = [*inside, "0.layers.0.linear1", "0.layers.1.linear1"]
    selection = greedyprune.select(model, x, layers=layers, size=Budget(params=0.95, keep=name))
    assert set(selection.layers) == set(layers[2:])  # the two inside heads need one share


def test_layers_in_one_share_with_one_that_is_kept() -> None:
    model, inputs = network("llama")
    name = next(name for name in greedyprune.layers(model, inputs) if "q_proj" in name)
    selection = greedyprune.select(model, data_of(inputs), size=Budget(flops=0.9, keep=name))
    assert name not in selection.layers


def test_patterns_that_keep_no_layer_or_all() -> None:
    model, inputs = network("vgg")
    with pytest.raises(ValueError, match=r"keep: found 'head\*', which matches no layer, expected"):
        greedyprune.select(model, [inputs], size=Budget(flops=0.5, keep="head*"))
    with pytest.raises(ValueError, match="keep: found patterns that match all layers"):
        greedyprune.select(model, [inputs], size=Budget(flops=0.5, keep="*"))


def test_the_least_share_of_every_layer() -> None:
    model, inputs = network("vgg")
    data = data_of(inputs)
    free = greedyprune.select(model, data, size=Budget(params=0.7))
    shares = {name: len(layer.kept) / len(layer.counts) for name, layer in free.layers.items()}
    least = min(shares.values()) + 0.1
    held = greedyprune.select(model, data, size=Budget(params=0.7, min_share=least))
    assert all(len(layer.kept) >= least * len(layer.counts) for layer in held.layers.values())
    assert held.budget.objective >= free.budget.objective
    with pytest.raises(ValueError, match=r"params: found 0\.7, but the smallest sizes"):
        greedyprune.select(model, data, size=Budget(params=0.7, min_share=0.9))


def test_several_costs_at_once() -> None:
    model, inputs = network("vgg")
    data = data_of(inputs)
    both = greedyprune.select(model, data, size=Budget(flops=0.5, params=0.6))
    after, before = count(greedyprune.prune(model, both), inputs), count(model, inputs)
    for what, share in (("flops", 0.5), ("params", 0.6)):
        assert both.budget.left[what] == after[what] / before[what] <= share
        alone = greedyprune.select(model, data, size=Budget(**{what: share}))
        assert alone.budget.objective <= both.budget.objective + both.budget.gap
    text = Console(width=200, file=StringIO())
    text.print(both.summary())
    assert "for a budget of 0.5, params 0." in text.file.getvalue()


def test_an_impossible_budget_names_the_dearest_layers() -> None:
    model, inputs = network("vgg")
    for what in ("flops", "params", "latency"):
        with pytest.raises(ValueError, match=rf"{what}: found 0.001, .* dearest layers being '"):
            greedyprune.select(model, [inputs], size=Budget(**{what: 0.001}))
