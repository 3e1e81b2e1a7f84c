"""A `Job`, as `select` builds it, for tests that call one objective directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from greedyprune.data.batches import Batches
from greedyprune.data.losses import criterion_of
from greedyprune.graph.groups import Group
from greedyprune.objectives.job import Job
from greedyprune.plan import NETWORK_LOSS, OUTPUT_LOSS, judge_of
from greedyprune.request import checked_request
from greedyprune.runtime.checkpoint import NO_CHECKPOINT
from greedyprune.runtime.progress import bars


def job_of(
    model: nn.Module, data: object, groups: Sequence[Group] = (), *, loss: object = "mse",
    backend: str = "cpu", **options: Any,
) -> Job:  # fmt: skip
    """The job of one process. groups: the layers that get rules; options: of `select`."""
    request = checked_request(**options)
    rules, sizes = {}, request.sizes_of(groups)
    for group in groups:
        by_loss = judge_of(request, group) in (OUTPUT_LOSS, NETWORK_LOSS)
        rules[group.producer] = request.rule(group, sizes[group.producer], by_loss=by_loss)
    return Job(
        model=model, batches=Batches(data, model), criterion=criterion_of(loss, None), rules=rules,
        weights=request.weights, tolerance=request.tolerance, imitation=request.imitation,
        loss=request.loss, fisher=request.fisher, traced=request.consumers is None,
        sized=request.size is not None, seed=request.seed,
        memory_limit=request.memory_limit or 2**30, backend=backend, bar=bars(False),
        checkpoint=NO_CHECKPOINT,
    )  # fmt: skip
