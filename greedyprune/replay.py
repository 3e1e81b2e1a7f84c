"""Two copies of a network run side by side, the dense one and the one pruned so far.

Both go through torch.export's graph a piece at a time, from one layer to the next, so that a whole
network is selected layer by layer in one pass of each: between two layers every batch's live values
are kept, or, where those do not fit in memory, computed again from the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from .data import Batch, Batches
from .graph import Graph
from .walk import IDENTITY, RESHAPING, operation, shape_of

MOST_SHAPES = 16
SILENT = 1e-3  # of the largest factor of a normalisation: below, a channel makes up for nothing

Values = dict[fx.Node, Any]


class _Program:
    """One exported graph, to be run in pieces; batches of another shape have another."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        graph = Graph(model, batch.args, batch.kwargs)
        self._nodes, self.kwargs = graph.nodes, graph.kwargs
        self._interpreter = fx.Interpreter(graph.program.graph_module)
        self.place = {layer.name: i for i, node in enumerate(graph.nodes)
                      if (layer := graph.layers.get(node))}  # fmt: skip
        last = {each: i for i, node in enumerate(self._nodes) for each in node.all_input_nodes}
        self._dead: list[list[fx.Node]] = [[] for _ in self._nodes]
        for node, i in last.items():
            self._dead[i].append(node)
        specs = graph.program.graph_signature.input_specs
        self._inputs = list(
            zip((n for n in self._nodes if n.op == "placeholder"), specs, strict=True)
        )
        self._constants = graph.program.constants
        self._tensors = graph.tensors
        self._model = model
        self.shortcuts = {name: self._shortcut(self._nodes[i]) for name, i in self.place.items()}

    def inputs(self, batch: Batch) -> Values:
        """The values of the user's inputs."""
        leaves = iter(tree_leaves((batch.args, self.kwargs | batch.kwargs)))
        return {
            node: next(leaves) for node, spec in self._inputs if spec.kind == InputKind.USER_INPUT
        }

    def run(self, values: Values, tensors: Mapping[str, Tensor], start: int, end: int) -> None:
        """Runs nodes [start, end) on `values`, of which only those stay that are used later."""
        own = {
            node: tensors[spec.target] if spec.target in tensors else self._constants[spec.target]
            for node, spec in self._inputs
            if spec.kind != InputKind.USER_INPUT
        }
        self._interpreter.env = own | values
        for i in range(start, end):
            node = self._nodes[i]
            if node.op == "placeholder":
                continue
            if node.op == "output":
                break
            value = self._one(node)
            if node.users:
                self._interpreter.env[node] = value
            for each in self._dead[i]:
                self._interpreter.env.pop(each, None)
        values.clear()
        values.update({n: v for n, v in self._interpreter.env.items() if n not in own})
        self._interpreter.env = {}

    def operands(self, values: Values, layer: str) -> Tensor:
        """A layer's input, once everything before it has run."""
        node = self._nodes[self.place[layer]]
        return values[node.args[1 if operation(node) == "addmm" else 0]]

    def output(self, values: Values, layer: str) -> Tensor:
        """A layer's output, just after it has run."""
        return values[self._nodes[self.place[layer]]]

    def missing(
        self, layer: str, dense: Values, pruned: Values, tensors: Sequence[Mapping[str, Tensor]]
    ) -> Tensor | None:
        """What the layer's output lacks for the sum with its shortcut to be the dense network's.

        dense, pruned: the values just before the layer; tensors: the two networks' weights
        """
        shortcut = self.shortcuts[layer]
        if shortcut is None:
            return None
        beside, end, scale = shortcut
        found = []
        for values, own in zip((dense, pruned), tensors, strict=True):
            values = dict(values)
            self.run(values, own, self.place[layer], end)
            found.append(values[beside])
        lack: Tensor = (found[0] - found[1]).reshape(shape_of(self._nodes[self.place[layer]]))
        if scale is None:
            return lack
        scale = scale.reshape(-1, *[1] * (lack.dim() - 2))
        lively = scale.abs() > SILENT * scale.abs().max()
        return torch.where(lively, lack / torch.where(lively, scale, 1.0), 0.0)

    def _shortcut(self, layer: fx.Node) -> tuple[fx.Node, int, Tensor | None] | None:
        """What a layer's output is added to, where, and what normalisation multiplies it with."""
        node, scale = layer, None
        while len(node.users) == 1:
            user = next(iter(node.users))
            op = operation(user)
            if op == "batch_norm" and user.args[5] is False and len(shape_of(user)) > 1:
                weight, _, _, variance = (self._parameter(each) for each in user.args[1:5])
                assert variance is not None
                factor = (variance + float(user.args[7])).rsqrt()  # type: ignore[arg-type]
                factor = factor if weight is None else factor * weight
                scale = factor if scale is None else scale * factor
            elif op == "add" and all(isinstance(arg, fx.Node) for arg in user.args):
                others = [arg for arg in user.all_input_nodes if arg is not node]
                if len(others) != 1 or others[0].op == "placeholder" or user.kwargs:
                    return None  # itself, or what both networks have alike
                if shape_of(others[0]) != shape_of(user) or depends(others[0], layer):
                    return None
                return others[0], self._nodes.index(user), scale
            elif op not in IDENTITY | RESHAPING or (scale is not None and op in RESHAPING):
                return None
            node = user
        return None

    def _parameter(self, node: object) -> Tensor | None:
        if not isinstance(node, fx.Node):
            return None
        name = self._tensors[node.name]
        module, _, attribute = name.rpartition(".")
        return getattr(self._model.get_submodule(module), attribute).detach()

    def _one(self, node: fx.Node) -> Any:
        """One operation; in-place ones on a copy, for the networks share values."""
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if not name.endswith("_") or name.endswith("__"):
            return self._interpreter.run_node(node)
        args: Any = self._interpreter.map_nodes_to_values(node.args, node)
        options: Any = self._interpreter.map_nodes_to_values(node.kwargs, node)
        target: Any = node.target
        return target(args[0].clone(), *args[1:], **options)


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


