"""The data and options with which a layer is selected, and code that all objectives share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.losses import Criterion
from ..graph.groups import Group
from ..kernels.path import Rule, Step
from ..runtime.checkpoint import Checkpoint
from ..runtime.distributed import Ranks
from ..runtime.progress import Bar, warn
from ..surgery.layer_selection import LayerSelection, distinct_counts
from .options import Fisher, Imitation, Loss

REPEATS_LIMIT = 10  # with a size and replacement: at most so many steps for each unit of the size


@dataclass(frozen=True)
class Job:
    """One call of `select`, as the objectives see it.

    model:        the dense model, in eval mode
    batches:      the data
    criterion:    the model's loss
    rules:        for each layer, by its first producer: when to stop and what may be picked
    weights:      the argument of `select`
    tolerance:    the argument of `select`
    imitation, loss, fisher: the options of each objective
    traced:       may torch.export's graph be used? Not where both ends of a layer are named by hand
    sized:        was a size asked for, rather than a number of steps?
    seed:         of random candidates, mini-batches and labels drawn from predictions
    memory_limit: bytes
    backend:      "cpu", "cuda" or "reference"
    before:       the layers that are selected already
    wide:         the layers whose consumers' columns are kept (wide.py), and how many of each
                  consumer, by name
    """

    model: nn.Module
    batches: Batches
    criterion: Criterion
    rules: Mapping[str, Rule]
    weights: str
    tolerance: float | None
    imitation: Imitation
    loss: Loss
    fisher: Fisher
    traced: bool
    sized: bool
    seed: int
    memory_limit: int
    backend: str
    bar: Bar
    checkpoint: Checkpoint[LayerSelection]
    before: Mapping[str, LayerSelection] = field(default_factory=dict)
    wide: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def ranks(self) -> Ranks:
        return self.batches.ranks

    @property
    def refits(self) -> bool:
        """Is least squares part of each step, where layers imitate or are judged by gates?"""
        return self.weights in ("auto", "refit")

    @property
    def solver_backend(self) -> str:
        """The backend for computations on sums over the data, which lie on the CPU."""
        return "reference" if self.backend == "reference" else "cpu"

    def rule(self, group: Group) -> Rule:
        return self.rules[group.producer]


def generator(seed: int, stream: int) -> torch.Generator:
    """Random numbers for one purpose, independent of those for another."""
    return torch.Generator("cpu").manual_seed((seed * 4 + stream) % 2**63)


def loop_has_kept_weights(weights: str, rule: Rule) -> bool:
    """Does the loop of eq. (1) evaluate the network that is kept?

    It does for weights N c / k, which are N / kept where no unit is picked twice.
    """
    return weights == "counts" or (weights == "uniform" and not rule.replacement)


def until(loss: float, shown: Any) -> Step:
    """A step function that moves a progress bar and ends the path at a loss of at most `loss`."""

    def step(k: int, unit: int, reached: float) -> bool:
        shown.update()
        return reached <= loss

    return step


def warn_of_repeats(job: Job, group: Group, order: Tensor) -> None:
    """Warns where repeated picks used up all steps before the size was reached."""
    rule, distinct = job.rule(group), int(distinct_counts(order)[-1])
    if job.sized and rule.replacement and len(order) == rule.steps and distinct < rule.size:
        warn(
            f"layer {group.producer!r}: because of repeats, {rule.steps} steps ({REPEATS_LIMIT} "
            f"times its size) picked only {distinct} of {rule.size} distinct units",
        )


def warn_of_missed_tolerance(group: Group, losses: Tensor, goal: float, sign: int = 1) -> None:
    """Warns where a path ends above the loss that was asked for.

    sign: -1 for the negative of a metric, of which more is better
    """
    if float(losses[-1]) > goal > -math.inf:
        warn(
            f"tolerance: layer {group.producer!r} ends at {sign * float(losses[-1]):.4g} after "
            f"{len(losses)} steps, {'above' if sign > 0 else 'below'} the {sign * goal:.4g} that "
            "was asked for",
        )
