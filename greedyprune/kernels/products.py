"""Products of features with themselves and with targets, in float64 to a known rounding.

A product in float32 is twice as fast as one in float64. Its sums are therefore kept short
(PRODUCT samples), and these short sums are added up in float64. Work goes block by block, so that
no float64 copy of all the features is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .backend import has_extension, instruction_set

# Samples in one product in the features' own type: the length of the longest sum in that type.
# csrc/kernels.h has the same number as kProductTile, and a test compares the two.
PRODUCT = 4096
MOST_PENDING = 1024  # columns that wait for one product
FLOAT64_SAMPLES = 1024  # the most samples that are multiplied in float64 at a time
FLOAT64_ENTRIES = 2**23  # the most entries of features that are copied to float64 at a time
PANEL_ROWS = 512  # rows of the Gram matrix that are computed together, from the diagonal on
COPIED_ROWS = 64  # rows of the Gram matrix for which a copy of their size is made at a time


@contextmanager
def rounded_inputs(allowed: bool = True) -> Iterator[None]:
    """Lets products of float32 round their inputs to bfloat16 where the CPU then multiplies faster.

    An entry of a feature is then off by up to 2^-9 of itself. A Gram matrix is exactly that of the
    rounded features, so it stays positive semidefinite. For least squares their rounding is noise:
    it acts as a ridge of about 1e-6 of the features' squares, far below the least damping.
    """
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not allowed or not has_fast_products() or not hasattr(settings, "fp32_precision"):
        yield
        return
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16"
        yield
    finally:
        settings.fp32_precision = before


@cache
def has_fast_products() -> bool:
    """Has the processor instructions for products of bfloat16, and may they be used?"""
    is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return has_extension() and instruction_set("cpu") == "avx512" and bool(is_supported())


def add_upper_product(gram: Tensor, features: Tensor, dtype: torch.dtype) -> None:
    """Adds features @ features.T to the blocks of `gram` on and above the diagonal.

    Args:
        gram: (N, N) float64, changed in place; `mirror` fills its lower half
        features: (N, m), of any floating type
        dtype: the type in which at most PRODUCT samples are multiplied; longer sums are float64
    """
    if dtype == gram.dtype:
        samples = max(64, min(FLOAT64_SAMPLES, FLOAT64_ENTRIES // len(gram)))
        for s in range(0, features.shape[1], samples):
            part = features[:, s : s + samples].to(dtype)
            for i in range(0, len(gram), PANEL_ROWS):
                gram[i : i + PANEL_ROWS, i:].addmm_(part[i : i + PANEL_ROWS], part[i:].T)
        return
    scratch = torch.empty(PANEL_ROWS * len(gram), dtype=dtype, device=gram.device)
    for s in range(0, features.shape[1], PRODUCT):
        part = features[:, s : s + PRODUCT].to(dtype)
        for i in range(0, len(gram), PANEL_ROWS):
            rows, columns = part[i : i + PANEL_ROWS], part[i:]
            product = scratch[: len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.T, out=product)
            for r in range(0, len(rows), COPIED_ROWS):  # the addition copies them to float64
                end = min(i + r + COPIED_ROWS, i + len(rows))
                gram[i + r : end, i:] += product[r : r + COPIED_ROWS]


def most_pending(features: int) -> int:
    """How many columns wait for one product: their bytes are a quarter of the Gram matrix's."""
    return min(MOST_PENDING, features // 2)


class PendingColumns:
    """Columns of features and targets that wait until they are enough for one product.

    Adding a product to the sums takes the same time for few columns as for many.
    """

    def __init__(self) -> None:
        self.rows, self.targets = list[Tensor](), list[Tensor]()

    def add(self, rows: Tensor, target: Tensor | None = None) -> bool:
        """Adds rows (F, m) and a target (C, m). Returns whether there are enough."""
        self.rows.append(rows)
        if target is not None:
            self.targets.append(target)
        return sum(part.shape[1] for part in self.rows) >= most_pending(len(rows))

    def to_sums(
        self,
        gram: Tensor | None,
        right: Tensor | None,
        dtype: torch.dtype | None,
        *,
        rounded: bool,
    ) -> None:
        """Adds the columns to the sums, those that are not None, and forgets them.

        gram, dtype: as for `add_upper_product`; None: the columns' own dtype
        right:       as for `add_right`
        rounded:     may products round their inputs?
        """
        if not self.rows:
            return
        rows = torch.cat(self.rows, 1) if len(self.rows) > 1 else self.rows[0]
        dtype = rows.dtype if dtype is None else dtype
        with rounded_inputs(rounded):
            if gram is not None:
                add_upper_product(gram, rows, dtype)
            if right is not None:
                target = torch.cat(self.targets, 1) if len(self.targets) > 1 else self.targets[0]
                add_right(right, rows, target, dtype)
        self.rows, self.targets = [], []

    def state(self) -> dict[str, Tensor]:
        """The columns that wait, to go on with after an interruption."""
        state = {}
        for name, parts in (("rows", self.rows), ("targets", self.targets)):
            if parts:
                state[name] = torch.cat(parts, 1)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.rows, self.targets = (
            [state[name]] if name in state else [] for name in ("rows", "targets")
        )


def mirror(gram: Tensor) -> None:
    """Fills the lower half of `gram` (N, N) from the upper one, in place."""
    for i in range(0, len(gram), COPIED_ROWS):
        rows = gram[i : i + COPIED_ROWS, i:]
        square = rows[:, : len(rows)]
        square.copy_(square.triu() + square.triu(1).T)
        gram[i + len(rows) :, i : i + len(rows)] = rows[:, len(rows) :].T


def add_right(right: Tensor, rows: Tensor, target: Tensor, dtype: torch.dtype) -> None:
    """Adds rows @ target.T to `right`, the right side of a least squares problem.

    Args:
        right: (F, C) float64, changed in place
        rows: (F, m) features; target: (C, m)
        dtype: the type in which at most PRODUCT samples are multiplied; longer sums are float64
    """
    for s in range(0, rows.shape[1], PRODUCT):
        part = target[:, s : s + PRODUCT].to(dtype)
        right += rows[:, s : s + PRODUCT].to(dtype) @ part.T


def float64_rounding(samples: int) -> float:
    """A bound on the error of an entry of a Gram matrix in float64, relative to |phi_i| |phi_j|.

    A sum of n terms has a relative error of at most n u, u = 2^-53. Here sums of FLOAT64_SAMPLES
    terms are added up, m / FLOAT64_SAMPLES of them.
    """
    return (FLOAT64_SAMPLES + samples / FLOAT64_SAMPLES) * 2.0**-53


def columns_rounding(dtype: torch.dtype) -> float:
    """A bound on the error of `ops.gram_columns`, relative to |phi_i| |phi_j|.

    A sum of n products in a type of unit roundoff u has an error of at most n u times the sum of
    the products' magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1),
    and by Cauchy and Schwarz that sum is at most |phi_i| |phi_j|. The kernel adds up PRODUCT
    samples in the features' type, in lanes that fill at least 16 bytes. Four more roundings stand
    for the product itself and for the sums in float64.
    """
    terms = PRODUCT * dtype.itemsize / 16
    return (terms + 4) * torch.finfo(dtype).eps / 2
