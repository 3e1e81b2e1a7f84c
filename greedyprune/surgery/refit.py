"""Least squares once more, for every layer of a pruned network, towards what the dense one gives.

A selection gives new weights to the layers that take its units. All the others, too, get inputs
that differ from the dense network's: convolutions and projections on the way, the classifier at the
end. In the order in which they run, each layer's weights are solved for again on the inputs that
the layers before it leave:

    min_D  |t - (W + D) x|^2 + ridge |D|^2,      t the layer's output in the dense network

where the output is added to a shortcut, corrected for what that lacks (replay.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..data.batches import Batches
from ..data.forward import evaluating
from ..graph.propagate import Layer, Slice
from ..graph.replay import Replay
from ..graph.unfold import module_weight, parts
from ..kernels.products import add_right, add_upper_product, mirror
from ..runtime.distributed import Ranks, ranks_of, unwrapped
from ..runtime.fingerprint import same_on_all
from ..runtime.free_memory import room
from ..runtime.progress import bars
from .cut import check_fits, cut, masked
from .distill import tune
from .hf_config import describe
from .selection import Selection

DAMPING = 1e-3  # of the features' mean square: what a change of the weights costs
Bar = Callable[..., Any]
ROUNDS = 4  # where a ReLU follows: each makes a target of what the last one gave


def refit(
    model: nn.Module,
    selection: Selection,
    data: object,
    *,
    epochs: int = 0,
    memory_limit: int | None = None,
    progress: bool | None = None,
    process_group: ProcessGroup | None = None,
) -> nn.Module:
    """What `prune` gives, with the weights of its layers solved for again, one after the other.

    Every Linear and convolution that runs after the first cut is given, by least squares on the
    pruned network's inputs, the weights with which it comes closest to its output in the dense
    network; no labels, and without `epochs` no gradients. A layer without a bias before a
    normalisation that has one changes that; else none is added. Grouped convolutions and weights
    that are shared with others stay.

    Args:
        model: the dense model that the selection was made on; it is not changed
        selection: from `select`
        data: as for `select`, and best the same; targets are not used
        epochs: tune all layers together afterwards, by gradients through the pruned network towards
            what the dense one's layers hand on, so many times over the data; 20 are a point of
            accuracy or more where much was cut, 0 none
        memory_limit: bytes for the activations between two layers; where they do not fit, they are
            computed again for every layer; None: half the memory that is free
        progress: False: no progress bars
        process_group: as for `select`; all processes get the same model; not with epochs

    Returns:
        a new, physically smaller nn.Module, of the same shapes as `prune`'s

    Raises:
        TypeError, ValueError: no model, a selection for another model, data without samples, NaN
            or inf in a layer's inputs, epochs that are no count or with several ranks, or a model
            that torch.export can't trace

    Example:
        >>> model = torch.nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> data = torch.randn(32, 4), torch.randn(32, 1)
        >>> small = greedyprune.refit(model, greedyprune.select(model, data, size=3), data)
        >>> small[0].weight.shape
        torch.Size([3, 4])
    """
    ranks = ranks_of(process_group)
    with ranks.together():
        model = unwrapped(model)
        check_fits(model, selection)
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise ValueError(f"epochs: found {epochs!r}, expected an int, 0 or more")
        if epochs and ranks.size > 1:
            raise ValueError(
                f"epochs: found {epochs} on {ranks.size} ranks, expected 0: one process tunes"
            )
        batches = Batches(data, model, ranks)
        batches.share_first()
        if batches.once:
            raise ValueError(
                "data: found an iterator, but every layer takes a pass; expected a list, Dataset "
                "or DataLoader"
            )
        bar = bars(progress if ranks.rank == 0 else False)
        shared = memory_limit is None and not batches.on_gpu
        limit = ranks.memory(memory_limit or room(batches.device), shared)
        kept = {f"kept of {n!r}": repr(e.kept.tolist()) for n, e in selection.layers.items()}
        with same_on_all(ranks, model, kept):
            return _refitted(model, selection, batches, epochs, limit, bar)


def _refitted(
    model: nn.Module, selection: Selection, batches: Batches, epochs: int, limit: int, bar: Bar
) -> nn.Module:
    full = masked(model, selection)
    cuts = {name: layer for layer in selection.layers.values() for name in layer.outputs}
    with evaluating(model):
        replay = Replay(model, batches, limit)
        place = replay.order(list(cuts))
        for name in sorted(cuts, key=place.__getitem__):
            replay.change(name, weight=full.get_parameter(f"{name}.weight"))
        layers = replay.after_changes()
        for layer in layers:
            own, channels = cuts.get(layer.name), None
            if own is not None:
                channels = own.slices[layer.weight].entries(own.kept, len(own.counts))
            _solve(full, layer, channels, replay, bar)
        del replay  # and what it holds in memory
        small = cut(full, selection)
        if epochs and layers:
            tune(model, small, selection, layers, batches, epochs, bar)
    describe(small, selection)
    return small


def _solve(
    full: nn.Module, layer: Layer, channels: Tensor | None, replay: Replay, bar: Bar
) -> None:
    """Changes one layer of `full` and of the replay's pruned network.

    channels: of the layer's inputs, those that are left; None: all
    """
    ahead, scale, shifted = replay.ahead(layer.name), None, None
    if layer.bias is not None:
        shifted = layer.name
    elif ahead.norm is not None:
        shifted, scale = ahead.norm, ahead.scale
    bias = None if shifted is None else full.get_parameter(f"{shifted}.bias")
    sums = _Sums(full.get_submodule(layer.name), layer, channels, bias, scale)
    for _ in range(ROUNDS if ahead.rectified else 1):
        for inputs, error in replay.errors(layer.name, bar):
            sums.add(inputs, error)
        sums.solve(replay.ranks)
        replay.change(layer.name, weight=full.get_parameter(layer.weight))
        if shifted is not None and bias is not None:
            replay.change(shifted, bias=bias)


class _Sums:
    """One layer's least squares, over all data.

    bias: what a constant is added to, times `scale`: the layer's own, or its normalisation's
    """

    def __init__(
        self, module: nn.Module, layer: Layer, channels: Tensor | None, bias: Tensor | None,
        scale: Tensor | None,
    ) -> None:  # fmt: skip
        self._module, self._name, self._dim = module, layer.name, layer.in_dim
        self._weight = module.get_parameter("weight")
        self._bias, self._scale = bias, scale
        if channels is None:
            channels = torch.arange(self._weight.shape[self._dim])
        self._channels = channels.to(self._weight.device)
        taps = self._weight[0, 0].numel()
        rows, outputs = len(channels) * taps, self._weight.shape[1 - self._dim]
        rows += self._bias is not None
        zeros = partial(torch.zeros, dtype=torch.float64, device=self._weight.device)
        self._gram, self._right = zeros(rows, rows), zeros(rows, outputs)
        self._factor: Tensor | None = None
        self._again = False  # the inputs are the same in every round

    def add(self, inputs: Tensor, error: Tensor) -> None:
        if not inputs.isfinite().all():
            raise ValueError(
                f"layer {self._name!r}: NaN or inf in its inputs, expected finite numbers"
            )
        for columns, target in parts(self._module, inputs, error):
            assert target is not None
            rows = columns[self._channels].flatten(0, 1)
            if self._bias is not None:  # the weight of a feature that is always 1
                rows = torch.cat([rows, rows.new_ones(1, rows.shape[1])])
            add_right(self._right, rows, target, rows.dtype)
            if not self._again:
                add_upper_product(self._gram, rows, rows.dtype)

    def solve(self, ranks: Ranks) -> None:
        """Changes the layer's weight and the bias, in place."""
        ranks.sum(f"right side {self._name!r}", self._right)
        if not self._again:
            ranks.sum_upper(f"products {self._name!r}", self._gram)
        self._again = True
        change = ranks.on_first(f"weights {self._name!r}", lambda: self._change().cpu())
        change = change.to(self._right)
        self._right.zero_()
        if self._bias is not None:
            constant = change[:, -1] if self._scale is None else change[:, -1] * self._scale
            self._bias.add_(constant.to(self._bias.dtype))
            change = change[:, :-1]
        shaped = change.reshape(len(change), len(self._channels), -1)
        shaped = module_weight(shaped, Slice(self._dim), self._weight)
        self._weight.index_add_(self._dim, self._channels, shaped.to(self._weight.dtype))

    def _change(self) -> Tensor:
        """The least squares, (outputs, rows)."""
        if self._factor is None:
            mirror(self._gram)
            squares = self._gram.diagonal()[: len(self._gram) - (self._bias is not None)]
            squares += DAMPING * float(squares.mean()) or 1.0  # 1: all are dead
            self._factor = torch.linalg.cholesky(self._gram)
        return torch.cholesky_solve(self._right, self._factor).T
