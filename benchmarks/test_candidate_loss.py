"""The candidates of one greedy step: the fused kernel compared with plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import baselines
import pytest
import torch
from baselines import Candidates
from harness import Bench, predicted
from limits import Limits, candidates_floor
from problems import candidates
from torch import Tensor

from greedyprune.data.losses import Criterion, Target
from greedyprune.kernels import ops, reference


@dataclass(frozen=True)
class Case:
    """The sizes of one step. goal: does a performance goal concern this case?"""

    kind: str
    m: int
    N: int
    C: int
    goal: bool = False
    table: str = "candidates"

    def __str__(self) -> str:
        return f"{self.kind} m={self.m} N={self.N} C={self.C}"

    @property
    def hows(self) -> list[str]:
        return [
            "greedyprune",
            "candidate by candidate",
            *(f"vectorised, {layout}" for layout in baselines.LAYOUTS),
            "torch.compile",
            *(["matrix products"] if self.kind == "mse" else []),
            "float64 reference",
        ]


def cases(sizes: list[tuple[int, int, int]], goal: tuple[int, int]) -> list[Case]:
    """All three losses at each size, but no cross-entropy of one class, which is always zero."""
    return [
        Case(kind, *size, goal=size[:2] == goal)
        for size in sizes
        for kind in ("cross_entropy", "bce_with_logits", "mse")
        if kind != "cross_entropy" or size[2] > 1
    ]


SIZES = [
    (128, 512, 1),
    (1024, 8192, 1),
    (1024, 8192, 10),
    (64, 32768, 10),
    (16384, 512, 10),
    (4096, 16384, 100),
]
FULL = [
    *cases(SIZES, goal=(1024, 8192)),
    Case("cross_entropy", 256, 1024, 1000),
    Case("cross_entropy", 64, 256, 50257),
]
QUICK = [
    *cases([(64, 128, 1), (64, 128, 10)], goal=(64, 128)),
    Case("cross_entropy", 16, 32, 1000),
]


@lru_cache(maxsize=1)
def problem_of(case: Case) -> tuple[Candidates, Tensor]:
    """The problem, and our losses."""
    problem = candidates(case.kind, case.m, case.N, case.C)
    return problem, ours(problem)()


def ours(p: Candidates) -> Callable[[], Tensor]:
    """A step as in `select`, which has measured the features when it collected them."""
    target, extent = target_of(p), ops.measure_features(p.features)
    outgoing, outputs = p.outgoing.double(), p.base.T.double().contiguous()

    def losses() -> Tensor:
        return ops.candidate_loss(
            p.features, outgoing, outputs, target, extent=extent, dtype=torch.float32
        ) / target.mass  # fmt: skip

    return losses


def target_of(p: Candidates) -> Target:
    return Criterion(p.kind).target(p.targets, tuple(p.base.shape))


def in_float64(p: Candidates) -> Tensor:
    target = target_of(p)
    losses = reference.candidate_loss(
        p.features, p.outgoing.double(), p.base.T.double().contiguous(), target
    )
    return losses / target.mass


def baseline(
    bench: Bench, case: Case, how: str, p: Candidates
) -> tuple[Callable[[], Tensor], float]:
    """The work to time and its approximate seconds; skips work that takes too long."""
    plain = {
        "candidate by candidate": baselines.by_candidate,
        "matrix products": baselines.by_products,
        "float64 reference": in_float64,
    }
    if how == "torch.compile":
        return compiled(bench, case, p), 0.0
    if how in plain:
        work = plain[how]
        seconds = predicted(lambda n: work(p.first(n)), case.N)
    else:
        form = baselines.best_form(p, (how.removeprefix("vectorised, "),))
        bench.note(chunk=form.chunk)

        def work(p: Candidates) -> Tensor:
            return baselines.vectorised(p, form)

        chunks = -(-case.N // form.chunk)
        seconds = predicted(lambda n: work(p.first(n * form.chunk)), chunks)
    bench.skip_if_long(seconds)
    return lambda: work(p), seconds


def compiled(bench: Bench, case: Case, p: Candidates) -> Callable[[], Tensor]:
    main = case.kind == "cross_entropy" if bench.quick else case.goal or case.C == 1000
    if not main:
        bench.skip("compiled at a few sizes only: every compilation takes a quarter of a minute")
    try:
        work, form = baselines.compiled(p, [32] if bench.quick else [64, 1024])
    except torch._dynamo.exc.BackendCompilerFailed as error:
        bench.skip(f"does not compile here ({str(error).splitlines()[0]})")
    bench.note(chunk=form.chunk, layout=form.layout)
    return work


@pytest.mark.cases(full=FULL, quick=QUICK)
def test_candidate_loss(bench: Bench, limits: Limits, case: Case, how: str) -> None:
    problem, losses = problem_of(case)
    if how == "greedyprune":
        floor = candidates_floor(case.kind, case.m, case.N, case.C, limits)
        bench.note(floor=floor.seconds, limit=floor.limit)
        some = min(case.N, 16)
        expected = in_float64(problem.first(some))
        bench.time(ours(problem), lambda found: baselines.same_losses(found[:some], expected, 2e-6))
        return
    work, seconds = baseline(bench, case, how, problem)
    rtol = 1e-4 if how == "matrix products" else 2e-5  # it sums large terms that cancel
    bench.time(work, lambda found: baselines.same_losses(found, losses, rtol), seconds)
