"""Computing the Gram matrix, and whole greedy loops on features or matrices in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import baselines
import pytest
import torch
from baselines import Layer
from harness import Bench, clocked, time_vectorised
from limits import Limits, gram_floor, steps_floor
from problems import candidates, network
from torch import Tensor
from watching import gram_builder

from greedyprune.data.losses import Criterion
from greedyprune.kernels import ops, reference
from greedyprune.kernels.path import Moments, Path, Rule


@dataclass(frozen=True)
class GramCase:
    N: int
    m: int
    table: str = "gram"

    def __str__(self) -> str:
        return f"N={self.N} m={self.m}"

    @property
    def hows(self) -> list[str]:
        return ["greedyprune", "torch.mm, float32", "torch.mm, float64"]


@dataclass(frozen=True)
class LoopCase:
    """Greedy steps on a Gram matrix in memory. repeats: may a unit be picked again?"""

    N: int
    steps: int
    repeats: bool
    table: str = "loop on the Gram matrix"

    def __str__(self) -> str:
        return f"N={self.N} steps={self.steps} {'with' if self.repeats else 'without'} repeats"

    @property
    def hows(self) -> list[str]:
        return ["greedyprune", "torch", "float64 reference"]


@dataclass(frozen=True)
class PointwiseCase:
    """Greedy steps by the candidates' losses, on features in memory."""

    kind: str
    m: int
    N: int
    C: int
    steps: int
    table: str = "loop on the losses"

    def __str__(self) -> str:
        return f"{self.kind} m={self.m} N={self.N} C={self.C} steps={self.steps}"

    @property
    def hows(self) -> list[str]:
        return ["greedyprune", "vectorised"]


@lru_cache(maxsize=1)
def gram_of(case: GramCase) -> tuple[Callable[[], Tensor], Layer]:
    net = network("mse", case.N, case.m, iterations=50)
    return gram_builder(net.model, net.data), net.layer()


@pytest.mark.cases(
    full=[GramCase(n, 20_000) for n in (1024, 2048, 4096, 8192)], quick=[GramCase(128, 500)]
)
def test_gram(bench: Bench, limits: Limits, case: GramCase, how: str) -> None:
    build, layer = gram_of(case)
    h, outgoing = layer.features, layer.outgoing
    if how == "greedyprune":
        floor = gram_floor(case.m, case.N, limits)
        bench.note(floor=floor.seconds, limit=floor.limit)
        work = build
    elif how == "torch.mm, float32":

        def work() -> Tensor:
            return baselines.gram_matrix(layer)

    else:

        def work() -> Tensor:
            return (h.double() @ h.T.double()).mul_(outgoing @ outgoing.T)

    some = torch.arange(0, case.N, max(1, case.N // 64))
    exact = (h[some].double() @ h.T.double()) * (outgoing[some] @ outgoing.T)
    norms = exact[torch.arange(len(some)), some].sqrt()[:, None]
    norms = norms * (h.double().square().sum(1) * outgoing.square().sum(1)).sqrt()

    def check(gram: Tensor) -> None:
        assert bool(((gram[some] - exact).abs() <= 1e-5 * norms + 1e-12).all())

    bench.time(work, check)


@lru_cache(maxsize=1)
def matrix_of(units: int) -> tuple[Tensor, Moments]:
    """A Gram matrix of 512 samples, and the moments for a noisy mean of some of the units."""
    p = candidates("mse", 512, units, 1)
    phi = p.features.double() * p.outgoing.double()
    target = phi[: units // 8].mean(0) + 0.1 * torch.randn(512, dtype=torch.float64)
    gram = phi @ phi.T
    # The last three numbers are for the certificate; the loop does not use them.
    moments = Moments(
        512, 512.0, gram.diag().clone(), phi @ target, float(target @ target), 0.0, 0.0, 0.0
    )
    return gram, moments


LOOPS = [LoopCase(n, steps, repeats) for n in (1024, 8192) for steps, repeats in ((200, True),)]
HALVES = [LoopCase(n, n // 2, repeats=False) for n in (1024, 8192)]


@pytest.mark.cases(
    full=[*LOOPS, LoopCase(8192, 2000, True), *HALVES],
    quick=[LoopCase(128, 20, True), LoopCase(128, 64, False)],
)
def test_greedy_gram(bench: Bench, case: LoopCase, how: str) -> None:
    gram, moments = matrix_of(case.N)
    size = case.N + 1 if case.repeats else case.steps
    rule = Rule(case.steps, size, case.repeats)
    ours = ops.greedy_gram(gram, moments, rule)
    expected = ours.order.tolist()
    if how == "torch":
        sums = moments.norm, moments.beta
        bench.time(
            lambda: baselines.greedy_on_gram(gram, *sums, case.steps, case.repeats),
            lambda found: _equal(found, expected),
        )
        return
    module = ops if how == "greedyprune" else reference

    def work() -> Path:
        return module.greedy_gram(gram, moments, rule)

    path = bench.time(work, lambda found: _equal(found.order.tolist(), expected))
    torch.testing.assert_close(path.losses, ours.losses, rtol=1e-9, atol=1e-12)


def _equal(found: list[int], expected: list[int]) -> None:
    assert found == expected


@lru_cache(maxsize=1)
def pointwise_of(case: PointwiseCase) -> tuple[Layer, Callable[[], Path]]:
    """The problem, and our loop on it."""
    p = candidates(case.kind, case.m, case.N, case.C)
    bias = torch.zeros(case.C)
    layer = Layer(case.kind, p.features, p.outgoing.double(), bias, p.targets)
    target = Criterion(case.kind).target(p.targets, (case.m, case.C))
    rule = Rule(case.steps, case.N + 1, True)
    return layer, lambda: ops.greedy_pointwise(
        layer.features, layer.outgoing, bias.double(), target, rule
    )


@pytest.mark.cases(
    full=[
        PointwiseCase("cross_entropy", 1024, 8192, 10, 50),
        PointwiseCase("bce_with_logits", 1024, 8192, 1, 50),
        PointwiseCase("cross_entropy", 1024, 8192, 100, 10),
        PointwiseCase("cross_entropy", 16384, 512, 10, 50),
        PointwiseCase("cross_entropy", 64, 32768, 10, 50),
    ],
    quick=[
        PointwiseCase("cross_entropy", 64, 128, 10, 5),
        PointwiseCase("bce_with_logits", 64, 128, 1, 5),
    ],
)
def test_greedy_pointwise(bench: Bench, limits: Limits, case: PointwiseCase, how: str) -> None:
    layer, loop = pointwise_of(case)
    path, seconds = clocked(loop)
    if how == "greedyprune":
        floor = steps_floor(case.m, case.N, case.C, case.steps, path.scored, limits)
        bench.note(
            floor=floor.seconds, limit=floor.limit,
            rescored=path.rescored, scored=path.scored, possible=case.steps * case.N,
        )  # fmt: skip
        expected = path.order.tolist()
        bench.time(loop, lambda found: _equal(found.order.tolist(), expected), seconds)
        return
    time_vectorised(bench, layer, path.order, case.steps)
