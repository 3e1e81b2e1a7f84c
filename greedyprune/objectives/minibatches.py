"""Mini-batches that greedy steps score on: the stochastic form of Wolfe et al. 2021."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import targets
from ..data.batches import Batch, samples_of
from ..data.padding import Padding
from ..data.targets import samples_in
from ..runtime.distributed import Ranks
from .job import Job, generator


@dataclass(frozen=True)
class MiniBatches:
    """Shuffled samples; step k scores on samples starts[k - 1] to stops[k - 1] of them.

    order: (m,) int64, the samples in shuffled order
    starts, stops: (steps,) int64; `size` apart where one process has all samples
    """

    order: Tensor
    starts: Tensor
    stops: Tensor
    size: int

    def part(self, k: int) -> slice:
        """The shuffled samples that step k scores on; none where other ranks have all of them."""
        return slice(int(self.starts[k - 1]), int(self.stops[k - 1]))

    def of_rank(self, ranks: Ranks, samples: int) -> MiniBatches:
        """The part of each mini-batch that this rank has; samples are numbered rank after rank."""
        first = sum(ranks.gather("samples", samples)[: ranks.rank])
        local = (self.order >= first) & (self.order < first + samples)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), local.cumsum(0)])
        order = self.order[local] - first
        return MiniBatches(order, before[self.starts], before[self.stops], self.size)


def mini_batches(job: Job, steps: int, samples: int) -> MiniBatches | None:
    """The mini-batches of this many steps; None if every step scores on all samples.

    They are passes over the shuffled data, as in a training loop: no sample comes twice in a pass,
    and an incomplete last mini-batch is dropped. Passes differ in the order of their mini-batches
    and in the sample they begin with.

    samples: how many this rank has. A mini-batch of more than all ranks have is all of them
    """
    size = job.loss.batch_size
    if size is None:
        return None
    total, random = sum(job.ranks.gather("samples", samples)), generator(job.seed, 2)
    size = min(size, total)
    order, starts = torch.randperm(total, device="cpu", generator=random), []
    count = total // size
    for _ in range(-(-steps // count)):
        first = torch.randint(total % size + 1, (), device="cpu", generator=random)
        starts.append(first + size * torch.randperm(count, device="cpu", generator=random))
    firsts = torch.cat(starts)[:steps].contiguous()
    batches = MiniBatches(order, firsts, firsts + size, size)
    return batches if job.ranks.size == 1 else batches.of_rank(job.ranks, samples)


def joined(batches: Iterable[Batch]) -> Batch:
    """All samples in one batch; ValueError where they are of different shapes."""
    parts = list(batches)
    if not parts:
        return Batch((), {}, None)
    counts = [samples_of(part) for part in parts]

    def cat(values: list[Any]) -> Any:
        first = values[0]
        if not (isinstance(first, Tensor) and first.dim() and len(first) == counts[0]):
            return first  # it has no entry for each sample
        if any(value.shape[1:] != first.shape[1:] for value in values):
            raise ValueError(
                f"batch_size: found samples of shapes {tuple(first.shape[1:])} and others, "
                "expected one shape, to make batches of so many of them"
            )
        return torch.cat(values)

    for count, part in zip(counts, parts, strict=True):
        if part.targets is not None and samples_in(part.targets) != count:
            shape = getattr(part.targets, "shape", None)
            form = "of another form" if shape is None else f"of shape {tuple(shape)}"
            raise ValueError(
                f"batch_size: found targets {form} for {count} samples, expected one for each, to "
                "make batches of so many of them"
            )
    return Batch(
        tuple(cat(list(values)) for values in zip(*(part.args for part in parts), strict=True)),
        {name: cat([part.kwargs[name] for part in parts]) for name in parts[0].kwargs},
        targets.joined([part.targets for part in parts]),
        _padding(parts),
    )


def _padding(parts: Sequence[Batch]) -> Padding:
    """The padding of all samples in one batch."""

    def cat(masks: list[Tensor | None]) -> Tensor | None:
        like = next((mask for mask in masks if mask is not None), None)
        if like is None:
            return None
        counts = [samples_of(part) or 0 for part in parts]
        return torch.cat([
            like.new_ones(count, like.shape[1]) if mask is None else mask
            for mask, count in zip(masks, counts, strict=True)
        ])  # fmt: skip

    decoders = [part.padding.decoder_layers for part in parts]
    return Padding(
        cat([part.padding.mask for part in parts]),
        cat([part.padding.decoder_mask for part in parts]),
        next((layers for layers in decoders if layers is not None), None),
        frozenset().union(*(part.padding.time_first for part in parts)),
    )
