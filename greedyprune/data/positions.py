"""Which positions have a part in a layer's sums: all, or one of every few.

A position is one pixel of a feature map or one token of a sequence. Neighbours say nearly the same,
so that a share of them gives nearly the same sums. The share follows the layer: enough positions
for each of its features, and all positions where their products cost little anyway.

Every sample has positions of its own. They are decided by the sample's data, so that they are the
same however the samples are batched, ordered, or spread over processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .halves import hashes_of
from .padding import counted

ROWS = 64  # positions for each feature of a layer
CHEAP = 1e10  # multiplications for a layer's sums that take little time anyway
KEPT_ROWS = 8192  # positions of a layer of so many features that the columns themselves are kept
COPIED = 256  # copying a feature or an output takes about as long as so many multiplications
FEW_FEATURES = 8192  # up to here sums are never too large
MOST_FEATURES = 12288  # from here on they always are: a Gram matrix has 1.2 GB
SHARE = 4  # between the two they are where there are so many times fewer positions than features
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly


class Draws(NamedTuple):
    """What is drawn for each of a batch's samples, on the CPU.

    second_half: (m,) bool: is the sample in the second half?
    starts:      (m,) float64 in [0, 1): where its positions start
    """

    second_half: Tensor
    starts: Tensor

    @staticmethod
    def of(batch: Batch) -> Draws:
        hashes = hashes_of(batch)
        return Draws(hashes < 0, ((hashes >> 20) & 0xFFFFFF).double() / 2**24)


NO_DRAWS = Draws(torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.float64))


class Sampling(NamedTuple):
    """Which positions have a part in a layer's sums.

    stride: a power of two; one of every `stride` positions has
    long:   do the sums take so long that their products are less exact than float64?
    """

    stride: int
    long: bool

    @staticmethod
    def of(
        draws: Draws, samples: int, shape: Sequence[int], mask: Tensor | None, features: int,
        outputs: int, *, wide: bool = False,
    ) -> Sampling:  # fmt: skip
        """Enough positions for a layer, from a batch of the data.

        Args:
            draws: of the batch
            samples: how many the data have; 0: it is unknown, then all positions have a part
            shape: of the layer's positions in the batch
            mask: (m, T) bool, which positions of the batch count; None: all
            features, outputs: of the layer
            wide: are the columns kept, in the place of sums of their products?
        """
        keep = counted(mask, shape)
        of_batch = math.prod(shape) if keep is None else int(keep.sum())
        positions = of_batch * samples // len(draws.starts)
        work = features * (features / 2 + 2 * outputs) + COPIED * (features + outputs)
        enough = KEPT_ROWS if wide else max(ROWS * features, CHEAP / work)
        stride = stride_for(positions, enough)
        return Sampling(stride, positions * work > CHEAP)


ALL = Sampling(1, False)


def stride_for(positions: int, enough: float) -> int:
    """The largest power of two that leaves enough positions of all."""
    stride = 1
    while positions >= 2 * stride * enough:
        stride *= 2
    return stride


def is_wide(features: int, positions: int) -> bool:
    """Are a layer's columns kept, with this many positions in the data? 0: it is unknown."""
    if features > MOST_FEATURES:
        return True
    return features > FEW_FEATURES and 0 < SHARE * positions <= features


def places(starts: Tensor, rows: int, stride: int, keep: Tensor | None) -> Tensor:
    """The places (n,) int64, in order, of one of every `stride` positions of each sample.

    From every `stride` successive positions of a sample that count, one is drawn. Each position is
    as likely as any other.

    Args:
        starts: (m,) as in `Draws`
        rows: how many positions the batch has, those of each sample together
        keep: (rows,) bool: which of them count; None: all
    """
    if stride == 1:
        return torch.arange(rows) if keep is None else keep.cpu().nonzero().flatten()
    samples = len(starts) if rows % len(starts) == 0 else 1
    length = rows // samples
    cells = torch.arange(-(-length // stride))
    within = (starts[:samples, None] + cells * GOLDEN).frac().mul(stride).long()
    chosen = cells * stride + within
    begins = torch.arange(samples)[:, None] * length
    if keep is None:
        return (begins + chosen)[chosen < length]
    keep = keep.cpu().view(samples, length)
    counting = chosen < keep.sum(1, keepdim=True)
    in_order = (~keep).byte().argsort(stable=True)  # those that count come first
    return (begins + in_order.gather(1, chosen.clamp(max=length - 1)))[counting]
