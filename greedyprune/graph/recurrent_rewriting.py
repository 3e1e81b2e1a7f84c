"""Rewrites recurrent layers: linear maps of their inputs, and the recurrences that are left.

torch.export gives one node for a whole nn.LSTM, of all its layers and directions. It becomes, for
each layer and direction, an ordinary linear map by `weight_ih` and a recurrence (recurrences.py).
The two directions are joined by `cat`. The last states of all layers are stacked only where the
model uses them as one tensor. `h_n[-1]`, or all states passed on to another recurrent layer, do not
need the layers in one size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .nodes import arguments_of, call_of, operation, shape_of
from .recurrences import FUNCTIONS, stacked

_CELL_WEIGHTS = "w_ih", "w_hh", "b_ih", "b_hh"


def is_recurrent(node: fx.Node) -> bool:
    """Is a node a recurrent module's one operation, as torch.export gives it?"""
    return node.op == "call_function" and operation(node) in FUNCTIONS


def why_not_rewritten(node: fx.Node) -> str:
    """Why such a node is not rewritten; "": it is."""
    arguments = arguments_of(node)
    if operation(node).endswith("_cell"):
        weights = [arguments[name] for name in _CELL_WEIGHTS]
    elif "batch_sizes" in arguments:
        return f"{node.target} takes packed sequences"
    else:
        weights = arguments["params"]
        runs = arguments["num_layers"] * (1 + arguments["bidirectional"])
        if len(weights) != runs * (4 if arguments["has_biases"] else 2):
            return f"{node.target} projects its states (proj_size)"
        if arguments["train"] and arguments["dropout"] and arguments["num_layers"] > 1:
            return f"{node.target} has dropout between its layers"
    if any(weight is not None and weight.op != "placeholder" for weight in weights):
        return f"{node.target} has weights that are no parameters"
    return ""


