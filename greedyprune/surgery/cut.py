"""`prune`: a model and a selection give a physically smaller model, in two steps.

`masked` writes the new weights into a copy of the model, with zeros for the units that are dropped.
`cut` then removes these zeros from every tensor that has entries for the units.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from ..data.batches import Batch, Batches, example_batch
from ..data.forward import run_model
from ..graph.groups import QUERY_KEY, Group
from ..graph.names import slice_of, weight_name, weight_of
from ..graph.slices import Entries, Slice
from ..graph.unfold import module_weight, out_dim_of, outputs_of
from ..runtime.modules import module_of
from .attention import fit_attention
from .copying import copied
from .hf_config import describe
from .layer_selection import LayerSelection
from .module_sizes import HEADS, holders_of, note_size, sizes_after, tied_sizes
from .proof import prove
from .recurrent import fit_recurrent
from .remaining import check_shares, entries_left, sizes_left
from .selection import Selection


def prune(model: nn.Module, selection: Selection, example: object = None) -> nn.Module:
    """Returns a new, physically smaller model with only the selected units; `model` is untouched.

    The new model gives the outputs of the dense model with the dropped units masked and the kept
    units' outgoing weights multiplied by `selection.layers[name].weights` (after weights="refit":
    replaced by them). Only the structure and those weights change. Biases and all other parameters
    stay as they are.

    The config of a Hugging Face model is edited if it can describe the smaller model, and then
    `save_pretrained` and `from_pretrained` work as usual. Most configs describe one size for the
    feed-forward blocks of all layers, as Budget(uniform=True) gives, and some one number of heads
    (Llama and ViT, but not BERT or GPT-2). If none does, the smaller model's `save_pretrained`
    raises a ValueError that says what to do; `save_pruned` saves any model. `greedyprune.layers`
    and `Selection.summary` say beforehand which it will be.

    The new model keeps dtypes, devices, memory formats, `requires_grad`, names and hooks. Functions
    that modules hold, such as a closure in the place of a forward, run the new model's own modules.
    What torch.compile made of them is dropped: compile the new model again.

    The new model runs once, on at most two samples, and has to give the outputs that the dense
    model gives with the new weights. This is left out if there are no samples: the Selection comes
    from a file and there is no `example`.

    Args:
        model: the dense model that the selection was made for, or one of the same architecture.
            Weights are not compared, because the model may have been trained since. New weights
            from weights="refit" fit only the weights that they were solved with. For a model in
            DistributedDataParallel, DataParallel or torch.compile, the module inside is pruned
        selection: from `select`
        example: inputs for one forward pass, on which the new model is checked: a tensor, a tuple
            of the forward's arguments or a dict of keyword arguments. None: the samples that the
            Selection has kept from the data

    Returns:
        a new nn.Module

    Raises:
        TypeError: `selection` is not a Selection, `model` is not an nn.Module, or `example` has
            another type
        ValueError: the selection was made for a model with other layers or other sizes; the model
            can't be copied, because it has an attribute that can't, or a function that holds
            parameters from outside the model; or the new model gives other outputs than the dense
            model with the units masked

    Example:
        >>> model = torch.nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> inputs, targets = torch.randn(32, 4), torch.randn(32, 1)
        >>> selection = greedyprune.select(model, (inputs, targets), size=3)
        >>> greedyprune.prune(model, selection)[0].weight.shape
        torch.Size([3, 4])
    """
    model = module_of(model)
    check_made_for(model, selection)
    batch = selection.example if example is None else example_batch(example)
    full = masked(model, selection)
    weights = {name: full.get_parameter(name).data for name in masked_names(model, selection)}
    small = cut(full, selection)
    if batch is not None:
        prove(model, weights, small, batch, entries_left(selection.layers.values()))
    describe(small, selection)
    return small


def recalibrate(model: nn.Module, data: object) -> nn.Module:
    """Estimates a model's batch-normalisation statistics again, in place, and returns the model.

    Pruning changes the means and variances of the activations. This makes one pass over the data in
    training mode (torch.optim.swa_utils.update_bn). Nothing else of the model changes. Where an
    error is raised, nothing changes at all.

    Args:
        model: any nn.Module; it stays in eval or training mode as it was
        data: as for `select`; targets are not used

    Raises:
        TypeError: `model` is not an nn.Module, or `data` has a type that `select` does not take
        ValueError: the data have no samples, the model can't run on them, or the inputs of a batch
            normalisation have NaN or inf

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        >>> inputs = torch.randn(32, 4)
        >>> model = greedyprune.recalibrate(model, inputs)
        >>> torch.allclose(model[1].running_mean, model[0](inputs).mean(0), atol=1e-5)
        True
    """
    module = module_of(model)
    batches = Batches(data, module)
    batches.first()  # raises where there are no samples
    with _as_before_on_errors(module):
        update_bn(batches, _OnBatches(module))
        for name, norm in _batch_norms(module):
            if not all(buffer.isfinite().all() for buffer in norm.buffers()):
                raise ValueError(
                    f"layer {name!r}: NaN or inf in its inputs on the data, expected finite numbers"
                )
    return model


def _batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]


@contextmanager
def _as_before_on_errors(model: nn.Module) -> Iterator[None]:
    """Gives a model its statistics, momenta and modes back where something raises inside."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for _, norm in _batch_norms(model)]
    buffers = [(buffer, buffer.clone()) for norm, _ in momenta for buffer in norm.buffers()]
    try:
        yield
    except BaseException:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
        for buffer, saved in buffers:
            buffer.copy_(saved)
        raise


