"""The nodes of a model's graph: their operations, operands and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

# The operations that a layer can be, by name.
TRANSPOSED = {f"conv_transpose{d}d" for d in (1, 2, 3)}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"} | TRANSPOSED
LINEAR = {"linear", "addmm"}  # addmm: transformers' Conv1D
PRODUCTS = {"matmul", "mm"}  # of an input and a parameter
INPUTS_FIRST = TRANSPOSED | PRODUCTS | {"addmm"}  # their weights are (inputs, outputs)
ATTENTION = "scaled_dot_product_attention"
# Operations that cut a dimension into several tensors:
SPLITTING = {"split", "split_with_sizes", "chunk"}
# Operations that leave every number as it is (`add` stands for `add_`, too):
IDENTITY = {
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "contiguous", "clone",
    "detach", "alias", "to", "_to_copy", "lift_fresh_copy",
}  # fmt: skip


def operation(node: fx.Node) -> str:
    """The name of a node's operation without its overload: "add" for aten.add_.Tensor."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = str(getattr(packet, "__name__", node.target))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def title(node: fx.Node) -> str:
    """What messages call a node's operation: "aten.add.Tensor", or "lstm" for a function."""
    is_function = isinstance(node.target, FunctionType)
    return node.target.__name__ if is_function else str(node.target)  # type: ignore[union-attr]


def in_place(node: fx.Node) -> bool:
    """Does a node write its result into its first operand, as aten.add_.Tensor does?"""
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's tensor in the trace; () where it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def first_of(node: fx.Node) -> fx.Node:
    """The first operand, on which an operation of one tensor acts."""
    return node.args[0]  # type: ignore[return-value]


def data_input(node: fx.Node) -> fx.Node:
    """A layer's operand that is neither its weight nor its bias."""
    return node.args[1 if operation(node) == "addmm" else 0]  # type: ignore[return-value]


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by their names, with the defaults of those that it does not give."""
    schema: Any = getattr(node.target, "_schema").arguments  # noqa: B009
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    return {a.name: a.default_value for a in schema} | given | node.kwargs


def flops_of(node: fx.Node) -> int:
    """The FLOPs of one operation, counted on the trace's tensors, which hold no data."""
    if "flops" in node.meta:  # of the part of a linear map that the model computes
        return int(node.meta["flops"])
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)  # type: ignore[operator]
    return counter.get_total_flops()


def ancestors(
    node: fx.Node, stop: Callable[[fx.Node], bool] = lambda node: False
) -> Iterator[fx.Node]:
    """`node` and all nodes that it is computed from, each once, up to nodes for which `stop`."""
    seen, todo = set[fx.Node](), [node]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        yield current
        if not stop(current):
            todo += current.all_input_nodes


def module_name_of(node: fx.Node) -> str:
    """The name of the innermost module that runs a node."""
    stack: dict[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def call_of(node: fx.Node) -> str:
    """The call of the innermost module that runs a node: each call of a module has its own name."""
    return list(node.meta.get("nn_module_stack") or [""])[-1]
