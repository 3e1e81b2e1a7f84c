"""A model as torch.export's graph: its operations in order, and which of them are layers.

A *node* of the graph is one operation of torch, an input or the output. A *layer* is a node that
multiplies its input by the weight of an nn.Linear, of a convolution, or of the Conv1D in
transformers' GPT-2. propagate.py and groups.py read from the graph which layers can be pruned;
executor.py runs it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

CONVOLUTION_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYER_TYPES = (nn.Linear, *CONVOLUTION_TYPES)

# The operations that a layer can be, by name.
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
LINEAR = {"linear", "addmm"}  # addmm: transformers' Conv1D


class Layer(NamedTuple):
    """A node whose operation is a module's own linear map.

    name:        the module's name
    weight:      the model's name for the weight
    bias:        the model's name for the bias; None: there is none
    out_dim:     the weight's dimension that has one entry for each output channel
    in_dim:      the weight's dimension that has one entry for each input channel (of one group)
    groups:      a convolution's groups, else 1
    channel_dim: the dimension of the node's input and output that holds the channels
    """

    name: str
    weight: str
    bias: str | None
    out_dim: int
    in_dim: int
    groups: int
    channel_dim: int


class Graph:
    """The exported graph of a model on one batch of example inputs.

    program:  what torch.export returns
    kwargs:   the keyword arguments of the trace, `use_cache=False` included where that was added
    nodes:    all nodes, in the order in which they run
    position: each node's index in `nodes`
    tensors:  from a placeholder's name to the model's name for that parameter or buffer
    layers:   the nodes that are layers, in order

    dynamic: may the graph serve other sizes of the inputs' dimensions, too? Sizes that the model
        needs stay fixed, and sizes of 1

    Raises whatever torch.export raises for a model that it can't trace.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
        dynamic: bool = False,
    ) -> None:  # fmt: skip
        kwargs = without_cache(model, kwargs)
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # torch.export logs whole graphs when it fails
        try:
            program = torch.export.export(
                model, args, kwargs, strict=False,
                dynamic_shapes=_any_sizes(model, args, kwargs) if dynamic else None,
            )  # fmt: skip
        finally:
            logging.disable(disabled)
        signature = program.graph_signature
        self.model, self.program, self.kwargs = model, program, kwargs
        self.nodes = list(program.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.layers = {
            node: layer for node in self.nodes if (layer := self._layer(node)) is not None
        }

    def tensor_of(self, node: object) -> str | None:
        """The model's name for the parameter or buffer that a node stands for; None: it is none."""
        return self.tensors.get(node.name) if isinstance(node, fx.Node) else None

    def _layer(self, node: fx.Node) -> Layer | None:
        """The layer of a node; None if it is not a layer, or its weight is not a module's own."""
        op = operation(node)
        if node.op != "call_function" or op not in LINEAR | CONVOLUTIONS:
            return None
        if op == "addmm":
            bias_node, _, weight_node = node.args[:3]
        else:
            weight_node, bias_node = node.args[1], node.args[2] if len(node.args) > 2 else None
        weight, bias = self.tensor_of(weight_node), self.tensor_of(bias_node)
        if weight is None or weight.rpartition(".")[2] != "weight":
            return None
        if bias_node is not None and bias is None:  # it is computed
            return None
        name, dims = weight.rpartition(".")[0], len(shape_of(node))
        module = self.model.get_submodule(name)
        if op == "linear" and type(module) is nn.Linear:
            return Layer(name, weight, bias, 0, 1, 1, dims - 1)
        if op == "addmm" and type(module).__name__ == "Conv1D":  # its weight is (inputs, outputs)
            return Layer(name, weight, bias, 1, 0, 1, dims - 1)
        if (
            op in CONVOLUTIONS
            and isinstance(module, CONVOLUTION_TYPES)
            and type(module) in CONVOLUTION_TYPES
        ):
            return Layer(name, weight, bias, 0, 1, module.groups, dims - 1 - int(op[-2]))
        return None


def _any_sizes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """torch.export's `dynamic_shapes` that leave all sizes of the inputs open, by parameter."""

    def open_sizes(value: Any) -> dict[int, Any] | None:
        return dict.fromkeys(range(value.dim()), Dim.AUTO) if isinstance(value, Tensor) else None

    signature = inspect.signature(model.forward)
    sizes = signature.bind(*tree_map(open_sizes, args), **tree_map(open_sizes, kwargs)).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            sizes |= sizes.pop(name, {})
    return sizes


def without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments, with those that keep a transformer's cache out of its outputs."""
    if getattr(getattr(model, "config", None), "use_cache", False):
        return {"use_cache": False} | kwargs  # a cache among the outputs is no tensor
    return kwargs


def operation(node: fx.Node) -> str:
    """The name of a node's operation without its overload: "add" for aten.add_.Tensor."""
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", str(node.target))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


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


def flops_of(node: fx.Node) -> int:
    """The FLOPs of one operation, counted on the trace's tensors, which hold no data."""
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
