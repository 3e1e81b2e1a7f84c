"""A model as torch.export's graph, to be run a piece at a time, from one layer to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_unflatten

from ..data.batches import Batch
from .groups import Graph
from .propagate import IDENTITY, RESHAPING, Layer, operation, shape_of

MOST_SHAPES = 16
SILENT = 1e-3  # of the largest factor of a normalisation: below, a channel makes up for nothing

Values = dict[fx.Node, Any]


class Ahead(NamedTuple):
    """What becomes of a layer's output: node = scale * output + ..., before anything not linear."""

    node: fx.Node
    scale: Tensor | None  # (C,); None: 1
    norm: str | None  # the only normalisation, right after the layer: its bias can take a constant
    beside: fx.Node | None  # the shortcut that is added on the way
    rectified: bool  # only its positive part goes on

    def unscaled(self, difference: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A difference there as one of the layer's output; 0 where the scale is next to nothing."""
        difference = difference.reshape(shape)
        if self.scale is None:
            return difference
        scale = self.scale.reshape(-1, *[1] * (len(shape) - 2))
        lively = scale.abs() > SILENT * scale.abs().max()
        return torch.where(lively, difference / torch.where(lively, scale, 1.0), 0.0)


class OverwrittenError(ValueError):
    """The model changes a tensor in place that has another name, which the copies would not see."""


class Program:
    """One exported graph, to be run in pieces; batches of another shape have another."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        graph = Graph(model, batch.args, batch.kwargs)
        self.nodes, self.kwargs = graph.nodes, graph.kwargs
        self._place = {node: i for i, node in enumerate(graph.nodes)}
        self._check_in_place()
        self._interpreter = fx.Interpreter(graph.program.graph_module)
        self.place = {layer.name: i for i, node in enumerate(graph.nodes)
                      if (layer := graph.layers.get(node))}  # fmt: skip
        last = {each: i for i, node in enumerate(self.nodes) for each in node.all_input_nodes}
        self._dead: list[list[fx.Node]] = [[] for _ in self.nodes]
        for node, i in last.items():
            self._dead[i].append(node)
        specs = graph.program.graph_signature.input_specs
        self._inputs = list(
            zip((n for n in self.nodes if n.op == "placeholder"), specs, strict=True)
        )
        self._constants = graph.program.constants
        self._structure = graph.program.call_spec.out_spec
        self.layers = {layer.name: layer for layer in graph.layers.values()}
        self._tensors = graph.tensors
        self._model = model
        self.ahead = {name: self._ahead(self.nodes[i]) for name, i in self.place.items()}
        self.refittable = self._own_weights(graph)

    def inputs(self, batch: Batch) -> Values:
        """The values of the user's inputs."""
        leaves = iter(tree_leaves((batch.args, self.kwargs | batch.kwargs)))
        return {
            node: next(leaves) for node, spec in self._inputs if spec.kind == InputKind.USER_INPUT
        }

    def own(self, tensors: Mapping[str, Tensor]) -> Values:
        """The values of what is not the user's input: parameters, buffers, constants."""
        return {
            node: tensors[spec.target] if spec.target in tensors else self._constants[spec.target]
            for node, spec in self._inputs
            if spec.kind != InputKind.USER_INPUT
        }

    def run(self, values: Values, tensors: Mapping[str, Tensor], start: int, end: int) -> None:
        """Runs nodes [start, end) on `values`, of which only those stay that are used later."""
        own = self.own(tensors)
        env = own | values
        for i in range(start, end):
            node = self.nodes[i]
            if node.op == "placeholder":
                continue
            if node.op == "output":
                break
            value = self.evaluate(node, env)
            if node.users:
                env[node] = value
            for each in self._dead[i]:
                env.pop(each, None)
        values.clear()
        values.update({n: v for n, v in env.items() if n not in own})
        self._interpreter.env = {}

    def outputs(self, values: Values, tensors: Mapping[str, Tensor], start: int) -> Any:
        """The model's output, from the values just before node `start`, which stay as they are."""
        after = dict(values)
        self.run(after, tensors, start, len(self.nodes))
        return self.returned(after)

    def returned(self, values: Values) -> Any:
        """The model's output, from the last values."""
        leaves = [values.get(n) if isinstance(n, fx.Node) else n for n in self.nodes[-1].args[0]]
        return tree_unflatten(leaves, self._structure)

    def ahead_of(
        self, batch: Batch, tensors: Mapping[str, Tensor], layers: Iterable[str]
    ) -> dict[str, Tensor]:
        """What goes on from these layers' outputs; of several that are added up, once."""
        ends = {self._place[self.ahead[layer].node] + 1: layer for layer in layers}
        values, start, found = self.inputs(batch), 0, {}
        for end, layer in sorted(ends.items()):
            self.run(values, tensors, start, end)
            start, ahead = end, self.ahead[layer]
            value: Tensor = values[ahead.node]
            found[layer] = value.relu() if ahead.rectified else value
        return found

    def operands(self, values: Values, layer: str, padded: bool = False) -> Tensor:
        """A layer's input, once everything before it has run; padded: as its node takes it."""
        node, module = self.nodes[self.place[layer]], self._model.get_submodule(layer)
        found: Tensor = values[node.args[1 if operation(node) == "addmm" else 0]]
        if padded or getattr(module, "padding_mode", "zeros") == "zeros":
            return found
        around = module._reversed_padding_repeated_twice  # a node of its own has padded already
        return nn.functional.pad(found, [-each for each in around])  # type: ignore[union-attr]

    def linear_map(self, layer: str, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a layer's node gives with this weight and bias."""
        node = self.nodes[self.place[layer]]
        if operation(node) == "addmm":
            return inputs @ weight if bias is None else torch.addmm(bias, inputs, weight)
        target: Any = node.target
        options = {name: value for name, value in node.kwargs.items() if name != "bias"}
        return target(inputs, weight, bias, *node.args[3:], **options)

    def output(self, values: Values, layer: str) -> Tensor:
        """A layer's output, just after it has run."""
        return values[self.nodes[self.place[layer]]]

    def missing(
        self, layer: str, dense: Values, pruned: Values, tensors: Sequence[Mapping[str, Tensor]]
    ) -> Tensor | None:
        """What the layer's output lacks for the sum with its shortcut to be the dense network's.

        dense, pruned: the values just before the layer; tensors: the two networks' weights
        """
        ahead = self.ahead[layer]
        if ahead.beside is None:
            return None
        found = self._at(ahead.beside, layer, (dense, pruned), tensors, self._place[ahead.node])
        return ahead.unscaled(found[0] - found[1], shape_of(self.nodes[self.place[layer]]))

    def error(
        self, layer: str, dense: Values, pruned: Values, tensors: Sequence[Mapping[str, Tensor]]
    ) -> Tensor:
        """By what the layer's output would have to change for both networks to go on alike.

        Where only the positive part goes on, what is negative in the dense network need only stay
        so (the target of Zhang et al. 2015, arXiv:1505.06798, for one step).
        """
        ahead = self.ahead[layer]
        end = self._place[ahead.node] + 1
        goal, found = self._at(ahead.node, layer, (dense, pruned), tensors, end)
        if ahead.rectified:
            goal = torch.where(goal > 0, goal, found.clamp(max=0))
        return ahead.unscaled(goal - found, shape_of(self.nodes[self.place[layer]]))

    def _at(
        self, node: fx.Node, layer: str, values: Sequence[Values],
        tensors: Sequence[Mapping[str, Tensor]], end: int,
    ) -> list[Tensor]:  # fmt: skip
        """A node's value in each network, from the values just before the layer."""
        found = []
        for before, own in zip(values, tensors, strict=True):
            after = dict(before)
            self.run(after, own, self.place[layer], end)
            found.append(after[node])
        return found

    def _ahead(self, layer: fx.Node) -> Ahead:
        node, scale, norm, beside = layer, None, None, None
        while len(node.users) == 1:
            user = next(iter(node.users))
            op = operation(user)
            if op == "relu":
                return Ahead(node, scale, norm, beside, True)
            if beside is not None:
                break
            if op == "batch_norm" and self._is_fixed(user) and len(shape_of(user)) > 1:
                weight, _, _, variance = (self._parameter(each) for each in user.args[1:5])
                assert variance is not None
                shift, norm = user.args[2], None
                if node is layer and isinstance(shift, fx.Node) and len(shift.users) == 1:
                    norm = self._tensors[shift.name].rpartition(".")[0]
                factor = (variance + float(user.args[7])).rsqrt()  # type: ignore[arg-type]
                factor = factor if weight is None else factor * weight
                scale = factor if scale is None else scale * factor
            elif op == "add" and all(isinstance(arg, fx.Node) for arg in user.args):
                others = [arg for arg in user.all_input_nodes if arg is not node]
                if len(others) != 1 or others[0].op == "placeholder" or user.kwargs:
                    break  # itself, or what both networks have alike
                if shape_of(others[0]) != shape_of(user) or depends(others[0], layer):
                    break
                beside = others[0]
            elif op not in IDENTITY | RESHAPING or (scale is not None and op in RESHAPING):
                break
            node = user
        return Ahead(node, scale, norm, beside, False)

    def _own_weights(self, graph: Graph) -> dict[int, Layer]:
        """The layers, by their place, whose weights nothing else uses, here or by another name."""
        names = Counter(id(p) for _, p in self._model.named_parameters(remove_duplicate=False))
        users: Counter[str] = Counter()
        for node in self.nodes:
            users[self._tensors.get(node.name, "")] += len(node.users)
        found = {}
        for node, layer in graph.layers.items():
            own = [each for each in (layer.weight, layer.bias) if each is not None]
            if layer.groups == 1 and all(
                users[each] == 1 and names[id(self._model.get_parameter(each))] == 1 for each in own
            ):
                found[self._place[node]] = layer
        return found

    def _check_in_place(self) -> None:
        """In-place operations run on a copy: nothing else may look at what they change."""
        for node in filter(in_place, self.nodes):
            top = node.args[0]
            while isinstance(top, fx.Node) and _is_alias(top):
                top = top.args[0]
            same, todo = set[fx.Node](), [top]
            while todo:
                each = todo.pop()
                if isinstance(each, fx.Node) and each is not node and each not in same:
                    same.add(each)
                    todo += [user for user in each.users if _is_alias(user)]
            later = {user for each in same for user in each.users}
            if any(self._place[user] > self._place[node] for user in later):
                raise OverwrittenError(
                    f"model: {node.target} changes a part of a tensor in place, which goes on as a "
                    "whole; expected operations that give new tensors (select: or sequential=False)"
                )

    def _is_fixed(self, norm: fx.Node) -> bool:
        """Does a normalisation take parameters and buffers, nothing that is computed?"""
        arguments = norm.all_input_nodes[1:]
        return norm.args[5] is False and all(each.name in self._tensors for each in arguments)

    def _parameter(self, node: object) -> Tensor | None:
        if not isinstance(node, fx.Node):
            return None
        name = self._tensors[node.name]
        module, _, attribute = name.rpartition(".")
        return getattr(self._model.get_submodule(module), attribute).detach()

    def evaluate(self, node: fx.Node, values: Values) -> Any:
        """One operation; in-place ones on a copy, for the networks share values."""
        self._interpreter.env = values
        if not in_place(node):
            return self._interpreter.run_node(node)
        args: Any = self._interpreter.map_nodes_to_values(node.args, node)
        options: Any = self._interpreter.map_nodes_to_values(node.kwargs, node)
        target: Any = node.target
        return target(args[0].clone(), *args[1:], **options)


def _is_alias(node: fx.Node) -> bool:
    """May a node's value share memory with its first operand's?"""
    schema = getattr(node.target, "_schema", None)
    view = schema is not None and any(each.alias_info for each in schema.arguments[:1])
    return (
        node.op == "call_function"
        and bool(node.args)
        and (
            view or operation(node) in IDENTITY or getattr(node.target, "__name__", "") == "getitem"
        )
    )


def in_place(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def depends(node: fx.Node, on: fx.Node) -> bool:
    seen, todo = set(), [node]
    while todo:
        each = todo.pop()
        if each is on:
            return True
        if each not in seen:
            seen.add(each)
            todo += each.all_input_nodes
    return False


class Programs:
    """A model's programs, one for each shape of batches."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: dict[object, Program] = {}

    def of(self, batch: Batch) -> Program:
        if (found := self.find(batch)) is None:
            raise ValueError(
                f"data: found batches of more than {MOST_SHAPES} shapes, each of which takes a "
                "trace of the model; expected batches of one size, or sequential=False"
            )
        return found

    def find(self, batch: Batch) -> Program | None:
        """None where there are too many already."""
        leaves = tree_leaves((batch.args, batch.kwargs))
        shapes = tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in leaves)
        if shapes not in self._found and len(self._found) < MOST_SHAPES:
            self._found[shapes] = Program(self._model, batch)
        return self._found.get(shapes)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def bytes_held(values: Sequence[Values]) -> int:
    tensors = {
        id(value): value
        for value in tree_leaves([list(each.values()) for each in values])
        if isinstance(value, Tensor)
    }
    return sum(each.numel() * each.element_size() for each in tensors.values())
