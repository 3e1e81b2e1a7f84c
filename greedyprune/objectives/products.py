"""Sums over the data for one consumer of a layer: products of its features.

A consumer's input is unfolded to one column for each position (a convolution's input as its
patches), and K = X X^T is added up. With w_a the weights on feature a, units i and j have
G_ij = N^2 sum of K_ab <w_a, w_b> over their features a and b (eq. (2)). The right side of
every least squares problem is K W^T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..data.forward import all_finite
from ..data.positions import ALL, NO_DRAWS, Draws, Sampling
from ..graph.groups import Group
from ..graph.names import slice_of, weight_of
from ..graph.replay import BothInputs
from ..graph.slices import Slice
from ..graph.unfold import (
    columns_in_halves,
    consumer_window,
    outputs_first,
    positions_shape,
    unit_major,
)
from ..kernels.least_squares import Halves, Held, feature_rows
from ..kernels.products import PendingColumns, mirror, rounded_inputs
from ..runtime.distributed import Ranks


class Sums:
    """The sums over one half of the samples.

    gram:        (F, F) float64, K; before `finish` only the blocks on and above the diagonal
    cross:       (F, C) float64, <x_i, target>; None: the target is the dense output of X
    positions:   how many columns X has
    target_norm: |target|^2
    pending:     columns that are in `positions` and `target_norm` only, until `add_pending`
    """

    def __init__(self, features: int, outputs: int | None, device: torch.device) -> None:
        self.positions, self.target_norm = 0, 0.0
        self.pending = PendingColumns()
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.cross = None if outputs is None else self.gram.new_zeros(features, outputs)

    def add(self, rows: Tensor, target: Tensor | None, long: bool) -> None:
        """Adds features (F, n) and targets (C, n)."""
        self.positions += rows.shape[1]
        if target is not None:
            self.target_norm += float(target.double().square().sum())
        if self.pending.add(rows, target):
            self.add_pending(long)

    def add_pending(self, long: bool) -> None:
        """long: as in `Sampling`. Other products are in float64: the loss can be a small rest."""
        dtype = None if long else torch.float64
        self.pending.to_sums(self.gram, self.cross, dtype, rounded=long)

    def state(self) -> dict[str, Tensor]:
        cross = {} if self.cross is None else {"cross": self.cross}
        return {"gram": self.gram, **cross, **self.columns()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.gram.copy_(state["gram"])
        if self.cross is not None:
            self.cross.copy_(state["cross"])
        self.set_columns(state)

    def columns(self) -> dict[str, Tensor]:
        """The columns that wait, and the numbers of `state`."""
        numbers = torch.tensor([self.positions, self.target_norm], dtype=torch.float64)
        pending = {f"pending {name}": part for name, part in self.pending.state().items()}
        return {"numbers": numbers, **pending}

    def set_columns(self, state: Mapping[str, Tensor]) -> None:
        """Sets them to what `columns` returned."""
        self.positions, self.target_norm = int(state["numbers"][0]), float(state["numbers"][1])
        before = "pending "
        self.pending.restore(
            {name.removeprefix(before): state[name] for name in state if name.startswith(before)}
        )

    def finish(self, name: str, ranks: Ranks, owner: int | None, stride: int) -> None:
        """Adds up all ranks' sums, for all ranks or the owner, and moves them to the CPU.

        stride: each position stands for so many
        """
        if stride > 1:
            self.gram *= stride
            self.positions *= stride
            self.target_norm *= stride
            if self.cross is not None:
                self.cross *= stride
        ranks.sum_upper(f"products {name}", self.gram, owner)
        counts = ranks.sum_numbers(f"sums {name}", self.positions, self.target_norm)
        self.positions, self.target_norm = int(counts[0]), counts[1]
        if self.cross is not None:
            ranks.sum(f"right side {name}", self.cross)
            self.cross = self.cross.cpu()
        mirror(self.gram)
        self.gram = self.gram.cpu()

    def merge(self, other: Sums) -> None:
        self.gram += other.gram
        self.positions += other.positions
        self.target_norm += other.target_norm
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross


class Products:
    """The sums of one least squares problem in the units' features; a unit's lie side by side.

    name:   of the layer that takes the units
    weight: (C, F) float64, what the features are multiplied with in the dense network
    root:   (C, C) float64, the square root of the metric that errors are measured in; None: I
    given:  are the targets added with the inputs? Else they are the dense outputs for these inputs
    halves: are the sums kept for each half of the samples, to choose a damping by?
    wide:   are the columns kept, and no sums (row_products.py)?
    sampling: which positions are in the sums; None: it is not known before the first batch
    """

    def __init__(
        self, name: str, units: int, weight: Tensor, device: torch.device, *, given: bool = False,
        halves: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.units, self.weight = name, units, weight
        self.outputs, self.features = weight.shape
        self.is_given, self.halves = given, halves
        self.sums = [self._empty(device) for _ in range(1 + halves)]
        self.root: Tensor | None = None
        self.sampling: Sampling | None = ALL

    wide = False

    def _empty(self, device: torch.device) -> Sums:
        """The sums of no columns."""
        return Sums(self.features, self.outputs if self.is_given else None, device)

    def add(
        self, inputs: Tensor, draws: Draws = NO_DRAWS, mask: Tensor | None = None,
        both: BothInputs | None = None,
    ) -> None:  # fmt: skip
        """Adds one batch of inputs.

        draws: of the m samples; NO_DRAWS: all are in the first half
        mask:  (m, T) bool: which positions count; None: all
        both:  what the targets follow from, if they are given
        """
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {"sampling": torch.tensor(self.sampling or (0, 0))} | {
            f"{name} {i}": tensor
            for i, sums in enumerate(self.sums)
            for name, tensor in sums.state().items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Sets the sums to what `state` returned."""
        stride, long = state["sampling"].tolist()
        self.sampling = Sampling(stride, bool(long)) if stride else None
        for i, sums in enumerate(self.sums):
            of_half = f" {i}"
            sums.restore({n.removesuffix(of_half): state[n] for n in state if n.endswith(of_half)})

    def finish(self, ranks: Ranks, owner: int | None = None) -> None:
        """Adds up all ranks' sums, for all ranks or the owner, and moves them to the CPU."""
        stride = self.sampling.stride if self.sampling else 1
        for i, sums in enumerate(self.sums):
            sums.add_pending(self.long)
            sums.finish(f"{self.name!r} {i}", ranks, owner, stride)

    def rearrange(self, features: Tensor) -> None:
        """Puts the features into another order, (F,) int64, in place."""
        self.weight = self.weight[:, features]
        for sums in self.sums:
            sums.gram = sums.gram[features[:, None], features]
            sums.cross = None if sums.cross is None else sums.cross[features]

    def part(self, features: Tensor) -> Products:
        """The products of some features, (F',) int64; their target is what they contribute."""
        part = Products(self.name, self.units, self.weight[:, features], self.sums[0].gram.device)
        for sums in self.sums:
            part.sums[0].gram += sums.gram[features[:, None], features]
        part.sums[0].positions = self.positions
        return part

    def merge(self) -> None:
        """Adds up the sums of both halves."""
        while len(self.sums) > 1:
            self.sums[0].merge(self.sums.pop())

    @property
    def gram(self) -> Tensor:
        """(F, F) float64, K of all samples."""
        self.merge()
        return self.sums[0].gram

    @property
    def positions(self) -> int:
        return sum(sums.positions for sums in self.sums)

    def squares(self) -> Tensor:
        """The features' squared norms: (F,) float64."""
        return torch.stack([sums.gram.diagonal() for sums in self.sums]).sum(0)

    def errors_without(self, units: Tensor, factor: float) -> Held:
        """The least squares problem, in both halves, of the error that keeping `units` leaves.

        units:  (K,) int64; they have their dense weights
        factor: of the squared error
        """
        rows = feature_rows(units, self.width)
        dense, grams, rights = self.weight.T[rows], [], []
        for sums in self.sums:
            gram = sums.gram[rows[:, None], rows]
            right = sums.gram[rows] @ self.weight.T if sums.cross is None else sums.cross[rows]
            grams.append(gram)
            rights.append((right - gram @ dense).mul_(math.sqrt(factor)))
        return Halves(grams, rights, self.squares()[rows])

    @property
    def long(self) -> bool:
        """Do the sums take so long that their products are less exact than float64?"""
        return self.sampling is not None and self.sampling.long

    @property
    def mass(self) -> float:
        """What sums of squares are divided by."""
        return float(self.positions * self.outputs)

    @property
    def width(self) -> int:
        """Features a unit."""
        return self.features // self.units

    def right(self) -> Tensor:
        """<x_i, target>, (F, C) float64."""
        self.merge()
        cross = self.sums[0].cross
        return self.gram @ self.weight.T if cross is None else cross

    def target_norm(self) -> float:
        """|target|^2; it leaves the halves apart."""
        if self.sums[0].cross is not None:
            return sum(sums.target_norm for sums in self.sums)
        rights = (sums.gram @ self.weight.T for sums in self.sums)
        return sum(float((right * self.weight.T).sum()) for right in rights)

    def end_losses(self) -> tuple[float, float]:
        """|target - output|^2 with all units as they are, and without any unit."""
        output_norm = float(((self.gram @ self.weight.T) * self.weight.T).sum())
        sums = self.sums[0]
        if sums.cross is None:
            return 0.0, output_norm
        along = float((sums.cross * self.weight.T).sum())
        return sums.target_norm - 2 * along + output_norm, sums.target_norm

    def unit_beta(self) -> Tensor:
        """<phi_i, target> / N for each unit i: (N,) float64."""
        return (self.right() * self.weight.T).view(self.units, -1).sum(1)

    def contributions(self) -> Tensor:
        """|phi_j|^2 / N^2 for each unit j: (N,) float64; it leaves the halves apart."""
        total = torch.zeros(self.units, dtype=torch.float64)
        for sums in self.sums:
            for j in range(self.units):
                at = slice(j * self.width, (j + 1) * self.width)
                weight = self.weight[:, at]
                total[j] += ((weight @ sums.gram[at, at]) * weight).sum()
        return total

    def unit_gram(self) -> Tensor:
        """<phi_i, phi_j> / N^2 for units i and j: (N, N) float64."""
        products = (self.weight.T @ self.weight).mul_(self.gram)
        if self.width == 1:
            return products
        shape = self.units, self.width, self.units, self.width
        return products.view(shape).sum((1, 3))


