"""Mini-batches that greedy steps score on: the stochastic form of Wolfe et al. 2021."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    """The mini-batches of so many steps; None where every step scores on all samples.

    They are passes over the shuffled data, as in a training loop: no sample comes twice in a pass,
    and an incomplete last mini-batch is dropped. Passes differ in the order of their mini-batches
    and in the sample they begin with.

    samples: how many this rank has
    """
    if job.loss.batch_size is None:
        return None
    total = sum(job.ranks.gather("samples", samples))
    size, random = min(job.loss.batch_size, total), generator(job.seed, 2)
    order, starts = torch.randperm(total, device="cpu", generator=random), []
    count = total // size
    for _ in range(-(-steps // count)):
        first = torch.randint(total % size + 1, (), device="cpu", generator=random)
        starts.append(first + size * torch.randperm(count, device="cpu", generator=random))
    firsts = torch.cat(starts)[:steps].contiguous()
    batches = MiniBatches(order, firsts, firsts + size, size)
    return batches if job.ranks.size == 1 else batches.of_rank(job.ranks, samples)
