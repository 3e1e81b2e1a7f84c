"""The trial cut, and the layers that it leaves out: one list for `layers` and `select`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from biased_attention import Biased
from oracle import close
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune.data.batches import Batch
from greedyprune.data.forward import same_outputs
from greedyprune.graph.groups import Group
from greedyprune.graph.structure import analyse
from greedyprune.runtime.files import read_tensors, write_tensors
from greedyprune.surgery import proof, trials
from greedyprune.surgery.selection import FORMAT

Run = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Two convolutions and two Linears, with any forward."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 1)
        self.hidden, self.last = nn.Linear(4 * 16, 10), nn.Linear(10, 3)
        self.run = run

    def features(self, x: Tensor) -> Tensor:
        """The convolution's channels, flattened by a view that computes their number."""
        hidden = self.conv(self.first(x).relu()).relu()
        return hidden.view(len(hidden), hidden.shape[1] * 16)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


@dataclass
class Detection:
    scores: Tensor
    name: str


def masked_scores(y: Tensor) -> Tensor:
    """A third of them -inf, as after a mask, and one NaN."""
    y = y.masked_fill(torch.tensor([True, False, False]), -torch.inf)
    return torch.cat([y, torch.full((1, 3), torch.nan)])


def out(model: Net, x: Tensor) -> Tensor:
    return model.last(model.hidden(model.features(x)).relu())


