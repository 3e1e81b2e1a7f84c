"""All layers of a pruned network tuned at once, towards what the dense one's hand on.

Least squares fits a layer to the inputs that it gets, and can't change those. Here gradients go
through the whole pruned network, to lower

    sum over layers of  |a - a_dense|^2 / |a_dense|^2,

a what goes on from a layer's output: past its normalisation and its sum with a shortcut, and only
the positive part where a ReLU follows (program.py). What the dense network gives is the only
target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Batches, samples_of
from ..data.forward import evaluating
from ..graph.executor import Programs, tensors_of
from ..graph.propagate import Layer, Slice
from .selection import Selection

RATE = 1e-3  # Adam's (Kingma and Ba 2015), falling to 0 along a cosine
SAMPLES = 128  # a step
SEED = 0  # of their order
TINY = 1e-12  # where the dense network gives nothing


def tune(
    model: nn.Module, small: nn.Module, selection: Selection, layers: Sequence[Layer],
    batches: Batches, epochs: int, bar: Callable[..., Any],
) -> None:  # fmt: skip
    """Changes the weights of `small`, in place.

    layers: whose outputs are compared, by their names in the dense model
    """
    kept = _kept_outputs(selection, layers)
    dense, pruned = Programs(model), Programs(small)
    leaves = {id(p): p.detach().clone().requires_grad_() for p in small.parameters()}
    dense_tensors = tensors_of(model)
    tensors = {name: leaves.get(id(t), t) for name, t in tensors_of(small).items()}
    optimiser = torch.optim.Adam(leaves.values(), RATE)
    count = len(batches) or sum(1 for _ in batches)
    torch.manual_seed(SEED)  # `evaluating` has forked the generators
    with evaluating(small):
        for epoch in bar(range(epochs), "tuning"):
            for place, batch in enumerate(batches):
                parts = _parts(batch)
                for i, part in enumerate(parts):
                    done = (epoch + (place + i / len(parts)) / count) / epochs
                    optimiser.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * done)) / 2
                    with torch.no_grad():
                        goals = dense.of(part).ahead_of(part, dense_tensors, kept)
                    with torch.enable_grad():
                        found = pruned.of(part).ahead_of(part, tensors, kept)
                        lacks = [_lack(found[name], goals[name], kept[name]) for name in found]
                        optimiser.zero_grad()
                        torch.stack(lacks).sum().backward()
                    optimiser.step()
    for parameter in small.parameters():
        parameter.data.copy_(leaves[id(parameter)].detach())


def _parts(batch: Batch) -> list[Batch]:
    """A batch in parts of at most SAMPLES samples, in another order each time."""
    samples = samples_of(batch)
    if samples is None:
        return [batch]
    return [batch.take(some) for some in torch.randperm(samples).split(SAMPLES)]


class _Kept(NamedTuple):
    """Which of a layer's outputs are left: units (K,) int64 of so many."""

    at: Slice
    units: Tensor
    total: int

    def of(self, goal: Tensor, like: Tensor) -> Tensor:
        """The dense values that `like` has."""
        for dim, size in enumerate(goal.shape):
            if size != like.shape[dim]:
                whole = size == self.at.width * self.total  # else in heads, or the like
                at = self.at if whole else Slice(dim, 1, size // self.total)
                return goal.index_select(dim, at.entries(self.units, self.total).to(goal.device))
        return goal


def _kept_outputs(selection: Selection, layers: Sequence[Layer]) -> dict[str, _Kept | None]:
    """For each layer; None: all are left."""
    kept: dict[str, _Kept | None] = {layer.name: None for layer in layers}
    for layer in layers:
        for cut in selection.layers.values():
            at = cut.slices.get(layer.weight)
            if at is not None and at.dim == layer.out_dim:
                kept[layer.name] = _Kept(at, cut.kept, len(cut.counts))
    return kept


def _lack(found: Tensor, goal: Tensor, kept: _Kept | None) -> Tensor:
    """The relative squared error."""
    goal = goal if kept is None else kept.of(goal, found)
    return (found - goal).square().mean() / goal.square().mean().clamp(min=TINY)
