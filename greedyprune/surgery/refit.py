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

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..data.batches import Batches
from ..data.forward import evaluating
from ..graph.groups import QUERY_KEY
from ..graph.names import weight_name, weight_of
from ..graph.replay import Replay
from ..graph.slices import Entries
from ..graph.tracing import Layer
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
from .layer_fit import LayerFit
from .proof import example_of, prove
from .recovered import selection_of
from .remaining import entries_left
from .selection import Selection

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
) -> LayerFit:
    """Changes one layer of `full` and of the replay's pruned network.

    left: what stays of each dimension that is cut
    """
    path, scale, shifted = replay.linear_path(layer.name), None, layer.bias
    if shifted is None and path.norm is not None:
        shifted, scale = f"{path.norm}.bias", path.scale
    bias = None if shifted is None else full.get_parameter(shifted)
    problem = LayerFit(
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
