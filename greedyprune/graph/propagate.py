"""What may be pruned: how each operation carries a layer's units to the layers that take them.

Every entry of every dimension of a parameter gets an id. The ids follow the values through the
graph: a tensor's dimension has the ids of the entries that it is computed from, such as those of a
Linear's weight along its outputs. Where an operation works only if two entries are removed
together, their ids become one class: a Linear's input and its weight along the inputs, both
operands of a sum, all entries of a head. Where an operation does not allow an entry to be removed
at all, its class is fixed, with the operation as the reason. A *unit* is a class that is not fixed.
group_reader.py makes groups of them.

The tables below list the operations that are known. Any other operation fixes its operands.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx

from .classes import Ids
from .labels import EXPANDING, Labels, Operand, State
from .layer_labels import LayerOperations
from .nodes import (
    ATTENTION,
    CONVOLUTIONS,
    LINEAR,
    SPLITTING,
    arguments_of,
    first_of,
    operation,
    shape_of,
)
from .norms import NORMS, STATISTICS
from .recurrences import is_recurrence, stacked
from .recurrent_rewriting import is_recurrent, why_not_rewritten
from .shapes import dims_of
from .tracing import Graph

# What operations do, by name; those that act on every number by itself are in labels.py.
# They make a tensor of one number:
FACTORIES = {"zeros", "ones", "full", "new_zeros", "new_ones", "new_full"}
# They give the same numbers another shape:
RESHAPING = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view",
    "reshape_as", "view_as",
}  # fmt: skip
# They give the dimensions another order or size:
MOVING = EXPANDING | {
    "transpose", "permute", "t", "numpy_T", "mT", "mH", "matrix_H", "adjoint", "swapaxes",
    "swapdims", "movedim", "moveaxis",
}  # fmt: skip
# They act on the last dimensions, as many as the name says: pooling and interpolation. `pad`, too.
POOLING = re.compile(r"(?:(?:adaptive_)?(?:max|avg)_pool|_?upsample_\w+?)([123])d(?:_aa)?|pad")
# They act along dimensions that their arguments name, and remove them or keep them:
REDUCING = {"mean", "sum", "amax", "amin"}
MIXING = {"softmax", "log_softmax", "_softmax", "cumsum", "roll"}
# They take some entries of the dimension that their arguments name:
TAKING = {"slice", "narrow", "select"}
# They write some entries of a dimension anew (tensors that a model changes in place, export.py):
WRITING = {"slice_scatter", "select_scatter"}
# They act on each unit by itself; the arguments at these places have one entry for each unit:
PER_UNIT_ARGUMENTS = {"batch_norm": (1, 2, 3, 4), "instance_norm": (1, 2, 3, 4), "prelu": (1,)}
# They multiply matrices: the first dimensions are a batch's, and may hold units:
MATRIX_PRODUCTS = {"matmul", "bmm", "mm", "baddbmm"}
# They add values of several layers: their units are then a stream.
SUMS = {"add", "sub", "subtract", "lerp", "addcmul", "rsub"}


class Product(NamedTuple):
    """A matrix product of each unit by itself, with the units' ids."""

    node: fx.Node
    ids: Ids


