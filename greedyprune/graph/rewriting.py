"""Rewrites a graph so that every linear map by a parameter is one node with the whole parameter.

This includes the linear maps inside recurrent layers (recurrent_rewriting.py).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import fx

from .einsums import write_einsum
from .experts import weight_of_experts, write_as_convolution
from .names import bias_name
from .nodes import CONVOLUTIONS, SPLITTING, arguments_of, first_of, flops_of, operation, shape_of
from .recurrent_rewriting import RecurrentRewriting

_TRANSPOSING = {"t", "numpy_T", "transpose", "permute", "matrix_H", "mT", "swapaxes"}


class Rewriting:
    """Rewrites the nodes of a graph that multiply by parameters, in place.

    parameters: from the names of the placeholders that are parameters to the model's names
    """

    def __init__(self, graph: fx.Graph, parameters: Mapping[str, str]) -> None:
        self._parameters = parameters
        RecurrentRewriting(graph)
        for write in (
            self._write_einsum, self._write_as_linear, self._write_with_whole_weight,
            self._write_without_bias, self._write_experts, self._write_copy,
        ):  # fmt: skip
            for node in list(graph.nodes):
                write(node)

    def _is_parameter(self, node: object) -> TypeGuard[fx.Node]:
        return isinstance(node, fx.Node) and node.name in self._parameters

    def _write_einsum(self, node: fx.Node) -> None:
        """Replaces an einsum by a product (einsums.py); a parameter is its second factor."""
        if operation(node) == "einsum":
            operands: Any = node.args[1]
            write_einsum(node, swap=self._is_parameter(operands[0]))

    def _write_as_linear(self, node: fx.Node) -> None:
        """Replaces `x @ weight.T + bias`, for parameters, by the one operation that computes it."""
        if operation(node) not in ("matmul", "mm") or node.kwargs:
            return
        inputs, transposed = node.args[:2]
        if not isinstance(transposed, fx.Node) or operation(transposed) not in _TRANSPOSING:
            return
        weight = first_of(transposed)
        if not self._is_parameter(weight) or len(shape_of(weight)) != 2:
            return
        if shape_of(transposed) != shape_of(weight)[::-1] or _keeps_order(transposed):
            return
        last, bias = node, None
        user = next(iter(node.users), None)
        if len(node.users) == 1 and user is not None and operation(user) == "add":
            others = [arg for arg in user.args if arg is not node]
            is_bias = len(others) == 1 and self._is_parameter(others[0]) and not user.kwargs
            if is_bias and shape_of(others[0]) == shape_of(weight)[:1]:  # type: ignore[arg-type]
                last, bias = user, others[0]
        graph = node.graph
        with graph.inserting_after(last):
            linear = graph.call_function(torch.ops.aten.linear.default, (inputs, weight, bias))
        linear.meta = dict(last.meta)
        last.replace_all_uses_with(linear)
        for gone in dict.fromkeys((last, node, transposed)):
            if not gone.users:
                graph.erase_node(gone)

    def _write_with_whole_weight(self, node: fx.Node) -> None:
        """Replaces a linear map by some rows of a parameter by these outputs of the whole map.

        nn.MultiheadAttention uses some rows only where the query is another tensor than the key.
        """
        if operation(node) != "linear":
            return
        inputs, part, bias = (*node.args, None)[:3]
        weight, rows = self._whole(part)
        if weight is None or rows is None:
            return
        whole_bias, bias_rows = self._whole(bias)
        graph, value = node.graph, node.meta["val"]
        with graph.inserting_before(node):
            same = bias_rows == rows
            args = (inputs, weight, whole_bias) if same else (inputs, weight)
            linear = graph.call_function(torch.ops.aten.linear.default, args)
            linear.meta = node.meta | {
                "val": value.new_empty(*value.shape[:-1], len(weight.meta["val"])),
                "flops": flops_of(node),
            }
            last = graph.call_function(
                torch.ops.aten.slice.Tensor, (linear, value.dim() - 1, rows[0], rows[1])
            )
            last.meta = dict(node.meta)
            last = graph.call_function(torch.ops.aten.contiguous.default, (last,))
            last.meta = dict(node.meta)
            if bias is not None and not same:
                last = graph.call_function(torch.ops.aten.add.Tensor, (last, bias))
                last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        graph.erase_node(node)

    def _write_copy(self, node: fx.Node) -> None:
        """Replaces a copy into a tensor, which has no derivative, by the copied values."""
        if operation(node) != "copy":
            return
        values: Any
        target, values = node.args[:2]
        with node.graph.inserting_before(node):
            for form, argument in (
                (torch.ops.aten.expand_as.default, target),
                (torch.ops.aten.to.dtype, node.meta["val"].dtype),
            ):
                values = node.graph.call_function(form, (values, argument))
                values.meta = dict(node.meta)
        node.replace_all_uses_with(values)
        node.graph.erase_node(node)

    def _write_experts(self, node: fx.Node) -> None:
        """Replaces a product of sorted rows and experts by a convolution (experts.py)."""
        if self._is_parameter(weight_of_experts(node)):
            write_as_convolution(node)

    def _whole(self, node: Any) -> tuple[fx.Node | None, tuple[int, int] | None]:
        """The parameter that a node is, or has some rows of; and the first and last of these."""
        if self._is_parameter(node):
            return node, None
        if not isinstance(node, fx.Node):
            return None, None
        source, place = node, 0
        if node.target is operator.getitem:
            source, place = node.args  # type: ignore[assignment]
        whole, op = source.args[0] if source.args else None, operation(source)
        if not self._is_parameter(whole) or op not in SPLITTING | {"slice"}:
            return None, None
        options = arguments_of(source)
        start, step = options.get("start"), options.get("step", 1)
        if options["dim"] != 0 or step != 1:
            return None, None
        if op == "slice":
            first = slice(start, options["end"]).indices(len(whole.meta["val"]))[0]
        else:
            parts = source.meta["val"]
            first = sum(len(part) for part in parts[:place])
        return whole, (first, first + len(node.meta["val"]))

    def _write_without_bias(self, node: fx.Node) -> None:
        """Adds a bias in a node of its own, where it is not the weight's (names.py)."""
        op = operation(node)
        if op not in CONVOLUTIONS | {"linear"} or len(node.args) < 3 or node.args[2] is None:
            return
        weight, bias = node.args[1:3]
        if not self._is_parameter(weight) or (
            self._is_parameter(bias)
            and self._parameters[bias.name] == bias_name(self._parameters[weight.name])
        ):
            return
        positions = int(op[-2]) if op in CONVOLUTIONS else 0
        with node.graph.inserting_before(node):
            if positions:
                shape = [-1] + [1] * positions
                value = bias.meta["val"].view(shape)  # type: ignore[union-attr]
                bias = node.graph.call_function(torch.ops.aten.view.default, (bias, shape))
                bias.meta = dict(node.meta) | {"val": value}
        with node.graph.inserting_after(node):
            added = node.graph.call_function(torch.ops.aten.add.Tensor, (node, bias))
        added.meta = dict(node.meta)
        node.replace_all_uses_with(added, lambda user: user is not added)
        node.args = (*node.args[:2], None, *node.args[3:]) if positions else node.args[:2]


def _keeps_order(node: fx.Node) -> bool:
    """Does a permutation of two dimensions leave them in their order?"""
    dims: Any = node.args[1] if operation(node) == "permute" else node.args[1:3]
    if operation(node) == "permute":
        return [int(dim) % 2 for dim in dims] == [0, 1]
    return len(dims) == 2 and int(dims[0]) % 2 == int(dims[1]) % 2
