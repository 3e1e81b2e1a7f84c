"""The part of a network that follows a layer, prepared to run for many outputs of that layer.

Nodes that do not depend on the layer run once for each batch. In the others, batch normalisation is
folded into the convolution before it, sums and ReLUs work in place, and on a CPU images lie in
channels-last order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ..graph.executor import GraphExecutor
from ..graph.networks import Values
from ..graph.nodes import CONVOLUTIONS, LINEAR, TRANSPOSED, in_place, operation, shape_of
from ..graph.propagate import RESHAPING

FRESH = CONVOLUTIONS | LINEAR | {"add", "batch_norm"}  # whose result no other node shares
Step = tuple[fx.Node, Callable[[Values], Any], tuple[fx.Node, ...]]


class NetworkSuffix:
    """The nodes after a layer, with given weights."""

    def __init__(self, executor: GraphExecutor, layer: str, tensors: Mapping[str, Tensor]) -> None:
        self._executor, start = executor, executor.place[layer]
        self.entry = executor.nodes[start]
        self._channels_last = self.entry.meta["val"].device.type == "cpu"
        self._tensors = {node: self.laid_out(t) for node, t in executor.constants(tensors).items()}
        self._scale: Tensor | None = None  # (C,) each, of a normalisation right after the layer
        self._shift: Tensor | None = None
        later = executor.nodes[start + 1 : -1]
        self._after: set[fx.Node] = set()
        for node in later:
            if any(s in self._after or s is self.entry for s in node.all_input_nodes):
                self._after.add(node)
        self._once = [n for n in later if n not in self._after and n.op != "placeholder"]
        last_user = {source: node for node in executor.nodes for source in node.all_input_nodes}
        self._steps: list[Step] = []
        folded = self._folded()
        for node in later:
            if node in self._after:
                gone = tuple(s for s in node.all_input_nodes if last_user[s] is node)
                self._steps.append((node, self._step(node, folded), gone))

    def scaled(
        self, weight: Tensor, bias: Tensor | None, out_dim: int
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's weight and bias with a normalisation that follows folded in."""
        if self._scale is None or self._shift is None:
            return weight, bias
        shape = [1] * weight.dim()
        shape[out_dim] = -1
        bias = self._shift if bias is None else self._shift + self._scale * bias
        return weight * self._scale.view(shape), bias

    def prepare(self, values: Values) -> Values:
        """The values that all candidates share, from the values just before the layer."""
        shared = self._tensors | values
        for node in self._once:
            shared[node] = self._call(node)(shared)
        needed = {source for node, _, _ in self._steps for source in node.all_input_nodes}
        needed |= set(self._executor.nodes[-1].all_input_nodes)
        return {n: self.laid_out(v) for n, v in shared.items() if n in needed}

    def __call__(self, output: Tensor, prepared: Values) -> Any:
        """The model's output for an output of the layer, which may be overwritten."""
        values = dict(prepared)
        values[self.entry] = output
        for node, run, gone in self._steps:
            values[node] = run(values)
            for source in gone:
                values.pop(source, None)
        return self._executor.returned(values)

    def _step(self, node: fx.Node, folded: Mapping[fx.Node, tuple[Tensor, Tensor]]) -> Any:
        source, op = node.all_input_nodes[0], operation(node)
        if op == "batch_norm" and (source in folded or self._enters(node)):
            return lambda values: values[source]
        if node in folded:
            weight, bias = folded[node]
            target: Any = node.target
            return lambda values: target(values[source], weight, bias, *node.args[3:])
        if op == "relu" and self._may_overwrite(source):
            return lambda values: values[source].relu_()
        if op == "add" and len(node.args) == 2 and not node.kwargs:
            for mine, other in (node.args, node.args[::-1]):
                if isinstance(mine, fx.Node) and self._may_overwrite(mine, like=node):
                    return self._add(mine, other)
        if op in RESHAPING and op.endswith("view"):
            return lambda values: values[source].reshape(map_arg(node.args[1], values.__getitem__))
        return self._call(node)

    def _add(self, mine: fx.Node, other: Any) -> Callable[[Values], Any]:
        if isinstance(other, fx.Node):
            return lambda values: values[mine].add_(values[other])
        return lambda values: values[mine].add_(other)

    def _call(self, node: fx.Node) -> Callable[[Values], Any]:
        target: Any = node.target
        if node.op != "call_function" or in_place(node):
            return lambda values: self._executor.evaluate(node, values)
        return lambda values: target(
            *map_arg(node.args, values.__getitem__), **map_arg(node.kwargs, values.__getitem__)
        )

    def _folded(self) -> dict[fx.Node, tuple[Tensor, Tensor]]:
        """Convolutions folded with the normalisation that follows: weight and bias."""
        folded = {}
        for node in self._after:
            if operation(node) != "batch_norm" or node.args[5] is not False:
                continue
            source = node.all_input_nodes[0]
            simple = operation(source) in CONVOLUTIONS - TRANSPOSED and not source.kwargs
            used = source.args[1:3] + node.args[1:5]
            if not (simple and len(source.users) == 1 and self._are_tensors(used)):
                continue
            types = {tensor.dtype for arg in used if (tensor := self._value(arg)) is not None}
            if len(types) > 1 or types.pop().itemsize < 4:
                continue  # in 16 bits the products would be rounded, and so would the losses
            weight, bias, mean, variance = (self._value(arg) for arg in node.args[1:5])
            assert mean is not None and variance is not None
            epsilon: Any = node.args[7]
            scale = (variance + epsilon).rsqrt()
            scale = scale if weight is None else scale * weight
            shift = -mean * scale if bias is None else bias - mean * scale
            if source is self.entry:
                self._scale, self._shift = scale, shift
                continue
            kernel, offset = self._value(source.args[1]), None
            if len(source.args) > 2:
                offset = self._value(source.args[2])
            assert kernel is not None
            kernel = kernel * scale.reshape(-1, *[1] * (kernel.dim() - 1))
            folded[source] = kernel, shift if offset is None else shift + scale * offset
        return folded

    def _enters(self, node: fx.Node) -> bool:
        return self._scale is not None and node.all_input_nodes[0] is self.entry

    def _may_overwrite(self, node: fx.Node, like: fx.Node | None = None) -> bool:
        """Does only this operation use the node's result, in memory of its own?"""
        if like is not None and _form(node) != _form(like):
            return False
        mine = node in self._after or node is self.entry
        return mine and len(node.users) == 1 and operation(node) in FRESH

    def _are_tensors(self, args: tuple[Any, ...]) -> bool:
        return all(arg is None or arg in self._tensors for arg in args)

    def _value(self, node: Any) -> Tensor | None:
        return None if node is None else self._tensors[node].detach()

    def laid_out(self, value: Any) -> Any:
        if self._channels_last and isinstance(value, Tensor) and value.dim() == 4:
            return value.contiguous(memory_format=torch.channels_last)
        return value


def _form(node: fx.Node) -> tuple[tuple[int, ...], torch.dtype]:
    return shape_of(node), node.meta["val"].dtype
