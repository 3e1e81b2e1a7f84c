"""Least squares for one layer of a pruned network, towards the dense outputs (refit.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..data.forward import all_finite
from ..data.positions import Sampling, is_wide
from ..graph.linear_paths import LinearPath
from ..graph.replay import PathValues
from ..graph.slices import Entries
from ..graph.tracing import Layer
from ..graph.unfold import (
    columns_in_halves,
    kept_type,
    module_weight,
    outputs_first,
    positions_shape,
)
from ..runtime.distributed import Ranks
from .weight_change import Change, ChangeFromRows, ChangeFromSums

FEW_FEATURES = 1024  # up to here sums are as fast
SHARE_OF_FEW = 2  # columns are kept where there are so many times fewer positions than features


class LayerFit:
    """One layer's least squares: its inputs, what its outputs are to be, and its new weights.

    A row of the inputs is a feature: an input channel, for a convolution one of its taps, and last
    a constant 1, where there is a bias.

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
        self._maps, self._samples = maps, samples
        self._start = zeros(rows, outputs)  # the change before the first round
        self._sampling: Sampling | None = None  # like the problem, not known before the first batch
        self._problem: Change | None = None
        self._added = zeros(outputs, rows)  # the last round's change of the weights

    def start_from(self, dense: Tensor) -> None:
        """The weights that the ridge is towards: the dense ones of the kept channels."""
        self._start[: self.features] = self._change_from(dense).T

    def _change_from(self, before: Tensor) -> Tensor:
        """By how much the weights differ from others: (outputs, features) float64."""
        change = self._kept_of(self._weight) - self._kept_of(before)
        return outputs_first(change, self._dim).flatten(1)

    def _kept_of(self, weight: Tensor) -> Tensor:
        """The part of a weight that the pruned network has, in float64."""
        weight = weight.index_select(self._dim, self._channels)
        return weight.index_select(self._out_dim, self._outputs).double()

    def add(self, batch: PathValues) -> None:
        """Adds one batch: the layer's inputs, and by what its outputs are to change."""
        inputs, path = batch.inputs, batch.inputs.path
        if self._sampling is None:
            shape = positions_shape(self._window, inputs.pruned)
            positions = math.prod(shape) * self._samples // len(batch.draws.starts)
            wide = is_wide(self.features, positions)
            self._sampling = Sampling.of(
                batch.draws, self._samples, shape, batch.mask, self.features, len(self._outputs),
                wide=wide,
            )  # fmt: skip
            rows = positions // self._sampling.stride
            few = 0 < SHARE_OF_FEW * rows <= self.features > FEW_FEATURES
            kept = kept_type(inputs.pruned) if wide or few else None
            self._problem = self._new_problem(self._sampling.long, kept)
        assert self._sampling is not None
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
        assert self._problem is not None
        self._problem.add(half, rows, target)

    def _new_problem(self, long: bool, kept: torch.dtype | None = None) -> Change:
        """The least squares, from columns kept in this type; None: from sums."""
        start = self._start
        del self._start
        if kept is None:
            return ChangeFromSums(self._name, start, self._free, long)
        return ChangeFromRows(self._name, start, self._free, kept)

    @property
    def stays(self) -> bool:
        """Are the new weights no better than the dense ones on held-out samples?"""
        return self._problem is not None and self._problem.damping == math.inf

    def solve(self, ranks: Ranks) -> None:
        """Changes the layer's weight and the bias, in place, for the data of all ranks."""
        problem = self._problem = self._problem or self._new_problem(long=False)
        added = -problem.change
        problem.solve(ranks, self._sampling.stride if self._sampling else 1)
        if self.stays:
            return
        added, before = added.add_(problem.change).T, self._weight.clone()
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
