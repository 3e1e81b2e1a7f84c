"""What may be pruned: how each operation carries a layer's units to the layers that take them.

Every entry of every dimension of a parameter gets an id. The ids follow the values through the
graph: a tensor's dimension has the ids of the entries that it is computed from, such as those of a
Linear's weight along its outputs. Where an operation works only if two entries are removed
together, their ids become one class: a Linear's input and its weight along the inputs, both
operands of a sum, all entries of a head. Where an operation does not allow an entry to be removed
at all, its class is fixed, with the operation as the reason. A *unit* is a class that is not fixed.
groups.py makes groups of them.

The tables below list the operations that are known. Any other operation fixes its operands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from .classes import Classes, Ids
from .constant_sizes import may_hold_size, split_may_hold_size
from .norms import NORMS, STATISTICS
from .slices import Entries
from .tracing import (
    CONVOLUTIONS,
    LINEAR,
    Graph,
    Layer,
    data_input,
    first_of,
    operation,
    shape_of,
)

# What operations do, by name (`add` stands for `add_`, too).
# They leave every number as it is:
IDENTITY = {
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "contiguous", "clone",
    "detach", "alias", "to", "_to_copy", "lift_fresh_copy",
}  # fmt: skip
# They act on every number by itself: these, and the operations that torch tags `pointwise`:
ELEMENTWISE = IDENTITY | {
    "hardswish", "log_sigmoid", "zeros_like", "ones_like", "full_like", "where",
}  # fmt: skip
# They make a tensor of one number:
FACTORIES = {"zeros", "ones", "full", "new_zeros", "new_ones", "new_full"}
# They give the same numbers another shape:
RESHAPING = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view"}
# They give the dimensions another order or size:
MOVING = {"transpose", "permute", "t", "numpy_T", "swapaxes", "expand", "movedim"}
# They cut a dimension into several tensors:
SPLITTING = {"split", "split_with_sizes", "chunk", "unbind"}
# They act on the last dimensions, as many as the name says: pooling and interpolation. `pad`, too.
POOLING = re.compile(r"(?:(?:adaptive_)?(?:max|avg)_pool|_?upsample_\w+?)([123])d(?:_aa)?|pad")
# They act along dimensions that their arguments name, and remove them or keep them:
REDUCING = {"mean", "sum", "amax", "amin"}
MIXING = {"softmax", "log_softmax", "_softmax", "cumsum", "roll"}
# They take some entries of the dimension that their arguments name:
TAKING = {"slice", "narrow", "select"}
# They act on each unit by itself; the arguments at these places have one entry for each unit:
PER_UNIT_ARGUMENTS = {"batch_norm": (1, 2, 3, 4), "instance_norm": (1, 2, 3, 4), "prelu": (1,)}
# They multiply matrices: the first dimensions are a batch's, and may hold units:
MATRIX_PRODUCTS = {"matmul", "bmm", "mm"}
MIXED = "a reshape mixes its units' dimension with others"
# They add values of several layers: their units are then a stream.
SUMS = {"add", "sub", "lerp", "addcmul", "rsub"}


class Labels(NamedTuple):
    """The ids of a tensor's entries along some of its dimensions; the others have none.

    ids: of the sizes of `dims`. Entries with the same ids go together
    """

    dims: tuple[int, ...]
    ids: Ids


State = tuple[Labels, ...]  # of disjoint dimensions
# An operand with its ids, and the result's dimension for each of its own; None: it has none.
Operand = tuple[fx.Node | None, State, Mapping[int, int | None]]


class Doubt(NamedTuple):
    """An operation that may have the size of a dimension with units as a constant.

    ids:   of the entries that the size counts, along `axis`
    value: the size
    """

    node: fx.Node
    ids: Ids
    axis: int
    value: int


class _Factor(NamedTuple):
    """Ids that an operation combines with a constant, which has some of their axes only."""

    node: fx.Node
    ids: Ids
    constant: Ids
    axes: tuple[int, ...]


class Norm(NamedTuple):
    """An operation that takes statistics over units: along `dim` of its input, with their ids."""

    node: fx.Node
    dim: int
    ids: Ids


class Propagation:
    """The ids of all tensors of a graph.

    classes:    which entries go together, and which are fixed
    parameters: the ids along each dimension of more than one entry, by parameter and dimension
    doubts:     operations that may have the number of units as a constant
    products:   the matrix products of each unit by itself (attention's), with the units' ids
    summed:     ids of sums whose terms come from different layers
    norms:      the operations that take statistics over units, with these along a dimension
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.classes = graph, Classes()
        self.parameters: dict[tuple[str, int], Ids] = {}
        self.doubts: list[Doubt] = []
        self.products: list[tuple[fx.Node, Ids]] = []
        self.summed: list[Ids] = []
        self.norms: list[Norm] = []
        self._factors: list[_Factor] = []
        self._splits: list[Ids] = []  # of several dimensions, which lose whole rows only
        self._states: dict[fx.Node, State] = {}
        self._parts: dict[fx.Node, list[State]] = {}  # of nodes that give several tensors
        self._constants = set[fx.Node]()  # nodes that are computed from parameters only
        self._nearest: dict[fx.Node, frozenset[str]] = {}  # the last layers before a node
        self._uniform: dict[fx.Node, set[int]] = {}  # dimensions along which a tensor is constant
        for node in graph.nodes:
            self._step(node)
        for norm in self.norms:
            self._check_rescales(norm)
        self._make_rectangular()
        if self._factors:
            self._decide_factors()
            self._make_rectangular()

    def of(self, node: fx.Node) -> State:
        """The ids of a node's tensor."""
        return self._states.get(node, ())

    # What each operation does.

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
        if node.op == "output":
            for source in sources:
                self._fix(self._of_all(source), "its units are the model's output")
        elif sources and (node.users or node in self.graph.layers):
            self._states[node] = self._after(node, operation(node))

    def _constant_along(self, node: fx.Node, op: str) -> set[int]:
        """The dimensions of more than one entry along which a tensor is surely constant."""
        if not (op == "expand" or op in FACTORIES or self._is_pointwise(node, op)):
            return set()
        dims = set(range(len(shape_of(node))))
        for source in () if op in FACTORIES else node.all_input_nodes:
            shift = len(shape_of(node)) - len(shape_of(source))
            alike = self._uniform.get(source, set())
            dims -= {
                dim + shift for dim, size in enumerate(shape_of(source))
                if size > 1 and dim not in alike
            }  # fmt: skip
        return {dim for dim in dims if shape_of(node)[dim] > 1}

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
        if op in LINEAR | CONVOLUTIONS:
            return self._through_layer(node)
        if op in SPLITTING:
            return self._through_split(node, op)
        if node.target.__name__ == "getitem":  # type: ignore[union-attr]
            parts = self._parts.get(first_of(node))
            place: Any = node.args[1]
            return self.of(first_of(node)) if parts is None else parts[place]
        if op in MATRIX_PRODUCTS:
            return self._through_product(node)
        if op == "scaled_dot_product_attention":
            return self._through_attention(node)
        if op in PER_UNIT_ARGUMENTS:
            return self._through_per_unit(node, op)
        if op in NORMS:
            return self._through_norm(node, op)
        if op in RESHAPING:
            return self._reshaped(node, self.of(first_of(node)))
        if op in MOVING:
            return self._moved(node, op)
        if pooling := POOLING.fullmatch(op):
            sizes: Any = node.args[1]
            count = len(sizes) // 2 if op == "pad" else int(pooling[1])
            dims = len(shape_of(first_of(node)))
            return self._mixed(node, self.of(first_of(node)), range(dims - count, dims))
        if op in REDUCING | MIXING | STATISTICS.keys():
            return self._along(node, op)
        if op in TAKING:
            return self._taken(node, op)
        if op == "flip":
            return self._flipped(node)
        if op == "cat":
            return self._joined(node)
        if op == "stack":
            return self._stacked(node)
        if op == "glu":
            return self._through_glu(node)
        if op == "pixel_shuffle":
            return self._through_pixel_shuffle(node)
        if op == "embedding":
            return self._through_embedding(node)
        if op == "index":
            return self._indexed(node)
        if self._is_pointwise(node, op):
            return self._elementwise(node, op)
        for source in node.all_input_nodes:
            self._fix(self._of_all(source), f"{node.target} is not known to keep its units apart")
        return ()

    def _through_layer(self, node: fx.Node) -> State:
        """A layer sums over its input's channels; a convolution may do so in groups."""
        inputs = data_input(node)
        layer = self.graph.layers.get(node) or self.graph.tied.get(node)
        state = self.of(inputs)
        if layer is None:
            reason = f"{node.target} takes its units, but its weight is not a module's own"
            for source in node.all_input_nodes:
                self._fix(self._of_all(source), reason)
            return ()
        outputs, taken = (
            self.parameters[layer.weight, dim] for dim in (layer.out_dim, layer.in_dim)
        )
        if layer.bias is not None:
            self.classes.unite(self.parameters[layer.bias, 0], outputs)
        channels = self._channels(node, layer, state)
        if channels is None:  # the model's own inputs
            self.classes.fix(taken, "its inputs are not a layer's units")
            if layer.groups > 1:
                self.classes.fix(outputs, "its inputs are not a layer's units")
        elif layer.groups == 1:
            self.classes.unite(channels, taken)
        else:
            self._through_groups(node, layer, channels, outputs, taken)
        others = [labels for labels in state if layer.channel_dim not in labels.dims]
        return (*others, Labels((layer.channel_dim,), outputs))

    def _channels(self, node: fx.Node, layer: Layer, state: State) -> Ids | None:
        """The ids along a layer's input channels, the same at all positions."""
        at = layer.channel_dim
        if layer.window is not None:
            last = range(at + 1, len(shape_of(data_input(node))))
            state = self._mixed(node, state, last)
        for labels in state:
            if at in labels.dims:
                axis = labels.dims.index(at)
                others = tuple(i for i in range(labels.ids.ndim) if i != axis)
                self.classes.unite_along(labels.ids, others)
                return np.moveaxis(labels.ids, axis, 0).reshape(labels.ids.shape[axis], -1)[:, 0]
        for labels in state:  # units of another dimension, while the channels have none
            self._fix(
                (labels,), f"{node.target} sums over another dimension than that of its units"
            )
        return None

    def _through_groups(
        self, node: fx.Node, layer: Layer, channels: Ids, outputs: Ids, taken: Ids
    ) -> None:
        """A grouped convolution: units of a group's channels, one of these if it has only one."""
        ins, outs = (ids.reshape(layer.groups, -1) for ids in (channels, outputs))
        for channels_of in (ins, outs):
            note = f"{node.target} has groups of {channels_of.shape[1]} channels"
            self.classes.unite_along(
                channels_of, (1,), f"{note}, which mix several of its units"
            )
        self.classes.unite(ins[:, 0], outs[:, 0])
        self.classes.fix(taken, f"{node.target} has groups")

    def _through_split(self, node: fx.Node, op: str) -> State:
        source = first_of(node)
        state, dims = self.of(source), len(shape_of(source))
        named: Any = node.args[1] if op == "unbind" and len(node.args) > 1 else None
        if op != "unbind":
            named = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        dim = int(named or 0) % dims
        pieces = [tuple(piece.shape) for piece in node.meta["val"]]
        sizes = [1] * len(pieces) if op == "unbind" else [piece[dim] for piece in pieces]
        self._parts[node] = [
            self._cut_out(state, dim, slice(end - size, end), removed=op == "unbind")
            for size, end in zip(sizes, np.cumsum(sizes), strict=True)
        ]
        for labels in state:
            if dim in labels.dims:
                axis = labels.dims.index(dim)
                alone = len(labels.dims) == 1
                if len(set(sizes)) > 1:
                    for part in self._parts[node]:
                        self._doubt_sizes(node, part, [dim])
                elif alone:
                    moved = np.moveaxis(labels.ids, axis, 0).reshape(len(sizes), sizes[0], -1)
                    self.classes.unite_along(
                        moved, (0,), f"{node.target} puts its units into different tensors"
                    )
                    if split_may_hold_size(node, dim):
                        self._doubt_sizes(node, self._parts[node][0], [dim])
        return ()

    def _doubt_sizes(self, node: fx.Node, state: State, dims: Iterable[int]) -> None:
        """Notes that an operation may have the sizes of these dimensions as constants."""
        self.doubts += [
            Doubt(node, labels.ids, axis, labels.ids.shape[axis])
            for labels in state for axis, dim in enumerate(labels.dims) if dim in dims
        ]  # fmt: skip

    def _through_product(self, node: fx.Node) -> State:
        """A matrix product for each entry of the first dimensions."""
        one, other = (arg for arg in node.args[:2] if isinstance(arg, fx.Node))
        dims = len(shape_of(node))
        if len(shape_of(one)) < 2 or len(shape_of(other)) < 2:
            return self._refused(node, f"{node.target} sums over its units")
        reason = f"{node.target} sums over its units"
        left = self._mixed(node, self.of(one), [len(shape_of(one)) - 1], reason)
        right = self._mixed(node, self.of(other), [len(shape_of(other)) - 2], reason)
        state = self._met(node, [
            (one, left, _aligned(one, node) | {len(shape_of(one)) - 1: None}),
            (other, right, _aligned(other, node) | {len(shape_of(other)) - 2: None}),
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
        keys, values = (_repeated(state, dims - 3, heads) for state in (keys, values))
        operands: list[Operand] = [
            (query, queries, _aligned(query, node) | {last: None}),
            (key, keys, _aligned(key, node) | {last: None, last - 1: None}),
            (value, values, _aligned(value, node) | {last - 1: None}),
        ]
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if isinstance(mask, fx.Node):
            masks = self._mixed(node, self.of(mask), [len(shape_of(mask)) - 1], reason)
            operands.append((mask, masks, _aligned(mask, node) | {len(shape_of(mask)) - 1: None}))
        state = self._met(node, operands)
        self._note_product(node, state, dims)
        return state

    def _note_product(self, node: fx.Node, state: State, dims: int) -> None:
        self.products += [
            (node, labels.ids) for labels in state if any(dim < dims - 2 for dim in labels.dims)
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

    def _through_norm(self, node: fx.Node, op: str) -> State:
        """A norm along the last dimensions, or of groups of channels with all positions."""
        source, of_groups = first_of(node), op == "group_norm"
        dims = len(shape_of(source))
        sizes: Any = node.args[1]
        over = range(1, dims) if of_groups else range(dims - len(sizes), dims)
        state = tuple(
            labels for all_labels in self.of(source)
            for labels in (
                (all_labels,) if all_labels.dims in [(dim,) for dim in over]
                and not (of_groups and all_labels.dims[0] > 1)
                else self._mixed(node, (all_labels,), over if not of_groups else range(2, dims))
            )
        )  # fmt: skip
        operands: list[Operand] = [(source, state, {dim: dim for dim in range(dims)})]
        for operand in node.args[2:4]:
            if isinstance(operand, fx.Node):
                to = {dim: over[dim] for dim in range(len(shape_of(operand)))}
                operands.append((operand, self.of(operand), to))
        state = self._met(node, operands)
        for labels in state:
            if not set(labels.dims) & set(over):
                continue
            if len(labels.dims) > 1:
                self._fix((labels,), f"{node.target} mixes its units")
            elif of_groups and sizes > 1:
                self.classes.unite_along(labels.ids.reshape(sizes, -1), (1,))
            else:
                self.norms.append(Norm(node, labels.dims[0], labels.ids))
            if len(operands) == 1:  # its sizes are those of no tensor
                self._doubt_sizes(node, (labels,), over)
        return state

    def _statistic(self, node: fx.Node, along: set[int]) -> State:
        """A statistic along dimensions, which stay with size 1: a part of a norm, maybe."""
        source, result = first_of(node), list[Labels]()
        for labels in self.of(source):
            if len(labels.dims) == 1 and labels.dims[0] in along:
                self.norms.append(Norm(node, labels.dims[0], labels.ids))
            else:
                result += self._mixed(node, (labels,), along)
        if operation(node) == "var_mean":
            self._parts[node] = [tuple(result), tuple(result)]
            return ()
        return tuple(result)

    def _check_rescales(self, norm: Norm) -> None:
        """Fixes units of which a statistic is used for anything but the units themselves."""
        if operation(norm.node) in NORMS:
            return
        units, todo, seen = self.classes.roots(norm.ids), [norm.node], {norm.node}
        while todo:
            for user in todo.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                if any(np.isin(units, self.classes.roots(la.ids)).any() for la in self.of(user)):
                    continue
                op = operation(user)
                is_pointwise = self._is_pointwise(user, op) or op in ("expand", "getitem")
                if user.op == "output" or not is_pointwise:
                    self.classes.fix(norm.ids, f"{norm.node.target} mixes its units")
                    return
                todo.append(user)

    def entries_in_norms(self, left: Entries) -> dict[fx.Node, tuple[int, Tensor]]:
        """The norms over entries that go: the dimension, and the entries that are left of it.

        left: what stays of each dimension that is cut
        """
        gone = list[Ids]()
        for key, entries in left.items():
            if key in self.parameters:
                goes = np.ones(len(self.parameters[key]), np.bool_)
                goes[entries.numpy()] = False
                gone.append(self.classes.roots(self.parameters[key][goes]))
        lost = np.unique(np.concatenate(gone)) if gone else np.empty(0, np.int64)
        found = {}
        for node, dim, ids in self.norms:
            stays = ~np.isin(self.classes.roots(ids), lost)
            if not stays.all():
                found[node] = dim, torch.from_numpy(np.nonzero(stays)[0])
        return found

    def _elementwise(self, node: fx.Node, op: str) -> State:
        operands = node.all_input_nodes
        state = self._met(node, [(o, self.of(o), _aligned(o, node)) for o in operands])
        terms = {
            self._nearest.get(o) for o in operands if self.of(o) and o not in self._constants
        }
        if op in SUMS and len(terms) > 1:
            self.summed += [labels.ids for labels in state]
        return state

    def _along(self, node: fx.Node, op: str) -> State:
        """An operation along dimensions that its arguments name (all of them where none is)."""
        source = first_of(node)
        place = 2 if op == "roll" else STATISTICS.get(op, 1)
        named = node.args[place] if len(node.args) > place else node.kwargs.get("dim")
        along = _dims(named, len(shape_of(source)))
        if op in STATISTICS and not _removes(source, node):
            return self._statistic(node, along)
        state = self._mixed(node, self.of(source), along)
        return _without_dims(state, along) if _removes(source, node) else state

    def _taken(self, node: fx.Node, op: str) -> State:
        source, shape = first_of(node), shape_of(first_of(node))
        arguments: list[Any] = [*node.args[1:]]
        dim = int(arguments[0] if arguments else 0) % len(shape)
        if op == "select":
            start, step, size = int(arguments[1]) % shape[dim], 1, 1
        else:
            start = arguments[1] if len(arguments) > 1 else 0
            step = arguments[3] if op == "slice" and len(arguments) > 3 else 1
            start = 0 if start is None else int(start)
            start = min(start + shape[dim], shape[dim]) if start < 0 else min(start, shape[dim])
            size = shape_of(node)[dim]
        places = slice(start, start + size * step, step)
        if size < shape[dim]:
            for labels in self.of(source):
                if labels.dims == (dim,) and op == "select":
                    self._fix((labels,), f"{node.target} takes one of its units")
                elif dim in labels.dims:
                    axis, end = labels.dims.index(dim), start + size * step
                    moved = np.moveaxis(labels.ids, axis, 0)
                    self.doubts += [
                        Doubt(node, ids, 0, len(ids)) for ids in (moved[:start], moved[:end])
                        if 0 < len(ids) < shape[dim]
                    ]  # fmt: skip
        return self._cut_out(self.of(source), dim, places, removed=op == "select")

    def _flipped(self, node: fx.Node) -> State:
        source = first_of(node)
        along = _dims(node.args[1], len(shape_of(source)))
        return tuple(
            Labels(labels.dims, np.flip(labels.ids, tuple(
                axis for axis, dim in enumerate(labels.dims) if dim in along
            ))) for labels in self.of(source)
        )  # fmt: skip

    def _joined(self, node: fx.Node) -> State:
        """Tensors side by side along one dimension."""
        parts: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
        parts = [part for part in parts if len(shape_of(part)) == len(shape_of(node))]
        dims = len(shape_of(node))
        named: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        dim = int(named) % dims
        if not any(dim in labels.dims for part in parts for labels in self.of(part)):
            rest: dict[int, int | None] = {at: at for at in range(dims) if at != dim}
            return self._met(node, [(part, self.of(part), rest | {dim: None}) for part in parts])
        joint = sorted({d for part in parts for labels in self.of(part) if dim in labels.dims
                        for d in labels.dims})  # fmt: skip
        same: dict[int, int | None] = {at: at for at in range(dims)}
        blocks, rests = list[Ids](), list[State]()
        for part in parts:
            inside = tuple(la for la in self.of(part) if set(la.dims) & set(joint))
            if not inside:  # values that no layer gives
                fresh = self.classes.fresh(shape_of(part)[dim])
                self.classes.fix(fresh, f"{node.target} joins its units with other values")
                inside = (Labels((dim,), fresh),)
            sizes = [shape_of(part)[d] for d in joint]
            blocks.append(self._block(node, joint, sizes, [(None, inside, same)]))
            rests.append(tuple(la for la in self.of(part) if not set(la.dims) & set(joint)))
        ids = np.concatenate(blocks, axis=joint.index(dim))
        along = same | dict.fromkeys(joint)
        others = self._met(node, [(p, rest, along) for p, rest in zip(parts, rests, strict=True)])
        if len(joint) > 1:
            self._splits.append(ids)
        return (*others, Labels(tuple(joint), ids))

    def _stacked(self, node: fx.Node) -> State:
        parts: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
        named: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        dim = int(named) % len(shape_of(node))
        moved = {at: at + (at >= dim) for at in range(len(shape_of(parts[0])))}
        labelled = sorted({moved[d] for p in parts for labels in self.of(p) for d in labels.dims})
        if not labelled:
            return ()
        sizes = [shape_of(node)[d] for d in labelled]
        blocks = [
            self._block(node, labelled, sizes, [(part, self.of(part), moved)]) for part in parts
        ]
        ids = np.stack(blocks)
        self._splits.append(ids)
        return (Labels((dim, *labelled), ids),)

    def _through_glu(self, node: fx.Node) -> State:
        source = first_of(node)
        dim = int(node.args[1] if len(node.args) > 1 else -1) % len(shape_of(source))  # type: ignore[arg-type]
        size = shape_of(node)[dim]
        first, second = (
            self._cut_out(self.of(source), dim, part, False)
            for part in (slice(0, size), slice(size, 2 * size))
        )
        same = {at: at for at in range(len(shape_of(node)))}
        return self._met(node, [(node, first, same), (node, second, same)])

    def _through_pixel_shuffle(self, node: fx.Node) -> State:
        source, channels = first_of(node), len(shape_of(node)) - 3
        state = self._mixed(node, self.of(source), [channels + 1, channels + 2])
        new = []
        for labels in state:
            if labels.dims == (channels,):
                ids = labels.ids.reshape(shape_of(node)[channels], -1)
                self.classes.unite_along(ids, (1,))
                labels = Labels(labels.dims, ids[:, 0])
            elif channels in labels.dims:
                self._fix((labels,), f"{node.target} mixes its units")
                continue
            new.append(labels)
        return tuple(new)

    def _through_embedding(self, node: fx.Node) -> State:
        table = first_of(node)
        for labels in self.of(table):
            if labels.dims == (0,):
                self.classes.fix(labels.ids, f"{node.target} looks its units up")
        last = len(shape_of(node)) - 1
        return tuple(
            Labels((last,), labels.ids) for labels in self.of(table) if labels.dims == (1,)
        )

    def _indexed(self, node: fx.Node) -> State:
        """The entries at places of one dimension that another tensor names."""
        source, indices = first_of(node), list(node.args[1])  # type: ignore[arg-type]
        named = [dim for dim, index in enumerate(indices) if index is not None]
        if len(named) != 1:
            return self._refused(node, f"{node.target} is not known to keep its units apart")
        self._fix(self.of(indices[named[0]]), f"{node.target} looks its units up")
        [dim], shift = named, len(shape_of(indices[named[0]])) - 1
        result = []
        for labels in self.of(source):
            if dim in labels.dims:
                self._fix((labels,), f"{node.target} looks its units up")
            else:
                dims = tuple(at + shift if at > dim else at for at in labels.dims)
                result.append(Labels(dims, labels.ids))
        return tuple(result)

    # Shapes.

    def _reshaped(self, node: fx.Node, state: State) -> State:
        """The ids in the new shape. Where one dimension becomes several, all of these share ids."""
        old, new = shape_of(first_of(node)), shape_of(node)
        result, pairs = list[Labels](), _same_entries(old, new)
        renamed = {b[0]: a[0] for b, a in pairs if len(b) == len(a) == 1}
        result += [
            Labels(tuple(renamed[dim] for dim in labels.dims), labels.ids)
            for labels in state if renamed.keys() >= set(labels.dims)
        ]  # fmt: skip
        for before, after in pairs:
            inside = tuple(labels for labels in state if set(labels.dims) & set(before))
            if not inside or len(before) == len(after) == 1:
                continue
            others = sorted({dim for labels in inside for dim in labels.dims} - set(before))
            if min(len(before), len(after)) > 1 or not renamed.keys() >= set(others):
                self._fix(inside, f"{node.target} mixes its units' dimension with others")
                continue
            dims = [*others, *before]
            same = {dim: dim for dim in dims}
            ids = self._block(node, dims, [old[dim] for dim in dims], [(None, inside, same)])
            ids = ids.reshape([old[dim] for dim in others] + [new[dim] for dim in after])
            labels = self._simple(Labels((*(renamed[dim] for dim in others), *after), ids))
            if len(labels.dims) > 1 and len(before) < len(after):
                self._splits.append(labels.ids)
            result.append(labels)
        held = [dim for dim in range(len(new)) if may_hold_size(node, dim)]
        self._doubt_sizes(node, tuple(result), held)
        return tuple(result)

    def _simple(self, labels: Labels) -> Labels:
        """The same without the dimensions along which all entries have one id."""
        roots, dims, ids = self.classes.roots(labels.ids), list(labels.dims), labels.ids
        for axis in reversed(range(ids.ndim)):
            if ids.ndim > 1 and (roots == roots.take([0], axis)).all():
                roots, ids = np.take(roots, 0, axis), np.take(ids, 0, axis)
                del dims[axis]
        return Labels(tuple(dims), ids)

    def _moved(self, node: fx.Node, op: str) -> State:
        source, dims = first_of(node), len(shape_of(first_of(node)))
        state = self.of(source)
        if op == "expand":
            shift = len(shape_of(node)) - dims
            for labels in state:
                for dim, size in zip(labels.dims, labels.ids.shape, strict=True):
                    if size != shape_of(node)[dim + shift]:
                        self._fix((labels,), f"{node.target} repeats its units")
            kept = [la for la in state if all(
                s == shape_of(node)[d + shift] for d, s in zip(la.dims, la.ids.shape, strict=True)
            )]  # fmt: skip
            result = tuple(Labels(tuple(d + shift for d in la.dims), la.ids) for la in kept)
            held = [dim for dim in range(len(shape_of(node))) if may_hold_size(node, dim)]
            self._doubt_sizes(node, result, held)
            return result
        order = list(range(dims))
        if op == "permute":
            order = _listed(node.args[1], dims)
        elif op == "movedim":
            places, to = (_listed(arg, dims) for arg in node.args[1:3])
            order = [dim for dim in range(dims) if dim not in places]
            for place, dim in sorted(zip(to, places, strict=True)):
                order.insert(place, dim)
        elif op == "numpy_T":
            order.reverse()
        elif dims > 1:
            first, second = node.args[1:3] if len(node.args) > 2 else (-2, -1)
            a, b = int(first) % dims, int(second) % dims  # type: ignore[arg-type]
            order[a], order[b] = order[b], order[a]
        return tuple(
            Labels(tuple(order.index(dim) for dim in labels.dims), labels.ids) for labels in state
        )

    def _cut_out(self, state: State, dim: int, places: slice, removed: bool) -> State:
        """Some entries of a dimension; `removed`: one, without the dimension."""
        result = []
        for labels in state:
            dims, ids = labels
            if dim in dims:
                axis = dims.index(dim)
                ids = ids[(slice(None),) * axis + (places,)]
                if removed:
                    ids, dims = np.take(ids, 0, axis), dims[:axis] + dims[axis + 1 :]
            if dims:
                dims = tuple(d - (removed and d > dim) for d in dims)
                result.append(Labels(dims, ids))
        return tuple(result)

    def _mixed(
        self, node: fx.Node, state: State, dims: Iterable[int], reason: str | None = None
    ) -> State:
        """The ids after an operation that mixes all entries along these dimensions."""
        along, result = set(dims), list[Labels]()
        for labels in state:
            axes = tuple(axis for axis, dim in enumerate(labels.dims) if dim in along)
            if not axes:
                result.append(labels)
            elif len(axes) == len(labels.dims):
                self._fix((labels,), reason or f"{node.target} mixes its units")
            else:
                self.classes.unite_along(
                    labels.ids, axes, reason or f"{node.target} mixes its units"
                )
                kept = [axis for axis in range(len(labels.dims)) if axis not in axes]
                first = tuple(0 if a in axes else slice(None) for a in range(len(labels.dims)))
                result.append(Labels(tuple(labels.dims[a] for a in kept), labels.ids[first]))
        return tuple(result)

    # Several operands.

    def _met(self, node: fx.Node, operands: Sequence[Operand]) -> State:
        """The ids of a result whose entries are computed from those at the same place."""
        shape = shape_of(node)
        blocks: list[set[int]] = []  # of the result's dimensions that share ids
        for _, state, to in operands:
            for labels in state:
                block = {at for dim in labels.dims if (at := to.get(dim)) is not None}
                met = [other for other in blocks if other & block]
                blocks = [other for other in blocks if not other & block]
                if block:
                    blocks.append(block.union(*met))
        result = []
        for block in blocks:
            dims = sorted(block)
            ids = self._block(node, dims, [shape[dim] for dim in dims], operands)
            result.append(self._simple(Labels(tuple(dims), ids)))
        return tuple(result)

    def _block(
        self, node: fx.Node, dims: Sequence[int], sizes: Sequence[int],
        operands: Sequence[Operand],
    ) -> Ids:  # fmt: skip
        """The ids of a result along `dims`, of these sizes; those that meet become one class."""
        arrays, reasons = list[Ids](), list[tuple[tuple[int, ...], str]]()
        factors = list[tuple[Ids, tuple[int, ...]]]()
        for operand, state, to in operands:
            covered = set[int]()
            for labels in state:
                ats = [to[dim] for dim in labels.dims]
                if not any(at in dims for at in ats):
                    continue
                axes = [dims.index(at) for at in ats if at is not None]
                shape = [1] * len(dims)
                for axis, size in zip(axes, labels.ids.shape, strict=True):
                    shape[axis] = size
                    covered.add(dims[axis])
                ids = labels.ids.transpose(np.argsort(axes)).reshape(shape)
                if ids.size == 1 < math.prod(sizes):  # a single unit that is broadcast
                    self.classes.fix(ids, f"{node.target} changes the size of its units' dimension")
                elif operand in self._constants and len(axes) < len(dims):
                    factors.append((np.broadcast_to(ids, sizes), tuple(axes)))
                else:
                    arrays.append(np.broadcast_to(ids, sizes))
            if operand is None or operand is node:
                continue
            uniform = self._uniform.get(operand, set())
            if arrays:
                axes = [dims.index(at) for dim, at in to.items() if dim in uniform and at in dims]
                self.doubts += [
                    Doubt(operand, arrays[0], axis, arrays[0].shape[axis]) for axis in axes
                ]
            own = {
                at: shape_of(operand)[dim] for dim, at in to.items()
                if at in dims and dim not in uniform
            }  # fmt: skip
            bare = tuple(dims.index(at) for at, s in own.items() if s > 1 and at not in covered)
            if bare:
                other = f"another tensor of shape {shape_of(operand)}"
                reasons.append((bare, f"{node.target} combines its units with {other}"))
        first = arrays[0] if arrays else self.classes.fresh(math.prod(sizes)).reshape(sizes)
        for others in arrays[1:]:
            self.classes.unite(first, others)
        self._factors += [_Factor(node, first, ids, axes) for ids, axes in factors]
        for bare, reason in reasons:
            if len(bare) < len(dims):  # along the other dimensions, units can still be removed
                self.classes.unite_along(first, bare, reason)
            else:
                self.classes.fix(first, reason)
        return np.ascontiguousarray(first)

    def _is_pointwise(self, node: fx.Node, op: str) -> bool:
        return op in ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())

    def _refused(self, node: fx.Node, reason: str) -> State:
        for source in node.all_input_nodes:
            self._fix(self._of_all(source), reason)
        return ()

    def _is_labelled(self, node: fx.Node) -> bool:
        return bool(self._states.get(node)) or node in self._parts

    def _of_all(self, node: fx.Node) -> State:
        """The ids of all tensors that a node gives."""
        return self.of(node) + tuple(la for state in self._parts.get(node, ()) for la in state)

    def _fix(self, state: State, reason: str) -> None:
        for labels in state:
            self.classes.fix(labels.ids, reason)

    def _decide_factors(self) -> None:
        """A constant along one of the dimensions that hold units: are these its entries?

        Yes where the units differ along its dimensions, as heads do with a bias for each head. If
        they do not, its entries stay: a norm's factors of the entries of all heads.
        """
        for node, ids, constant, axes in self._factors:
            roots = self.classes.roots(ids)
            others = tuple(axis for axis in range(ids.ndim) if axis not in axes)
            if all((roots == roots.take([0], axis)).all() for axis in others):
                self.classes.unite(ids, constant)
            else:
                self.classes.fix(constant, f"{node.target} has the same for several units")
                self.classes.unite_along(ids, axes, f"{node.target} has factors for its entries")

    def _make_rectangular(self) -> None:
        """A dimension that was split into several loses its entries along one of these only.

        So entries at the same place of that one go together. It is the one with the most units.
        """
        for ids in self._splits:
            roots = self.classes.roots(ids)
            varying = [
                axis for axis in range(ids.ndim) if not (roots == roots.take([0], axis)).all()
            ]
            free = np.array([reason is None for reason in self.classes.reasons(roots)])
            if len(varying) < 2 or not free.any():
                continue
            most = max(varying, key=lambda axis: ids.shape[axis])
            self.classes.unite_along(ids, tuple(a for a in range(ids.ndim) if a != most), MIXED)


def _aligned(operand: fx.Node, result: fx.Node) -> dict[int, int | None]:
    """The result's dimension for each of an operand's, as torch broadcasts them."""
    shift = len(shape_of(result)) - len(shape_of(operand))
    return {dim: dim + shift for dim in range(len(shape_of(operand)))}


def _repeated(state: State, dim: int, size: int) -> State:
    """The ids where each entry of a dimension is repeated until it has this size."""
    result = []
    for labels in state:
        if dim in labels.dims:
            axis = labels.dims.index(dim)
            times = size // labels.ids.shape[axis]
            labels = Labels(labels.dims, labels.ids.repeat(times, axis))
        result.append(labels)
    return tuple(result)


def _dims(named: Any, count: int) -> set[int]:
    """Named dimensions, of `count`; all if none is named."""
    if isinstance(named, int):
        return {named % count}
    return {int(dim) % count for dim in named or range(count)}


def _listed(named: Any, count: int) -> list[int]:
    return [int(dim) % count for dim in ([named] if isinstance(named, int) else named)]


def _removes(source: fx.Node, node: fx.Node) -> bool:
    return len(shape_of(source)) > len(shape_of(node))


def _without_dims(state: State, removed: set[int]) -> State:
    """The ids where dimensions without ids are removed."""
    return tuple(
        Labels(tuple(d - sum(r < d for r in removed) for d in labels.dims), labels.ids)
        for labels in state
    )


def _same_entries(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The least sets of old and new dimensions of more than one entry that hold the same entries.

    Both are shapes with as many entries.
    """
    before, after = ([dim for dim, size in enumerate(shape) if size > 1] for shape in (old, new))
    pairs = list[tuple[list[int], list[int]]]()
    while before:
        ours, theirs = [before.pop(0)], [after.pop(0)]
        while (a := math.prod(old[d] for d in ours)) != (b := math.prod(new[d] for d in theirs)):
            if a < b:
                ours.append(before.pop(0))
            else:
                theirs.append(after.pop(0))
        pairs.append((ours, theirs))
    return pairs