class _OnBatches(nn.Module):
    """A model as a function of one Batch, in the model's mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, batch: Batch) -> object:
        return run_model(self.model, batch)


def masked(model: nn.Module, selection: Selection) -> nn.Module:
    """A copy of the model with the new weights, and with zeros for the units that are dropped."""
    full = copied(model)
    mask(full, selection)
    return full


def mask(full: nn.Module, selection: Selection) -> None:
    """The same in place, for a copy of the model."""
    with torch.inference_mode(False), torch.no_grad():
        for layer in selection.layers.values():
            for consumer in layer.outputs:
                weight = weight_of(full, consumer)
                weight.copy_(masked_weight(weight, layer, consumer))
        for layer in selection.layers.values():  # a consumer may give queries and keys
            for name in layer.tied:
                weight = full.get_parameter(name)
                weight.copy_(masked_tied(weight, layer, name))
    fit_recurrent(full)


def masked_names(model: nn.Module, selection: Selection) -> list[str]:
    """The names of the tensors that `masked` changes."""
    names = list[str]()
    for layer in selection.layers.values():
        names += [*(weight_name(model, consumer) for consumer in layer.outputs), *layer.tied]
    return list(dict.fromkeys(names))


def cut(full: nn.Module, selection: Selection) -> nn.Module:
    """Removes the dropped units from a model that `masked` gives, in place; returns the model."""
    with torch.inference_mode(False), torch.no_grad():
        for layer in selection.layers.values():
            _set_heads(full, layer)
            _rescale(full, layer)
        _cut_tensors(full, entries_left(selection.layers.values()))
        _set_sizes(full, sizes_left(selection.layers.values()))
    fit_attention(full)
    fit_recurrent(full)
    return full


def selection_of_units(model: nn.Module, group_units: Iterable[tuple[Group, Tensor]]) -> Selection:
    """A Selection that keeps given units (K,) int64 of each group, with their weights as they are.

    Its losses are all 0: nothing was scored.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    return Selection({
        group.producer: LayerSelection.of_path(
            group.units, units, "none", None, losses=zero.expand(len(units)),
            dense_loss=zero[0], bound=None, gap=None, **group.cut,
            loss="mse", objective="loss",
            outputs={name: outputs_of(model, group, name) for name in group.consumers},
        )
        for group, units in group_units
    })  # fmt: skip


def cut_to(model: nn.Module, groups: Iterable[Group], widths: Mapping[str, int]) -> nn.Module:
    """A new model with the first widths[producer] units of each group."""
    selection = selection_of_units(model, ((g, torch.arange(widths[g.producer])) for g in groups))
    return cut(masked(model, selection), selection)


def check_made_for(model: nn.Module, selection: Selection) -> None:
    """Raises TypeError or ValueError unless the selection was made for this model."""
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: found {_kind_of(selection)}, expected a Selection")
    for name, layer in selection.layers.items():
        _check_layer(model, name, layer)
    check_shares(selection.layers)


def _kind_of(selection: object) -> str:
    if selection is None:
        return "None, which a PretrainingMonitor has before its first check"
    return type(selection).__name__


def _check_layer(model: nn.Module, name: str, layer: LayerSelection) -> None:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for tensor, at in (*layer.slices.items(), *layer.also.items()):
        if tensor not in tensors:
            raise ValueError(f"selection: layer {name!r} needs {tensor!r}, which the model lacks")
        size = tensors[tensor].shape[at.dim]
        if size != at.size:
            units = (size - at.size) / at.width + at.units
            raise ValueError(
                f"selection: made for {at.units} units in layer {name!r}, but the model's "
                f"{tensor!r} has {units:g}"
            )
    for consumer, outputs in layer.outputs.items():
        outputs_dim = out_dim_of(slice_of(layer.slices, consumer).dim)
        size = weight_of(model, consumer).shape[outputs_dim]
        if outputs != size:
            raise ValueError(
                f"selection: made for {outputs} outputs of {consumer!r}, but the model's has {size}"
            )


