"""The names of layers and of their parameters.

A layer is named after its module where its weight is the module's `weight`. Otherwise, as the
packed projections of nn.MultiheadAttention, it has the name of its weight.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .slices import Slice


def layer_name(weight: str) -> str:
    """The name of the layer that has this weight."""
    owner, _, attribute = weight.rpartition(".")
    return owner if owner and attribute == "weight" else weight


def bias_name(weight: str) -> str:
    """The name that the bias of the layer with this weight has, if there is one.

    "": the weight's name does not contain "weight".
    """
    owner, dot, attribute = weight.rpartition(".")
    bias = attribute.replace("weight", "bias")
    return "" if bias == attribute else f"{owner}{dot}{bias}"


def module_of_layer(model: nn.Module, layer: str) -> nn.Module | None:
    """The module that a layer is named after; None: it has the name of its weight."""
    owner, _, attribute = layer.rpartition(".")
    is_weight = attribute in model.get_submodule(owner)._parameters
    return None if is_weight else model.get_submodule(layer)


def owner_of(model: nn.Module, layer: str) -> nn.Module:
    """The module that has a layer's weight."""
    return module_of_layer(model, layer) or model.get_submodule(layer.rpartition(".")[0])


def weight_name(model: nn.Module, layer: str) -> str:
    """The name of a layer's weight."""
    is_weight = module_of_layer(model, layer) is None
    return layer if is_weight else f"{layer}.weight".lstrip(".")


def weight_of(model: nn.Module, layer: str) -> nn.Parameter:
    """A layer's weight."""
    return model.get_parameter(weight_name(model, layer))


def bias_of(model: nn.Module, layer: str) -> nn.Parameter | None:
    """A layer's bias; None: it has none."""
    owner, _, attribute = bias_name(weight_name(model, layer)).rpartition(".")
    return model.get_submodule(owner)._parameters.get(attribute)


def slice_of(slices: Mapping[str, Slice], layer: str) -> Slice:
    """Where a layer's weight holds the units, of the tensors that hold them."""
    return slices[layer if layer in slices else f"{layer}.weight"]
