"""How recurrences carry the ids of their hidden units."""

from __future__ import annotations

from torch import fx

from .classes import Ids
from .labels import Doubt, Labels, State
from .nodes import shape_of
from .norm_labels import NormOperations
from .recurrences import GATES


class RecurrentOperations(NormOperations):
    """Recurrences (recurrences.py), and the last states of several layers as one tensor.

    A hidden unit is one entry of each gate, of the output and of the states, and a row for each
    gate and a column of `weight_hh`.
    """

    def _through_recurrence(self, node: fx.Node) -> State:
        gates, _, bias, *initial = node.args
        assert isinstance(gates, fx.Node)
        is_cell, last = node.target.__name__.endswith("_cell"), len(shape_of(gates)) - 1  # type: ignore[union-attr]
        layer, state = self.graph.tied.get(node), self.of(gates)
        own = next((labels.ids for labels in state if labels.dims == (last,)), None)
        if layer is None or own is None or len(state) > 1:
            return self._refused(node, "a recurrence's gates are not a layer's units")
        by_gate = own.reshape(GATES[node.target.__name__], -1)  # type: ignore[union-attr]
        units = by_gate[0]
        self.classes.unite(by_gate, units)
        self.classes.unite(self.parameters[layer.weight, 0].reshape(by_gate.shape), units)
        self.classes.unite(self.parameters[layer.weight, 1], units)
        if isinstance(bias, fx.Node):
            name = self.graph.tensors[bias.name]
            self.classes.unite(self.parameters[name, 0].reshape(by_gate.shape), units)
        for state_node in initial:
            if isinstance(state_node, fx.Node):
                self._start_from(node, state_node, units)
        if node.meta.get("by_index"):
            self.doubts.append(Doubt(node, units, 0, len(units)))
        results: list[State] = [(Labels((1,), units),)] * 2
        self._parts[node] = results if is_cell else [(Labels((2,), units),), *results]
        return ()

    def _start_from(self, node: fx.Node, state: fx.Node, units: Ids) -> None:
        """A recurrence that starts from another state than zero."""
        met = False
        for labels in self._mixed(node, self.of(state), [0]):
            if labels.dims == (1,):
                self.classes.unite(labels.ids, units)
                met = True
        uniform = self._uniform.get(state, {}).get(1)
        if not met and uniform is not None:
            self.classes.unite(uniform, units)
            self.doubts.append(Doubt(state, units, 0, len(units)))
        elif not met and len(units) > 1:
            self.classes.fix(units, "its recurrence starts from a state that no layer gives")

    def _through_stacked(self, node: fx.Node) -> State:
        """The last states of layers that have to stay of one size."""
        found = [la.ids for part in node.args for la in self.of(part) if la.dims == (1,)]  # type: ignore[arg-type]
        if len(found) < len(node.args):
            return self._refused(node, "its last states are stacked with those of other layers")
        for ids in found[1:]:
            self.classes.unite(found[0], ids)
        return (Labels((2,), found[0]),)
