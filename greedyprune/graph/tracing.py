"""A model as torch.export's graph: its operations in order, and which of them are layers.

A *node* of the graph is one operation of torch, an input or the output. A *layer* is a node that
multiplies its input by a parameter, as an nn.Linear, a convolution, the packed projections of an
nn.MultiheadAttention and the Conv1D in transformers' GPT-2 do. The module's class does not matter.
propagate.py and group_reader.py read from it which layers can be pruned; executor.py runs it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .experts import EXPERTS
from .export import exported, without_cache
from .names import bias_name, layer_name, module_of_layer
from .nodes import (
    CONVOLUTIONS,
    INPUTS_FIRST,
    LINEAR,
    PRODUCTS,
    TRANSPOSED,
    ancestors,
    arguments_of,
    module_name_of,
    operation,
    shape_of,
)
from .recurrences import WEIGHT, is_recurrence
from .recurrent_rewriting import is_recurrent, why_not_rewritten
from .rewriting import Rewriting
from .windows import CONVOLUTION_TYPES, TRANSPOSED_TYPES, Window, window_from, window_of

LAYER_TYPES = (nn.Linear, *CONVOLUTION_TYPES)


class Layer(NamedTuple):
    """A node whose operation is a linear map by a parameter of its own.

    name:        the module's name, or the weight's (names.py)
    weight:      the model's name for the weight
    bias:        the model's name for the bias; None: there is none
    out_dim:     the weight's dimension that has one entry for each output channel
    in_dim:      the weight's dimension that has one entry for each input channel (of one group)
    groups:      a convolution's groups, else 1
    channel_dim: the dimension of the node's input and output that holds the channels
    window:      how a convolution goes over its input; None: it is no convolution
    """

    name: str
    weight: str
    bias: str | None
    out_dim: int
    in_dim: int
    groups: int
    channel_dim: int
    window: Window | None


class Graph:
    """The exported graph of a model on one batch of example inputs.

    program:    what torch.export returns
    kwargs:     the keyword arguments of the trace, `use_cache=False` included where that was added
    nodes:      all nodes, in the order in which they run
    position:   each node's index in `nodes`
    tensors:    from a placeholder's name to the model's name for that parameter or buffer
    layers:     the nodes that are layers, in order
    tied:       nodes that take units and keep their weights: linear maps by an embedding's table,
                as the last layer of a language model often is, and recurrences (recurrences.py),
                whose layer is `weight_hh`
    not_layers: why other nodes that are linear maps are no layers, by the name of their module or
                weight

    dynamic: may the graph serve other sizes of the inputs' dimensions, too? Sizes that the model
        needs stay fixed, and sizes of 1

    Raises TraceError for a model that torch.export can't trace.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
        dynamic: bool = False,
    ) -> None:  # fmt: skip
        kwargs = without_cache(model, kwargs)
        program = exported(model, args, kwargs, dynamic)
        signature = program.graph_signature
        self.model, self.program, self.kwargs = model, program, kwargs
        inputs = signature.inputs_to_parameters | signature.inputs_to_buffers
        self.tensors = {node: self._first_name(tensor) for node, tensor in inputs.items()}
        self._parameters = set(signature.inputs_to_parameters)
        self._constants = self.tensors | signature.inputs_to_lifted_tensor_constants
        Rewriting(program.graph, {name: self.tensors[name] for name in self._parameters})
        first = {id(tensor): name for name, tensor in reversed([*model.named_parameters()])}
        for node in program.graph.nodes:
            if node.name in self._parameters and _is_looked_up(node):  # it may be tied
                table = model.get_parameter(self.tensors[node.name])
                self.tensors[node.name] = first[id(table)]
        self.nodes = list(program.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.layers: dict[fx.Node, Layer] = {}
        self.tied: dict[fx.Node, Layer] = {}
        self.not_layers: dict[str, str] = {}
        for node in self.nodes:
            self._add_layer(node)

    @property
    def names_dtypes(self) -> bool:
        """Does an operation name a floating-point type? If not, the graph serves any type."""
        return any(
            isinstance(arg, torch.dtype) and arg.is_floating_point
            for node in self.nodes for arg in (*node.args, *node.kwargs.values())
        )  # fmt: skip

    def tensor_of(self, node: object) -> str | None:
        """The model's name for the parameter or buffer that a node stands for; None: it is none."""
        return self.tensors.get(node.name) if isinstance(node, fx.Node) else None

    def _first_name(self, tensor: str) -> str:
        """A tensor's name in its module's first name, if the module has several."""
        path, _, attribute = tensor.rpartition(".")
        owner = self.model.get_submodule(path)
        first = next(name for name, module in self.model.named_modules() if module is owner)
        parameters = owner._parameters
        if (own := parameters.get(attribute)) is not None:  # a module may have it twice
            attribute = next(name for name, value in parameters.items() if value is own)
        return f"{first}.{attribute}".lstrip(".")

    def uses_of(self, name: str) -> list[fx.Node]:
        """The nodes that are the layer `name`, in order."""
        return [node for node, layer in self.layers.items() if layer.name == name]

    def _is_parameter(self, node: object) -> bool:
        return isinstance(node, fx.Node) and node.name in self._parameters

    def _add_layer(self, node: fx.Node) -> None:
        """Adds the node to the layers, or the reason why it is none to `not_layers`."""
        op = operation(node)
        if is_recurrence(node):
            self._add_recurrence(node)
        elif is_recurrent(node):
            self.not_layers.setdefault(module_name_of(node) or node.name, why_not_rewritten(node))
        if node.op != "call_function" or op not in LINEAR | CONVOLUTIONS | PRODUCTS | {EXPERTS}:
            return
        weight_node: Any
        bias_node: Any
        if op == "addmm":
            bias_node, _, weight_node = node.args[:3]
        else:
            weight_node, bias_node = (*node.args, None)[1:3]
        weight, bias = self.tensor_of(weight_node), self.tensor_of(bias_node)
        dims = len(shape_of(node))
        if op in LINEAR and weight is not None and _is_looked_up(weight_node):
            name, out = weight.rpartition(".")[0], int(op == "addmm")
            self.tied[node] = Layer(name, weight, bias, out, 1 - out, 1, dims - 1, None)
            return
        reason = self._why_no_layer(node, weight_node, bias_node)
        if reason is None and weight is not None:
            name, window = layer_name(weight), None
            module = module_of_layer(self.model, name)
            if op in CONVOLUTIONS:
                window = window_of(module) if module is not None else None
                if module is None or not is_plain(module):
                    options = arguments_of(node)
                    kernel = shape_of(options["weight"])[2:]
                    window = window_from(options, kernel, op in TRANSPOSED)
            transposed = op in INPUTS_FIRST
            out, taken = int(transposed), int(not transposed)
            if op == EXPERTS:
                out, taken, dims = 1, 2, 2  # a row and its channels
                window = Window((shape_of(weight_node)[0],), (1,), (1,), (0, 0), "zeros")
            self.layers[node] = Layer(
                name, weight, bias, out, taken, _groups_of(node),
                dims - 1 - (int(op[-2]) if op in CONVOLUTIONS else 0), window,
            )  # fmt: skip
        elif reason:
            self.not_layers.setdefault(self._row_of(node, weight_node), reason)

    def _add_recurrence(self, node: fx.Node) -> None:
        weight, bias = (self.tensor_of(arg) for arg in node.args[WEIGHT : WEIGHT + 2])
        if weight is not None:
            self.tied[node] = Layer(weight, weight, bias, 0, 1, 1, len(shape_of(node)) - 1, None)

    def _why_no_layer(self, node: fx.Node, weight_node: Any, bias_node: Any) -> str | None:
        """Why a linear map is no layer; "": this is not worth telling; None: it is one."""
        is_matrix = isinstance(weight_node, fx.Node) and len(shape_of(weight_node)) == 2
        if operation(node) in PRODUCTS and not (is_matrix and self._constant_behind(weight_node)):
            return ""
        weight, bias = self.tensor_of(weight_node), self.tensor_of(bias_node)
        if not self._is_parameter(weight_node):
            kind = "computed, by its module, a parametrization or torch.nn.utils.prune"
            if self._constant_of(weight_node) is not None:
                kind = "a plain tensor" if weight is None else "a buffer"
            return f"its weight is {kind}; expected a parameter of its module"
        assert weight is not None
        module = self.model.get_submodule(weight.rpartition(".")[0])
        if bias_node is not None and bias != bias_name(weight):
            return "its bias is not the parameter of that name beside the weight"
        if operation(node) in TRANSPOSED and _groups_of(node) > 1:
            return "it is a transposed convolution with groups"
        if operation(node) == "addmm" and node.kwargs:
            return "its product is scaled"
        if operation(node) in CONVOLUTIONS and getattr(module, "groups", 1) != _groups_of(node):
            return "it has groups that its module does not know"
        return None

    def _row_of(self, node: fx.Node, weight_node: Any) -> str:
        """The name under which a node that is no layer is listed: its module's or its weight's."""
        tensor = self._constant_behind(weight_node)
        module = module_name_of(node)
        if module and getattr(self.model.get_submodule(module), "weight", None) is not None:
            return module
        if tensor is None:
            return module or node.name
        return tensor.removesuffix(".weight")

    def _constant_of(self, node: object) -> str | None:
        """The name of a parameter, buffer or constant of the trace; None: the node is none."""
        return self._constants.get(node.name) if isinstance(node, fx.Node) else None

    def _constant_behind(self, node: object) -> str | None:
        """The same for a node that is computed from one constant only."""
        if not isinstance(node, fx.Node):
            return None
        sources = [source for source in ancestors(node) if source.op == "placeholder"]
        return self._constant_of(sources[0]) if len(sources) == 1 else None


def _is_looked_up(weight: fx.Node) -> bool:
    """Does an embedding look rows of this tensor up?"""
    return any(operation(user) == "embedding" for user in weight.users)


def is_plain(module: nn.Module) -> bool:
    """Does a module, of whatever class, run as torch's Linear or convolution, or GPT-2's Conv1D?

    A hook on it then sees the linear map's own input and output.
    """
    kind: Any = type(module)
    if kind.__name__ == "Conv1D":
        return True
    base: Any = next((base for base in LAYER_TYPES if isinstance(module, base)), None)
    if base is None or "forward" in vars(module) or kind.forward is not base.forward:
        return False
    if base is nn.Linear or base in TRANSPOSED_TYPES:
        return True
    return bool(kind._conv_forward is base._conv_forward)


def _groups_of(node: fx.Node) -> int:
    return int(arguments_of(node)["groups"]) if operation(node) in CONVOLUTIONS else 1
