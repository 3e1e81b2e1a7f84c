"""The change of one layer's weights by least squares, from sums or from the columns themselves.

    min over D of  |E - D X|^2 + ridge |D|^2

X are the layer's inputs, a row for each feature and last, where there is a bias, a constant 1. E is
by how much the outputs of the layer are to change. D is the whole change from the dense weights.

Later rounds have the same X and another E. It is what the change so far leaves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..data.padding import NO_POSITION
from ..kernels.dual import DualHalves, change_of, gathered, product
from ..kernels.least_squares import Halves, chosen_damping, ridge
from ..kernels.products import PendingColumns, mirror
from ..runtime.distributed import Ranks

DAMPING = 1e-3  # the least ridge, as a share of the features' mean square


class Change:
    """What both ways have in common.

    change:  (rows, C) float64, D^T so far
    damping: chosen in the first round; inf: the weights stay as they are
    free:    1 where the last row is the constant, which has no ridge, else 0
    """

    def __init__(self, name: str, change: Tensor, free: int) -> None:
        self.name, self.change, self.free = name, change, free
        self.features = len(change) - free
        self.damping: float | None = None

    def add(self, half: int, rows: Tensor, error: Tensor) -> None:
        """Adds X (rows, n) and E (C, n) of one half of the samples."""
        raise NotImplementedError

    def solve(self, ranks: Ranks, stride: int) -> None:
        """Sets `change` and `damping` for what was added on all ranks.

        stride: each position stands for so many
        """
        raise NotImplementedError


class ChangeFromSums(Change):
    """From G = X X^T and X E^T.

    long: do the sums take so long that products may round their inputs?
    """

    def __init__(self, name: str, change: Tensor, free: int, long: bool) -> None:
        super().__init__(name, change, free)
        self._grams = [change.new_zeros(len(change), len(change)) for _ in range(2)]
        self._rights = [torch.zeros_like(change) for _ in range(2)]
        self._pending = [PendingColumns(), PendingColumns()]
        self._rows, self._long = 0, long

    def add(self, half: int, rows: Tensor, error: Tensor) -> None:
        if self.damping is not None:  # the inputs are the same in every round
            half = 0
        else:
            self._rows += rows.shape[1]
        if self._pending[half].add(rows, error):
            self._add_pending(half)

    def _add_pending(self, half: int) -> None:
        gram = self._grams[half] if self.damping is None else None
        self._pending[half].to_sums(gram, self._rights[half], None, rounded=self._long)

    def solve(self, ranks: Ranks, stride: int) -> None:
        for half, right in enumerate(self._rights):
            self._add_pending(half)
            right *= stride
            ranks.sum(f"right side {self.name!r} {half}", right)
        if self.damping is None:
            for half, gram in enumerate(self._grams):
                gram *= stride
                ranks.sum_upper(f"products {self.name!r} {half}", gram)
            [rows] = ranks.sum_numbers(f"rows {self.name!r}", self._rows)
            if not rows:
                raise ValueError(NO_POSITION)
        change, self.damping = ranks.on_first(f"weights {self.name!r}", self._solution)
        self.change = change.to(self.change)
        for right in self._rights:
            right.zero_()

    def _solution(self) -> tuple[Tensor, float]:
        """The change and its damping.

        A later round's right side lacks D G, with D the change so far. That is the right side that
        D solved, less ridge D.
        """
        if self.damping is None:
            for gram, right in zip(self._grams, self._rights, strict=True):
                mirror(gram)
                right += gram @ self.change
            squares = (self._grams[0] + self._grams[1]).diagonal()[: self.features]
            problem = Halves(self._grams, self._rights, squares, self.free)
            damping, gain = chosen_damping([problem], DAMPING)
            if gain < 0:
                return self.change.cpu(), math.inf
            self.damping = damping
            self._ridge = torch.zeros_like(self.change[:, :1])  # none for the constant
            self._ridge[: self.features, 0] = ridge(squares, damping)
            damped = self._grams[0].add_(self._grams.pop())
            damped.diagonal().add_(self._ridge[:, 0])
            self._factor = torch.linalg.cholesky(damped)
            del self._grams[0]
            self._whole_right = self._rights[0] + self._rights[1]
        else:
            self._whole_right += self._rights[0] - self._ridge * self.change
        return torch.cholesky_solve(self._whole_right, self._factor).cpu(), self.damping


class ChangeFromRows(Change):
    """From X and E themselves, where the layer is wide: the dual form (kernels/dual.py).

    The constant has no ridge. So the best one makes the mean of what is left zero, and D is least
    squares for X and E less their means.

    dtype: in which X and E are kept, float32 or float64
    """

    def __init__(self, name: str, change: Tensor, free: int, dtype: torch.dtype) -> None:
        super().__init__(name, change, free)
        self._dtype = dtype
        self._parts: list[list[Tensor]] = [[], []]  # of X, in each half
        self._errors: list[list[Tensor]] = [[], []]

    def add(self, half: int, rows: Tensor, error: Tensor) -> None:
        if self.damping is None:
            self._parts[half].append(rows)
        self._errors[half].append(error)

    def solve(self, ranks: Ranks, stride: int) -> None:
        name, outputs = self.name, self.change.shape[1]
        error, _ = gathered(f"errors {name!r}", self._errors, outputs, torch.float64, ranks)
        error *= math.sqrt(stride)
        if self.damping is None:
            size = self.features + self.free
            self._rows, self._first = gathered(
                f"columns {name!r}", self._parts, size, self._dtype, ranks
            )
            self._rows *= math.sqrt(stride)
            if not len(self._rows):
                raise ValueError(NO_POSITION)
        change, self.damping = ranks.on_first(f"weights {name!r}", lambda: self._solution(error))
        self.change = change.to(self.change)

    def _solution(self, error: Tensor) -> tuple[Tensor, float]:
        features, change = self._rows[:, : self.features], self.change.cpu()
        error = error + product(self._rows, change)  # of the dense weights
        if self.damping is None:
            squares = torch.linalg.vector_norm(features, dim=0, dtype=torch.float64).square()
            problem = DualHalves(features, error, self._first, squares, free=bool(self.free))
            self.damping, gain = chosen_damping([problem], DAMPING)
            if gain < 0:
                return change, math.inf
            self._ridge = ridge(squares, self.damping)
            kernel = problem.damped_kernel(self.damping)
            if self.free:
                means = kernel.mean(0)
                kernel = kernel - means - means[:, None] + means.mean()
            kernel.diagonal().add_(1)
            self._factor = torch.linalg.cholesky(kernel)
        mean = error.mean(0) if self.free else torch.zeros_like(error[0])
        left = torch.cholesky_solve(error - mean, self._factor)
        change = change_of(features, left, self._ridge)
        if self.free:
            means = features.double().mean(0)
            change = torch.cat([change, (mean - means @ change)[None]])
        return change, self.damping
