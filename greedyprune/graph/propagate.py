"""What may be pruned: how each operation carries a layer's units to the layers that take them.

A *unit* is removed as a whole: a hidden unit, a channel, an attention head. The layers whose
outputs are the units are their *producers*; the layers that sum over them are their *consumers*.
Units can be removed if every operation between the two keeps them apart. The tables below list the
operations that do; an operation that no table names makes the layer not prunable.

A tensor holds the units in one dimension, of size outer * units * inner: unit j has the entries
(a * units + j) * inner + b for every a < outer and b < inner. So a channel stays one unit when
it is flattened into many features, and a head is one unit among the columns of a fused projection.
Where an operation mixes neighbouring units (a view as heads, a grouped convolution), those
neighbours are merged into one unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from .constant_sizes import may_hold_size, split_may_hold_size
from .tracing import (
    CONVOLUTIONS,
    LINEAR,
    Graph,
    ancestors,
    data_input,
    first_of,
    flops_of,
    operation,
    shape_of,
)

# What operations do to the units' dimension, by name (`add` stands for `add_`, too).
# They leave every number as it is:
IDENTITY = {
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "contiguous", "clone",
    "detach", "alias", "to", "_to_copy", "lift_fresh_copy",
}  # fmt: skip
# They act on every number by itself: these, and the operations that torch tags `pointwise`:
ELEMENTWISE = IDENTITY | {"hardswish", "log_sigmoid", "zeros_like", "ones_like", "full_like"}
# They give the same numbers another shape:
RESHAPING = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view"}
# They give the dimensions another order or size:
MOVING = {"transpose", "permute", "t", "numpy_T", "swapaxes", "expand"}
# They cut a dimension into several tensors:
SPLITTING = {"split", "split_with_sizes", "chunk"}
# They act on the last dimensions, behind that of the units:
POOLING = {
    f"{kind}_pool{d}d" for d in (1, 2, 3) for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
} | {"upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "pad"}  # fmt: skip
# They act along dimensions that their arguments name, and remove them or keep them:
REDUCING = {"mean", "sum", "amax", "amin"}
ALONG = {
    "softmax", "log_softmax", "_softmax", "cumsum", "slice", "narrow", "select", "flip", "roll",
}  # fmt: skip
# They act on each unit by itself; the arguments at these places have one entry for each unit:
PER_UNIT_ARGUMENTS = {"batch_norm": (1, 2, 3, 4), "instance_norm": (1, 2, 3, 4), "prelu": (1,)}
# In these (and in `mul`) the units may meet units of other producers: all are then one group.
MATRIX_PRODUCTS = {"matmul", "bmm", "scaled_dot_product_attention"}
# A layer (LINEAR and CONVOLUTIONS of tracing.py) ends the way: it is a consumer. Only a convolution
# with several groups carries the units on.


class NotPrunableError(ValueError):
    """A ValueError: no unit of a layer can be removed. The message names the layer and says why."""


@dataclass(frozen=True)
class Slice:
    """Where a tensor holds the units: its dimension `dim` has size outer * units * inner."""

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def width(self) -> int:
        """The number of entries of one unit along `dim`."""
        return self.outer * self.inner

    def entries(self, kept: Tensor, units: int) -> Tensor:
        """The indices along `dim` of the units `kept`, (K,) int64: (outer * K * inner,) int64."""
        outer, inner = torch.arange(self.outer), torch.arange(self.inner)
        indices = (outer[:, None, None] * units + kept.cpu()[:, None]) * self.inner + inner
        return indices.flatten()


class Merge(NamedTuple):
    """A way to merge units: those so far are before * units * after, `units` the merged ones."""

    before: int
    units: int
    after: int


class CoarserUnits(Exception):  # noqa: N818
    """An operation mixes neighbouring units: they have to be merged, in one of these ways."""

    def __init__(self, merges: list[Merge]) -> None:
        self.merges = merges


class MoreProducers(Exception):  # noqa: N818
    """The units meet outputs of other layers, which are producers of the same group."""

    def __init__(self, producers: list[fx.Node]) -> None:
        self.producers = producers


class Propagation:
    """One group's units on their way through a graph, from the producers to all consumers.

    name:          the layer that errors name
    units:         how many units there are
    carrying:      the nodes whose tensors hold the units, and where
    slices:        the parameters and buffers with entries of the units, and where
    consumers:     the layers that sum over the units
    may_hold_size: operations whose arguments may hold the number of units as a constant
    products:      the matrix products of each unit by itself (attention's), and the FLOPs of all
    """

    def __init__(
        self, graph: Graph, name: str, units: int, producers: Mapping[fx.Node, Slice]
    ) -> None:
        self.name, self.units = name, units
        self.carrying = dict(producers)
        self.slices: dict[str, Slice] = {}
        self.consumers: list[fx.Node] = []
        self.may_hold_size: list[fx.Node] = []
        self.products: dict[str, int] = {}
        self.graph, self._producers = graph, producers

    def run(self) -> None:
        """Carries the units through the graph.

        Raises NotPrunableError where an operation mixes the units, CoarserUnits where they have to
        be merged and MoreProducers where outputs of other layers are units of the same group.
        """
        graph = self.graph
        for node, at in self._producers.items():
            layer = graph.layers[node]
            self._cut(layer.weight, Slice(layer.out_dim, at.outer, at.inner))
            if layer.bias is not None:
                self._cut(layer.bias, Slice(0, at.outer, at.inner))
        first = min(graph.position[node] for node in self._producers)
        for node in graph.nodes[first + 1 :]:
            if not any(source in self.carrying for source in node.all_input_nodes):
                continue
            if node in self._producers:
                raise self.refusal(f"its units are also inputs of {graph.layers[node].name!r}")
            self._step(node)

    def refusal(self, reason: str) -> NotPrunableError:
        return NotPrunableError(f"layer {self.name!r}: {reason}")

    def _cut(self, tensor: str, at: Slice) -> None:
        """A parameter or buffer has entries of the units."""
        if self.slices.setdefault(tensor, at) != at:
            raise self.refusal(f"{tensor!r} holds its units in two different ways")

    def _step(self, node: fx.Node) -> None:
        """Carries the units through one operation."""
        if node.op == "output":
            raise self.refusal("its units are the model's output")
        op = operation(node)
        if op in LINEAR | CONVOLUTIONS:
            self._through_layer(node)
        elif op in SPLITTING:
            self._through_split(node)
        elif node.op == "call_function" and node.target.__name__ == "getitem":  # type: ignore[union-attr]
            self.carrying[node] = self.carrying[first_of(node)]
        elif not node.users:
            return
        elif op in MATRIX_PRODUCTS:
            self._through_product(node, op)
        elif op in PER_UNIT_ARGUMENTS:
            self._through_per_unit(node, op)
        elif op in RESHAPING | MOVING:
            self.carrying[node] = self._moved(node, op) if op in MOVING else self._reshaped(node)
            self._doubt(may_hold_size(node, self.carrying[node].dim), node)
        elif op in POOLING:
            self._through_pooling(node, op)
        elif op in REDUCING | ALONG:
            self.carrying[node] = self._along_other_dims(node, op)
        elif op == "cat":
            self._through_cat(node)
        elif op in ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            self._through_elementwise(node, op)
        else:
            raise self.refusal(f"{node.target} is not known to keep its units apart")

    def _through_layer(self, node: fx.Node) -> None:
        """A consumer, or a convolution whose groups keep the units apart."""
        layer, inputs = self.graph.layers.get(node), data_input(node)
        if layer is None or inputs not in self.carrying:
            raise self.refusal(
                f"{node.target} takes its units, but its weight is not a module's own"
            )
        at = self.carrying[inputs]
        if at.dim != layer.channel_dim:
            raise self.refusal(f"{node.target} sums over another dimension than that of its units")
        if layer.groups == 1:
            self._cut(layer.weight, Slice(layer.in_dim, at.outer, at.inner))
            self.consumers.append(node)
            return
        size = shape_of(inputs)[at.dim] // layer.groups  # channels of one group
        mixed = f"{node.target} has groups of {size} channels, which mix several of its units"
        channels = shape_of(node)[layer.channel_dim]
        if at.outer > 1 and size > 1:
            raise self.refusal(mixed)
        if at.inner % size:
            together = size // math.gcd(size, at.inner)
            if self.units % together or self.units == together:
                raise self.refusal(mixed)
            raise CoarserUnits([Merge(1, self.units // together, together)])
        out = at.inner // size * (channels // layer.groups)
        self._cut(layer.weight, Slice(0, at.outer, out))
        if layer.bias is not None:
            self._cut(layer.bias, Slice(0, at.outer, out))
        self.carrying[node] = Slice(layer.channel_dim, at.outer, out)

    def _doubt(self, may_hold_size: bool, node: fx.Node) -> None:
        self.may_hold_size += [node] * may_hold_size

    def _through_split(self, node: fx.Node) -> None:
        at, shape = self.carrying[first_of(node)], shape_of(first_of(node))
        self._doubt(split_may_hold_size(node, at.dim), node)
        pieces = [tuple(piece.shape) for piece in node.meta["val"]]
        if pieces[0][at.dim] == shape[at.dim]:  # along another dimension
            self.carrying[node] = at
            return
        if len({piece[at.dim] for piece in pieces}) > 1:
            raise self.refusal(f"{node.target} splits its units into unequal parts")
        if at.outer % len(pieces):
            if at.outer > 1 or self.units % len(pieces) or self.units == len(pieces):
                raise self.refusal(f"{node.target} puts its units into different tensors")
            raise CoarserUnits([Merge(len(pieces), self.units // len(pieces), 1)])
        self.carrying[node] = Slice(at.dim, at.outer // len(pieces), at.inner)

    def _through_product(self, node: fx.Node, op: str) -> None:
        """A matrix product for each unit, as in attention: the units are a batch dimension."""
        count = 3 if op == "scaled_dot_product_attention" else 2
        factors = [arg for arg in node.args[:count] if isinstance(arg, fx.Node)]
        slices = {
            factor: _aligned(self.carrying[factor], factor, node)
            for factor in factors if factor in self.carrying
        }  # fmt: skip
        dims, dim = len(shape_of(node)), next(iter(slices.values())).dim
        if any(at.dim != dim or dim >= dims - 2 for at in slices.values()):
            raise self.refusal(f"{node.target} sums over its units")
        self._join(node, [factor for factor in factors if factor not in slices], dim)
        others = [source for source in node.all_input_nodes if source not in factors]
        if any(_size_at(other, node, dim) != 1 for other in others):
            raise self.refusal(f"{node.target} takes a tensor with an entry for each of its units")
        first = slices.get(factors[0], next(iter(slices.values())))
        if any(at.outer != first.outer or first.inner % at.inner for at in slices.values()):
            raise self.refusal(f"{node.target} multiplies its units with one another")
        self.products[node.name] = flops_of(node)
        self.carrying[node] = first

    def _through_per_unit(self, node: fx.Node, op: str) -> None:
        at = self.carrying[first_of(node)]
        if op == "instance_norm" and at.dim != 1:  # it may have no tensor that shows this
            raise self.refusal(f"{node.target} mixes its units")
        for i in PER_UNIT_ARGUMENTS[op]:
            operand = node.args[i]
            if not isinstance(operand, fx.Node) or shape_of(operand) == (1,):
                continue
            tensor = self.graph.tensor_of(operand)
            if at.dim != 1 or tensor is None:
                raise self.refusal(f"{node.target} does not act along the units' dimension")
            self._cut(tensor, Slice(0, at.outer, at.inner))
        self.carrying[node] = at

    def _through_pooling(self, node: fx.Node, op: str) -> None:
        at = self.carrying[first_of(node)]
        pooled = len(node.args[1]) // 2 if op == "pad" else int(op[-2])  # type: ignore[arg-type]
        if at.dim >= len(shape_of(first_of(node))) - pooled:
            raise self.refusal(f"{node.target} mixes its units")
        self.carrying[node] = at

    def _through_cat(self, node: fx.Node) -> None:
        parts: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
        slices = {self.carrying.get(part) for part in parts}
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(shape_of(node))  # type: ignore[operator]
        at = slices.pop()
        if slices or at is None or at.dim == dim:
            raise self.refusal(f"{node.target} joins its units with other values")
        self.carrying[node] = at

    def _through_elementwise(self, node: fx.Node, op: str) -> None:
        operands = node.all_input_nodes
        slices = {
            _aligned(self.carrying[operand], operand, node)
            for operand in operands if operand in self.carrying
        }  # fmt: skip
        at = slices.pop()
        if slices:
            raise self.refusal(f"{node.target} combines its units with one another")
        if shape_of(node)[at.dim] != at.outer * self.units * at.inner:
            raise self.refusal(f"{node.target} changes the size of its units' dimension")
        factors = []
        for operand in operands:
            if operand in self.carrying or _size_at(operand, node, at.dim) == 1:
                continue
            tensor = self.graph.tensor_of(operand)
            if tensor is not None:
                dim = at.dim - (len(shape_of(node)) - len(shape_of(operand)))
                self._cut(tensor, Slice(dim, at.outer, at.inner))
            elif op == "mul":
                factors.append(operand)
            else:
                raise self._combined(node, operand)
        self._join(node, factors, at.dim)
        self.carrying[node] = at

    def _join(self, node: fx.Node, operands: list[fx.Node], dim: int) -> None:
        """Operands with an entry for each unit: the layers that they come from are producers."""
        layers, producers = self.graph.layers, list[fx.Node]()
        for operand in operands:
            if _size_at(operand, node, dim) == 1:
                continue
            sources = ancestors(operand, stop=layers.__contains__)
            nearest = [source for source in sources if source in layers]
            if not nearest or any(source in self.carrying for source in nearest):
                raise self._combined(node, operand)
            producers += nearest
        if producers:
            raise MoreProducers(list(dict.fromkeys(producers)))

    def _combined(self, node: fx.Node, operand: fx.Node) -> NotPrunableError:
        other = f"another tensor of shape {shape_of(operand)}"
        return self.refusal(f"{node.target} combines its units with {other}")

    def _reshaped(self, node: fx.Node) -> Slice:
        """Where the new shape holds the units: in the dimension that has all of them, if one has.

        Else some dimension may hold groups of neighbouring units, which are then merged.
        """
        at, old, new = self.carrying[first_of(node)], shape_of(first_of(node)), shape_of(node)
        outer, inner = math.prod(old[: at.dim]) * at.outer, at.inner * math.prod(old[at.dim + 1 :])
        merges = []
        for dim in range(len(new)):
            left, right = math.prod(new[:dim]), math.prod(new[dim + 1 :])
            before, after = left // math.gcd(left, outer), right // math.gcd(right, inner)
            if before * after == 1:
                return Slice(dim, outer // left, inner // right)
            units = self.units // (before * after)
            if units > 1 and units * before * after == self.units:
                merges.append(Merge(before, units, after))
        if not merges:
            raise self.refusal(f"{node.target} mixes its units' dimension with others")
        raise CoarserUnits(sorted(merges, key=lambda merge: -merge.units))

    def _moved(self, node: fx.Node, op: str) -> Slice:
        at, dims = self.carrying[first_of(node)], len(shape_of(first_of(node)))
        if op == "expand":
            dim = at.dim + len(shape_of(node)) - dims
            if shape_of(node)[dim] != shape_of(first_of(node))[at.dim]:
                raise self.refusal(f"{node.target} repeats its units")
            return Slice(dim, at.outer, at.inner)
        if op == "permute":
            order = [int(dim) % dims for dim in node.args[1]]  # type: ignore[union-attr,arg-type]
        else:
            first, second = node.args[1:3] if len(node.args) > 2 else (-2, -1)
            order = list(range(dims))
            if op == "numpy_T":
                order.reverse()
            elif dims > 1:
                a, b = int(first) % dims, int(second) % dims  # type: ignore[arg-type]
                order[a], order[b] = order[b], order[a]
        return Slice(order.index(at.dim), at.outer, at.inner)

    def _along_other_dims(self, node: fx.Node, op: str) -> Slice:
        """An operation along dimensions that its arguments name (all of them where none is)."""
        at, shape = self.carrying[first_of(node)], shape_of(first_of(node))
        named = node.args[2 if op == "roll" else 1] if len(node.args) > 1 else None
        dims = [named] if isinstance(named, int) else list(named or range(len(shape)))  # type: ignore[arg-type]
        along = {int(dim) % len(shape) for dim in dims}
        if at.dim in along and not (op == "slice" and shape_of(node) == shape):
            raise self.refusal(f"{node.target} mixes its units")
        removed = len(shape) > len(shape_of(node))
        return Slice(at.dim - sum(dim < at.dim for dim in along) * removed, at.outer, at.inner)


def _aligned(at: Slice, operand: fx.Node, result: fx.Node) -> Slice:
    """An operand's slice in the dimensions of the result that the operand is broadcast to."""
    return Slice(at.dim + len(shape_of(result)) - len(shape_of(operand)), at.outer, at.inner)


def _size_at(operand: fx.Node, result: fx.Node, dim: int) -> int:
    """The operand's size along the result's dimension `dim`; 1 where it is broadcast."""
    shape = shape_of(operand)
    at = dim - (len(shape_of(result)) - len(shape))
    return shape[at] if at >= 0 else 1
