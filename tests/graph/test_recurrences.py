"""Recurrent modules in the graph: linear maps and recurrences that give what torch gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import close
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import greedyprune
from greedyprune.data.batches import Batch
from greedyprune.graph.executor import GraphExecutor
from greedyprune.graph.groups import Group
from greedyprune.graph.networks import tensors_of
from greedyprune.graph.recurrences import is_recurrence
from greedyprune.graph.structure import analyse

KINDS = {
    "lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}  # fmt: skip
NAMES = "num_layers", "bidirectional", "batch_first", "bias"
OPTIONS = [
    dict(zip(NAMES, values, strict=True))
    for values in itertools.product((1, 3), (False, True), (False, True), (False, True))
]  # fmt: skip


class Running(nn.Module):
    """A recurrent module and everything that it returns, from zero states or from others."""

    def __init__(self, kind: str, options: dict[str, Any], given: bool) -> None:
        super().__init__()
        self.body, self.given, self.kind = KINDS[kind](5, 6, **options), given, kind
        self.count = options["num_layers"] * (1 + options["bidirectional"])
        self.samples = 0 if options["batch_first"] else 1

    def forward(self, x: Tensor) -> Any:
        if not self.given:
            return self.body(x)
        h = x.mean() * torch.linspace(-2, 2, self.count * x.shape[self.samples] * 6).to(x)
        h = h.view(self.count, x.shape[self.samples], 6)
        return self.body(x, (h, h * 2) if self.kind == "lstm" else h)


def of_graph(model: nn.Module, x: Tensor, dynamic: bool = False) -> Any:
    executor = GraphExecutor(model, Batch((x,), {}, None), dynamic)
    values = executor.inputs(Batch((x,), {}, None))
    return executor.outputs(values, tensors_of(model), 0)


def assert_same(outputs: Any, expected: Any) -> None:
    pairs = zip(tree_leaves(outputs), tree_leaves(expected), strict=True)
    for one, other in pairs:
        assert one.shape == other.shape
        assert close(one, other, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("given", [False, True])
def test_the_graph_gives_what_torch_gives(kind: str, options: dict[str, Any], given: bool) -> None:
    torch.manual_seed(0)
    model, x = Running(kind, options, given).double().eval(), torch.randn(7, 4, 5).double()
    outputs = of_graph(model, x)
    assert_same(outputs, model(x))
    assert not close(tree_leaves(outputs)[0], torch.zeros(1).double())


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_and_open_sizes(kind: str) -> None:
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "batch_first": False, "bias": True}
    model, x = Running(kind, options, False).double().eval(), torch.randn(7, 4, 5).double()
    assert_same(of_graph(model, x[:, 0]), model(x[:, 0]))
    executor = GraphExecutor(model, Batch((x,), {}, None), dynamic=True)
    other = Batch((torch.randn(7, 9, 5).double(),), {}, None)
    assert executor.accepts(other)
    outputs = executor.outputs(executor.inputs(other), tensors_of(model), 0)
    assert_same(outputs, model(*other.args))


def test_an_input_that_is_turned_around_has_the_module_turned_around() -> None:
    """So the linear maps have one order of positions in a network and in its pruned copy."""
    torch.manual_seed(0)

    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.GRU(5, 6, 2, bidirectional=True, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            outputs, states = self.body(x.flip(1))
            return outputs.flip(1), states

    model, x = Turning().double().eval(), torch.randn(3, 7, 5).double()
    executor = GraphExecutor(model, Batch((x,), {}, None))
    assert_same(of_graph(model, x), model(x))
    reversed_ = [node.args[-1] for node in executor.nodes if is_recurrence(node)]
    assert reversed_ == [True, False, True, False]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [False, True])
def test_cells(kind: Callable[..., nn.Module], bias: bool) -> None:
    torch.manual_seed(0)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.two = kind(5, 6, bias=bias), kind is nn.LSTMCell

        def forward(self, x: Tensor) -> Any:
            state, outputs = None, []
            for step in x.unbind(1):
                state = self.cell(step, state)
                outputs.append(state[0] if self.two else state)
            return torch.stack(outputs, 1), state

    model, x = Loop().double().eval(), torch.randn(3, 4, 5).double()
    assert_same(of_graph(model, x), model(x))


class Last(nn.Module):
    """A classifier by the last states, as `of` takes them."""

    def __init__(self, of: Callable[[Tensor], Tensor], width: int = 6, **options: Any) -> None:
        super().__init__()
        self.body = nn.GRU(5, 6, 2, batch_first=True, **options)
        self.head, self.of = nn.Linear(width, 3), of

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.of(self.body(x)[1]))


LAYERS = ["body.weight_ih_l0", "body.weight_ih_l1"]


@pytest.mark.parametrize(("of", "together"), [
    (lambda h: h[-1], False),
    (lambda h: h[-1, :, :], False),
    (lambda h: h.unbind(0)[1], False),
    (lambda h: h.select(0, -1), False),
    (lambda h: h.mean(0), True),
    (lambda h: h[1:][0], True),
    (lambda h: h.transpose(0, 1)[:, 1], True),
])  # fmt: skip
def test_last_states_tie_layers_only_where_they_are_one_tensor(
    of: Callable[[Tensor], Tensor], together: bool
) -> None:
    table = greedyprune.layers(Last(of).eval(), torch.randn(4, 7, 5))
    assert [*table] == LAYERS[: 1 if together else 2]
    assert table[LAYERS[0]].producers == tuple(LAYERS if together else LAYERS[:1])
    assert not table.refused.keys() & {*LAYERS}


def test_code_that_needs_last_states_as_a_tensor_is_found_by_a_trial() -> None:
    """The graph has nothing of the size. A `States` has no shape; states of one size have."""
    model = Last(lambda h: h[-1] * h.shape[1]).eval()
    x = torch.randn(4, 7, 5)
    table = greedyprune.layers(model, x)
    assert [group.share for group in table.values()] == [tuple(LAYERS)] * 2
    options = {"objective": "imitation", "weights": "none"}
    selection = greedyprune.select(model, x, layers="all", size=4, **options)
    assert greedyprune.prune(model, selection).body.hidden_size == 4
    with pytest.raises(ValueError, match="which has to keep one share with"):
        greedyprune.select(model, x, size=dict(zip(LAYERS, (4, 3), strict=True)), **options)


class Started(nn.Module):
    """A recurrent module that starts from states of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.states = how, 6
        self.body, self.head = nn.LSTM(5, 6, 2, batch_first=True), nn.Linear(6, 3)
        self.start = nn.Parameter(torch.randn(2, 1, 6))
        self.make = nn.Linear(5, 6) if how == "layer" else None
        self.first = nn.Linear(5, 5) if how == "new zeros" else None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(2, len(x), self.states).to(x)
        if self.how == "new zeros":
            x = self.first(x).relu()
            h = x.new_zeros(2, len(x), self.states)
        if self.how == "parameter":
            h = self.start.expand(-1, len(x), -1).contiguous()
        elif self.how == "layer":
            h = self.make(x[:, 0]).tanh().expand(2, -1, -1).contiguous()
        elif self.how == "random":
            h = torch.randn(2, len(x), 6).to(x)
        return self.head(self.body(x, (h, h))[0])


@pytest.mark.parametrize("how", ["zeros", "new zeros", "parameter", "layer", "random"])
def test_states_to_start_from(how: str) -> None:
    torch.manual_seed(0)
    model, x = Started(how).eval().double(), torch.randn(9, 7, 5).double()
    table = greedyprune.layers(model, x)
    if how == "random":
        reason = "its recurrence starts from a state that no layer gives"
        assert {table.refused[name] for name in LAYERS} == {reason}
        return
    *before, name = table
    assert before == (["first"] if how == "new zeros" else [])
    made = ("make",) if how == "layer" else ()
    assert table[name].producers == (*made, *LAYERS)
    selection = greedyprune.select(model, x, size=3, objective="imitation", progress=False)
    small = greedyprune.prune(model, selection)
    assert type(small.body) is nn.LSTM
    assert small.states == (3 if "zeros" in how else 6)
    assert small(x).shape == (9, 7, 3)


def test_a_direction_that_nothing_uses_still_takes_the_units_before_it() -> None:
    torch.manual_seed(0)
    model = Last(lambda h: h[2], bidirectional=True).eval()
    x = torch.randn(9, 7, 5)
    small = greedyprune.prune(model, greedyprune.select(model, x, size=2, progress=False))
    assert small.body.weight_ih_l1_reverse.shape == (18, 4)
    assert small.body.hidden_size == (2, 2, 2, 6)
    selection = greedyprune.select(model, x, size=2, progress=False)
    assert greedyprune.refit(model, selection, x, epochs=1).body.hidden_size == (2, 2, 2, 6)


def test_a_shared_weight_keeps_its_size() -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.GRU(5, 6), nn.GRU(6, 6)
            self.b.weight_hh_l0 = self.a.weight_hh_l0
            self.last = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.b(self.a(x)[0])[0])

    refused = greedyprune.layers(Sharing().eval(), torch.randn(7, 4, 5)).refused
    for name in "ab":
        assert "weight_hh_l0' is shared with another layer" in refused[f"{name}.weight_ih_l0"]


def test_messages_name_the_recurrence() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body, self.last = nn.Linear(5, 8), nn.GRU(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.body(self.first(x).relu())[0])

    batch = Batch((torch.randn(7, 4, 5),), {}, None)
    group = analyse(Stack().eval(), batch)["first"]
    assert isinstance(group, Group)
    assert (group.consumer, group.not_output) == ("body.weight_ih_l0", "gru")


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projection_is_refused() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Linear(5, 8), nn.LSTM(8, 6, proj_size=3)
            self.last = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.body(self.first(x).relu())[0])

    refused = greedyprune.layers(Projected().eval(), torch.randn(7, 4, 5)).refused
    reason = "aten.lstm.input projects its states (proj_size)"
    assert refused["body"] == refused["first"] == reason


def test_packed_sequences_are_refused() -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, [7, 5, 3], batch_first=True)
            return self.last(self.body(packed)[1][-1])

    with pytest.raises(ValueError, match=r"packed sequences.*expected padded ones"):
        greedyprune.layers(Packing().eval(), torch.randn(3, 7, 5))
