"""What a layer's output goes through before anything nonlinear: its *linear path*."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx

from .nodes import IDENTITY, ancestors, operation, shape_of
from .propagate import RESHAPING
from .tracing import Graph

SMALLEST_SCALE = 1e-3  # of the largest one: channels that are scaled by less are not corrected


class LinearPath(NamedTuple):
    """What a layer's output goes through before anything nonlinear: end = scale * output + ...

    end:       the last node of the path
    scale:     (C,), by which each output channel has been multiplied; None: 1
    norm:      the batch normalisation that follows the layer at once, if it is the only one: a
               constant for the output can be added to its bias. None: there is none
    shortcut:  the node that is added on the way, if one is
    rectified: a ReLU follows `end`
    """

    end: fx.Node
    scale: Tensor | None
    norm: str | None
    shortcut: fx.Node | None
    rectified: bool

    def scaled(self, change: Tensor) -> Tensor:
        """The change at `end` for a change of the layer's output, both (C, positions)."""
        return change if self.scale is None else self.scale[:, None] * change

    def unscaled(self, change: Tensor) -> Tensor:
        """The change of the layer's output that gives a change at `end`, both (C, positions).

        0 for channels whose scale is next to nothing.
        """
        if self.scale is None:
            return change
        scale = self.scale[:, None]
        corrected = scale.abs() > SMALLEST_SCALE * scale.abs().max()
        return torch.where(corrected, change / torch.where(corrected, scale, 1.0), 0.0)


def linear_path(graph: Graph, layer: fx.Node) -> LinearPath:
    """What follows a layer until something nonlinear."""
    node, scale, norm, shortcut = layer, None, None, None
    while len(node.users) == 1:
        user = next(iter(node.users))
        op = operation(user)
        if op == "relu":
            return LinearPath(node, scale, norm, shortcut, True)
        if shortcut is not None:
            break
        if op == "batch_norm" and _is_fixed(graph, user) and len(shape_of(user)) > 1:
            bias, norm = user.args[2], None
            if node is layer and isinstance(bias, fx.Node) and len(bias.users) == 1:
                norm = graph.tensors[bias.name].rpartition(".")[0]
            factor = _norm_scale(graph, user)
            scale = factor if scale is None else scale * factor
        elif op == "add" and all(isinstance(arg, fx.Node) for arg in user.args):
            others = [arg for arg in user.all_input_nodes if arg is not node]
            # Not a sum with itself, nor with what both networks have alike.
            if len(others) != 1 or others[0].op == "placeholder" or user.kwargs:
                break
            if any(shape_of(term) != shape_of(user) for term in (node, others[0])):
                break  # one of them is broadcast, as a vector that is added to a feature map
            if layer in ancestors(others[0]):
                break
            shortcut = others[0]
        elif op not in IDENTITY | RESHAPING or (scale is not None and op in RESHAPING):
            break
        node = user
    return LinearPath(node, scale, norm, shortcut, False)


def _is_fixed(graph: Graph, norm: fx.Node) -> bool:
    """Does a batch normalisation use stored statistics and the model's own parameters only?"""
    arguments = norm.all_input_nodes[1:]
    return norm.args[5] is False and all(argument.name in graph.tensors for argument in arguments)


def _norm_scale(graph: Graph, norm: fx.Node) -> Tensor:
    """The factors by which a batch normalisation multiplies the channels, (C,)."""
    weight, variance = _tensor(graph, norm.args[1]), _tensor(graph, norm.args[4])
    assert variance is not None
    factor = (variance + float(norm.args[7])).rsqrt()  # type: ignore[arg-type]
    return factor if weight is None else factor * weight


def _tensor(graph: Graph, node: object) -> Tensor | None:
    name = graph.tensor_of(node)
    if name is None:
        return None
    module, _, attribute = name.rpartition(".")
    return getattr(graph.model.get_submodule(module), attribute).detach()
