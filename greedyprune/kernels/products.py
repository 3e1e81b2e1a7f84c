"""Products of features with themselves and with targets, added up in float64."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**23  # entries of features that are taken to float64 at a time
PRODUCT = 4096  # samples in one product in the features' own type; bounds its rounding
DOUBLE = 1024  # samples that are taken to float64 at a time, at most
PANEL = 512  # rows of the Gram matrix computed together: only the upper half of them
SOME = 64  # rows at a time of what is needed beside the matrix


def add_upper_product(gram: Tensor, h: Tensor, dtype: torch.dtype) -> None:
    """gram += h h^T, the blocks on and above the diagonal; sums of products in float64.

    dtype: what PRODUCT samples are multiplied in
    """
    if dtype == gram.dtype:
        some = max(64, min(DOUBLE, BLOCK // len(gram)))
        for s in range(0, h.shape[1], some):
            part = h[:, s : s + some].to(dtype)
            for i in range(0, len(gram), PANEL):
                gram[i : i + PANEL, i:].addmm_(part[i : i + PANEL], part[i:].T)
        return
    scratch = torch.empty(PANEL * len(gram), dtype=dtype, device=gram.device)
    for s in range(0, h.shape[1], PRODUCT):
        part = h[:, s : s + PRODUCT].to(dtype)
        for i in range(0, len(gram), PANEL):
            rows, all_columns = part[i : i + PANEL], part[i:]
            product = scratch[: len(rows) * len(all_columns)].view(len(rows), len(all_columns))
            torch.mm(rows, all_columns.T, out=product)
            for r in range(0, len(rows), SOME):  # adding to float64 makes a copy in float64
                gram[i + r : min(i + r + SOME, i + len(rows)), i:] += product[r : r + SOME]


def mirror(gram: Tensor) -> None:
    """Fills the lower half from the upper one, some rows at a time."""
    for i in range(0, len(gram), SOME):
        rows = gram[i : i + SOME, i:]
        square = rows[:, : len(rows)]
        square.copy_(square.triu() + square.triu(1).T)
        gram[i + len(rows) :, i : i + len(rows)] = rows[:, len(rows) :].T


def add_right(right: Tensor, rows: Tensor, target: Tensor, dtype: torch.dtype) -> None:
    """right (F, C) += rows target^T; sums of products in float64.

    dtype: what PRODUCT samples are multiplied in
    """
    for i in range(0, rows.shape[1], PRODUCT):
        part = target[:, i : i + PRODUCT].to(dtype)
        right += rows[:, i : i + PRODUCT].to(dtype) @ part.T