OUTPUTS: dict[str, Run] = {
    "a tensor": out,
    "a tuple": lambda m, x: (out(m, x), out(m, 2 * x)),
    "dicts of lists": lambda m, x: {"boxes": [out(m, x), {"n": out(m, x).argmax(1)}]},
    "infinite": lambda m, x: masked_scores(out(m, x)),
    "sampled": lambda m, x: (y := out(m, x)) + torch.randn_like(y),
    "dropped in eval mode": lambda m, x: m.last(functional.dropout(m.hidden(m.features(x)))),
    "dropped units": lambda m, x: m.last(m.hidden(functional.dropout(m.features(x), 0.5))),
}
# What a model that can't be traced makes of its last layer's output.
UNTRACEABLE: dict[str, Callable[[Tensor], Any]] = {
    "a dataclass": lambda y: Detection(y, "cat"),
    "objects": lambda y: [SimpleNamespace(box=box, kind=1.5) for box in y],
    "a distribution": lambda y: torch.distributions.Categorical(logits=y),
    "Python's random numbers": lambda y: [y, random.random()],
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_any_kind_are_compared(kind: str) -> None:
    """The view runs with fewer channels, whatever the model returns."""
    torch.manual_seed(0)
    model, x = Net(OUTPUTS[kind]), torch.randn(8, 1, 6, 6)
    state, python_state = torch.get_rng_state(), random.getstate()
    table = greedyprune.layers(model, x)
    assert list(table) == ["first", "conv", "hidden"]
    selection = greedyprune.select(model, [x], objective="imitation")
    assert list(selection.layers) == list(table)
    assert torch.get_rng_state().equal(state) and random.getstate() == python_state


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_outputs_of_models_that_cannot_be_traced(kind: str) -> None:
    """Layers named by hand are tried too, and refused where the units meet between them."""
    wrap, x = UNTRACEABLE[kind], torch.randn(20, 1, 6, 6)

    def selected(between: Callable[[Tensor], Tensor]) -> list[str]:
        torch.manual_seed(0)
        model = Net(lambda m, x: wrap(m.last(between(m.hidden(m.features(x))))))
        layers = {"hidden": "last"}
        return list(greedyprune.select(model, [x], layers=layers, objective="imitation").layers)

    assert selected(torch.relu) == ["hidden"]
    with pytest.raises(ValueError, match="layer 'hidden': cutting units gives other outputs"):
        selected(lambda hidden: hidden.softmax(1))


SURE: dict[str, Run] = {
    "inferred": lambda m, x: m.hidden(m.conv(m.first(x)).relu().view(len(x), -1)),
    "flattened": lambda m, x: m.hidden(m.conv(m.first(x)).flatten(1)),
    "unsqueezed": lambda m, x: m.hidden(m.conv(m.first(x)).unsqueeze(0).squeeze(0).flatten(1)),
    "unflattened": lambda m, x: m.hidden(m.conv(m.first(x)).unflatten(2, (-1, 2)).flatten(1)),
    "expanded": lambda m, x: m.hidden(m.conv(m.first(x)).expand(len(x), -1, 4, 4).flatten(1)),
    "chunked": lambda m, x: m.hidden(
        torch.cat(m.conv(m.first(x)).chunk(2, 2), 2).flatten(1)
    ),
    "split elsewhere": lambda m, x: m.hidden(
        torch.cat(m.conv(m.first(x)).split(2, 2), 2).flatten(1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SURE)
def test_no_trial_where_the_graph_proves_it(kind: str) -> None:
    def check(model: nn.Module, group: Group, batch: Batch) -> None:
        raise AssertionError(group.may_hold_size)

    structure = analyse(Net(SURE[kind]).eval(), Batch((torch.randn(3, 1, 6, 6),), {}, None), check)
    assert [name for name, group in structure.items() if isinstance(group, Group)] == [
        "first", "conv",
    ]  # fmt: skip


def test_a_convolution_before_a_view_in_a_vae_that_samples() -> None:
    """It is pruned as with flatten, and both selections are the same."""

    def code(m: Net, hidden: Tensor) -> tuple[Tensor, Tensor]:
        mean = m.hidden(hidden)
        return m.last((mean + torch.randn_like(mean)).relu()), mean

    def viewed(m: Net, x: Tensor) -> Any:
        hidden = m.conv(m.first(x).relu()).relu()
        return code(m, hidden.view(hidden.shape[0], hidden.shape[1] * 16))

    torch.manual_seed(0)
    model, x = Net(viewed), torch.randn(30, 1, 6, 6)
    flat = Net(lambda m, x: code(m, m.conv(m.first(x).relu()).relu().flatten(1)))
    flat.load_state_dict(model.state_dict())
    selection, expected = greedyprune.select(model, [x]), greedyprune.select(flat, [x])
    assert list(selection.layers) == list(expected.layers) == ["first", "conv"]
    for name, layer in selection.layers.items():
        assert layer.order.equal(expected.layers[name].order)
        assert close(layer.weights, expected.layers[name].weights)


def with_constant(m: Net, x: Tensor) -> Tensor:
    return m.last(m.hidden(m.conv(m.first(x).relu()).relu().view(len(x), 64)).relu())


def test_layers_that_the_trial_rejects_are_named(tmp_path: Path) -> None:
    """In one warning, in the summary, in both lists, and after saving."""
    torch.manual_seed(0)
    model, x = Net(with_constant), torch.randn(8, 1, 6, 6)
    refused = greedyprune.layers(model, x).refused
    assert refused["last"] == "its units are the model's output"
    assert "aten.view.default (test_trial_cut.py line " in refused["conv"]
    assert "may have their number as a constant: shape '[2, 64]' is invalid" in refused["conv"]
    with pytest.warns(UserWarning, match="layers: not pruned: 'conv': with fewer") as found:
        selection = greedyprune.select(model, [x], objective="imitation")
    assert [str(w.message).count("'last'") for w in found] == [0]
    assert list(selection.layers) == ["first", "hidden"]
    assert selection.refused == refused
    selection.save(tmp_path / "selection")
    loaded = greedyprune.Selection.load(tmp_path / "selection")
    assert loaded.refused == selection.at(1).refused == refused
    console = Console(width=400, file=StringIO())
    console.print(loaded.summary())
    shown = "".join(console.file.getvalue().split())  # its lines are as wide as the table
    for name, reason in refused.items():
        assert "".join(f"not pruned: '{name}': {reason}".split()) in shown
    with pytest.raises(ValueError, match=r"found 'conv', which can't be pruned .*as a constant"):
        greedyprune.select(model, [x], layers="conv")
    assert greedyprune.select(model, [x], layers="first").refused == {}
    tensors, header = read_tensors(tmp_path / "selection", FORMAT, "selection")
    header.pop("refused")  # as before this was saved
    write_tensors(tmp_path / "old", tensors, header | {"format": FORMAT})
    assert greedyprune.Selection.load(tmp_path / "old").refused == {}


def test_an_unexpected_error_is_no_answer() -> None:
    def by_size(m: Net, x: Tensor) -> Tensor:
        scales = {64: 2.0}
        return m.last(m.hidden((h := m.features(x)) * scales[h.shape[1]]).relu())

    model, x = Net(by_size), torch.randn(8, 1, 6, 6)
    pattern = r"half of the units of layer 'conv' it raises KeyError \(32, in the model, test_tri"
    with pytest.raises(ValueError, match=pattern):
        greedyprune.layers(model, x)
    with pytest.raises(ValueError, match=pattern):
        greedyprune.select(model, [x])
    assert list(
        greedyprune.select(model, [x], objective="imitation", layers={"hidden": "last"}).layers
    ) == ["hidden"]


class OneWidth(nn.Module):
    """Two layers whose outputs are reshaped to a size from the same attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.width = nn.Linear(4, 8), nn.Linear(4, 8), 8
        self.c, self.d = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (layer(x).view(len(x), self.width) for layer in (self.a, self.b))
        return self.c(first.relu()) + self.d(second.tanh())


@pytest.mark.parametrize("inside", [False, True])
def test_layers_that_need_one_size_are_found(inside: bool, tmp_path: Path) -> None:
    """They may keep different units, but not different numbers of them."""
    torch.manual_seed(0)
    model, x = OneWidth(), torch.randn(64, 4)
    model = nn.Sequential(model) if inside else model
    names = ("0.a", "0.b") if inside else ("a", "b")
    assert [group.share for group in greedyprune.layers(model, x).values()] == [names] * 2
    options: dict[str, Any] = {"layers": "all", "objective": "imitation", "weights": "none"}
    selection = greedyprune.select(model, x, **options)
    one, other = (layer.kept for layer in selection.layers.values())
    assert not one.equal(other)
    selection.save(tmp_path / "selection")
    for chosen in (selection, greedyprune.Selection.load(tmp_path / "selection")):
        small = greedyprune.prune(model, chosen)
        assert (small[0] if inside else small).width == 4
        assert small(x).shape == (64, 3)


class Shuffled(nn.Module):
    """The stream's size gives the shape of another tensor, whose own units can't go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c = x.shape
        inner = self.inner(x).softmax(-1).view(n, 3, 4).transpose(1, 2).reshape(n, c)
        return self.head(x + self.last(inner))


def test_a_size_that_another_tensor_needs() -> None:
    table = greedyprune.layers(Shuffled(), torch.randn(20, 5))
    assert not table
    assert "aten.view.default (test_trial_cut.py line" in table.refused["first"]
    assert "is invalid for input of size" in table.refused["first"]


def test_layers_of_several_blocks_are_tried_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many blocks take few trials, though a layer in front of them can't be cut."""
    torch.manual_seed(0)
    tried, smaller = list[int](), trials.Trials._smaller
    blocks = [Biased(6, 4, tuple) for _ in range(8)]
    model = nn.Sequential(nn.Linear(5, 6), Rows(6), nn.Linear(6, 5), *blocks)

    def count(each: Any, groups: list[Group], *rest: Any) -> Any:
        if not groups[0].part:
            tried.append(len(groups))
        return smaller(each, groups, *rest)

    monkeypatch.setattr(trials.Trials, "_smaller", count)
    table = greedyprune.layers(model, torch.randn(20, 6, 5))
    assert list(table) == [f"{i + 3}.qkv" for i in range(8)]
    assert tried.count(1) == 1
    assert len(tried) < 9
    assert "may have their number as a constant" in table.refused["0"]


class Block(nn.Module):
    """A block whose code may hold the number of its units."""

    def __init__(self, *, holds: bool) -> None:
        super().__init__()
        self.first, self.last, self.holds = nn.Linear(6, 8), nn.Linear(8, 6), holds

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return x + self.last(y.view(-1, 8 if self.holds else y.shape[1]))


@pytest.mark.parametrize("blocks", ["hhfh", "hhfhf", "fhhhf", "hf", "hhhff"])
def test_blocks_that_can_be_cut_among_some_that_cannot(blocks: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(holds=each == "h") for each in blocks), nn.Linear(6, 2))
    table = greedyprune.layers(model, torch.randn(30, 6))
    assert [name for name in table if table[name].kind == ""] == [
        f"{i}.first" for i, each in enumerate(blocks) if each == "f"
    ]
    for name, reason in table.refused.items():
        if name.endswith("first"):  # each has its own reason
            assert f"'{name.removesuffix('first')}last'" in reason


def test_constants_of_a_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph in float32 has another number than the model in float64."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.size = nn.Linear(6, 8), nn.Linear(8, 5), 8

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).view(-1, self.size).exp()
            y = y / (y.norm(dim=-1, keepdim=True) + torch.finfo(y.dtype).eps * 1e4)
            return self.last(y)

    def only_in_float64(one: Tensor, other: Tensor, *rest: Any) -> bool:
        return one.dtype == torch.float64 and same_outputs(one, other, *rest)

    for module in (trials, proof):
        monkeypatch.setattr(module, "same_outputs", only_in_float64)
    torch.manual_seed(0)
    assert list(greedyprune.layers(Scaled().eval(), torch.randn(2, 6))) == ["first"]


def test_a_view_that_holds_the_size_in_two_parts() -> None:
    """Outlook attention: `width // heads`, where the width is that of another tensor."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            y = self.inner(x).view(-1, 2, x.shape[1] // 2)
            return self.last(y.softmax(2).flatten(1))

    table = greedyprune.layers(Net().eval(), torch.randn(20, 6))
    assert not table
    assert (
        "is invalid for input of size" in table.refused["first"] or "mat1" in table.refused["first"]
    )


class Rows(nn.Module):
    """A view with the number of features written into the code."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = (features, features)

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, 6).tanh()


class Width(nn.Module):
    """A block whose code takes its width from an attribute, or from a place that pruning can't set.

    In both, the failure without attributes reads the same.
    """

    def __init__(self, has_attribute: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 6)
        self.width = 12 if has_attribute else None
        self.nested = {"deep": {"width": 12}}

    def forward(self, x: Tensor) -> Tensor:
        width = self.width or self.nested["deep"]["width"]
        return x + self.b(self.a(x).relu().view(-1, width))


def test_a_block_that_fails_as_others_do_is_tried_with_its_own_attributes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Width(has_attribute=i == 2) for i in range(4)))
    assert list(greedyprune.layers(model, torch.randn(5, 6))) == ["2.a"]
