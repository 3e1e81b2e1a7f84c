"""Cutting: from a model and a selection to a physically smaller model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .selection import LayerSelection, Selection

# The attributes with which torch's modules describe the sliced dimension, by (tensor, dimension).
_SIZES = {
    (nn.Linear, "weight", 0): "out_features",
    (nn.Linear, "weight", 1): "in_features",
    (nn.BatchNorm1d, "weight", 0): "num_features",
    (nn.BatchNorm1d, "running_mean", 0): "num_features",
    (nn.PReLU, "weight", 0): "num_parameters",
}


def prune(model: nn.Module, selection: Selection) -> nn.Module:
    """A new, physically smaller model with only the selected units; `model` is untouched.

    Equivalent to: masking the units that were not kept and multiplying the kept units' outgoing
    weights by `selection.layers[name].weights` (after weights="refit": replacing them by it). Only
    the structure and those weights change; biases and everything else stay.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, expected an nn.Module")
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: found {type(selection).__name__}, expected a Selection")
    for name, layer in selection.layers.items():
        _check_fits(model, name, layer)
    small = copy.deepcopy(model)
    with torch.no_grad():
        for layer in selection.layers.values():
            _reweight(small, layer)
        for layer in selection.layers.values():
            _cut(small, layer)
    return small


def _check_fits(model: nn.Module, name: str, layer: LayerSelection) -> None:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for tensor, dim in layer.slices.items():
        if tensor not in tensors:
            raise ValueError(f"selection: layer {name!r} needs {tensor!r}, which the model lacks")
        found = tensors[tensor].shape[dim]
        if found != len(layer.counts):
            raise ValueError(
                f"selection: made for {len(layer.counts)} units in layer {name!r}, but the model's "
                f"{tensor!r} has {found}"
            )

    outputs = tensors[f"{layer.consumer}.weight"].shape[0]
    if outputs != layer.outputs:
        raise ValueError(
            f"selection: made for {layer.outputs} outputs of {layer.consumer!r}, but the model's "
            f"has {outputs}"
        )


def _reweight(model: nn.Module, layer: LayerSelection) -> None:
    """The kept units' outgoing weights, while everything has its full size."""
    weight = dict(model.named_parameters())[f"{layer.consumer}.weight"]
    kept, weights = layer.kept.to(weight.device), layer.weights.to(weight.device)
    if weights.dim() == 1:
        weights = weight[:, kept].double() * weights
    weight[:, kept] = weights.to(weight.dtype)


def _cut(model: nn.Module, layer: LayerSelection) -> None:
    for tensor, dim in layer.slices.items():
        module_name, _, attribute = tensor.rpartition(".")
        module = model.get_submodule(module_name)
        old: Tensor = getattr(module, attribute)
        new = old.index_select(dim, layer.kept.to(old.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(module, attribute, new)
        size = _SIZES.get((type(module), attribute, dim))
        if size is not None:
            setattr(module, size, len(layer.kept))
