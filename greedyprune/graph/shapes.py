"""How operations that change tensors' shapes carry the ids of their entries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import fx

from .classes import Ids
from .constant_sizes import may_hold_size, split_may_hold_size
from .labels import EXPANDING, Doubt, LabelledTensors, Labels, Operand, State, blocks_of
from .nodes import arguments_of, first_of, shape_of


class ShapeOperations(LabelledTensors):
    """Reshapes, permutations, and operations that take or join parts of tensors."""

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
                if split_may_hold_size(node, dim):  # `x.split(self.width // 2)`
                    self._doubt_sizes(node, (labels,), [dim])
                if len(set(sizes)) > 1:
                    for part in self._parts[node]:
                        self._doubt_sizes(node, part, [dim])
                elif alone:
                    moved = np.moveaxis(labels.ids, axis, 0).reshape(len(sizes), sizes[0], -1)
                    note = f"{node.target} puts its units into different tensors"
                    self._split_evenly(moved, note)
                    if split_may_hold_size(node, dim):
                        self._doubt_sizes(node, self._parts[node][0], [dim])
        return ()

    def _split_evenly(self, ids: Ids, note: str) -> None:
        """Parts of one size lose the same units. ids: the first axis is that of the parts."""
        self.classes.unite_along(ids, (0,), note)

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
            if len(inside) > 1:  # what stays as it is has no part in what goes
                inside = tuple(la for la in inside if not self._stays(la)) or inside
            others = sorted({dim for labels in inside for dim in labels.dims} - set(before))
            finest = _finest([old[dim] for dim in before], [new[dim] for dim in after])
            if finest is None or not renamed.keys() >= set(others):
                self._fix(inside, f"{node.target} mixes its units' dimension with others")
                continue
            dims = [*others, *before]
            same = {dim: dim for dim in dims}
            ids = self._block(node, dims, [old[dim] for dim in dims], [(None, inside, same)])
            sizes = [old[dim] for dim in others]
            if len(finest) > len(before):  # some dimensions become several
                split = ids.reshape(sizes + finest)
                split = self._simple(Labels(tuple(range(split.ndim)), split)).ids
                if split.ndim > 1:
                    self._splits.append(split)
            ids = ids.reshape(sizes + [new[dim] for dim in after])
            result.append(self._simple(Labels((*(renamed[d] for d in others), *after), ids)))
        held = [dim for dim in range(len(new)) if may_hold_size(node, dim)]
        self._doubt_sizes(node, tuple(result), held)
        return tuple(result)

    def _with_uniform(self, node: fx.Node) -> State:
        """A tensor's ids, or those of its only constant dimension, which a reshape may merge."""
        state, uniform = self.of(node), self._uniform.get(node, {})
        if state or len(uniform) != 1:
            return state
        [(dim, ids)] = uniform.items()
        self.doubts.append(Doubt(node, ids, 0, len(ids)))
        return (Labels((dim,), ids),)

    def _moved(self, node: fx.Node, op: str) -> State:
        source, dims = first_of(node), len(shape_of(first_of(node)))
        state = self.of(source)
        if op in EXPANDING:
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
        elif op in ("movedim", "moveaxis"):
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
                else:
                    self._doubt_ends(node, (labels,), dim, start, start + size * step)
        return self._cut_out(self.of(source), dim, places, removed=op == "select")

    def _flipped(self, node: fx.Node) -> State:
        source = first_of(node)
        along = dims_of(node.args[1], len(shape_of(source)))
        return tuple(
            Labels(labels.dims, np.flip(labels.ids, tuple(
                axis for axis, dim in enumerate(labels.dims) if dim in along
            ))) for labels in self.of(source)
        )  # fmt: skip

    def _joined(self, node: fx.Node) -> State:
        """Tensors side by side along one dimension."""
        parts: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
        parts = [part for part in parts if len(shape_of(part)) == len(shape_of(node))]
        named: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        dim = int(named) % len(shape_of(node))
        return self._side_by_side(
            node, dim, [(part, self.of(part), shape_of(part)[dim]) for part in parts]
        )

    def _written(self, node: fx.Node, op: str) -> State:
        """A tensor with some entries of one dimension written anew."""
        source, written = node.all_input_nodes[:2]
        arguments = arguments_of(node)
        shape = shape_of(source)
        dim = int(arguments["dim"]) % len(shape)
        if op == "select_scatter" or arguments["step"] != 1:
            if any(dim in labels.dims for labels in self.of(source)):
                return self._refused(node, f"{node.target} changes some of its units")
            moved: dict[int, int | None] = {at: at for at in range(len(shape))}
            if op == "select_scatter":
                moved = {at: at + (at >= dim) for at in range(len(shape) - 1)}
            same: dict[int, int | None] = {at: at for at in range(len(shape))}
            operands = [(source, self.of(source), same), (written, self.of(written), moved)]
            return self._met(node, operands)
        places = slice(arguments["start"], arguments["end"])
        start, end, _ = places.indices(int(shape[dim]))
        state = self.of(source)
        parts = [
            (source, self._cut_out(state, dim, slice(0, start), False), start),
            (written, self.of(written), end - start),
            (source, self._cut_out(state, dim, slice(end, None), False), shape[dim] - end),
        ]
        self._doubt_ends(node, state, dim, start, end)
        return self._side_by_side(node, dim, [part for part in parts if part[2]])

    def _doubt_ends(self, node: fx.Node, state: State, dim: int, start: int, end: int) -> None:
        """Notes that an operation may have these places of a dimension as constants."""
        for labels in state:
            if dim in labels.dims:
                moved = np.moveaxis(labels.ids, labels.dims.index(dim), 0)
                self.doubts += [
                    Doubt(node, ids, 0, len(ids)) for ids in (moved[:start], moved[:end])
                    if 0 < len(ids) < len(moved)
                ]  # fmt: skip

    def _side_by_side(
        self, node: fx.Node, dim: int, parts: Sequence[tuple[fx.Node, State, int]]
    ) -> State:
        """Tensors, with their ids and their sizes along the dimension in which they are joined."""
        dims = len(shape_of(node))
        if not any(dim in labels.dims for _, state, _ in parts for labels in state):
            rest: dict[int, int | None] = {at: at for at in range(dims) if at != dim}
            return self._met(node, [(part, state, rest | {dim: None}) for part, state, _ in parts])
        joint = sorted({d for _, state, _ in parts for labels in state if dim in labels.dims
                        for d in labels.dims})  # fmt: skip
        same: dict[int, int | None] = {at: at for at in range(dims)}
        along = same | dict.fromkeys(joint)
        blocks, rests = list[Ids](), list[Operand]()
        for part, state, size in parts:
            inside = tuple(la for la in state if set(la.dims) & set(joint))
            if not inside:  # values that no layer gives
                fresh = self.classes.fresh(size)
                self.classes.fix(fresh, f"{node.target} joins its units with other values")
                inside = (Labels((dim,), fresh),)
            sizes = [size if d == dim else shape_of(part)[d] for d in joint]
            blocks.append(self._block(node, joint, sizes, [(None, inside, same)]))
            outside = tuple(la for la in state if not set(la.dims) & set(joint))
            rests.append((part, outside, along))
        ids = np.concatenate(blocks, axis=joint.index(dim))
        others = self._met(node, rests)
        if len(joint) > 1:
            self._splits.append(ids)
        return (*others, Labels(tuple(joint), ids))

    def _stacked(self, node: fx.Node) -> State:
        parts: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
        named: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        dim = int(named) % len(shape_of(node))
        moved = {at: at + (at >= dim) for at in range(len(shape_of(parts[0])))}
        result, apart = list[Labels](), list[tuple[list[int], list[Ids]]]()
        for block in blocks_of({moved[d] for d in la.dims} for p in parts for la in self.of(p)):
            dims = sorted(block)
            sizes = [shape_of(node)[d] for d in dims]
            ids = [self._block(node, dims, sizes, [(p, self.of(p), moved)]) for p in parts]
            roots = [self.classes.roots(each) for each in ids]
            if all(np.array_equal(roots[0], each) for each in roots):
                result.append(Labels(tuple(dims), ids[0]))
            else:
                apart.append((dims, ids))
        # Only along one block of dimensions can the parts be of different units.
        apart.sort(key=lambda block: block[1][0].size)
        for dims, ids in apart[:-1]:
            for other in ids[1:]:
                self.classes.unite(ids[0], other)
            result.append(Labels(tuple(dims), ids[0]))
        for dims, ids in apart[-1:]:
            self._splits.append(np.stack(ids))
            result.append(Labels((dim, *dims), self._splits[-1]))
        return tuple(result)

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

    def _indexed(self, node: fx.Node) -> State:
        """The entries at places of one dimension that another tensor names."""
        indices = list(node.args[1])  # type: ignore[arg-type]
        named = [dim for dim, index in enumerate(indices) if index is not None]
        if len(named) != 1:
            return self._refused(node, f"{node.target} is not known to keep its units apart")
        self._fix(self.of(indices[named[0]]), f"{node.target} looks its units up")
        return self._at_places(node, named, len(shape_of(indices[named[0]])) - 1)

    def _at_places(self, node: fx.Node, named: Iterable[int], shift: int = 0) -> State:
        """The ids of a tensor's entries at places of one dimension.

        shift: how many dimensions the places have, less one
        """
        source, [dim] = first_of(node), named
        result = []
        for labels in self.of(source):
            if dim in labels.dims:
                self._fix((labels,), f"{node.target} looks its units up")
            else:
                dims = tuple(at + shift if at > dim else at for at in labels.dims)
                result.append(Labels(dims, labels.ids))
        return tuple(result)

    def _gathered(self, node: fx.Node) -> State:
        """Entries of a tensor at places of one dimension, other places at every other entry."""
        arguments = arguments_of(node)
        source, places = arguments["self"], arguments["index"]
        dims = len(shape_of(source))
        dim = int(arguments["dim"]) % dims
        kept: dict[int, int | None] = {at: at for at in range(dims)}
        state = self._mixed(node, self.of(source), [dim])
        return self._met(node, [
            (source, state, kept | {dim: None}), (places, self.of(places), kept | {dim: None}),
        ])  # fmt: skip


def dims_of(named: Any, count: int) -> set[int]:
    """Named dimensions, of `count`; all if none is named."""
    if isinstance(named, int):
        return {named % count}
    return {int(dim) % count for dim in named or range(count)}


def _listed(named: Any, count: int) -> list[int]:
    return [int(dim) % count for dim in ([named] if isinstance(named, int) else named)]


def _finest(old: Sequence[int], new: Sequence[int]) -> list[int] | None:
    """The sizes of dimensions that both shapes make by putting neighbours together.

    None: there are none, since a dimension of one lies across two of the other.
    """
    ends = list[int]()  # sizes may be symbols, which no set takes
    for end in (math.prod(shape[i:]) for shape in (old, new) for i in range(len(shape))):
        if all(end != other for other in ends):
            ends.append(end)
    ends.sort()
    sizes = list[int]()
    for inner, outer in zip([1, *ends], ends, strict=False):
        if outer % inner:
            return None
        sizes.insert(0, outer // inner)
    return sizes


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
