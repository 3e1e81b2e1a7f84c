"""Layers of a mixture of experts that hold all experts in one weight, as convolutions.

Such a layer multiplies rows that are sorted by their experts, each by its expert's matrix. That is
a convolution without any step: its kernel has one entry for each expert, and a row has its numbers
at its expert's entry and zeros at the others. So the units of all experts at the same place are
one unit with a feature for each expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from .nodes import first_of, operation, shape_of

EXPERTS = "product_of_experts"  # the operation that takes the place of these:
GROUPED = {"grouped_mm_fallback", "_grouped_mm"}  # transformers', torch's


def product_of_experts(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution: rows (S, I, E), a weight (E, O, I); the result is (S, O, 1)."""
    return functional.conv1d(rows, weight.permute(1, 2, 0), bias)


def weight_of_experts(node: fx.Node) -> fx.Node | None:
    """The weight (experts, outputs, inputs) of such a layer; None: the node is none."""
    if operation(node) not in GROUPED or len(node.args) != 3 or node.kwargs:
        return None
    transposed = node.args[1]
    if not isinstance(transposed, fx.Node) or operation(transposed) != "transpose":
        return None
    weight = first_of(transposed)
    is_swapped = shape_of(weight)[1:] == shape_of(transposed)[:0:-1]
    return weight if len(shape_of(weight)) == 3 and is_swapped else None


def write_as_convolution(node: fx.Node) -> None:
    """Replaces a product of sorted rows and their experts' matrices by a convolution, in place.

    The node's operands: the rows (S, I), the experts' matrices (E, I, O), and at which row each
    expert's rows end (E,).
    """
    rows, transposed, ends = node.args
    weight = weight_of_experts(node)
    assert isinstance(rows, fx.Node)
    assert isinstance(ends, fx.Node)
    assert weight is not None
    aten, graph, value = torch.ops.aten, node.graph, rows.meta["val"]
    count, inputs = shape_of(rows)

    def call(operator: Callable[..., Tensor], *args: Any, **options: Any) -> fx.Node:
        new = graph.call_function(operator, args, options)
        values = fx.map_arg(args, lambda source: source.meta["val"])
        with torch.no_grad(), value.fake_mode:
            new.meta = dict(node.meta) | {"val": operator(*values, **options)}
        return new

    with graph.inserting_before(node):
        places = call(aten.arange.default, count, device=value.device)
        before_end = call(aten.lt.Tensor, call(aten.unsqueeze.default, places, 1), ends)
        before_end = call(aten.to.dtype, before_end, value.dtype)  # (S, E)
        of_expert = call(
            aten.sub.Tensor, before_end, call(aten.constant_pad_nd.default, before_end, [1, -1])
        )
        spread = call(
            aten.mul.Tensor, call(aten.unsqueeze.default, rows, 2),
            call(aten.unsqueeze.default, of_expert, 1),
        )  # fmt: skip
        product = call(product_of_experts, spread, weight)
        product.meta["flops"] = 2 * count * inputs * shape_of(weight)[1]
        result = call(aten.squeeze.dim, product, -1)
    node.replace_all_uses_with(result)
    for gone in (node, transposed):
        if isinstance(gone, fx.Node) and not gone.users:
            graph.erase_node(gone)
