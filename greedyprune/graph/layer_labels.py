"""How layers carry the ids of entries: from their inputs' channels to their outputs'."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from .classes import Ids
from .labels import Labels, Operand, State
from .nodes import CONVOLUTIONS, arguments_of, data_input, first_of, operation, shape_of
from .norm_labels import Norm
from .recurrent_labels import RecurrentOperations
from .tracing import Layer


class LayerOperations(RecurrentOperations):
    """Linear maps and convolutions."""

    def _through_layer(self, node: fx.Node) -> State:
        """A layer sums over its input's channels; a convolution may do so in groups."""
        inputs = data_input(node)
        layer = self.graph.layers.get(node) or self.graph.tied.get(node)
        state = self.of(inputs)
        if layer is None and self._is_depthwise(node):
            return self._through_depthwise(node)
        if layer is None:
            reason = f"{node.target} takes its units, but its weight is no parameter"
            return self._refused(node, reason)
        if (along := self._along_units(node, layer)) is not None:
            return along
        outputs, taken = (
            self.parameters[layer.weight, dim] for dim in (layer.out_dim, layer.in_dim)
        )
        if layer.bias is not None:
            self.classes.unite(self.parameters[layer.bias, 0], outputs)
        channels = self._channels(node, layer, state)
        if channels is None:  # the model's own inputs
            self.classes.fix(taken, "its inputs are not a layer's units")
            if layer.groups > 1:
                self.classes.fix(outputs, "its inputs are not a layer's units")
        elif layer.groups == 1:
            self.classes.unite(channels, taken)
        else:
            self._through_groups(node, layer, channels, outputs, taken)
        last = len(shape_of(inputs)) if layer.window is not None else layer.channel_dim + 1
        mixed = set(range(layer.channel_dim, last))  # the channels and a window's positions
        others = [labels for labels in state if mixed.isdisjoint(labels.dims)]
        return (*others, Labels((layer.channel_dim,), outputs))

    def _along_units(self, node: fx.Node, layer: Layer) -> State | None:
        """The ids after a convolution of one channel that goes over units; None: it is no such one.

        Efficient channel attention (arXiv:1910.03151) has it. As with a norm, the units that are
        left have other neighbours where some go.
        """
        inputs, at = data_input(node), layer.channel_dim
        if layer.window is None or shape_of(inputs) != shape_of(node) or shape_of(node)[at] != 1:
            return None
        state = self.of(inputs)
        over = [labels for labels in state if any(dim > at for dim in labels.dims)]
        along = [labels for labels in over if len(labels.dims) == 1]
        others = [labels for labels in state if not any(dim > at for dim in labels.dims)]
        if len(over) != 1 or len(along) != 1 or set(layer.window.stride) != {1}:
            return None
        for dim in (layer.out_dim, layer.in_dim):
            ids = self.parameters[layer.weight, dim]
            self.classes.fix(ids, "its one channel goes over the units of another layer")
        self.norms.append(Norm(node, along[0].dims[0], along[0].ids))
        return (*others, *along)

    def _channels(self, node: fx.Node, layer: Layer, state: State) -> Ids | None:
        """The ids along a layer's input channels, the same at all positions."""
        at = layer.channel_dim
        if layer.window is not None:
            last = range(at + 1, len(shape_of(data_input(node))))
            state = self._mixed(node, state, last)
        for labels in state:
            if at in labels.dims:
                axis = labels.dims.index(at)
                others = tuple(i for i in range(labels.ids.ndim) if i != axis)
                self.classes.unite_along(labels.ids, others)
                return np.moveaxis(labels.ids, axis, 0).reshape(labels.ids.shape[axis], -1)[:, 0]
        for labels in state:  # units of another dimension, while the channels have none
            self._fix(
                (labels,), f"{node.target} sums over another dimension than that of its units"
            )
        return None

    def _through_groups(
        self, node: fx.Node, layer: Layer, channels: Ids, outputs: Ids, taken: Ids
    ) -> None:
        """A grouped convolution: units of a group's channels, one of these if it has only one."""
        ins, outs = (ids.reshape(layer.groups, -1) for ids in (channels, outputs))
        for channels_of in (ins, outs):
            note = f"{node.target} has groups of {channels_of.shape[1]} channels"
            self.classes.unite_along(channels_of, (1,), f"{note}, which mix several of its units")
        self.classes.unite(ins[:, 0], outs[:, 0])
        self.classes.fix(taken, f"{node.target} has groups")

    def _is_depthwise(self, node: fx.Node) -> bool:
        """Is it a convolution of each channel by itself, with a weight that is computed?"""
        if operation(node) not in CONVOLUTIONS:
            return False
        weight: Any = node.args[1]
        groups = arguments_of(node)["groups"]
        is_batch = len(shape_of(node)) == len(shape_of(weight))
        return is_batch and shape_of(weight)[:2] == (groups, 1)

    def _through_depthwise(self, node: fx.Node) -> State:
        """Such a convolution keeps channels apart; its weight may be a parameter in a new shape."""
        inputs, weight = first_of(node), node.args[1]
        dims = len(shape_of(node))
        assert isinstance(weight, fx.Node)
        state = self._mixed(node, self.of(inputs), range(2, dims))
        channels: dict[int, int | None] = {0: 0, 1: 1} | dict.fromkeys(range(2, dims))
        outputs: dict[int, int | None] = {0: 1} | dict.fromkeys(range(1, dims))
        operands: list[Operand] = [(inputs, state, channels), (weight, self.of(weight), outputs)]
        bias = arguments_of(node)["bias"]
        if isinstance(bias, fx.Node):
            operands.append((bias, self.of(bias), {0: 1}))
        state = self._met(node, operands)
        self._doubt_sizes(node, state, [1])  # the number of groups
        return state
