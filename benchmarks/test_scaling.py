"""How greedyprune's time grows with samples, units, outputs, steps and threads; see scaling.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from harness import Bench
from problems import candidates, network
from torch import Tensor

import greedyprune
from greedyprune.data.losses import Criterion
from greedyprune.kernels import ops
from greedyprune.kernels.path import Moments, Rule

KINDS = ("cross_entropy", "bce_with_logits", "mse")


@dataclass(frozen=True)
class Case:
    """One point of a line in a panel (`sweep`). threads: 0 stands for torch's default."""

    sweep: str
    line: str
    kind: str
    m: int
    N: int
    C: int
    steps: int = 1
    threads: int = 0
    table: str = "scaling"

    def __str__(self) -> str:
        sizes = f"m={self.m} N={self.N} C={self.C} steps={self.steps} threads={self.threads}"
        return f"over {self.sweep}: {self.line}, {sizes}"

    @property
    def hows(self) -> list[str]:
        return ["greedyprune"]

    @property
    def x(self) -> int:
        return int(getattr(self, "m" if self.sweep == "select" else self.sweep))

    @property
    def fixed(self) -> str:
        """The sizes that stay the same along the line."""
        names = {"select": ("N",), "steps": ("m", "N", "C")}.get(self.sweep, ("m", "N", "C"))
        return ", ".join(f"{name}={getattr(self, name)}" for name in names if name != self.sweep)


def thread_counts() -> list[int]:
    """1, 2, 4, ... and the number of all processors."""
    most = os.cpu_count() or 1
    return sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})


def sweeps(m: int, n: int, c: int, doublings: int, steps: list[int]) -> list[Case]:
    """All sweeps. Each one quadruples one size several times; m and N start at a quarter."""
    cases = []
    for i in range(doublings):
        for kind in KINDS:
            cases += [
                Case("m", kind, kind, m // 4 * 4**i, n, c),
                Case("N", kind, kind, m, n // 4 * 4**i, c),
                Case("C", kind, kind, m, n, 2 * 4**i),
            ]
    for k in steps:
        cases += [Case("steps", kind, kind, m, n, c, k) for kind in KINDS[:2]]
        cases.append(Case("steps", "mse, on the Gram matrix", "mse", m, n, c, k))
    for threads in thread_counts():
        cases += [Case("threads", kind, kind, m, n, c, 1, threads) for kind in KINDS]
    return sorted(cases, key=lambda case: (case.sweep, case.kind))


def selects(units: int, samples: list[int]) -> list[Case]:
    cases = []
    for m in samples:
        cases += [
            Case("select", "mse, 200 steps", "mse", m, units, 1, 200),
            Case("select", "mse, half the units", "mse", m, units, 1, 0),
            Case("select", "cross_entropy, 50 steps", "cross_entropy", m, units, 10, 50),
        ]
    return sorted(cases, key=lambda case: case.line)


FULL = sweeps(1024, 4096, 8, 4, [1, 4, 16, 64]) + selects(2048, [1000, 4000, 16_000, 60_000])
QUICK = sweeps(64, 128, 4, 2, [1, 4]) + selects(128, [250, 1000])


def nothing_to_check(found: object) -> None:
    """No check: the other benchmarks and the tests check these answers."""


@pytest.mark.cases(full=FULL, quick=QUICK)
def test_scaling(bench: Bench, case: Case, how: str) -> None:
    bench.note(x=case.x, fixed=case.fixed)
    if case.threads:
        torch.set_num_threads(case.threads)
    bench.time(work_of(case), nothing_to_check)


def work_of(case: Case) -> Callable[[], object]:
    if case.sweep == "select":
        net = network(case.kind, case.N, case.m, iterations=50)
        options: dict[str, Any] = {"steps": case.steps} if case.steps else {"size": 0.5}
        return lambda: greedyprune.select(net.model, net.data, progress=False, **options)
    if case.sweep == "steps" and case.kind == "mse":
        gram, moments = gram_of(case.m, case.N, case.C)
        return lambda: ops.greedy_gram(gram, moments, Rule(case.steps, case.N + 1, True))
    p = candidates(case.kind, case.m, case.N, case.C)
    target = Criterion(case.kind).target(p.targets, (case.m, case.C))
    outgoing = p.outgoing.double()
    if case.sweep == "steps":
        bias, rule = torch.zeros(case.C, dtype=torch.float64), Rule(case.steps, case.N + 1, True)
        return lambda: ops.greedy_pointwise(p.features, outgoing, bias, target, rule)
    base, extent = p.base.T.double().contiguous(), ops.measure_features(p.features)
    return lambda: ops.candidate_loss(
        p.features, outgoing, base, target, extent=extent, dtype=torch.float32
    )


@lru_cache(maxsize=1)
def gram_of(m: int, n: int, c: int) -> tuple[Tensor, Moments]:
    """G_ij = (h_i . h_j) (w_i . w_j), and the moments of squared error for a bias of zero."""
    p = candidates("mse", m, n, c)
    h, w, t = p.features.double(), p.outgoing.double(), p.targets.double()
    gram = (h @ h.T) * (w @ w.T)
    beta = ((h @ t) * w).sum(1)
    norm = gram.diag().clone()
    return gram, Moments(m, float(m * c), norm, beta, float(t.square().sum()), 0.0, 0.0, 0.0)
