"""`select` where the activations exceed `memory_limit`, compared with the same in memory.

Random inputs of 64 numbers, and a layer of N units. Cross-entropy needs one pass over the data for
each step. Squared error needs one pass; where the Gram matrix exceeds the limit, too, it needs one
for every block of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from harness import Bench
from torch import Tensor, nn

import greedyprune
from greedyprune import Selection

INPUTS, OUTPUTS, BATCH = 64, 10, 2048


@dataclass(frozen=True)
class Case:
    """One selection. limit: memory_limit in MiB, smaller than the features."""

    kind: str
    N: int
    m: int
    steps: int
    limit: int
    table: str = "stream"

    def __str__(self) -> str:
        return f"{self.kind} N={self.N} m={self.m} {self.steps} steps limit={self.limit}"

    @property
    def hows(self) -> list[str]:
        return ["streamed", "in memory", "dense forward pass"]


CASES = [
    Case("cross_entropy", 4096, 32768, 8, 256),
    Case("mse", 4096, 65536, 100, 512),
    Case("mse", 16384, 16384, 10, 512),
]
QUICK = [Case("cross_entropy", 64, 4096, 2, 1), Case("mse", 64, 4096, 4, 1)]


@lru_cache(maxsize=1)
def problem_of(case: Case) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, case.N), nn.ReLU(), nn.Linear(case.N, OUTPUTS))
    inputs = torch.randn(case.m, INPUTS)
    teacher = inputs @ torch.randn(INPUTS, OUTPUTS) / 8
    targets = teacher.argmax(1) if case.kind == "cross_entropy" else teacher.tanh()
    return model, list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))


@pytest.mark.cases(full=CASES, quick=QUICK)
def test_stream(bench: Bench, case: Case, how: str) -> None:
    model, data = problem_of(case)

    def forward() -> float:
        with torch.no_grad():
            return float(sum(model(inputs).sum() for inputs, _ in data))

    def select(limit: int) -> Selection:
        return greedyprune.select(model, data, steps=case.steps, memory_limit=limit, progress=False)

    if how == "dense forward pass":
        bench.time(forward, lambda found: None)
        return
    other, own = 2**34, case.limit * 2**20
    if how == "in memory":
        other, own = own, other
    expected = select(other)

    def check(found: Selection) -> None:
        assert found.order.equal(expected.order)
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-6, atol=0)

    bench.time(lambda: select(own), check)
