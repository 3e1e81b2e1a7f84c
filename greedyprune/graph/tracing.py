"""A model as torch.export's graph: its operations in order, and which of them are layers.

A *node* of the graph is one operation of torch, an input or the output. A *layer* is a node that
multiplies its input by a module's own weight, as an nn.Linear, a convolution and the Conv1D in
transformers' GPT-2 do. The module's class does not matter. propagate.py and groups.py read from the
graph which layers can be pruned; executor.py runs it.
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

from .trace_errors import trace_error
from .windows import CONVOLUTION_TYPES, TRANSPOSED_TYPES, Window, window_from, window_of

LAYER_TYPES = (nn.Linear, *CONVOLUTION_TYPES)

# The operations that a layer can be, by name.
TRANSPOSED = {f"conv_transpose{d}d" for d in (1, 2, 3)}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"} | TRANSPOSED
LINEAR = {"linear", "addmm"}  # addmm: transformers' Conv1D
_TRANSPOSING = {"t", "numpy_T", "transpose", "permute", "matrix_H", "mT", "swapaxes"}


class Layer(NamedTuple):
    """A node whose operation is a module's own linear map.

    name:        the module's name
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
    tied:       nodes that are linear maps by an embedding's table, as the last layer of a language
                model often is
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
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # torch.export logs whole graphs when it fails
        try:
            program = torch.export.export(
                model, args, kwargs, strict=False,
                dynamic_shapes=_any_sizes(model, args, kwargs) if dynamic else None,
            )  # fmt: skip
        except Exception as error:
            raise trace_error(model, error) from None
        finally:
            logging.disable(disabled)
        signature = program.graph_signature
        self.model, self.program, self.kwargs = model, program, kwargs
        inputs = signature.inputs_to_parameters | signature.inputs_to_buffers
        self.tensors = {node: self._first_name(tensor) for node, tensor in inputs.items()}
        self._parameters = set(signature.inputs_to_parameters)
        self._constants = self.tensors | signature.inputs_to_lifted_tensor_constants
        first = {id(tensor): name for name, tensor in reversed([*model.named_parameters()])}
        for node in list(program.graph.nodes):
            if node.name in self._parameters and _is_looked_up(node):  # it may be tied
                table = model.get_parameter(self.tensors[node.name])
                self.tensors[node.name] = first[id(table)]
            self._write_as_linear(node)
        self.nodes = list(program.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.layers: dict[fx.Node, Layer] = {}
        self.tied: dict[fx.Node, Layer] = {}
        self.not_layers: dict[str, str] = {}
        for node in self.nodes:
            self._add_layer(node)

    def tensor_of(self, node: object) -> str | None:
        """The model's name for the parameter or buffer that a node stands for; None: it is none."""
        return self.tensors.get(node.name) if isinstance(node, fx.Node) else None

    def _first_name(self, tensor: str) -> str:
        """A tensor's name in its module's first name, if the module has several."""
        path, _, attribute = tensor.rpartition(".")
        owner = self.model.get_submodule(path)
        first = next(name for name, module in self.model.named_modules() if module is owner)
        return f"{first}.{attribute}".lstrip(".")

    def uses_of(self, name: str) -> list[fx.Node]:
        """The nodes that are the layer `name`, in order."""
        return [node for node, layer in self.layers.items() if layer.name == name]

    def _is_parameter(self, node: object) -> bool:
        return isinstance(node, fx.Node) and node.name in self._parameters

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
        if shape_of(transposed) != shape_of(weight)[::-1]:  # the same where it is square
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

    def _add_layer(self, node: fx.Node) -> None:
        """Adds the node to the layers, or the reason why it is none to `not_layers`."""
        op = operation(node)
        if node.op != "call_function" or op not in LINEAR | CONVOLUTIONS | {"matmul", "mm"}:
            return
        bias_node: Any = None
        if op == "addmm":
            bias_node, _, weight_node = node.args[:3]
        else:
            weight_node, bias_node = node.args[1], node.args[2] if len(node.args) > 2 else None
        weight, bias = self.tensor_of(weight_node), self.tensor_of(bias_node)
        dims = len(shape_of(node))
        if op in LINEAR and weight is not None and _is_looked_up(weight_node):  # type: ignore[arg-type]
            name, out = weight.rpartition(".")[0], int(op == "addmm")
            self.tied[node] = Layer(name, weight, bias, out, 1 - out, 1, dims - 1, None)
            return
        reason = self._why_no_layer(node, weight_node, bias_node)
        if reason is None and weight is not None:
            name = weight.rpartition(".")[0]
            window, module = None, self.model.get_submodule(name)
            if op in CONVOLUTIONS:
                window = window_of(module)
                if not is_plain(module):
                    options = _arguments(node)
                    kernel = shape_of(options["weight"])[2:]
                    window = window_from(options, kernel, op in TRANSPOSED)
            transposed = op in TRANSPOSED | {"addmm"}  # its weight is (inputs, outputs)
            self.layers[node] = Layer(
                name, weight, bias, int(transposed), int(not transposed), _groups_of(node),
                dims - 1 - (int(op[-2]) if op in CONVOLUTIONS else 0), window,
            )  # fmt: skip
        elif reason:
            self.not_layers.setdefault(self._row_of(node, weight_node), reason)

    def _why_no_layer(self, node: fx.Node, weight_node: Any, bias_node: Any) -> str | None:
        """Why a linear map is no layer; "": this is not worth telling; None: it is one."""
        if operation(node) in ("matmul", "mm"):
            constant = self._constant_behind(weight_node)
            is_map = constant is not None and len(shape_of(weight_node)) == 2
            return "it is a matrix product, not a Linear with a `weight`" if is_map else ""
        weight, bias = self.tensor_of(weight_node), self.tensor_of(bias_node)
        if not self._is_parameter(weight_node):
            kind = "computed, by its module, a parametrization or torch.nn.utils.prune"
            if self._constant_of(weight_node) is not None:
                kind = "a plain tensor" if weight is None else "a buffer"
            return f"its weight is {kind}; expected a parameter `weight` of its module"
        assert weight is not None
        owner, _, attribute = weight.rpartition(".")
        module = self.model.get_submodule(owner)
        if attribute != "weight":
            return f"its weight is {weight!r}; expected a parameter `weight` of its module"
        if bias_node is not None and not self._is_own_bias(bias_node, bias, module):
            owners = (other for other in self.model.modules() if other is not module)
            if any(module.weight is tensor for o in owners for tensor in o._parameters.values()):
                return f"{weight!r} is shared with another layer"
            return "its bias is not a parameter `bias` of its module"
        if operation(node) in TRANSPOSED and _groups_of(node) > 1:
            return "it is a transposed convolution with groups"
        if operation(node) == "addmm" and node.kwargs:
            return "its product is scaled"
        if operation(node) in CONVOLUTIONS and getattr(module, "groups", 1) != _groups_of(node):
            return "it has groups that its module does not know"
        return None

    def _is_own_bias(self, node: object, bias: str | None, module: nn.Module) -> bool:
        owner, _, attribute = (bias or "").rpartition(".")
        is_bias = self._is_parameter(node) and attribute == "bias"
        return is_bias and self.model.get_submodule(owner) is module

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
    return int(_arguments(node).get("groups", 1))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by their names, with the defaults of those that it does not give."""
    schema: Any = getattr(node.target, "_schema").arguments  # noqa: B009
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    return {a.name: a.default_value for a in schema} | given | node.kwargs


def module_name_of(node: fx.Node) -> str:
    """The name of the innermost module that runs a node."""
    stack: dict[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def call_of(node: fx.Node) -> str:
    """The call of the innermost module that runs a node: each call of a module has its own name."""
    return list(node.meta.get("nn_module_stack") or [""])[-1]


def without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments, with those that keep a transformer's cache out of its outputs."""
    if getattr(getattr(model, "config", None), "use_cache", False):
        return {"use_cache": False} | kwargs  # a cache among the outputs is no tensor
    return kwargs


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