def masked_weight(weight: Tensor, layer: LayerSelection, consumer: str) -> Tensor:
    """A consumer's dense weight with the kept units' new weights, and zeros for the others."""
    at, new = slice_of(layer.slices, consumer), layer.new_weights(consumer)
    if new is None:
        return scaled_weight(weight, at, torch.zeros(at.units).double().index_copy_(
            0, layer.kept, layer.weights
        ))  # fmt: skip
    places, kept = (p.flatten().to(weight.device) for p in (at.places, at.places[layer.kept]))
    changed = module_weight(new, at.dim, weight).to(weight)
    return weight.index_fill(at.dim, places, 0).index_copy_(at.dim, kept, changed)


def masked_tied(weight: Tensor, layer: LayerSelection, name: str) -> Tensor:
    """A weight of `layer.tied`, with zeros for the units that are dropped."""
    at = layer.slices[name]
    return weight.index_fill(at.dim, at.without_units(layer.kept).to(weight.device), 0)


def without_query_keys(tensor: Tensor, name: str, layers: Iterable[LayerSelection]) -> Tensor:
    """The parameter of this name, with zeros for the query-key units that these layers drop."""
    for layer in layers:
        if layer.part == QUERY_KEY and name in layer.tied:
            tensor = masked_tied(tensor, layer, name)
    return tensor


def scaled_weight(weight: Tensor, at: Slice, factors: Tensor) -> Tensor:
    """A consumer's weight with each unit's entries times the unit's factor, (N,) float64."""
    shape = [1] * weight.dim()
    shape[at.dim] = -1
    scale = torch.ones(at.size, dtype=torch.float64)
    scale[at.places] = factors.double().cpu()[:, None]
    scale = scale.view(shape).to(weight.device)
    return (weight.detach().double() * scale).to(weight.dtype)


def _rescale(model: nn.Module, layer: LayerSelection) -> None:
    """Keeps attention scores as they are where the code divides them by the root of the units.

    Queries and keys get the same factor.
    """
    factor = (len(layer.kept) / len(layer.counts)) ** 0.25
    for name in layer.rescaled:
        tensor, at = model.get_parameter(name), layer.slices[name]
        tensor.data = scaled_weight(tensor, at, torch.full((at.units,), factor))


def _set_heads(model: nn.Module, layer: LayerSelection) -> None:
    """Sets the numbers of heads of attention modules, where the layer's units are heads."""
    units, kept = len(layer.counts), len(layer.kept)
    for attention in _attention_modules(layer):
        module = model.get_submodule(attention)
        for attribute in HEADS:
            size = getattr(module, attribute, None)
            if isinstance(size, int):
                setattr(module, attribute, size * kept // units)


def _set_sizes(model: nn.Module, sizes: Mapping[str, int]) -> None:
    """Sets attributes by their names: "module.attribute", or "module.attribute[i]" for an entry."""
    for name, size in sizes.items():
        parts = re.fullmatch(r"(?:(.*)\.)?([^.\[]+)(?:\[(\d+)\])?", name)
        assert parts is not None
        owner, attribute, entry = parts.groups()
        module = model.get_submodule(owner or "")
        new: Any = size
        if entry is not None:
            old: Any = getattr(module, attribute)
            new = type(old)([*old[: int(entry)], size, *old[int(entry) + 1 :]])
        setattr(module, attribute, new)
        note_size(module, attribute)


def _cut_tensors(model: nn.Module, entries: Entries) -> None:
    """Cuts tensors down to these entries of their dimensions, and sets attributes with sizes."""
    by_owner: dict[str, dict[tuple[str, int], Tensor]] = {}
    for (name, dim), left in entries.items():
        owner, _, tensor = name.rpartition(".")
        by_owner.setdefault(owner, {})[tensor, dim] = left
    holders = holders_of(model)
    for owner, cuts in by_owner.items():
        module = model.get_submodule(owner)
        sizes = sizes_after(module, {key: len(left) for key, left in cuts.items()})
        for tied, new in tied_sizes(holders, module, cuts):
            for attribute, size in new.items():
                setattr(tied, attribute, size)
        for (tensor, dim), left in cuts.items():
            dense: Tensor = getattr(module, tensor)
            # The tensor stays the same object: functions that hold it use the smaller one, too.
            dense.data = in_format_of(dense, dense.index_select(dim, left.to(dense.device)))
        for attribute, size in sizes.items():
            setattr(module, attribute, size)


def in_format_of(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with its dimensions in the order in memory that `like` has, as channels_last."""
    if tensor.dim() != like.dim():
        return tensor
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda dim: -strides[dim])
    places = sorted(range(like.dim()), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(places)


def _attention_modules(layer: LayerSelection) -> set[str]:
    """The modules whose outputs are the units, or that hold these, where a unit is a head.

    Where a unit has several entries in a row of a tensor, it is a head (or several features of a
    consumer, which do not count here).
    """
    projections = {
        name.rpartition(".")[0]
        for name, at in layer.slices.items()
        if at.neighbours > 1 and not layer.part
    } - layer.outputs.keys()
    return projections | {name.rpartition(".")[0] for name in projections}
