"""`refit`: least squares for each layer of a pruned network, towards the dense network's outputs.

A selection gives new weights only to the layers that take the selected units as inputs. The layers
after them also receive inputs that differ from the dense network's. `refit` visits all these layers
in the order in which they run. It solves for the weights of each layer, on the inputs that the
layer receives from the layers refitted before it:

    min over D of  |t - (W + D) x|^2 + ridge |D|^2

x is the layer's input in the pruned network, W its dense weights on these inputs (or what the
selection made of them without least squares), D their change, and t the layer's output in the dense
network. Where the output is added to a shortcut, t also compensates for the shortcut's error
(graph/replay.py). The ridge is chosen for each layer by 2-fold cross-validation over the samples. A
layer whose new weights would be no better on held-out samples than W keeps its weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..data.batches import Batches
from ..data.forward import all_finite, evaluating
from ..data.padding import NO_POSITION
from ..data.positions import Sampling
from ..graph.groups import QUERY_KEY
from ..graph.linear_paths import LinearPath
from ..graph.names import weight_name, weight_of
from ..graph.replay import PathValues, Replay
from ..graph.slices import Entries
from ..graph.tracing import Layer
from ..graph.unfold import columns_in_halves, module_weight, outputs_first, positions_shape
from ..kernels.least_squares import Halves, chosen_damping, ridge
from ..kernels.products import FAST, PendingColumns, mirror
from ..runtime.arguments import is_int, positive_int
from ..runtime.distributed import Ranks, ranks_of
from ..runtime.fingerprint import same_on_all
from ..runtime.free_memory import room
from ..runtime.modules import module_of
from ..runtime.progress import Bar, bars, warn
from .attention import attending_as
from .cut import check_made_for, cut, masked, masked_names
from .distill import distill
from .hf_config import describe
from .proof import example_of, prove
from .recovered import selection_of
from .remaining import entries_left
from .selection import Selection

DAMPING = 1e-3  # the least ridge, as a share of the features' mean square
ROUNDS = 4  # of least squares before a ReLU: each takes its target from the last one's outputs


def refit(
    model: nn.Module,
    selection: Selection | nn.Module | Mapping[str, Sequence[int]],
    data: object,
    *,
    epochs: int = 0,
    mask: str | None = "auto",
    memory_limit: int | None = None,
    progress: bool | None = None,
    process_group: ProcessGroup | None = None,
) -> nn.Module:
    """Prunes as `prune` does, and solves for the weights of the layers again.

    This works after any tool's pruning: give the pruned model, or the units to keep, in the place
    of a Selection.

    Every Linear and convolution that runs after the first cut gets new weights, by least squares:
    on its inputs in the pruned network, its outputs come as close as possible to its outputs in
    the dense network. Layers are solved in the order in which they run. This takes no labels and,
    without `epochs`, no gradients. If a layer has a bias, the bias is solved for, too. If it has
    none but a normalisation with a bias follows, that bias is solved for. No bias is added. Grouped
    convolutions and weights that several layers share stay as they are.

    Few samples are no danger: each layer's weights are held near the dense ones by a ridge, whose
    strength is chosen by 2-fold cross-validation over the samples. A layer whose new weights would
    be no better on held-out samples keeps its weights, and a warning names it.

    Args:
        model: the dense model that the selection was made for; it is not changed
        selection: from `select`. Or a model that another tool has pruned, a smaller copy of
            `model`: which units it has is found by comparing weights, so it must not have been
            trained since. Or the kept units by layer, with the names of `greedyprune.layers`
        data: as for `select`, preferably the same data; targets are not used
        epochs: passes over the data in which all layers are then trained together, by gradients,
            towards the outputs of the dense network's layers. A tenth of the samples is held out;
            the weights are those of the epoch that was best on it. 0: none. If many units were
            removed, 20 epochs gain a point of accuracy or more
        mask: as for `select`: which positions of padded sequences count
        memory_limit: bytes for the activations between two layers. If they do not fit, they are
            computed again for every layer. None: half the free memory
        progress: False hides the progress bars
        process_group: a group of torch.distributed; None: the default group, if there is one. Each
            process brings its own part of the data, and all get the same model

    Returns:
        a new, physically smaller nn.Module, with the same shapes as `prune`'s

    Raises:
        TypeError: `model`, `selection` or `data` has another type
        ValueError: the selection was made for a model of other sizes, or one of `prune`'s other
            reasons; the pruned model's units are not units of `greedyprune.layers`; the data are an
            iterator or have no samples, or the model can't run on them; a layer's inputs have NaN
            or inf; `epochs` is not an int of 0 or more, or is above 0 with several processes or for
            dimensions inside heads; `memory_limit` is below 1; or torch.export can't trace the
            model

    Example:
        >>> model = torch.nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> data = torch.randn(32, 4), torch.randn(32, 1)
        >>> small = greedyprune.refit(model, greedyprune.select(model, data, size=3), data)
        >>> small[0].weight.shape
        torch.Size([3, 4])
    """
    ranks = ranks_of(process_group)
    with ranks.together(), torch.inference_mode(False):
        model = module_of(model)
        if isinstance(selection, Selection | None):
            check_made_for(model, selection)
        _check_epochs(epochs, ranks)
        if epochs and isinstance(selection, Selection):
            inside = [name for name, layer in selection.layers.items() if layer.part]
            if inside:
                raise ValueError(
                    f"epochs: found {epochs} for {inside[0]!r}, whose units are inside attention's "
                    "heads; expected 0"
                )
        memory_limit = positive_int("memory_limit", memory_limit)
        batches = _batches_of(data, model, ranks, mask)
        if not isinstance(selection, Selection):
            pruned = module_of(selection) if isinstance(selection, nn.Module) else selection
            with evaluating(model):
                selection = selection_of(model, pruned, batches.first())
        bar = bars(progress if ranks.rank == 0 else False)
        shared = memory_limit is None and not batches.on_gpu
        limit = ranks.memory(memory_limit or room(batches.device), shared)
        selected = selection.layers.items()
        kept = {f"kept of {name!r}": repr(layer.kept.tolist()) for name, layer in selected}
        with same_on_all(ranks, model, kept):
            return _refit(model, selection, batches, epochs, limit, bar)


def _check_epochs(epochs: int, ranks: Ranks) -> None:
    if not is_int(epochs) or epochs < 0:
        raise ValueError(f"epochs: found {epochs!r}, expected an int, 0 or more")
    if epochs and ranks.size > 1:
        raise ValueError(
            f"epochs: found {epochs} with {ranks.size} ranks, expected 0, or a process_group of "
            "one process"
        )


def _batches_of(data: object, model: nn.Module, ranks: Ranks, mask: str | None) -> Batches:
    """The data as batches that can be read once for each layer."""
    batches = Batches(data, model, ranks, mask)
    batches.share_first()
    if batches.once:
        raise ValueError(
            "data: found an iterator, but every layer takes a pass; expected a list, Dataset or "
            "DataLoader"
        )
    return batches


def _refit(
    model: nn.Module, selection: Selection, batches: Batches, epochs: int, limit: int, bar: Bar
) -> nn.Module:
    full = masked(model, selection)
    consumers = {name for layer in selection.layers.values() for name in layer.outputs}
    left = entries_left(selection.layers.values())
    with evaluating(model):
        replay = Replay(model, batches, limit)
        replay.keep_only(left)
        changes: list[dict[str, Tensor]] = [
            {weight_name(model, name): weight_of(full, name)} for name in consumers
        ]
        changes += [
            {name: full.get_parameter(name) for name in layer.tied}
            for layer in selection.layers.values() if layer.part == QUERY_KEY
        ]  # fmt: skip
        for name, tensors in replay.in_order(changes):
            replay.change(name, tensors)
        layers = replay.after_changes()
        stayed = list[str]()
        for layer in layers:
            problem = _refit_layer(model, full, layer, left, replay, bar)
            if problem.stays:
                stayed.append(repr(layer.name))
        if stayed:
            warn(
                f"data: these layers keep their weights: {', '.join(stayed)}. New ones were no "
                "better on held-out samples; more samples may change that"
            )
        names = dict.fromkeys([*replay.changed, *masked_names(model, selection)])
        weights = {name: full.get_parameter(name).data for name in names}
        del replay  # and the activations that it holds
        small = cut(full, selection)
        prove(model, weights, small, example_of(model, batches.first()), left)
        del weights
        if epochs and layers:
            with attending_as(model, small):
                distill(model, small, selection, layers, batches, epochs, bar)
    describe(small, selection)
    return small


def _refit_layer(
    model: nn.Module, full: nn.Module, layer: Layer, left: Entries, replay: Replay, bar: Bar
) -> _LeastSquares:
    """Changes one layer of `full` and of the replay's pruned network.

    left: what stays of each dimension that is cut
    """
    path, scale, shifted = replay.linear_path(layer.name), None, layer.bias
    if shifted is None and path.norm is not None:
        shifted, scale = f"{path.norm}.bias", path.scale
    bias = None if shifted is None else full.get_parameter(shifted)
    problem = _LeastSquares(
        full.get_parameter(layer.weight), layer, left, bias, scale, replay.maps(layer),
        replay.samples,
    )  # fmt: skip
    if (layer.weight, layer.in_dim) in left:
        problem.start_from(model.get_parameter(layer.weight))
    for _ in range(ROUNDS if path.rectified else 1):
        for batch in replay.visit_path(layer.name, bar):
            problem.add(batch)
        problem.solve(replay.ranks)
        if problem.stays:
            break
        changed = {layer.weight: full.get_parameter(layer.weight)}
        if shifted is not None and bias is not None:
            changed[shifted] = bias
        replay.change(layer.name, changed)
    return problem


class _LeastSquares:
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
        scale: Tensor | None, maps: Sequence[tuple[Tensor, Tensor | float]], samples: int,
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
        self._dtype = torch.float32  # of products
        self.rows = 0  # positions in the sums
        self._maps, self._samples = maps, samples
        self._sampling: Sampling | None = None  # not known before the first batch
        self._change = zeros(rows, outputs)
        self._added = zeros(outputs, rows)  # the last round's change of the weights
        self._damping: float | None = None  # chosen in the first round; inf: the weights stay

    def start_from(self, dense: Tensor) -> None:
        """The weights that the ridge is towards: the dense ones of the kept channels."""
        change = self._weight.double() - dense.double()
        change = change.index_select(self._dim, self._channels)
        change = change.index_select(self._out_dim, self._outputs)
        self._change[: self.features] = outputs_first(change, self._dim).flatten(1).T

    def add(self, batch: PathValues) -> None:
        """Adds one batch: the layer's inputs, and by what its outputs are to change."""
        inputs, path = batch.inputs, batch.inputs.path
        if self._sampling is None:
            shape = positions_shape(self._window, inputs.pruned)
            self._sampling = Sampling.of(
                batch.draws, self._samples, shape, batch.mask, self.features, len(self._outputs)
            )
            wide = torch.float64 if inputs.pruned.dtype == torch.float64 else torch.float32
            self._dtype = FAST if self._sampling.long else wide
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
        return product if isinstance(bias, float) else product + bias.to(product)[:, None]

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
        self._pending[half].to_sums(gram, self._rights[half], self._dtype)

    @property
    def stays(self) -> bool:
        """Are the new weights no better than the dense ones on held-out samples?"""
        return self._damping == math.inf

    def solve(self, ranks: Ranks) -> None:
        """Changes the layer's weight and the bias, in place, for the sums over all ranks."""
        for half, right in enumerate(self._rights):
            self._add_pending(half)
            ranks.sum(f"right side {self._name!r} {half}", right)
        if self._damping is None:
            for half, gram in enumerate(self._grams):
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
        self._added = added = added.T
        if self._bias is not None:
            constant = added[:, -1]
            if self._scale is not None:
                constant = constant * self._scale[self._outputs]
            self._bias.index_add_(0, self._outputs, constant.to(self._bias.dtype))
            added = added[:, :-1]
        shaped = module_weight(added, self._dim, self._weight).to(self._weight.dtype)
        whole = shaped.new_zeros(self._weight.shape)
        whole = whole.index_select(self._dim, self._channels)
        whole.index_copy_(self._out_dim, self._outputs, shaped)
        self._weight.index_add_(self._dim, self._channels, whole)

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
