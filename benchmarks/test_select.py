"""`select` from a model and its inputs to the Selection, at the sizes of arXiv:2108.00259.

The networks have two layers, 784 -> N -> 1 (binarised labels, squared error) or 784 -> N -> 10
(cross-entropy), and are trained briefly. The times are compared with one dense forward pass over
the same data, with the baselines, and with stochastic forms of the selection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import baselines
import pytest
import torch
from harness import Bench, clocked, time_vectorised
from limits import Limits, gram_floor, steps_floor
from problems import Network, network
from torch import Tensor, nn
from watching import Watched, watched_select

import greedyprune
from greedyprune import Loss

FORWARD = "dense forward pass"
# Options for the stochastic steps of Wolfe et al. and the random candidates of Ye et al.
STOCHASTIC = {
    "batch_size=1024": Loss(batch_size=1024),
    "batch_size=256, shortlist=256": Loss(batch_size=256, shortlist=256),
    "batch_size=512, shortlist=256": Loss(batch_size=512, shortlist=256),
    "batch_size=2048, shortlist=256": Loss(batch_size=2048, shortlist=256),
    "candidates=512": Loss(candidates=512),
}


@dataclass(frozen=True)
class Case:
    """One selection. steps: with repeats; None: half the units. goal: a goal's name in goals.py."""

    kind: str
    N: int
    m: int
    steps: int | None
    goal: str = ""
    table: str = "select"

    def __str__(self) -> str:
        steps = "half the units" if self.steps is None else f"{self.steps} steps"
        return f"{self.kind} N={self.N} m={self.m} {steps}"

    @property
    def hows(self) -> list[str]:
        if self.kind == "cross_entropy":
            return ["greedyprune", FORWARD, "vectorised", *STOCHASTIC]
        if self.steps is None:
            return ["greedyprune", FORWARD, "Gram matrix in torch"]
        return ["greedyprune", FORWARD, "matrix-vector", "vectorised", "float64 reference"]

    @property
    def options(self) -> dict[str, Any]:
        return {"size": 0.5} if self.steps is None else {"steps": self.steps}


FULL = [
    Case("mse", 5000, 1000, 200),
    Case("mse", 5000, 20_000, 200),
    Case("mse", 8192, 20_000, 200, goal="few"),
    Case("mse", 8192, 20_000, None, goal="half"),
    Case("mse", 10_000, 10_000, 200),
    Case("mse", 10_000, 60_000, 200),
    Case("mse", 20_000, 1000, 200),
    Case("mse", 20_000, 20_000, 200),
    Case("cross_entropy", 8192, 10_000, 200, goal="cross_entropy"),
]
QUICK = [
    Case("mse", 128, 500, 10, goal="few"),
    Case("mse", 128, 500, None, goal="half"),
    Case("cross_entropy", 128, 300, 10, goal="cross_entropy"),
]


@lru_cache(maxsize=1)
def network_of(case: Case) -> Network:
    return network(case.kind, case.N, case.m)


@lru_cache(maxsize=1)
def ours_of(case: Case) -> tuple[Watched, float]:
    """Our selection, which the baselines are checked against, and its seconds."""
    net = network_of(case)
    return clocked(lambda: watched_select(net.model, net.data, **case.options))


@pytest.mark.cases(full=FULL, quick=QUICK)
def test_select(bench: Bench, limits: Limits, case: Case, how: str) -> None:
    net = network_of(case)
    ours, seconds = ours_of(case)
    order = ours.selection.order
    bench.note(data=net.source)
    if how == "greedyprune":
        time_ours(bench, limits, case, net, seconds)
    elif how in STOCHASTIC:
        time_stochastic(bench, case, net, STOCHASTIC[how])
    elif how == FORWARD:
        bench.time(net.forward, lambda outputs: None)
    elif how == "float64 reference":
        time_reference(bench, case, net, order)
    elif how == "vectorised":
        layer, before = clocked(net.layer)
        time_vectorised(bench, layer, order, len(order), before)
    else:
        layer = net.layer()
        work = matrix_vector if how == "matrix-vector" else on_gram_matrix
        bench.time(
            lambda: work(net, len(order)),
            lambda found: bench.note(same_picks=baselines.same_picks(layer, found, order)),
            seconds,
        )


def matrix_vector(net: Network, steps: int) -> list[int]:
    return baselines.greedy_matrix_vector(net.layer(), steps)


def on_gram_matrix(net: Network, steps: int) -> list[int]:
    layer = net.layer()
    gram = baselines.gram_matrix(layer)
    return baselines.greedy_on_gram(gram, *baselines.sums(layer), steps, replacement=False)


def time_ours(bench: Bench, limits: Limits, case: Case, net: Network, seconds: float) -> None:
    def check(found: Watched) -> None:
        check_selection(net, found.selection)

    found = bench.time(lambda: watched_select(net.model, net.data, **case.options), check, seconds)
    bench.note(
        by=found.by, preparing=found.preparing, looping=found.looping, rescored=found.rescored,
        scored=found.scored, possible=len(found.selection.order) * case.N,
        kept=len(found.selection.kept),
        final_loss=float(found.selection.losses[-1]), dense_loss=float(found.selection.dense_loss),
    )  # fmt: skip
    if case.steps is None:
        floor = gram_floor(case.m, case.N, limits)
        bench.note(floor=floor.seconds, limit=floor.limit)
    elif case.kind == "cross_entropy":
        floor = steps_floor(case.m, case.N, 10, case.steps, found.scored, limits)
        bench.note(floor=floor.seconds, limit=floor.limit)


def time_stochastic(bench: Bench, case: Case, net: Network, objective: Loss) -> None:
    """The recorded final loss is that of all samples, also where the steps use a part of them."""

    def at_most(asked: int | None, most: int) -> int | None:
        return None if asked is None else min(asked, most)

    objective = Loss(
        candidates=at_most(objective.candidates, case.N),
        batch_size=at_most(objective.batch_size, case.m),
        shortlist=at_most(objective.shortlist, case.N),
    )
    found = bench.time(
        lambda: greedyprune.select(
            net.model, net.data, objective=objective, progress=False, **case.options
        ),
        lambda found: check_selection(net, found),
    )
    bench.note(final_loss=float(found.losses[-1]))


def time_reference(bench: Bench, case: Case, net: Network, order: Tensor) -> None:
    def select(steps: int) -> greedyprune.Selection:
        return greedyprune.select(
            net.model, net.data, steps=steps, backend="reference", progress=False
        )

    assert case.steps is not None
    _, seconds = clocked(lambda: select(1))
    bench.skip_if_long(seconds * case.steps)
    bench.time(
        lambda: select(len(order)),
        lambda found: bench.note(same_picks=_same(found.order, order)),
        seconds * case.steps,
    )


def _same(found: Tensor, expected: Tensor) -> int:
    assert found.tolist() == expected.tolist()
    return len(found)


def check_selection(net: Network, selection: greedyprune.Selection) -> None:
    """Checks that the selection's last loss is the loss of the pruned model."""
    small = greedyprune.prune(net.model, selection)
    assert isinstance(small, nn.Sequential)
    loss = replace(net, model=small).loss()
    torch.testing.assert_close(loss, float(selection.losses[-1]), rtol=1e-4, atol=0)