class _State:
    """One batch in both networks, run up to the same node; `pruned` is None while they agree."""

    def __init__(self, batch: Batch, program: _Program) -> None:
        self.program, self.at = program, 0
        self.dense = program.inputs(batch)
        self.pruned: Values | None = None

    def advance(self, to: int, dense: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
        if self.pruned is not None:
            self.program.run(self.pruned, pruned, self.at, to)
        self.program.run(self.dense, dense, self.at, to)
        self.at = to

    def bytes_held(self) -> int:
        tensors = {
            id(value): value
            for values in (self.dense, self.pruned or {})
            for value in tree_leaves(list(values.values()))
            if isinstance(value, Tensor)
        }
        return sum(each.numel() * each.element_size() for each in tensors.values())


class Replay:
    """All batches, advanced from layer to layer."""

    def __init__(self, model: nn.Module, batches: Batches, limit: int) -> None:
        self._model, self._batches, self._limit = model, batches, limit
        self._dense = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self._changed: dict[str, Tensor] = {}
        self._first_change: str | None = None
        self._programs: dict[object, _Program] = {}
        self._states: list[_State] | None = None  # None: computed from the inputs in every pass

    def order(self, names: Sequence[str]) -> dict[str, int]:
        """Where in the graph each of these layers runs."""
        place = self._program(self._batches.first()).place
        return {name: place[name] for name in names}

    def change(self, layer: str, weight: Tensor) -> None:
        """The pruned network has this weight from here on; layers in the order of the graph."""
        self._changed[f"{layer}.weight"] = weight
        self._first_change = self._first_change or layer
        for state in self._states or []:
            if state.pruned is None:
                state.pruned = dict(state.dense)

    def visit(
        self, layers: Sequence[str], add: Callable[[str, Tensor, Tensor], None], bar: Any
    ) -> None:
        """add(layer, its input in the pruned network, what it should give) for each batch.

        That is its output in the dense network, and where it is added to a shortcut, what the
        pruned network's shortcut lacks.

        Leaves both networks just before the first of the layers.
        """
        layers = sorted(layers, key=self.order(layers).__getitem__)
        for state in self._all(bar):
            place = state.program.place
            pruned = self._dense | self._changed
            state.advance(place[layers[0]], self._dense, pruned)
            dense_values, at = dict(state.dense), state.at
            other = dict(state.dense if state.pruned is None else state.pruned)
            for layer in layers:
                state.program.run(other, pruned, at, place[layer])
                state.program.run(dense_values, self._dense, at, place[layer])
                found = state.program.operands(other, layer)
                node_values = dict(dense_values)
                state.program.run(node_values, self._dense, place[layer], place[layer] + 1)
                wanted = state.program.output(node_values, layer)
                if state.pruned is not None:
                    weights = self._dense, pruned
                    lack = state.program.missing(layer, dense_values, other, weights)
                    wanted = wanted if lack is None else wanted + lack
                add(layer, found, wanted)
                at = place[layer]

    def _all(self, bar: Any) -> Iterator[_State]:
        """Every batch where it was left, or from its inputs."""
        if self._states is not None:
            yield from bar(self._states, "activations")
            return
        fresh, held, kept = not self._changed, 0, []
        for batch in bar(self._batches, "activations"):
            state = _State(batch, self._program(batch))
            if not fresh:
                first = self._first_change
                assert first is not None
                state.advance(state.program.place[first], self._dense, self._dense)
                state.pruned = dict(state.dense)
            yield state
            held += state.bytes_held()
            if held <= self._limit:
                kept.append(state)
        if held <= self._limit:
            self._states = kept

    def _program(self, batch: Batch) -> _Program:
        leaves = tree_leaves((batch.args, batch.kwargs))
        shapes = tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in leaves)
        if shapes not in self._programs:
            if len(self._programs) == MOST_SHAPES:
                raise ValueError(
                    f"data: found batches of more than {MOST_SHAPES} shapes, each of which takes a "
                    "trace of the model; expected batches of one size, or sequential=False"
                )
            self._programs[shapes] = _Program(self._model, batch)
        return self._programs[shapes]
