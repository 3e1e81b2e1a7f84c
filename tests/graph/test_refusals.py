"""Layers whose units can't be removed: each reason that propagate.py and group_reader.py give."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune.data.batches import Batch
from greedyprune.graph.slices import NotPrunableError
from greedyprune.graph.structure import analyse, named_group

Forward = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """Modules and parameters by name, and the forward pass as a function of them."""

    def __init__(self, forward: Forward, **members: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def linears(*outputs: int) -> dict[str, nn.Module]:
    """Linears a, b, ... with so many outputs: a takes 5 inputs, the others 8."""
    inputs = [5, *[8] * len(outputs)]
    return {"abc"[i]: nn.Linear(inputs[i], count) for i, count in enumerate(outputs)}


MODELS: dict[str, tuple[Model, tuple[int, ...], str]] = {
    "a parameter along two dimensions": (
        Model(
            lambda m, x: m.b((h := m.a(x)) + m.p + (h.T * m.p).T),
            p=nn.Parameter(torch.ones(8, 8)), **linears(8, 3),
        ), (8, 5), "aten.add.Tensor combines its units with another tensor of shape (8, 8)",
    ),
    "transposed": (
        Model(lambda m, x: m.b(m.a(x).T), **linears(8, 3)), (8, 5),
        "aten.linear.default sums over another dimension than that of its units",
    ),
    "groups that are mixed as a whole": (
        Model(
            lambda m, x: m.b(m.mix(m.deep(m.a(x)))), a=nn.Conv2d(5, 3, 1),
            deep=nn.Conv2d(3, 6, 1, groups=3), mix=nn.Conv2d(6, 4, 1, groups=2),
            b=nn.Conv2d(4, 3, 1),
        ), (2, 5, 4, 4), "has groups of 3 channels, which mix several of its units",
    ),
    "a tensor for each unit": (
        Model(lambda m, x: m.b(torch.cat(m.a(x).chunk(8, 1), 1)), **linears(8, 3)), (4, 5),
        "aten.chunk.default puts its units into different tensors",
    ),
    "a normalisation of another dimension": (
        Model(lambda m, x: m.b(m.norm(m.a(x))), norm=nn.BatchNorm1d(6), **linears(8, 3)), (4, 6, 5),
        "aten.batch_norm.default does not act along the units' dimension",
    ),
    "pooled": (
        Model(
            lambda m, x: m.b(functional.avg_pool1d(m.a(x), 3, 1, 1)), **linears(8, 3)
        ), (4, 6, 5), "aten.avg_pool1d.default mixes its units",
    ),
    "added to themselves, transposed": (
        Model(lambda m, x: m.b((h := m.a(x)) + h.T), **linears(8, 3)), (8, 5),
        "aten.add.Tensor combines its units with another tensor of shape (8, 8)",
    ),
    "a single unit that is broadcast": (
        Model(lambda m, x: m.b(m.a(x) + x[:, :1].expand(-1, 8)), **linears(1, 3)), (4, 5),
        "aten.add.Tensor changes the size of its units' dimension",
    ),
    "a single unit that is repeated": (
        Model(lambda m, x: m.b(m.a(x).expand(-1, 8)), **linears(1, 3)), (4, 5),
        "aten.expand.default repeats its units",
    ),
    "a shape that mixes them": (
        Model(lambda m, x: m.b(m.a(x).reshape(7, 8)), **linears(7, 3)), (8, 5),
        "aten.reshape.default mixes its units' dimension with others",
    ),
    "a statistic of all units": (
        Model(
            lambda m, x: m.b((h := m.a(x)) * m.c(h.mean(1, keepdim=True)).sigmoid()),
            a=nn.Linear(5, 8), b=nn.Linear(8, 3), c=nn.Linear(1, 1),
        ), (4, 5), "aten.mean.dim mixes its units",
    ),
    "one of the units": (
        Model(lambda m, x: m.b((h := m.a(x)) * h[:, 3:4]) + h[:, 3].sum(), **linears(8, 3)), (4, 5),
        "aten.select.int takes one of its units",
    ),
}  # fmt: skip


def reason(model: nn.Module, shape: tuple[int, ...]) -> str:
    """Why layer "a" can't be pruned."""
    structure = analyse(model.eval(), Batch((torch.randn(shape),), {}, None))
    refusal = structure["a"]
    assert isinstance(refusal, NotPrunableError)
    return str(refusal)