class Propagation(LayerOperations):
    """The ids of all tensors of a graph.

    products:   the matrix products of each unit by itself (attention's)
    summed:     ids of sums whose terms come from different layers
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.products: list[Product] = []
        self.summed: list[Ids] = []
        self._nearest: dict[fx.Node, frozenset[str]] = {}  # the last layers before a node
        for node in graph.nodes:
            self._step(node)
        for norm in self.norms:
            self._check_rescales(norm)
        self._make_rectangular()
        if self._factors:
            self._decide_factors()
            self._make_rectangular()

    def _step(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._states[node] = self._of_parameter(node)
            return
        self._nearest[node] = frozenset[str]().union(
            *(self._nearest.get(source, ()) for source in node.all_input_nodes)
        )
        if node in self.graph.layers:
            self._nearest[node] = frozenset({self.graph.layers[node].name})
        if all(source in self._constants for source in node.all_input_nodes):
            self._constants.add(node)
        if node.op == "call_function":
            self._uniform[node] = self._constant_along(node, operation(node))
        sources = [source for source in node.all_input_nodes if self._is_labelled(source)]
        if node.op == "call_function" and operation(node) in RESHAPING:
            sources += [source for source in node.all_input_nodes if self._uniform.get(source)]
        if node.op == "output":
            for source in sources:
                self._fix(self._of_all(source), "its units are the model's output")
        elif sources and (node.users or node in self.graph.layers):
            self._states[node] = self._after(node, operation(node))

    def _constant_along(self, node: fx.Node, op: str) -> dict[int, Ids]:
        """The dimensions along which a tensor is surely constant, with ids for their entries.

        Such a dimension may get smaller. Then everything that the tensor is combined with has to
        get smaller, too.
        """
        if op == "select":
            taken: Any = node.args[1]
            uniform = self._uniform.get(first_of(node), {})
            return {dim - (dim > taken): ids for dim, ids in uniform.items() if dim != taken}
        if not (op in EXPANDING | FACTORIES or self._is_pointwise(node, op)):
            return {}
        shape, found = shape_of(node), dict[int, Ids]()
        sources = [] if op in FACTORIES else node.all_input_nodes
        if op in EXPANDING:
            sources = [first_of(node)]
        for dim, size in enumerate(shape):
            known = list[Ids | None]()
            for source in sources:
                at = dim - len(shape) + len(shape_of(source))
                if at >= 0 and (own := shape_of(source)[at]) > 1:
                    same = self._uniform.get(source, {}).get(at)
                    known.append(same if own == size else None)  # `repeat` changes it
            ids = [each for each in known if each is not None]
            if size > 1 and len(ids) == len(known):
                found[dim] = ids[0] if ids else self.classes.fresh(int(size))
                for other in ids[1:]:
                    self.classes.unite(ids[0], other)
        return found

    def _of_parameter(self, node: fx.Node) -> State:
        name = self.graph.tensors.get(node.name)
        if name is None:
            return ()
        self._constants.add(node)
        state = []
        for dim, size in enumerate(shape_of(node)):
            ids = self.parameters.get((name, dim))
            if ids is None:
                ids = self.parameters[name, dim] = self.classes.fresh(size)
            if size > 1:
                state.append(Labels((dim,), ids))
        return tuple(state)

    def _after(self, node: fx.Node, op: str) -> State:
        if op in LINEAR | CONVOLUTIONS or node in self.graph.layers:
            return self._through_layer(node)
        if op in SPLITTING | {"unbind"}:
            return self._through_split(node, op)
        if node.target.__name__ == "getitem":  # type: ignore[union-attr]
            parts = self._parts.get(first_of(node))
            place: Any = node.args[1]
            return self.of(first_of(node)) if parts is None else parts[place]
        if is_recurrence(node):
            return self._through_recurrence(node)
        if node.target is stacked:
            return self._through_stacked(node)
        if op in MATRIX_PRODUCTS:
            return self._through_product(node, op)
        if op == ATTENTION:
            return self._through_attention(node)
        if op in PER_UNIT_ARGUMENTS:
            return self._through_per_unit(node, op)
        if op in NORMS:
            return self._through_norm(node, op)
        if op in RESHAPING:
            return self._reshaped(node, self._with_uniform(first_of(node)))
        if op in MOVING:
            return self._moved(node, op)
        if pooling := POOLING.fullmatch(op):
            last = len(shape_of(first_of(node))) - 1
            along: Sequence[int] = range(last, last - int(pooling[1] or 0), -1)
            if op == "pad":  # two sizes for each dimension, from the last one
                sizes: Any = node.args[1]
                along = [last - i // 2 for i, size in enumerate(sizes) if size]
            return self._mixed(node, self.of(first_of(node)), along)
        if op in REDUCING | MIXING | STATISTICS.keys():
            return self._along(node, op)
        if op in TAKING:
            return self._taken(node, op)
        if op == "flip":
            return self._flipped(node)
        if op == "cat":
            return self._joined(node)
        if op in WRITING:
            return self._written(node, op)
        if op == "stack":
            return self._stacked(node)
        if op == "glu":
            return self._through_glu(node)
        if op == "pixel_shuffle":
            return self._through_pixel_shuffle(node)
        if op in ("embedding", "embedding_bag"):
            return self._through_embedding(node, op)
        if op == "index":
            return self._indexed(node)
        if op == "index_select":
            return self._at_places(node, dims_of(node.args[1], len(shape_of(first_of(node)))))
        if op == "gather":
            return self._gathered(node)
        if op == "type_as":
            return self.of(first_of(node))
        if op == "repeat_interleave":
            options = arguments_of(node)
            if isinstance(options.get("dim"), int) and isinstance(options["repeats"], int):
                return repeated(self.of(first_of(node)), options["dim"], shape_of(node))
        if self._is_pointwise(node, op):
            return self._elementwise(node, op)
        if op in FACTORIES:  # of the type of a tensor, whose numbers do not matter
            return ()
        if is_recurrent(node):
            return self._refused(node, why_not_rewritten(node))
        return self._refused(node, f"{node.target} is not known to keep its units apart")

    def _through_product(self, node: fx.Node, op: str) -> State:
        """A matrix product for each entry of the first dimensions; baddbmm adds it to a tensor."""
        *added, one, other = node.args[: 3 if op == "baddbmm" else 2]
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
            return self._refused(node, f"{node.target} sums over its units")
        dims = len(shape_of(node))
        if len(shape_of(one)) < 2 or len(shape_of(other)) < 2:
            return self._refused(node, f"{node.target} sums over its units")
        reason = f"{node.target} sums over its units"
        left = self._mixed(node, self.of(one), [len(shape_of(one)) - 1], reason)
        right = self._mixed(node, self.of(other), [len(shape_of(other)) - 2], reason)
        sums = [tensor for tensor in added if isinstance(tensor, fx.Node)]
        state = self._met(node, [
            *((tensor, self.of(tensor), aligned(tensor, node)) for tensor in sums),
            (one, left, aligned(one, node) | {len(shape_of(one)) - 1: None}),
            (other, right, aligned(other, node) | {len(shape_of(other)) - 2: None}),
        ])  # fmt: skip
        self._note_product(node, state, dims)
        return state

    def _through_attention(self, node: fx.Node) -> State:
        query, key, value = (arg for arg in node.args[:3] if isinstance(arg, fx.Node))
        dims, reason = len(shape_of(node)), f"{node.target} sums over its units"
        last = dims - 1
        queries = self._mixed(node, self.of(query), [last], reason)
        keys = self._mixed(node, self.of(key), [last - 1, last], reason)
        values = self._mixed(node, self.of(value), [last - 1], reason)
        heads = shape_of(query)[-3] if dims > 2 else 1
        keys, values = (repeated(state, dims - 3, [heads] * dims) for state in (keys, values))
        operands: list[Operand] = [
            (query, queries, aligned(query, node) | {last: None}),
            (key, keys, aligned(key, node) | {last: None, last - 1: None}),
            (value, values, aligned(value, node) | {last - 1: None}),
        ]
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if isinstance(mask, fx.Node):
            masks = self._mixed(node, self.of(mask), [len(shape_of(mask)) - 1], reason)
            operands.append((mask, masks, aligned(mask, node) | {len(shape_of(mask)) - 1: None}))
        state = self._met(node, operands)
        self._note_product(node, state, dims)
        return state

    def _note_product(self, node: fx.Node, state: State, dims: int) -> None:
        self.products += [
            Product(node, labels.ids)
            for labels in state
            if any(dim < dims - 2 for dim in labels.dims)
        ]

    def _through_per_unit(self, node: fx.Node, op: str) -> State:
        source = first_of(node)
        dims = len(shape_of(source))
        state = self.of(source)
        if op == "instance_norm":
            state = self._mixed(node, state, range(2, dims))
        operands: list[Operand] = [(source, state, {dim: dim for dim in range(dims)})]
        for i in PER_UNIT_ARGUMENTS[op]:
            operand = node.args[i] if len(node.args) > i else None
            if isinstance(operand, fx.Node) and shape_of(operand) != (1,):
                operands.append((operand, self.of(operand), {0: 1}))
        if any(1 not in labels.dims for labels in state) and len(operands) > 1:
            others = tuple(labels for labels in state if 1 not in labels.dims)
            if not any(1 in labels.dims for labels in state):
                self._fix(others, f"{node.target} does not act along the units' dimension")
        return self._met(node, operands)

    def _elementwise(self, node: fx.Node, op: str) -> State:
        operands = node.all_input_nodes
        state = self._met(node, [(o, self.of(o), aligned(o, node)) for o in operands])
        terms = {
            self._nearest.get(o, frozenset()) for o in operands
            if self.of(o) and o not in self._constants
        }  # fmt: skip
        # The terms of x + x * f(x) share a layer: they are gated, and no residual sum.
        if op in SUMS and any(not (a <= b or b <= a) for a in terms for b in terms):
            self.summed += [labels.ids for labels in state]
        return state

    def _along(self, node: fx.Node, op: str) -> State:
        """An operation along dimensions that its arguments name (all of them where none is)."""
        source = first_of(node)
        place = 2 if op == "roll" else STATISTICS.get(op, 1)
        named = node.args[place] if len(node.args) > place else node.kwargs.get("dim")
        along = dims_of(named, len(shape_of(source)))
        if op in STATISTICS and not _removes(source, node):
            return self._statistic(node, along)
        state = self._mixed(node, self.of(source), along)
        return _without_dims(state, along) if _removes(source, node) else state

    def _through_embedding(self, node: fx.Node, op: str) -> State:
        table = first_of(node)
        for labels in self.of(table):
            if labels.dims == (0,):
                self.classes.fix(labels.ids, f"{node.target} looks its units up")
        last = 1 if op == "embedding_bag" else len(shape_of(node)) - 1
        state = tuple(
            Labels((last,), labels.ids) for labels in self.of(table) if labels.dims == (1,)
        )
        if op == "embedding_bag":  # with three tensors of counts
            self._parts[node] = [state, (), (), ()]
            return ()
        return state


def aligned(operand: fx.Node, result: fx.Node) -> dict[int, int | None]:
    """The result's dimension for each of an operand's, as torch broadcasts them."""
    shift = len(shape_of(result)) - len(shape_of(operand))
    return {dim: dim + shift for dim in range(len(shape_of(operand)))}


def repeated(state: State, dim: int, sizes: Sequence[int]) -> State:
    """The ids where each entry of a dimension is repeated until it has its size of these."""
    result, dim = [], dim % len(sizes)
    for labels in state:
        if dim in labels.dims:
            axis = labels.dims.index(dim)
            times = sizes[dim] // labels.ids.shape[axis]
            labels = Labels(labels.dims, labels.ids.repeat(times, axis))
        result.append(labels)
    return tuple(result)


def _removes(source: fx.Node, node: fx.Node) -> bool:
    """Has the result, or each of several, fewer dimensions?"""
    value = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    return len(shape_of(source)) > first.dim()


def _without_dims(state: State, removed: set[int]) -> State:
    """The ids where dimensions without ids are removed."""
    return tuple(
        Labels(tuple(d - sum(r < d for r in removed) for d in labels.dims), labels.ids)
        for labels in state
    )