class RecurrentRewriting:
    """Rewrites the recurrent nodes of a graph, in place."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._states: dict[fx.Node, list[fx.Node]] = {}  # of all layers, by the node that has all
        self._maybe_unused: dict[fx.Node, None] = {}  # in the order in which they run
        for node in list(graph.nodes):
            if is_recurrent(node) and not why_not_rewritten(node):
                if operation(node).endswith("_cell"):
                    self._write_cell(node)
                else:
                    self._write_layers(node)
        for node in reversed(self._maybe_unused):
            if not node.users:
                graph.erase_node(node)

    def _write_cell(self, node: fx.Node) -> None:
        """Replaces a cell, which takes one step."""
        arguments = arguments_of(node)
        given = _listed(arguments["hx"])
        with self._graph.inserting_before(node):
            initial = [self._initial(node, state) for state in given]
            weights = [arguments[name] for name in _CELL_WEIGHTS]
            run = self._recurrence(node, arguments["input"], weights, initial, ())
            states = [self._item(node, run, i) for i in range(len(given))]
        self._replace(node, states)

    def _write_layers(self, node: fx.Node) -> None:
        """Replaces a node of one layer or several, in one direction or both."""
        arguments = arguments_of(node)
        batch_first, given = arguments["batch_first"], _listed(arguments["hx"])
        inputs, flips = arguments["input"], False
        if operation(inputs) == "flip" and list(inputs.args[1]) == [int(batch_first)]:
            self._maybe_unused[inputs] = None
            inputs, flips = inputs.args[0], True
        each = 4 if arguments["has_biases"] else 2
        states: list[list[fx.Node]] = [[] for _ in given]  # h of all layers, and c
        with self._graph.inserting_before(node):
            for _ in range(arguments["num_layers"]):
                outputs = list[fx.Node]()
                for backward in (False, True)[: 1 + arguments["bidirectional"]]:
                    i = len(states[0])
                    weights = [*arguments["params"][i * each : (i + 1) * each], None, None][:4]
                    initial = [self._initial(node, state, i) for state in given]
                    order = (batch_first, flips != backward)
                    run = self._recurrence(node, inputs, weights, initial, order)
                    outputs.append(self._item(node, run, 0))
                    for place, state in enumerate(states, 1):
                        state.append(self._item(node, run, place))
                inputs = outputs[0]
                if len(outputs) > 1:
                    inputs = self._call(node, torch.ops.aten.cat.default, (outputs, -1), torch.cat)
            if flips:
                flipped = (inputs, [int(batch_first)])
                inputs = self._call(node, torch.ops.aten.flip.default, flipped, torch.flip)
            results = [inputs, *(self._all_states(node, own) for own in states)]
        self._replace(node, results)
        for all_states, own in zip(results[1:], states, strict=True):
            self._take_by_index(all_states, own)

    def _recurrence(
        self, node: fx.Node, inputs: fx.Node, weights: Sequence[Any], initial: Sequence[Any],
        order: tuple[bool, ...],
    ) -> fx.Node:  # fmt: skip
        """One layer and direction: the linear map of its inputs, and what follows."""
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        value, size = inputs.meta["val"], shape_of(weight_hh)[1]
        positions = tuple(value.shape[:-1])
        samples = positions
        if order:  # without the dimension of time
            samples = positions[:1] if order[0] else positions[1:]
        gates = self._call(
            node, torch.ops.aten.linear.default, (inputs, weight_ih, bias_ih),
            lambda *_: value.new_empty(*positions, len(weight_ih.meta["val"])),
        )  # fmt: skip
        outputs = [value.new_empty(*samples, size) for _ in initial]
        if order:
            outputs.insert(0, value.new_empty(*positions, size))
        run = self._call(
            node, FUNCTIONS[operation(node)], (gates, weight_hh, bias_hh, *initial, *order),
            lambda *_: tuple(outputs),
        )  # fmt: skip
        run.meta["flops"] = 2 * positions[0] * weight_hh.meta["val"].numel()
        for count in positions[1:]:
            run.meta["flops"] *= count
        self._maybe_unused[run] = None
        return run

    def _initial(self, node: fx.Node, state: fx.Node, place: int | None = None) -> fx.Node | None:
        """The state that a recurrence starts from, of all layers' states; None: zero.

        place: of the layer and direction; None: it is a cell
        """
        if operation(state) == "zeros" and call_of(state) == call_of(node):
            self._maybe_unused.setdefault(state)
            return None  # the module's own
        if place is None:
            return state
        if state in self._states:
            return self._one_of(self._states[state], place)
        return self._call(
            state, torch.ops.aten.select.int, (state, 0, place), lambda *_: state.meta["val"][place]
        )

    def _all_states(self, node: fx.Node, states: list[fx.Node]) -> fx.Node:
        """The last states of all layers and directions as torch gives them, in one tensor."""
        if len(states) == 1:
            args: Any = (states[0], 0)
            whole = self._call(node, torch.ops.aten.unsqueeze.default, args, torch.unsqueeze)
        else:
            whole = self._call(node, stacked, tuple(states), stacked)
        self._states[whole] = states
        self._maybe_unused[whole] = None
        return whole

    def _take_by_index(self, whole: fx.Node, states: list[fx.Node]) -> None:
        """Replaces `h_n[-1]` by this layer's own state."""
        for user in list(whole.users):
            op, rest = operation(user), list[Any](user.args[1:])
            if op == "select" and rest[0] == 0:
                user.replace_all_uses_with(self._one_of(states, rest[1]))
                self._graph.erase_node(user)
            elif op == "unbind" and (not rest or rest[0] == 0):
                self._replace(user, [self._one_of(states, i) for i in range(len(states))])

    def _one_of(self, states: list[fx.Node], place: int) -> fx.Node:
        """One layer's state, where the model takes it from those of all layers."""
        if len(states) > 1:  # the sizes may differ, if the model's code allows it
            for state in states:
                state.args[0].meta["by_index"] = True  # type: ignore[union-attr]
        return states[place]

    def _replace(self, node: fx.Node, results: Sequence[fx.Node]) -> None:
        """Replaces the results of a node, which may be several, by other nodes."""
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
                self._graph.erase_node(user)
        node.replace_all_uses_with(results[0])
        self._graph.erase_node(node)

    def _item(self, node: fx.Node, run: fx.Node, place: int) -> fx.Node:
        item = self._call(node, operator.getitem, (run, place), lambda *_: run.meta["val"][place])
        self._maybe_unused[item] = None
        return item

    def _call(
        self, node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...],
        value_of: Callable[..., Any],
    ) -> fx.Node:  # fmt: skip
        """A new node, in the place of `node` in the model's code.

        value_of: gives the value in the trace, for those of the arguments
        """
        new = self._graph.call_function(target, args)
        values = fx.map_arg(args, lambda source: source.meta["val"])
        new.meta = node.meta | {"val": value_of(*values)}
        return new


def _listed(states: Any) -> list[fx.Node]:
    return list(states) if isinstance(states, (list, tuple)) else [states]