class ConsumerProducts(Products):
    """The products of one consumer. The target is the units' part of its dense output."""

    def __init__(
        self, model: nn.Module, group: Group, name: str, root: Tensor | None = None, *,
        given: bool = False, halves: bool = False, current: Tensor | None = None,
        samples: int = 0,
    ) -> None:  # fmt: skip
        """current: the weight that the consumer has by now, None: the dense one.

        samples: how many the data have, to decide how many of their positions are enough; 0: all
            positions are in the sums
        """
        dense, at = weight_of(model, name), slice_of(group.slices, name)
        weight = self._stored(unit_major(dense.detach(), at).cpu())
        weight = weight if root is None else (root @ weight.double()).to(weight)
        super().__init__(name, group.units, weight, dense.device, given=given, halves=halves)
        self.root, self.layer = root, group.producer
        self._samples, self.sampling = samples, None if samples else ALL
        self._at, self._dense = at, outputs_first(dense.detach(), at.dim).flatten(1)
        self._window = consumer_window(model, group, name)
        self._rest = at.rest()
        current = dense if current is None else current
        rest = Slice(at.dim, self._rest[:, None], at.size)
        self._of_rest = unit_major(current.detach(), rest).double()

    def _stored(self, weight: Tensor) -> Tensor:
        """The dense weight in the type that it is kept in."""
        return weight.double()

    def add(
        self, inputs: Tensor, draws: Draws = NO_DRAWS, mask: Tensor | None = None,
        both: BothInputs | None = None,
    ) -> None:  # fmt: skip
        if mask is None and not all_finite(inputs):
            raise self._not_finite()
        if self.sampling is None:
            shape = positions_shape(self._window, inputs)
            self.sampling = Sampling.of(
                draws, self._samples, shape, mask, self.features, self.outputs, wide=self.wide
            )
        parts = partial(
            columns_in_halves, self._window, draws=draws, halves=len(self.sums) > 1, mask=mask,
            stride=self.sampling.stride,
        )  # fmt: skip
        if both is None:
            for half, columns, _ in parts(inputs):
                self._add_columns(self.sums[half], columns, None, mask)
            return
        pairs = zip(parts(both.dense), parts(inputs, outputs=both.shortcuts), strict=True)
        for (half, dense, _), (_, columns, shortcuts) in pairs:
            with rounded_inputs(self.long):
                target = self._dense.to(dense) @ dense.flatten(0, 1)
            if shortcuts:
                of_dense, of_pruned = shortcuts
                target += both.path.unscaled(of_dense - of_pruned)
            self._add_columns(self.sums[half], columns, target, mask)

    def _of_units(self, columns: Tensor) -> Tensor:
        """The channels of the units, those of each unit together: (channels, taps, positions)."""
        places = self._at.places.flatten()
        if places.equal(torch.arange(len(columns))):
            return columns
        return columns[places.to(columns.device)]

    def _not_finite(self) -> ValueError:
        return ValueError(
            f"layer {self.layer!r}: NaN or inf in its activations on the data, expected finite "
            "numbers"
        )

    def _add_columns(
        self, sums: Sums, columns: Tensor, target: Tensor | None, mask: Tensor | None
    ) -> None:
        """Adds inputs (channels, taps, positions) and outputs (C, positions) without the bias."""
        if mask is not None and not all_finite(columns):  # hidden positions may be NaN
            raise self._not_finite()
        if target is not None:
            if len(self._rest):  # what the other inputs give, as those of a concatenation
                others, rest = columns[self._rest.to(columns.device)].flatten(0, 1), self._of_rest
                dtype = target.dtype if self.long else torch.float64
                target = target - (rest.to(dtype) @ others.to(dtype)).to(target)
            if self.root is not None:
                target = self.root.to(target) @ target
        sums.add(self._of_units(columns).flatten(0, 1), target, self.long)
