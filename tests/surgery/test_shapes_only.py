"""Runs on shapes alone tell errors about shapes, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import greedyprune
from greedyprune.data.batches import example_batch
from greedyprune.surgery import trials
from greedyprune.surgery.shapes_only import fails_on_shapes


class Runs(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(6, 6), function
        self.held = torch.ones(6)  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x) + self.held)


def asserts(x: Tensor) -> Tensor:
    assert x.shape[-1] == 7, "expected 7 channels"
    return x


@pytest.mark.parametrize(("function", "fails"), [
    (lambda x: x.view(-1, 5), True),
    (lambda x: x @ torch.ones(7, 2), True),
    (lambda x: x.split([2, 3], -1)[0], True),
    (lambda x: x.relu(), False),
    (lambda x: x * x.detach().sum().item(), False),  # needs numbers, and so do the following
    (lambda x: x[x > 0], False),
    (lambda x: torch.from_numpy(x.detach().numpy()), False),
    (asserts, False),  # the real run tells
])  # fmt: skip
def test_errors_about_shapes(function: Callable[[Tensor], Tensor], fails: bool) -> None:
    model, batch = Runs(function), example_batch(torch.randn(4, 6))
    found = fails_on_shapes(model, partial(copy.deepcopy, model), batch, trials._is_about_shapes)
    assert found is fails
    assert not isinstance(model.layer.weight.data, torch._subclasses.FakeTensor)


def test_a_model_that_is_not_built() -> None:
    def built(memo: dict[int, Any]) -> nn.Module:
        raise RuntimeError("a size is wrong")

    batch = example_batch(torch.randn(4, 6))
    assert not fails_on_shapes(Runs(torch.relu), built, batch, trials._is_about_shapes)


def test_the_table_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from head_kinds import of_kind

    tables = []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(trials, "SLOW", seconds)
        tables.append([])
        for kind in ("torch's scale", "torch's module", "grouped"):
            table = greedyprune.layers(*of_kind(kind))
            for layers in (table, table.inside_heads):
                tables[-1] += [(name, layer.units, layer.share) for name, layer in layers.items()]
    assert tables[0] == tables[1]
