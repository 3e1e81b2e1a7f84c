"""`select` on a small layer, where the time is overhead rather than arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import baselines
import pytest
import torch
from harness import Bench, clocked
from problems import Network
from torch import Tensor, nn

import greedyprune
from greedyprune import Selection

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    kind: str
    N: int = 64
    m: int = 256
    steps: int = 32
    table: str = "overhead"

    def __str__(self) -> str:
        return f"{self.kind} N={self.N} m={self.m} steps={self.steps}"

    @property
    def hows(self) -> list[str]:
        return ["greedyprune", "matrix-vector"] if self.kind == "mse" else ["greedyprune"]


CASES = [Case("mse"), Case("cross_entropy")]


@lru_cache(maxsize=1)
def problem_of(case: Case) -> tuple[nn.Sequential, Data, Selection, float]:
    """The model, the data, the first selection from the model, and its seconds."""
    torch.manual_seed(0)
    outputs = 1 if case.kind == "mse" else 10
    model = nn.Sequential(nn.Linear(16, case.N), nn.ReLU(), nn.Linear(case.N, outputs))
    targets = torch.randn(case.m, 1) if case.kind == "mse" else torch.randint(10, (case.m,))
    data = torch.randn(case.m, 16), targets
    first, seconds = clocked(
        lambda: greedyprune.select(model, data, steps=case.steps, progress=False)
    )
    return model, data, first, seconds


@pytest.mark.cases(full=CASES, quick=CASES)
def test_overhead(bench: Bench, case: Case, how: str) -> None:
    model, data, first, seconds = problem_of(case)
    if how == "greedyprune":
        bench.note(first=seconds)  # includes the analysis of the model's structure
        expected = first.order.tolist()

        def check(found: Selection) -> None:
            assert found.order.tolist() == expected

        bench.time(lambda: greedyprune.select(model, data, steps=case.steps, progress=False), check)
        return

    layer = Network(case.kind, model, *data, "random numbers").layer
    bench.time(
        lambda: baselines.greedy_matrix_vector(layer(), case.steps),
        lambda found: baselines.same_picks(layer(), found, first.order),
    )
