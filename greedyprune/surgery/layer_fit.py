"""Least squares for one layer of a pruned network, towards the dense outputs (refit.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..data.forward import all_finite
from ..data.padding import NO_POSITION
from ..data.positions import Sampling
from ..graph.linear_paths import LinearPath
from ..graph.replay import PathValues
from ..graph.slices import Entries
from ..graph.tracing import Layer
from ..graph.unfold import columns_in_halves, module_weight, outputs_first, positions_shape
from ..kernels.least_squares import Halves, chosen_damping, ridge
from ..kernels.products import PendingColumns, mirror
from ..runtime.distributed import Ranks

DAMPING = 1e-3  # the least ridge, as a share of the features' mean square


class LayerFit:
    """One layer's least squares: sums over all data, in float64, and their solution.

    A row of the sums is a feature: an input channel, for a convolution one of its taps, and last a
    constant 1, where there is a bias. The change D of the weights is the whole change from the
    weights that the layer had before its first round.

    left: what stays of each dimension that is cut; of the layer's outputs only these are solved for
    bias: the bias that changes with the constant's weight, times `scale`: the layer's own or its
        normalisation's; None: there is no constant
    scale: (outputs,), the normalisation's factors of the layer's outputs; None: 1
    maps: the layer's weight and bias in the dense network and the pruned one, as from `Replay.maps`
    samples: how many the data have; 0: it is unknown
    """

    def __init__(
        self, weight: Tensor, layer: Layer, left: Entries, bias: Tensor | None,
        scale: Tensor | None, maps: Sequence[tuple[Tensor, Tensor | None]], samples: int,
    ) -> None:  # fmt: skip
        self._window, self._name, self._dim = layer.window, layer.name, layer.in_dim
        self._weight, self._bias, self._scale = weight, bias, scale
        self._channels, self._outputs = (
            left.get((layer.weight, dim), torch.arange(self._weight.shape[dim])).to(
                self._weight.device
            )
            for dim in (layer.in_dim, layer.out_dim)
        )
        taps = outputs_first(self._weight, self._dim)[0, 0].numel()
        outputs, self._out_dim = len(self._outputs), layer.out_dim
        self.features = len(self._channels) * taps
        self._free = int(self._bias is not None)
        rows = self.features + self._free
        zeros = partial(torch.zeros, dtype=torch.float64, device=self._weight.device)
        self._grams = [zeros(rows, rows), zeros(rows, rows)]  # of each half of the samples
        self._rights = [zeros(rows, outputs), zeros(rows, outputs)]
        self._pending = [PendingColumns(), PendingColumns()]
        self.rows = 0  # positions in the sums
        self._maps, self._samples = maps, samples
        self._sampling: Sampling | None = None  # not known before the first batch
        self._change = zeros(rows, outputs)
        self._added = zeros(outputs, rows)  # the last round's change of the weights
        self._damping: float | None = None  # chosen in the first round; inf: the weights stay

    def start_from(self, dense: Tensor) -> None:
        """The weights that the ridge is towards: the dense ones of the kept channels."""
        self._change[: self.features] = self._change_from(dense).T

    def _change_from(self, before: Tensor) -> Tensor:
        """By how much the weights differ from others: (outputs, features) float64."""
        change = self._weight.double() - before.double()
        change = change.index_select(self._dim, self._channels)
        change = change.index_select(self._out_dim, self._outputs)
        return outputs_first(change, self._dim).flatten(1)

    def add(self, batch: PathValues) -> None:
        """Adds one batch: the layer's inputs, and by what its outputs are to change."""
        inputs, path = batch.inputs, batch.inputs.path
        if self._sampling is None:
            shape = positions_shape(self._window, inputs.pruned)
            self._sampling = Sampling.of(
                batch.draws, self._samples, shape, batch.mask, self.features, len(self._outputs)
            )
        parts = partial(
            columns_in_halves, self._window, draws=batch.draws, mask=batch.mask,
            stride=self._sampling.stride,
        )  # fmt: skip
        if path.rectified:
            self._add_rectified(parts(inputs.pruned, outputs=batch.ends), path, batch.known)
            return
        pairs = zip(
            parts(inputs.dense), parts(inputs.pruned, outputs=inputs.shortcuts), strict=True
        )
        for (half, dense, _), (_, columns, shortcuts) in pairs:
            change = path.scaled(self._output(0, dense) - self._output(1, columns))
            if shortcuts:
                change += shortcuts[0] - shortcuts[1]
            self._add_part(half, self._rows_of(columns), path.unscaled(change)[self._outputs])

    def _output(self, network: int, columns: Tensor) -> Tensor:
        """The layer's output in the dense network (0) or the pruned one (1): (C, positions)."""
        weight, bias = self._maps[network]
        product = outputs_first(weight, self._dim).flatten(1).to(columns) @ columns.flatten(0, 1)
        return product if bias is None else product + bias.to(product)[:, None]

    def _add_rectified(
        self, parts: Iterable[tuple[int, Tensor, list[Tensor]]], path: LinearPath,
        known: list[Tensor],
    ) -> None:  # fmt: skip
        """Negative values of the dense network only need to stay negative.

        That is the target of Zhang et al. 2015, arXiv:1505.06798, for one step.

        parts: with the values at the path's end as outputs, unless they are known
        known: these values, of each part; those of the pruned network are brought up to date
        """
        for i, (half, columns, ends) in enumerate(parts):
            rows = self._rows_of(columns)
            if ends:
                known += [end.to(rows) for end in ends]
            else:
                change = self._added.to(rows) @ rows
                if path.scale is not None:
                    change *= path.scale[self._outputs, None]
                known[2 * i + 1].index_add_(0, self._outputs, change)
            goal, value = known[2 * i : 2 * i + 2]
            goal = torch.where(goal > 0, goal, value.clamp(max=0))
            self._add_part(half, rows, path.unscaled(goal - value)[self._outputs])

    def _rows_of(self, columns: Tensor) -> Tensor:
        """A row for each feature: (rows, positions)."""
        if not all_finite(columns):
            raise ValueError(
                f"layer {self._name!r}: NaN or inf in its inputs, expected finite numbers"
            )
        rows = columns[self._channels].flatten(0, 1)
        return torch.cat([rows, rows.new_ones(1, rows.shape[1])]) if self._free else rows

    def _add_part(self, half: int, rows: Tensor, target: Tensor) -> None:
        if self._damping is not None:  # the inputs are the same in every round
            half = 0
        else:
            self.rows += rows.shape[1]
        if self._pending[half].add(rows, target):
            self._add_pending(half)

    def _add_pending(self, half: int) -> None:
        gram = self._grams[half] if self._damping is None else None
        long = self._sampling is not None and self._sampling.long
        self._pending[half].to_sums(gram, self._rights[half], None, rounded=long)

    @property
    def stays(self) -> bool:
        """Are the new weights no better than the dense ones on held-out samples?"""
        return self._damping == math.inf

    def solve(self, ranks: Ranks) -> None:
        """Changes the layer's weight and the bias, in place, for the sums over all ranks."""
        stride = self._sampling.stride if self._sampling else 1  # each position stands for so many
        for half, right in enumerate(self._rights):
            self._add_pending(half)
            right *= stride
            ranks.sum(f"right side {self._name!r} {half}", right)
        if self._damping is None:
            for half, gram in enumerate(self._grams):
                gram *= stride
                ranks.sum_upper(f"products {self._name!r} {half}", gram)
            [rows] = ranks.sum_numbers(f"rows {self._name!r}", self.rows)
            self.rows = int(rows)
            if not self.rows:
                raise ValueError(NO_POSITION)
        change, self._damping = ranks.on_first(f"weights {self._name!r}", self._solution)
        if self.stays:
            return
        added, self._change = change.to(self._change) - self._change, change.to(self._change)
        for right in self._rights:
            right.zero_()
        added, before = added.T, self._weight.clone()
        if self._bias is not None:
            constant = added[:, -1]
            if self._scale is not None:
                constant = constant * self._scale[self._outputs]
            self._bias.index_add_(0, self._outputs, constant.to(self._bias.dtype))
            self._added[:, -1], added = added[:, -1], added[:, :-1]
        shaped = module_weight(added, self._dim, self._weight).to(self._weight.dtype)
        whole = shaped.new_zeros(self._weight.shape)
        whole = whole.index_select(self._dim, self._channels)
        whole.index_copy_(self._out_dim, self._outputs, shaped)
        self._weight.index_add_(self._dim, self._channels, whole)
        self._added[:, : self.features] = self._change_from(before)  # as rounded to their type

    def _solution(self) -> tuple[Tensor, float]:
        """The whole change D of the weights, (rows, outputs), and its damping; inf for no change.

        A later round's error is what the change so far leaves. With G = X X^T, its right side
        therefore lacks D G, which is the right side that D solved, less ridge D.
        """
        if self._damping is None:
            for gram, right in zip(self._grams, self._rights, strict=True):
                mirror(gram)
                right += gram @ self._change
            squares = (self._grams[0] + self._grams[1]).diagonal()[: self.features]
            problem = Halves(self._grams, self._rights)
            damping, gain = chosen_damping([problem], DAMPING, [squares], self._free)
            if gain < 0:
                return self._change.cpu(), math.inf
            self._damping = damping
            self._ridge = torch.zeros_like(self._change[:, :1])  # none for the constant
            self._ridge[: self.features, 0] = ridge(squares, damping)
            damped = self._grams[0].add_(self._grams.pop())
            damped.diagonal().add_(self._ridge[:, 0])
            self._factor = torch.linalg.cholesky(damped)
            del self._grams[0]
            self._whole_right = self._rights[0] + self._rights[1]
        else:
            self._whole_right += self._rights[0] - self._ridge * self._change
        return torch.cholesky_solve(self._whole_right, self._factor).cpu(), self._damping
