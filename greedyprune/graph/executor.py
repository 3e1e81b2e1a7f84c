"""A model's exported graph, run in pieces: from one layer to the next, with given weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_leaves, tree_unflatten

from ..data.batches import Batch
from ..data.forward import not_run
from ..data.padding import Padding
from .experts import EXPERTS
from .head_labels import HeadPropagation
from .linear_paths import linear_path
from .networks import Network, Values, is_new
from .nodes import PRODUCTS, ancestors, data_input, in_place, operation, shape_of
from .norms import over_entries
from .propagate import Propagation
from .recurrences import is_recurrence, with_columns
from .slices import Entries
from .tracing import Graph, Layer
from .unfold import output_shape


class GraphExecutor:
    """Runs a model's graph for batches of one shape, any range of its nodes at a time.

    dynamic: for batches of several shapes, see `accepts`
    graph:   the model's graph on such a batch; None: the model is traced

    nodes:        all nodes, in the order in which they run
    place:        the index in `nodes` of each layer's first use, by its name
    layers:       the layers by their names
    linear_paths: what follows each layer until something nonlinear, by its name
    refittable:   the layers by their index, if nothing else uses their weights
    """

    def __init__(
        self, model: nn.Module, batch: Batch, dynamic: bool = False, graph: Graph | None = None
    ) -> None:
        graph = graph or Graph(model, batch.args, batch.kwargs, dynamic)
        self.graph, self.nodes = graph, graph.nodes
        self._interpreter = fx.Interpreter(graph.program.graph_module)
        self.layers = {layer.name: layer for layer in graph.layers.values()}
        self.place: dict[str, int] = {}
        for node, layer in graph.layers.items():
            self.place.setdefault(layer.name, graph.position[node])
        last_use = {
            source: i for i, node in enumerate(self.nodes) for source in node.all_input_nodes
        }
        self._last_uses: list[list[fx.Node]] = [[] for _ in self.nodes]
        for source, i in last_use.items():
            self._last_uses[i].append(source)
        placeholders = (node for node in self.nodes if node.op == "placeholder")
        specs = graph.program.graph_signature.input_specs
        self._inputs = list(zip(placeholders, specs, strict=True))
        self.linear_paths = {
            name: linear_path(graph, self.nodes[i]) for name, i in self.place.items()
        }
        self.refittable = self._refittable()
        # Of the last two networks that ran:
        self._known_constants: list[tuple[Network, Values]] = []
        # The last entries that `_sums_over` was asked for: of the network, and without a group.
        self._last_left: list[tuple[Entries, dict[fx.Node, tuple[int, Tensor]]]] = []
        # What `output_of` and `ends` read, also where the graph uses it nowhere.
        self._read = {*graph.layers, *(path.end for path in self.linear_paths.values())}

    def accepts(self, batch: Batch) -> bool:
        """Has a batch sizes that the graph serves?"""
        sizes: dict[Any, int] = {}  # by symbol
        ranges = self.graph.program.range_constraints
        for node, value in self.inputs(batch).items():
            if not isinstance(value, Tensor):
                continue
            for traced, size in zip(shape_of(node), value.shape, strict=True):
                symbol = getattr(getattr(traced, "node", None), "expr", None)
                if symbol is None or not symbol.is_Symbol:
                    if traced != size:
                        return False
                    continue
                allowed = ranges.get(symbol)
                if sizes.setdefault(symbol, size) != size:
                    return False
                if allowed is not None and not allowed.lower <= size <= allowed.upper:
                    return False
        return True

    def inputs(self, batch: Batch) -> Values:
        """The values of the model's inputs."""
        leaves = iter(tree_leaves((batch.args, self.graph.kwargs | batch.kwargs)))
        return {
            node: next(leaves) for node, spec in self._inputs if spec.kind == InputKind.USER_INPUT
        }

    def constants(self, tensors: Mapping[str, Tensor]) -> Values:
        """The values other than the model's inputs: parameters, buffers, constants of the trace.

        tensors: parameters and buffers by name
        """
        traced, found = self.graph.program.constants, dict[fx.Node, Any]()
        for node, spec in self._inputs:
            if spec.kind != InputKind.USER_INPUT:
                name = self.graph.tensors.get(node.name, "")
                found[node] = tensors[name] if name in tensors else traced[spec.target]
        return found

    def _constants_of(self, network: Network) -> Values:
        """`constants`, kept for the last two networks."""
        for known, constants in self._known_constants:
            if known is network:
                return constants
        constants = self.constants(network.tensors)
        self._known_constants = [(network, constants), *self._known_constants[:1]]
        return constants

    def run(self, values: Values, network: Network, start: int, end: int) -> None:
        """Runs nodes [start, end) on `values`, in place; values without later use are dropped."""
        constants, sums = self._constants_of(network), self._sums_over(network.left)
        env, own = constants | values, set[fx.Node]()
        for i in range(start, end):
            node = self.nodes[i]
            if node.op == "placeholder":
                continue
            if node.op == "output":
                break
            value = self._on_used_inputs(node, env, network)
            if value is None:
                value = self.evaluate(node, env, sums.get(node), own)
            in_own = in_place(node) and node.args[0] in own  # the value stays where it was
            if in_own or is_new(value, [env[source] for source in node.all_input_nodes]):
                own.add(node)
            if node.users or (i == end - 1 and node in self._read):
                env[node] = value
            for source in self._last_uses[i]:
                env.pop(source, None)
        values.clear()
        values.update({node: value for node, value in env.items() if node not in constants})
        self._interpreter.env = {}

    def inputs_used(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`Network.used` for these weights, by name."""
        used = {}
        for layer in self.layers.values():
            if layer.groups == 1 and layer.weight in tensors:
                weight = tensors[layer.weight]
                others = [dim for dim in range(weight.dim()) if dim != layer.in_dim]
                used[layer.weight] = (weight != 0).any(others).nonzero().flatten()
        return used

    def _on_used_inputs(self, node: fx.Node, values: Values, network: Network) -> Tensor | None:
        """The output of a layer that does not use all input channels; None: it uses all."""
        layer = self.graph.layers.get(node)
        used = None if layer is None else network.used.get(layer.weight)
        if layer is None or used is None or operation(node) in PRODUCTS | {"addmm", EXPERTS}:
            return None
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or self.graph.tensors.get(weight.name) != layer.weight:
            return None
        inputs, weights = values[data_input(node)], network.tensors[layer.weight]
        if not 0 < len(used) < weights.shape[layer.in_dim]:
            return None
        bias = None if layer.bias is None else network.tensors[layer.bias]
        inputs = inputs.index_select(layer.channel_dim, used)
        return _linear_map(node, inputs, weights.index_select(layer.in_dim, used), bias)

    def evaluate(
        self, node: fx.Node, values: Values, over: tuple[int, Tensor] | None = None,
        own: Container[fx.Node] = (),
    ) -> Any:  # fmt: skip
        """One operation; in place ones act on a copy, since two networks may share the values.

        over: for a norm or a recurrence over units: its dimension, and the entries left of it
        own:  nodes whose values nothing else shares
        """
        self._interpreter.env = values
        if not in_place(node) and over is None:
            return self._interpreter.run_node(node)
        args: Any = self._interpreter.map_nodes_to_values(node.args, node)
        options: Any = self._interpreter.map_nodes_to_values(node.kwargs, node)
        target: Any = node.target
        if over is not None and is_recurrence(node):
            return target(*with_columns(args, over[1]))
        if over is not None:
            return over_entries(node, args, options, *over)
        source = node.args[0]
        if not (isinstance(source, fx.Node) and source in own and len(source.users) == 1):
            args = (args[0].clone(), *args[1:])
        return target(*args, **options)

    @cached_property
    def _propagation(self) -> Propagation:
        return Propagation(self.graph)

    @cached_property
    def _head_propagation(self) -> HeadPropagation:
        return HeadPropagation(self.graph)

    def _sums_over(self, left: Entries | None) -> dict[fx.Node, tuple[int, Tensor]]:
        """The norms and recurrences over units of which some go, with the entries that are left."""
        if not left:
            return {}
        known = [sums for entries, sums in self._last_left if entries is left]
        if not known:
            recurrences = {
                node: (layer.in_dim, left[layer.weight, layer.in_dim])
                for node, layer in self.graph.tied.items()
                if is_recurrence(node) and (layer.weight, layer.in_dim) in left
            }
            norms = self._propagation.entries_in_norms(left)
            if not self._propagation.are_whole(left):  # heads become smaller
                norms |= self._head_propagation.entries_in_norms(left)
            known = [norms | recurrences]
            self._last_left = [(left, known[0]), *self._last_left[:1]]
        return known[0]

    def goes_over(self, layer: Layer, left: Entries) -> bool:
        """Is the layer a convolution along units of which some go?"""
        return self.nodes[self.place[layer.name]] in self._sums_over(left)

    def has_norms(self, left: Entries) -> bool:
        """Is there a norm over units of which some go?"""
        return not all(map(is_recurrence, self._sums_over(left)))

    def start_of(self, layers: Iterable[str], left: Entries) -> int:
        """The place of the first of these layers, norms and recurrences over units that go."""
        places = [self.graph.position[node] for node in self._sums_over(left)]
        for layer in layers:
            if layer not in self.place:
                raise not_run(layer)
            places.append(self.place[layer])
        return min(places)

    def outputs(
        self, values: Values, tensors: Mapping[str, Tensor], start: int,
        left: Entries | None = None,
    ) -> Any:  # fmt: skip
        """The model's output from the values just before node `start`; these are not changed."""
        values = dict(values)
        self.run(values, Network(tensors, left or {}), start, len(self.nodes))
        return self.returned(values)

    def returned(self, values: Values) -> Any:
        """The model's output, in its own structure, once all nodes have run."""
        specs = self.graph.program.graph_signature.output_specs
        leaves = [
            values.get(leaf) if isinstance(leaf, fx.Node) else leaf
            for leaf, spec in zip(self.nodes[-1].args[0], specs, strict=True)
            if spec.kind == OutputKind.USER_OUTPUT  # others are buffers that the forward changes
        ]
        return tree_unflatten(leaves, self.graph.program.call_spec.out_spec)

    def path_ends(
        self, batch: Batch, tensors: Mapping[str, Tensor], layers: Iterable[str]
    ) -> dict[str, Tensor]:
        """The values at the ends of these layers' linear paths, past the ReLU that follows.

        Where the paths of several layers end in the same sum, only for the last of those layers.
        """
        by_end = {self._end(layer): layer for layer in layers}
        values, start, ends = self.inputs(batch), 0, dict[str, Tensor]()
        network = Network(tensors)
        for end, layer in sorted(by_end.items()):
            self.run(values, network, start, end)
            start, path = end, self.linear_paths[layer]
            value: Tensor = values[path.end]
            ends[layer] = value.relu() if path.rectified else value
        return ends

    def mask_of(self, layer: str, padding: Padding) -> Tensor | None:
        """Which of a layer's positions count (`Padding.of`).

        ValueError for experts on padded data: their rows are sorted by expert.
        """
        if padding.hides and operation(self.nodes[self.place[layer]]) == EXPERTS:
            raise ValueError(
                f"mask: found hidden positions, but the rows of {layer!r} are sorted by expert; "
                "expected batches without padding, or mask=None, which counts all positions"
            )
        return padding.of(layer)

    def input_of(self, layer: str, values: Values, padded: bool = False) -> Tensor:
        """A layer's input, from the values just before the layer.

        padded: include a convolution's padding if the graph pads in a separate node
        """
        return self._input_of(self.nodes[self.place[layer]], values, padded)

    def _input_of(self, node: fx.Node, values: Values, padded: bool = False) -> Tensor:
        inputs: Tensor = values[data_input(node)]
        window = self.graph.layers[node].window
        if padded or window is None or window.padding_mode == "zeros":
            return inputs
        return nn.functional.pad(inputs, [-size for size in window.padding])

    def visit_inputs(
        self, batch: Batch, tensors: Mapping[str, Tensor], layers: Container[str],
        add: Callable[[str, Tensor], None],
    ) -> None:  # fmt: skip
        """Runs the model and calls add(layer, input) at every use of these layers."""
        values, start, network = self.inputs(batch), 0, Network(tensors)
        for node, layer in self.graph.layers.items():
            if layer.name in layers:
                end = self.graph.position[node]
                self.run(values, network, start, end)
                start = end
                add(layer.name, self._input_of(node, values))

    def output_of(self, layer: str, values: Values) -> Tensor:
        """A layer's output, from the values just after the layer."""
        return values[self.nodes[self.place[layer]]]

    def linear_map(self, layer: str, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A layer's output for its (padded) inputs, with this weight and bias."""
        return _linear_map(self.nodes[self.place[layer]], inputs, weight, bias)

    def shortcuts(
        self, layer: str, dense: Values, pruned: Values, networks: Sequence[Network]
    ) -> list[Tensor]:
        """The shortcut that is added to a layer's output, in both networks, in the output's shape.

        Empty where nothing is added.

        dense, pruned: the two networks' values just before the layer
        networks:      these two networks
        """
        node, traced = self.linear_paths[layer].shortcut, self.layers[layer]
        if node is None:
            return []
        outputs = networks[0].tensors[traced.weight].shape[traced.out_dim]
        shape = output_shape(traced.window, self.input_of(layer, dense), outputs)
        return [
            self._value_of(node, values, network).reshape(shape)
            for values, network in zip((dense, pruned), networks, strict=True)
        ]

    def _value_of(self, node: fx.Node, values: Values, network: Network) -> Tensor:
        """A node's value, from values before it. Only what the node is computed from runs."""
        env, sums = self._constants_of(network) | values, self._sums_over(network.left)
        missing = {other for other in ancestors(node, env.__contains__) if other not in env}
        for other in sorted(missing, key=self.graph.position.__getitem__):
            env[other] = self.evaluate(other, env, sums.get(other))
        self._interpreter.env = {}
        value: Tensor = env[node]
        return value

    def ends(
        self, layer: str, dense: Values, pruned: Values, networks: Sequence[Network]
    ) -> list[Tensor]:
        """The values at the end of a layer's linear path, in both networks, in the output's shape.

        Arguments as for `shortcuts`.
        """
        path, place, results = self.linear_paths[layer], self.place[layer], list[Tensor]()
        for its_values, network in zip((dense, pruned), networks, strict=True):
            values = dict(its_values)
            self.run(values, network, place, place + 1)
            shape = self.output_of(layer, values).shape
            self.run(values, network, place + 1, self._end(layer))
            results.append(values[path.end].reshape(shape))
        return results

    def _end(self, layer: str) -> int:
        """The index just behind a layer's linear path."""
        return self.graph.position[self.linear_paths[layer].end] + 1

    def _refittable(self) -> dict[int, Layer]:
        graph = self.graph
        parameters = graph.model.named_parameters(remove_duplicate=False)
        names = Counter(id(parameter) for _, parameter in parameters)
        uses: Counter[str] = Counter()
        for node in self.nodes:
            uses[graph.tensors.get(node.name, "")] += len(node.users)

        def is_own(name: str) -> bool:
            return uses[name] == 1 and names[id(graph.model.get_parameter(name))] == 1

        return {
            graph.position[node]: layer
            for node, layer in graph.layers.items()
            if layer.groups == 1
            and is_own(layer.weight)
            and (layer.bias is None or is_own(layer.bias))
        }


def _linear_map(node: fx.Node, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's operation on other operands."""
    if operation(node) in PRODUCTS | {"addmm"}:
        return inputs @ weight if bias is None else torch.addmm(bias, inputs, weight)
    target: Any = node.target
    options = {name: value for name, value in node.kwargs.items() if name != "bias"}
    return target(inputs, weight, bias, *node.args[3:], **options)
