"""Cutting: from a model and a selection to a physically smaller model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ..data.batches import Batch, Batches
from ..graph.groups import Group
from ..graph.propagate import Slice
from ..graph.unfold import module_weight, outputs_of
from ..runtime.distributed import unwrapped
from .hf_config import describe
from .module_sizes import CONV1D, HEADS, SIZES
from .selection import LayerSelection, Selection


def prune(model: nn.Module, selection: Selection) -> nn.Module:
    """A new, physically smaller model with only the selected units; `model` is untouched.

    Of a model in DistributedDataParallel or DataParallel, that is the module inside.

    Equivalent to: masking the units that were not kept and multiplying the kept units' outgoing
    weights by `selection.layers[name].weights` (after weights="refit": replacing them by it). Only
    the structure and those weights change; biases and everything else stay.

    The config of a Hugging Face model is edited where it can say what is left: one width for the
    feed-forward blocks of all layers, or one number of heads where that does not follow from the
    hidden size (Llama's and ViT's, not BERT's or GPT-2's). Then `save_pretrained` works as always.
    It is left as it is where it can't; `save_pruned` keeps any model.

    Raises:
        TypeError: no Selection, or no nn.Module
        ValueError: a selection for another model

    Example:
        >>> model = torch.nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> inputs, targets = torch.randn(32, 4), torch.randn(32, 1)
        >>> selection = greedyprune.select(model, (inputs, targets), size=3)
        >>> greedyprune.prune(model, selection)[0].weight.shape
        torch.Size([3, 4])
    """
    model = unwrapped(model)
    check_fits(model, selection)
    small = cut(masked(model, selection), selection)
    describe(small, selection)
    return small


def recalibrate(model: nn.Module, data: object) -> nn.Module:
    """Estimates the statistics of a model's batch normalisation again, in place; returns the model.

    What `prune` leaves gives other means and variances than the dense network did. One pass over
    the data in training mode (torch.optim.swa_utils.update_bn); nothing else of the model changes.

    Args:
        model: any nn.Module, in eval or training mode, in which it stays
        data: as for `select`; targets are not used

    Raises:
        TypeError: no nn.Module, or no data; ValueError: data without samples
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, expected an nn.Module")
    batches = Batches(data, model)
    batches.first()
    update_bn(batches, _OfBatch(model))
    return model


class _OfBatch(nn.Module):
    """A model as a function of a Batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, batch: Batch) -> object:
        return self.model(*batch.args, **batch.kwargs)


def masked(model: nn.Module, selection: Selection) -> nn.Module:
    """What `prune` gives, at the dense model's size: zeros where a unit is dropped."""
    full = copy.deepcopy(model)
    with torch.no_grad():
        for layer in selection.layers.values():
            _mask(full, layer)
    return full


def with_units(model: nn.Module, kept: Iterable[tuple[Group, Tensor]]) -> Selection:
    """Groups with given units (K,) int64 kept, their weights as they are."""
    nothing = torch.zeros(1, dtype=torch.float64)
    return Selection({
        group.producer: LayerSelection.of_path(
            group.units, units, "none", None, losses=nothing.expand(len(units)),
            dense_loss=nothing[0], bound=None, gap=None, slices=group.slices, loss="mse",
            objective="loss",
            outputs={name: outputs_of(model, group, name) for name in group.consumers},
        )
        for group, units in kept
    })  # fmt: skip


def cut_to(model: nn.Module, groups: Iterable[Group], widths: Mapping[str, int]) -> nn.Module:
    """A new model with the first so many units of each group."""
    selection = with_units(model, ((g, torch.arange(widths[g.producer])) for g in groups))
    return cut(masked(model, selection), selection)


def cut(full: nn.Module, selection: Selection) -> nn.Module:
    """Cuts what `masked` gives, in place; returns it."""
    with torch.no_grad():
        for layer in selection.layers.values():
            _cut(full, layer)
    return full


def check_fits(model: nn.Module, selection: Selection) -> None:
    """TypeError or ValueError where the selection was not made for this model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, expected an nn.Module")
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: found {type(selection).__name__}, expected a Selection")
    for name, layer in selection.layers.items():
        _check_layer(model, name, layer)


def _check_layer(model: nn.Module, name: str, layer: LayerSelection) -> None:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for tensor, at in layer.slices.items():
        if tensor not in tensors:
            raise ValueError(f"selection: layer {name!r} needs {tensor!r}, which the model lacks")
        found = tensors[tensor].shape[at.dim]
        if found != at.width * len(layer.counts):
            raise ValueError(
                f"selection: made for {len(layer.counts)} units in layer {name!r}, but the model's "
                f"{tensor!r} has {found / at.width:g}"
            )

    for consumer, outputs in layer.outputs.items():
        at = layer.slices[f"{consumer}.weight"]
        found = tensors[f"{consumer}.weight"].shape[0 if at.dim else 1]
        if outputs != found:
            raise ValueError(
                f"selection: made for {outputs} outputs of {consumer!r}, but the model's "
                f"has {found}"
            )


def _mask(model: nn.Module, layer: LayerSelection) -> None:
    for consumer in layer.outputs:
        weight = model.get_parameter(f"{consumer}.weight")
        weight.copy_(masked_weight(weight, layer, consumer))


def masked_weight(weight: Tensor, layer: LayerSelection, consumer: str) -> Tensor:
    """A consumer's dense weight with the kept units' new weights, and zeros for the others."""
    at, units = layer.slices[f"{consumer}.weight"], len(layer.counts)
    new = layer.new_weights(consumer)
    if new is None:
        return scaled_weight(weight, at, torch.zeros(units).double().index_copy_(
            0, layer.kept, layer.weights
        ))  # fmt: skip
    here = at.entries(layer.kept, units).to(weight.device)
    changed = module_weight(new, at, weight).to(weight)
    return torch.zeros_like(weight).index_copy_(at.dim, here, changed)


def scaled_weight(weight: Tensor, at: Slice, factors: Tensor) -> Tensor:
    """A consumer's weight with each unit's entries times its factor, (N,) float64."""
    shape = [1] * weight.dim()
    shape[at.dim] = -1
    every = factors.expand(at.outer, -1)[:, :, None].expand(-1, -1, at.inner)
    scale = every.reshape(shape).to(weight.device)
    return (weight.detach().double() * scale).to(weight.dtype)


def _cut(model: nn.Module, layer: LayerSelection) -> None:
    units, kept = len(layer.counts), len(layer.kept)
    heads = {
        name.rpartition(".")[0].rpartition(".")[0] for name, at in layer.slices.items()
        if at.inner > 1 and name.rpartition(".")[0] not in layer.outputs
    }  # fmt: skip
    for name in heads:
        module = model.get_submodule(name)
        for attribute in HEADS:
            size = getattr(module, attribute, None)
            if isinstance(size, int):
                setattr(module, attribute, size * kept // units)
    for tensor, at in layer.slices.items():
        module_name, _, attribute = tensor.rpartition(".")
        module = model.get_submodule(module_name)
        old: Tensor = getattr(module, attribute)
        new = old.index_select(at.dim, at.entries(layer.kept, units).to(old.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(module, attribute, new)
        size = SIZES.get((type(module), attribute, at.dim))
        if size is not None:
            setattr(module, size, new.shape[at.dim])
        if attribute == "weight" and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if module.groups > 1:  # each has its own units
                module.in_channels = module.in_channels * kept // units
                module.groups = module.groups * kept // units
        elif attribute == "weight" and type(module).__name__ == "Conv1D":
            setattr(module, CONV1D[at.dim], new.shape[at.dim])