@pytest.mark.parametrize(("model", "shape", "message"), MODELS.values(), ids=MODELS)
def test_a_refusal_says_why(model: Model, shape: tuple[int, ...], message: str) -> None:
    assert model(torch.randn(shape)).shape  # it runs
    assert message in reason(model, shape)


FACTORS = {
    "from a layer of another size": (
        Model(
            lambda m, x: m.b(m.a(x) * m.gate(x)[:, :8]), gate=nn.Linear(5, 9), **linears(8, 3)
        )
    ),
    "from layers of two sizes": (
        Model(
            lambda m, x: m.b(m.a(x) * (m.gate(x) + m.wide(x)[:, :8])), gate=nn.Linear(5, 8),
            wide=nn.Linear(5, 16), **linears(8, 3),
        )
    ),
}  # fmt: skip


UNEQUAL = Model(lambda m, x: m.b(torch.cat(m.a(x).split([3, 5], 1), 1)), **linears(8, 3))


def test_unequal_parts_whose_sizes_the_model_holds() -> None:
    refused = greedyprune.layers(UNEQUAL, torch.randn(4, 5)).refused
    assert "aten.split_with_sizes" in refused["a"] or "aten.split" in refused["a"]


@pytest.mark.parametrize("model", FACTORS.values(), ids=FACTORS)
def test_a_size_that_the_model_holds(model: Model) -> None:
    refused = greedyprune.layers(model, torch.randn(4, 5)).refused
    assert "aten.slice.Tensor (test_refusals.py line" in refused["a"]
    assert "may have their number as a constant" in refused["a"]


def test_a_refused_model_is_not_kept_alive() -> None:
    """Not by the exceptions that are kept, whose frames would hold it."""
    model = Model(lambda m, x: m.b(m.a(x).reshape(7, 8)), **linears(7, 3))
    assert "mixes its units" in reason(model, (8, 5))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_modules_that_are_no_producers() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight * 2, self.bias)

    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Scaled(8, 6), nn.ReLU(), nn.Linear(6, 3))
    model.unused = nn.Linear(3, 3)
    model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))
    x = torch.randn(4, 5)
    refused = greedyprune.layers(model, (x,)).refused
    assert refused["2"].startswith("its weight is computed, by its module, a parametrization or")
    assert refused["unused"] == "Linear: it does not run, or shares its weight"
    with pytest.raises(ValueError, match=r"layers: found '1' \(ReLU: not a Linear or conv"):
        greedyprune.select(model, [x], layers=["1"])
    with pytest.raises(ValueError, match=r"layers: found '7' \(no such module\), expected any of"):
        greedyprune.select(model, [x], layers=["7"])
    with pytest.raises(TypeError, match="model: found int"):
        greedyprune.layers(3, x)


NAMED = {
    "no module": ("a", "e", r"layers: found 'e' \(no such module\), expected the name of an nn.Li"),
    "no Linear": ("norm", "b", r"layers: found 'norm' \(BatchNorm1d\), expected the name"),
    "sizes": ("a", "c", "layers: 'a' has 8 output units, but 'c' takes 6 inputs"),
    "calls": ("a", "b", "layers: 'a' ran 1 and 'b' 2 times in one forward pass, expected once"),
}


@pytest.mark.parametrize(("producer", "consumer", "message"), NAMED.values(), ids=NAMED)
def test_named_layers_that_do_not_fit(producer: str, consumer: str, message: str) -> None:
    model = Model(
        lambda m, x: m.c(m.b(h := m.a(x)) + m.b(m.norm(h))), norm=nn.BatchNorm1d(8),
        a=nn.Linear(5, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 3),
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match=message):
        named_group(model, producer, consumer, Batch((torch.randn(4, 5),), {}, None))
