"""Samples that are held out, or the halves of cross-validation: each sample's data decide.

So they are the same however the samples are batched, ordered, or spread over processes. Equal
samples are in the same part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.sparse import as_coo
from .batch import Batch, samples_of
from .padding import counted

SPREAD = -7046029254386353131  # 2^64 / golden ratio: multiplying by it mixes the bits (Knuth)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def in_second_half(batch: Batch) -> Tensor:
    """For each of a batch's samples, whether it is in the second half: (m,) bool on the CPU."""
    return hashes_of(batch) < 0


def held_out(batch: Batch, one_in: int = 10, separate: bool = True) -> Tensor:
    """For each of a batch's samples, whether it is held out, as one in 10 is: (m,) bool, CPU.

    separate: False: the batch is held out whole or not at all, (1,) bool
    """
    hashes = hashes_of(batch)
    if not separate:
        hashes = hashes.sum(0, keepdim=True) * SPREAD
    return ((hashes >> 44) & 0xFFFFF) % one_in == 0


def hashes_of(batch: Batch) -> Tensor:
    """(m,) int64: of each sample's entries in the first input that has one for each sample.

    Entries of hidden positions are zeros, which change no hash.
    """
    for value in (*batch.args, *batch.kwargs.values()):
        if isinstance(value, Tensor) and value.dim() and len(value) == samples_of(batch):
            rows = counted(batch.padding.mask, value.shape)
            shown = value.detach()
            if rows is not None:
                shown = (shown.to_dense() if _is_sparse(shown) else shown).masked_fill(~rows, 0)
            return _sums_of_bits(shown).cpu() * SPREAD
    return torch.zeros(1, dtype=torch.int64)


def _sums_of_bits(rows: Tensor) -> Tensor:
    """The sum of each row's entries, their bits read as integers: (m,) int64."""
    if _is_sparse(rows):  # the entries that are left out are zeros, without bits
        rows = as_coo(rows)
        sums = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        return sums.index_add_(0, rows.indices()[0], _sums_of_bits(rows.values()))
    entries = rows.reshape(len(rows), -1).contiguous()
    if entries.is_complex():
        entries = torch.view_as_real(entries).flatten(1)
    return entries.view(INTEGERS[entries.element_size()]).sum(1, dtype=torch.int64)


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided
