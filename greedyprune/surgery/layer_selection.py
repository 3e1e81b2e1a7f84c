"""The greedy path of one layer, as a frozen record: which units are kept, and with what weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..graph.slices import Slice
from ..kernels.dual import DualFit
from ..kernels.path import NestedFit
from ..runtime.arguments import is_int

Fit = NestedFit | DualFit  # a consumer's least squares


@dataclass(frozen=True, eq=False)
class LayerSelection:
    """The greedy path of one layer with N units: k steps, which keep K distinct units.

    All tensors are on the CPU.

    order:      (k,) int64, the picks in sequence
    counts:     (N,) int64, how often each unit was picked
    kept:       (K,) int64, the distinct units, ascending
    weights:    (K,) float64, the factors that multiply the kept units' outgoing weights. After
                weights="refit" with objective "loss" or "imitation" these are the new outgoing
                weights themselves: (C, K) float64 for a consumer with C outputs, or (C, K, w) for
                a consumer that takes w features of each unit, such as a convolution's taps. Where
                there are several consumers, they are the first one's
    losses:     (k,) float64, the objective after each step, of the network with these weights
    dense_loss: () float64, the objective of the dense layer
    bound:      (k,) float64, eq. (3); None where its conditions do not hold
    gap:        (k,) float64, the Frank-Wolfe gap: losses - gap is at most the loss of any convex
                reweighting of all units; None where it is not known
    distinct:   (k,) int64, the number of distinct units after each step
    outputs:    the consumers, which are the layers that take the units' outputs as inputs, each
                with its number of outputs
    slices:     the parameters and buffers that have entries for each unit, and where these are
    fitted:     after weights="refit": each consumer's least squares, for every number of units
    gates:      after weights="refit" with objective "fisher": the least squares of one factor for
                each unit's outgoing weights
    weighting:  how the kept units' outgoing weights were found: "counts", "uniform", "none" or
                "refit", as in the argument `weights` of `select`
    loss:       the loss that `losses` are values of: "mse", "cross_entropy", "bce_with_logits" or
                "custom"; "mse" for a layer that imitates
    objective:  what the layer was judged by: "loss", "imitation" or "fisher"
    also:       those tensors that hold the units along a second dimension, and where
    sizes:      attributes of modules that hold a size, as "module.attribute" or
                "module.attribute[i]", and where the entries that they count belong to units; only
                those that have to be set
    tied:       weights that take the units and stay as they are: embeddings' tables that the last
                layer multiplies with, too, the `weight_hh` of recurrent layers, and all parameters
                of query-key units, which no layer takes. They are cut
    share:      the layers, with this one, that have to keep one share of their units, because the
                model's code needs it; () for any share
    part:       "" or, of dimensions inside attention's heads, "[query-key]" or "[value]"
    rescaled:   parameters of query-key units that cutting multiplies, so that attention scores
                which the code divides by the root of the number of units stay as they are
    """

    order: Tensor
    counts: Tensor
    kept: Tensor
    weights: Tensor
    losses: Tensor
    dense_loss: Tensor
    bound: Tensor | None
    gap: Tensor | None
    distinct: Tensor
    outputs: Mapping[str, int]
    slices: Mapping[str, Slice]
    weighting: str
    loss: str
    objective: str
    fitted: Mapping[str, Fit] | None = field(default=None, repr=False)
    gates: NestedFit | None = field(default=None, repr=False)
    also: Mapping[str, Slice] = field(default_factory=dict, repr=False)
    sizes: Mapping[str, Slice] = field(default_factory=dict, repr=False)
    tied: tuple[str, ...] = field(default=(), repr=False)
    share: tuple[str, ...] = field(default=(), repr=False)
    part: str = field(default="", repr=False)
    rescaled: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of_path(
        cls, units: int, order: Tensor, weighting: str, fitted: Mapping[str, Fit] | None,
        gates: NestedFit | None = None, **fields: Any,
    ) -> LayerSelection:  # fmt: skip
        """The record of the picks `order` (k,) among `units` units.

        fields: the attributes that do not follow from the picks and the least squares
        """
        counts = torch.bincount(order, minlength=units)
        kept = counts.nonzero().flatten()
        if gates is not None:
            weights = _outgoing_ascending(gates, len(kept)).flatten()
        elif fitted is None:
            weights = factors(weighting, counts, kept)
        else:
            weights = _outgoing_ascending(next(iter(fitted.values())), len(kept))
            weights = weights[..., 0] if weights.shape[2] == 1 else weights
        return cls(
            order=order, counts=counts, kept=kept, weights=weights.contiguous(),
            distinct=distinct_counts(order), weighting=weighting, fitted=fitted, gates=gates,
            **fields,
        )  # fmt: skip

    def at(self, k: int) -> LayerSelection:
        """The same path after k steps; ValueError if it has fewer, TypeError if k is not an int."""
        expected = f"expected an int from 1 to {len(self.order)}, the path's steps"
        if not is_int(k):
            raise TypeError(f"k: found {k!r}, {expected}")
        if not 1 <= k <= len(self.order):
            raise ValueError(f"k: found {k}, {expected}")

        def first(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:k].clone()

        return LayerSelection.of_path(
            len(self.counts), self.order[:k].clone(), self.weighting, self.fitted, self.gates,
            losses=self.losses[:k].clone(), dense_loss=self.dense_loss, bound=first(self.bound),
            gap=first(self.gap), slices=self.slices, also=self.also, sizes=self.sizes,
            tied=self.tied, share=self.share, part=self.part, rescaled=self.rescaled,
            outputs=self.outputs, loss=self.loss, objective=self.objective,
        )  # fmt: skip

    def of_size(self, size: int) -> LayerSelection:
        """The same path until it has `size` distinct units, which it must have."""
        return self.at(int(torch.searchsorted(self.distinct, size)) + 1)

    def new_weights(self, consumer: str) -> Tensor | None:
        """A consumer's new weights on the kept units' features, (C, K, w) float64.

        None unless weights="refit" has found new weights.
        """
        if self.fitted is None:
            return None
        return _outgoing_ascending(self.fitted[consumer], len(self.kept))


def _outgoing_ascending(fitted: Fit, distinct: int) -> Tensor:
    """The least squares on the first `distinct` units, with these units in ascending order."""
    return fitted.outgoing(distinct)[:, fitted.units[:distinct].argsort()]


def distinct_counts(order: Tensor) -> Tensor:
    """The number of distinct units in order[:i + 1], for each i: (k,) int64."""
    seen: set[int] = set()
    counts = []
    for unit in order.tolist():
        seen.add(unit)
        counts.append(len(seen))
    return torch.tensor(counts, dtype=torch.int64)


def factors(weights: str, counts: Tensor, kept: Tensor) -> Tensor:
    """The factors of the kept units' outgoing weights: (K,) float64.

    weights: "counts", "uniform" or "none", as for `select`
    """
    if weights == "counts":
        return counts[kept].double() * len(counts) / counts.sum()
    value = len(counts) / len(kept) if weights == "uniform" else 1.0
    return torch.full((len(kept),), value, dtype=torch.float64)
