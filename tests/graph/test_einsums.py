"""einsum, as the products that it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import greedyprune
from greedyprune.data.batches import Batch
from greedyprune.graph.executor import GraphExecutor
from greedyprune.graph.networks import tensors_of
from greedyprune.graph.nodes import operation

EQUATIONS = {
    "b h i d, b h j d -> b h i j": ((2, 4, 3, 5), (2, 4, 6, 5)),
    "bhij,bhjd->bihd": ((2, 4, 3, 6), (2, 4, 6, 5)),
    "bid,jd->bij": ((2, 3, 5), (6, 5)),
    "...id,...jd->...ij": ((2, 4, 3, 5), (2, 4, 6, 5)),
    "...d,de->...e": ((2, 4, 5), (5, 3)),
    "...d,d...->...": ((2, 3, 5), (5, 3)),
    "bi,ij": ((2, 3), (3, 5)),
    "ba,bc": ((2, 3), (2, 5)),
    "...i,...i": ((2, 3), (2, 3)),
    "i,i->": ((5,), (5,)),
    "i,j->ji": ((5,), (3,)),
    "bhnd,bd->bhnd": ((2, 4, 3, 5), (2, 5)),
    "bnd,dhe->bhne": ((2, 3, 5), (5, 4, 2)),
    "bnij,bmij->bnm": ((2, 3, 4, 5), (2, 6, 4, 5)),
    "bncd,bmcd->bnmc": ((2, 3, 4, 5), (2, 6, 4, 5)),
    "bxyd,bd->bxy": ((2, 3, 4, 5), (2, 5)),
    "bd,bxyd->bxy": ((2, 5), (2, 3, 4, 5)),
    "bxyd,bzwd->bxwzy": ((2, 3, 4, 5), (2, 6, 7, 5)),
    "d,bd->b": ((5,), (2, 5)),
}
OTHERS = {
    "ii,ij->ij": ((3, 3), (3, 4)),
    "ij,k->ik": ((3, 4), (5,)),
    "ij,jk->ik": ((3, 1), (4, 5)),  # repeats an entry
    "ij->ji": ((3, 4),),
    "ij,jk,kl->il": ((3, 4), (4, 5), (5, 2)),
}


class Einsum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.einsum(self.equation, *tensors) + 0


@pytest.mark.parametrize("equation", EQUATIONS | OTHERS)
def test_the_result_is_the_same(equation: str) -> None:
    torch.manual_seed(0)
    shapes: Any = (EQUATIONS | OTHERS)[equation]
    model, tensors = Einsum(equation), tuple(torch.randn(shape) for shape in shapes)
    batch = Batch(tensors, {}, None)
    executor = GraphExecutor(model, batch)
    is_left = any(operation(node) == "einsum" for node in executor.nodes)
    assert is_left == (equation in OTHERS)
    output = executor.outputs(executor.inputs(batch), tensors_of(model), 0)
    torch.testing.assert_close(output, model(*tensors))


class Attention(nn.Module):
    """Attention as older code writes it, with a Linear by einsum, too."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 48, bias=False), nn.Parameter(torch.randn(3, 16))
        self.heads = 4

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, -1) for t in self.qkv(x).chunk(3, dim=-1))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.5
        y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(b, n, -1)
        return torch.einsum("b n d, e d -> b n e", y, self.out)


def test_attention_is_cut() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(12, 5, 6)
    table = greedyprune.layers(model, x)
    assert table["qkv"].units == 4
    assert table["qkv"].consumers == ("out",)
    selection = greedyprune.select(model, x, size=2, weights="none", objective="imitation")
    small = greedyprune.prune(model, selection)
    assert small.qkv.out_features == 24
    assert small.out.shape == (3, 8)
    masked = greedyprune.refit(model, selection, x)
    assert masked(x).shape == (12, 5, 3)


class Decomposed(nn.Module):
    """A product with the positions of a map, as relative positions are often added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(7, 2)
        self.register_buffer("places", torch.randn(5, 7, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu())[:, :, None].expand(-1, -1, 3, -1)
        return self.last(torch.einsum("bhwc,hkc->bhwk", x, self.places)).mean((1, 2))


def test_batches_of_many_sizes() -> None:
    """One trace serves all of them: an einsum's sizes are no constants in it."""
    torch.manual_seed(0)
    model, data = Decomposed(), [torch.randn(2 + i, 5, 4) for i in range(20)]
    selection = greedyprune.select(
        model, data[0], layers=["first"], weights="none", objective="imitation"
    )
    small = greedyprune.refit(model, selection, data)
    assert small.first.out_features == 4
