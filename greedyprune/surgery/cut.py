"""`prune`: a model and a selection give a physically smaller model, in two steps.

`masked` writes the new weights into a copy of the model, with zeros for the units that are dropped.
`cut` then removes these zeros from every tensor that has entries for the units.
"""

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
from .module_sizes import CONV1D, HEADS, size_name_of
from .selection import LayerSelection, Selection


def prune(model: nn.Module, selection: Selection) -> nn.Module:
    """Returns a new, physically smaller model with only the selected units; `model` is untouched.

    The new model gives the outputs of the dense model with the dropped units masked and the kept
    units' outgoing weights multiplied by `selection.layers[name].weights` (after weights="refit":
    replaced by them). Only the structure and those weights change. Biases and all other parameters
    stay as they are.

    The config of a Hugging Face model is edited if it can describe the smaller model. It can if the
    feed-forward blocks of all layers have one size. It also can if all attention layers have one
    number of heads and the size of a head does not follow from the hidden size (as in Llama and
    ViT, but not in BERT or GPT-2). Then `save_pretrained` works as usual. Otherwise the config is
    left as it is; `save_pruned` saves any model.

    Args:
        model: the dense model that the selection was made for. For a model in
            DistributedDataParallel or DataParallel, the module inside is pruned
        selection: from `select`

    Returns:
        a new nn.Module, with the parameters' dtypes and devices of `model`

    Raises:
        TypeError: `selection` is not a Selection, or `model` is not an nn.Module
        ValueError: the selection was made for another model

    Example:
        >>> model = torch.nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> inputs, targets = torch.randn(32, 4), torch.randn(32, 1)
        >>> selection = greedyprune.select(model, (inputs, targets), size=3)
        >>> greedyprune.prune(model, selection)[0].weight.shape
        torch.Size([3, 4])
    """
    model = unwrapped(model)
    check_made_for(model, selection)
    small = cut(masked(model, selection), selection)
    describe(small, selection)
    return small


def recalibrate(model: nn.Module, data: object) -> nn.Module:
    """Estimates a model's batch-normalisation statistics again, in place, and returns the model.

    Pruning changes the means and variances of the activations. This makes one pass over the data in
    training mode (torch.optim.swa_utils.update_bn). Nothing else of the model changes.

    Args:
        model: any nn.Module; it stays in eval or training mode as it was
        data: as for `select`; targets are not used

    Raises:
        TypeError: `model` is not an nn.Module, or `data` has a type that `select` does not take
        ValueError: the data have no samples

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        >>> inputs = torch.randn(32, 4)
        >>> model = greedyprune.recalibrate(model, inputs)
        >>> torch.allclose(model[1].running_mean, model[0](inputs).mean(0), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, expected an nn.Module")
    batches = Batches(data, model)
    batches.first()  # raises where there are no samples
    update_bn(batches, _OnBatches(model))
    return model


class _OnBatches(nn.Module):
    """A model as a function of one Batch, in the model's mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, batch: Batch) -> object:
        return self.model(*batch.args, **batch.kwargs)


def masked(model: nn.Module, selection: Selection) -> nn.Module:
    """A copy of the model with the new weights, and with zeros for the units that are dropped."""
    full = copy.deepcopy(model)
    with torch.no_grad():
        for layer in selection.layers.values():
            for consumer in layer.outputs:
                weight = full.get_parameter(f"{consumer}.weight")
                weight.copy_(masked_weight(weight, layer, consumer))
    return full


def cut(full: nn.Module, selection: Selection) -> nn.Module:
    """Removes the dropped units from a model that `masked` gives, in place; returns the model."""
    with torch.no_grad():
        for layer in selection.layers.values():
            _cut_layer(full, layer)
    return full


def selection_of_units(model: nn.Module, group_units: Iterable[tuple[Group, Tensor]]) -> Selection:
    """A Selection that keeps given units (K,) int64 of each group, with their weights as they are.

    Its losses are all 0: nothing was scored.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    return Selection({
        group.producer: LayerSelection.of_path(
            group.units, units, "none", None, losses=zero.expand(len(units)),
            dense_loss=zero[0], bound=None, gap=None, slices=group.slices, loss="mse",
            objective="loss",
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
        size = tensors[tensor].shape[at.dim]
        if size != at.width * len(layer.counts):
            raise ValueError(
                f"selection: made for {len(layer.counts)} units in layer {name!r}, but the model's "
                f"{tensor!r} has {size / at.width:g}"
            )
    for consumer, outputs in layer.outputs.items():
        at = layer.slices[f"{consumer}.weight"]
        size = tensors[f"{consumer}.weight"].shape[0 if at.dim else 1]
        if outputs != size:
            raise ValueError(
                f"selection: made for {outputs} outputs of {consumer!r}, but the model's has {size}"
            )


def masked_weight(weight: Tensor, layer: LayerSelection, consumer: str) -> Tensor:
    """A consumer's dense weight with the kept units' new weights, and zeros for the others."""
    at, units = layer.slices[f"{consumer}.weight"], len(layer.counts)
    new = layer.new_weights(consumer)
    if new is None:
        return scaled_weight(weight, at, torch.zeros(units).double().index_copy_(
            0, layer.kept, layer.weights
        ))  # fmt: skip
    kept_entries = at.entries(layer.kept, units).to(weight.device)
    changed = module_weight(new, at, weight).to(weight)
    return torch.zeros_like(weight).index_copy_(at.dim, kept_entries, changed)


def scaled_weight(weight: Tensor, at: Slice, factors: Tensor) -> Tensor:
    """A consumer's weight with each unit's entries times the unit's factor, (N,) float64."""
    shape = [1] * weight.dim()
    shape[at.dim] = -1
    entry_factors = factors.expand(at.outer, -1)[:, :, None].expand(-1, -1, at.inner)
    scale = entry_factors.reshape(shape).to(weight.device)
    return (weight.detach().double() * scale).to(weight.dtype)


def _cut_layer(model: nn.Module, layer: LayerSelection) -> None:
    """Cuts all tensors with entries of the layer's units, and the attributes with their sizes."""
    units, kept = len(layer.counts), len(layer.kept)
    for attention in _attention_modules(layer):
        module = model.get_submodule(attention)
        for attribute in HEADS:
            size = getattr(module, attribute, None)
            if isinstance(size, int):
                setattr(module, attribute, size * kept // units)
    for name, at in layer.slices.items():
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        dense: Tensor = getattr(module, attribute)
        small = dense.index_select(at.dim, at.entries(layer.kept, units).to(dense.device))
        if isinstance(dense, nn.Parameter):
            small = nn.Parameter(small, requires_grad=dense.requires_grad)
        setattr(module, attribute, small)
        size_name = size_name_of(module, attribute, at.dim)
        if size_name is not None:
            setattr(module, size_name, small.shape[at.dim])
        if attribute == "weight" and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if module.groups > 1:  # each group of the convolution has its own units
                module.in_channels = module.in_channels * kept // units
                module.groups = module.groups * kept // units
        elif attribute == "weight" and type(module).__name__ == "Conv1D":
            setattr(module, CONV1D[at.dim], small.shape[at.dim])


def _attention_modules(layer: LayerSelection) -> set[str]:
    """The modules that hold projections whose outputs are the units, where a unit is a head.

    Where a unit has several entries in a row of a tensor, it is a head (or several features of a
    consumer, which do not count here).
    """
    projections = {
        name.rpartition(".")[0] for name, at in layer.slices.items() if at.inner > 1
    } - layer.outputs.keys()
    return {name.rpartition(".")[0] for name in projections}
