"""How single operations treat the units of a layer that are followed through a graph.

A tensor's dimension of size outer * units * inner has the entries of unit j at every index
(a * units + j) * inner + b. So a channel stays one unit when it is flattened into many inputs, and
a head when it is many columns of a fused projection. Where an operation mixes units with some of
their neighbours (a view as heads, a grouped convolution), those neighbours have to be one unit. An
operation that no table below names refuses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

# What the operations do to the units' dimension, by name (in-place forms count as the plain ones).
# What leaves every number as it is:
IDENTITY = {
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "contiguous", "clone",
    "detach", "alias", "to", "_to_copy", "lift_fresh_copy",
}  # fmt: skip
# Elementwise operations are those that torch tags `pointwise`, and these:
ELEMENTWISE = IDENTITY | {"hardswish", "log_sigmoid", "zeros_like", "ones_like", "full_like"}
# The same numbers in another shape:
RESHAPING = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view"}
# Over the dimensions after the units', a channel at a time:
POOLING = {
    f"{kind}_pool{d}d" for d in (1, 2, 3) for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
} | {"upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "pad"}  # fmt: skip
# Over dimensions that the arguments name:
REDUCING = {"mean", "sum", "amax", "amin"}
ALONG = {
    "softmax", "log_softmax", "_softmax", "cumsum", "slice", "narrow", "select", "flip", "roll",
}  # fmt: skip
# Of each unit by itself, with arguments that have one entry a unit:
PER_UNIT_ARGUMENTS = {"batch_norm": (1, 2, 3, 4), "prelu": (1,)}
# Other producers' units may meet these here, and are then units of the same group:
MATRIX_PRODUCTS = {"matmul", "bmm", "scaled_dot_product_attention"}  # and mul
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
LINEAR = {"linear", "addmm"}


class NotPrunableError(ValueError):
    """No unit of the layer can be removed; the message says which operation is in the way."""


@dataclass(frozen=True)
class Slice:
    """Where a tensor's dimension `dim`, of size outer * units * inner, has the units' entries."""

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def width(self) -> int:
        """Entries a unit."""
        return self.outer * self.inner

    def entries(self, kept: Tensor, units: int) -> Tensor:
        """The indices along `dim` of the units `kept` (K,) of so many: outer * K * inner int64."""
        outer, inner = torch.arange(self.outer), torch.arange(self.inner)
        at = (outer[:, None, None] * units + kept.cpu()[:, None]) * self.inner + inner
        return at.flatten()


class Layer(NamedTuple):
    """A node that is a module's own linear map: of which parameters, units in which dimension."""

    name: str
    weight: str
    bias: str | None
    out_dim: int  # of the weight: the outputs
    in_dim: int
    groups: int
    axis: int  # of input and output: the channels


class Coarser(Exception):  # noqa: N818
    """Units that are mixed have to be one; ways to do so: before * units * after = units so far."""

    def __init__(self, ways: list[tuple[int, int, int]]) -> None:
        self.ways = ways


class Joined(Exception):  # noqa: N818
    """Other producers' outputs are units of the same group."""

    def __init__(self, producers: list[fx.Node]) -> None:
        self.producers = producers


@dataclass
class Walk:
    """One group's walk: the nodes that carry its units and where, what it met."""

    name: str
    units: int
    carrying: dict[fx.Node, Slice]
    layers: Mapping[fx.Node, Layer]
    tensors: Mapping[str, str]  # the model's name for a placeholder's
    slices: dict[str, Slice] = field(default_factory=dict)
    consumers: list[fx.Node] = field(default_factory=list)
    sized: str = ""  # an operation that may have sizes of the dense model written into it
    products: dict[str, int] = field(default_factory=dict)  # matrix products and their FLOPs

    def refuse(self, why: str) -> NotPrunableError:
        return NotPrunableError(f"layer {self.name!r}: {why}")

    def slice(self, tensor: str, at: Slice) -> None:
        if self.slices.setdefault(tensor, at) != at:
            raise self.refuse(f"{tensor!r} is used in two ways")

    def step(self, node: fx.Node) -> None:
        """Takes the units through one operation, or says why not."""
        if node.op == "output":
            raise self.refuse("its units are the model's output")
        op = operation(node)
        if op in LINEAR | CONVOLUTIONS:
            self._through_layer(node)
        elif op in ("split", "split_with_sizes", "chunk"):
            self._through_split(node)
        elif node.op == "call_function" and node.target.__name__ == "getitem":  # type: ignore[union-attr]
            self.carrying[node] = self.carrying[first_of(node)]
        elif not node.users:
            return
        elif op in MATRIX_PRODUCTS:
            self._through_product(node, op)
        elif op in PER_UNIT_ARGUMENTS:
            self._through_per_unit(node, op)
        elif op in RESHAPING:
            self.carrying[node] = self._reshaped(node)
            self.sized = self.sized if op == "flatten" else str(node.target)
        elif op in ("transpose", "permute", "t", "numpy_T", "swapaxes", "expand"):
            self.carrying[node] = self._moved(node, op)
        elif op in POOLING:
            self._through_pooling(node, op)
        elif op in REDUCING | ALONG:
            self.carrying[node] = self._beside(node, op)
        elif op == "cat":
            self._through_cat(node)
        elif op in ELEMENTWISE or _is_pointwise(node):
            self._through_elementwise(node, op)
        else:
            raise self.refuse(f"{node.target} stands between its units and the next layer")

    def _through_layer(self, node: fx.Node) -> None:
        """A consumer, or a convolution whose groups keep the units apart."""
        layer, target = self.layers.get(node), str(node.target).removesuffix(".default")
        inputs: fx.Node = node.args[1 if operation(node) == "addmm" else 0]  # type: ignore[assignment]
        if layer is None or inputs not in self.carrying:
            raise self.refuse(
                f"its units meet a linear operation that is no module's own ({target})"
            )
        if any(arg in self.carrying for arg in node.args if arg is not inputs and _is_node(arg)):
            raise self.refuse(f"its units are used as weights ({target})")
        at = self.carrying[inputs]
        if at.dim != layer.axis:
            raise self.refuse(f"{node.target} contracts another dimension than its units'")
        if layer.groups == 1:
            self.slice(layer.weight, Slice(layer.in_dim, at.outer, at.inner))
            self.consumers.append(node)
            return
        size = shape_of(inputs)[at.dim] // layer.groups  # channels a group
        if shape_of(node)[layer.axis] % layer.groups or (at.outer > 1 and size > 1):
            raise self.refuse(f"{node.target} has groups of {size} channels, across its units")
        if at.inner % size:
            together = size // math.gcd(size, at.inner)
            if self.units % together or self.units == together:
                raise self.refuse(f"{node.target} has groups of {size} channels, across its units")
            raise Coarser([(1, self.units // together, together)])
        out = at.inner // size * (shape_of(node)[layer.axis] // layer.groups)
        self.slice(layer.weight, Slice(0, at.outer, out))
        if layer.bias is not None:
            self.slice(layer.bias, Slice(0, at.outer, out))
        self.carrying[node] = Slice(layer.axis, at.outer, out)

    def _through_split(self, node: fx.Node) -> None:
        self.sized = str(node.target)
        at, shape = self.carrying[first_of(node)], shape_of(first_of(node))
        pieces = [tuple(piece.shape) for piece in node.meta["val"]]
        if pieces[0][at.dim] == shape[at.dim]:
            self.carrying[node] = at
            return
        if len({piece[at.dim] for piece in pieces}) > 1:
            raise self.refuse(f"{node.target} cuts its units into unequal parts")
        if at.outer % len(pieces):
            if at.outer > 1 or self.units % len(pieces) or self.units == len(pieces):
                raise self.refuse(f"{node.target} cuts through its units")
            raise Coarser([(len(pieces), self.units // len(pieces), 1)])
        self.carrying[node] = Slice(at.dim, at.outer // len(pieces), at.inner)

    def _through_product(self, node: fx.Node, op: str) -> None:
        """Matrix products side by side, as of attention heads: the units are a batch dimension."""
        count = 3 if op == "scaled_dot_product_attention" else 2
        operands = [arg for arg in node.args[:count] if isinstance(arg, fx.Node)]
        dims = len(shape_of(node))
        found: dict[fx.Node, Slice] = {
            each: _aligned(self.carrying[each], each, node) for each in operands
            if each in self.carrying
        }  # fmt: skip
        dim = next(iter(found.values())).dim
        if any(at.dim != dim or dim >= dims - 2 for at in found.values()):
            raise self.refuse(f"{node.target} contracts its units")
        self._join(node, [each for each in operands if each not in found], dim)
        others = [each for each in node.all_input_nodes if each not in operands]
        if any(_size_at(each, node, dim) != 1 for each in others):
            raise self.refuse(f"{node.target} takes a tensor with an entry for each of its units")
        first = found.get(operands[0], next(iter(found.values())))
        for at in found.values():
            if at.outer != first.outer or first.inner % at.inner:
                raise self.refuse(f"{node.target} pairs its units with others")
        self.products[node.name] = _flops(node)
        self.carrying[node] = first

    def _through_per_unit(self, node: fx.Node, op: str) -> None:
        at = self.carrying[first_of(node)]
        for i in PER_UNIT_ARGUMENTS[op]:
            operand = node.args[i]
            if not isinstance(operand, fx.Node) or shape_of(operand) == (1,):
                continue
            tensor = self.tensors.get(operand.name)
            if at.dim != 1 or tensor is None:
                raise self.refuse(f"{node.target} does not act along the units' dimension")
            self.slice(tensor, Slice(0, at.outer, at.inner))
        self.carrying[node] = at

    def _through_pooling(self, node: fx.Node, op: str) -> None:
        at = self.carrying[first_of(node)]
        over = len(node.args[1]) // 2 if op == "pad" else int(op[-2])  # type: ignore[arg-type]
        if at.dim >= len(shape_of(first_of(node))) - over:
            raise self.refuse(f"{node.target} mixes its units")
        self.carrying[node] = at

    def _through_cat(self, node: fx.Node) -> None:
        parts: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
        found = {self.carrying.get(part) for part in parts}
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(shape_of(node))  # type: ignore[operator]
        at = found.pop()
        if found or at is None or at.dim == dim:
            raise self.refuse(f"{node.target} puts other numbers beside its units")
        self.carrying[node] = at

    def _through_elementwise(self, node: fx.Node, op: str) -> None:
        operands = node.all_input_nodes
        found = {
            _aligned(self.carrying[each], each, node) for each in operands if each in self.carrying
        }
        at = found.pop()
        if found:
            raise self.refuse(f"{node.target} combines its units with one another")
        size = at.outer * self.units * at.inner
        if shape_of(node)[at.dim] != size:
            raise self.refuse(f"{node.target} changes its units' dimension")
        strangers = []
        for each in operands:
            if each in self.carrying or _size_at(each, node, at.dim) == 1:
                continue
            tensor = self.tensors.get(each.name)
            if tensor is not None:
                dim = at.dim - (len(shape_of(node)) - len(shape_of(each)))
                self.slice(tensor, Slice(dim, at.outer, at.inner))
            elif op == "mul":
                strangers.append(each)
            else:
                raise self.refuse(
                    f"{node.target} combines its units with another tensor of shape "
                    f"{shape_of(each)}"
                )
        self._join(node, strangers, at.dim)
        self.carrying[node] = at

    def _join(self, node: fx.Node, others: list[fx.Node], dim: int) -> None:
        """Layers that other operands with an entry for each unit come from are producers, too."""
        wanted: list[fx.Node] = []
        for other in others:
            if _size_at(other, node, dim) == 1:
                continue
            sources = self._sources(other)
            if not sources or any(each in self.carrying for each in sources):
                raise self.refuse(
                    f"{node.target} combines its units with another tensor of shape "
                    f"{shape_of(other)}"
                )
            wanted += sources
        if wanted:
            raise Joined(list(dict.fromkeys(wanted)))

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The nearest layers that a tensor is computed from."""
        found, seen, todo = [], set(), [node]
        while todo:
            each = todo.pop()
            if each in seen:
                continue
            seen.add(each)
            if each in self.layers:
                found.append(each)
            else:
                todo += each.all_input_nodes
        return found

    def _reshaped(self, node: fx.Node) -> Slice:
        """The dimension of the new shape that has the units, if one has all of them."""
        at, old, new = self.carrying[first_of(node)], shape_of(first_of(node)), shape_of(node)
        outer, inner = math.prod(old[: at.dim]) * at.outer, at.inner * math.prod(old[at.dim + 1 :])
        ways = []
        for dim in range(len(new)):
            left, right = math.prod(new[:dim]), math.prod(new[dim + 1 :])
            before, after = left // math.gcd(left, outer), right // math.gcd(right, inner)
            if before * after == 1:
                return Slice(dim, outer // left, inner // right)
            units = self.units // (before * after)
            if units > 1 and units * before * after == self.units:
                ways.append((before, units, after))
        if not ways:
            raise self.refuse(f"{node.target} mixes its units' dimension with others")
        raise Coarser(sorted(ways, key=lambda way: -way[1]))

    def _moved(self, node: fx.Node, op: str) -> Slice:
        at, dims = self.carrying[first_of(node)], len(shape_of(first_of(node)))
        if op == "expand":
            moved = at.dim + len(shape_of(node)) - dims
            if shape_of(node)[moved] != shape_of(first_of(node))[at.dim]:
                raise self.refuse(f"{node.target} repeats its units")
            return Slice(moved, at.outer, at.inner)
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

    def _beside(self, node: fx.Node, op: str) -> Slice:
        """Operations along dimensions that they name: never the units'."""
        at, shape = self.carrying[first_of(node)], shape_of(first_of(node))
        named = node.args[2 if op == "roll" else 1] if len(node.args) > 1 else None
        dims = [named] if isinstance(named, int) else list(named or range(len(shape)))  # type: ignore[arg-type]
        along = {int(dim) % len(shape) for dim in dims}
        if at.dim in along and not (op == "slice" and shape_of(node) == shape):
            raise self.refuse(f"{node.target} mixes its units")
        gone = len(shape) > len(shape_of(node))
        return Slice(at.dim - sum(dim < at.dim for dim in along) * gone, at.outer, at.inner)


def _aligned(at: Slice, operand: fx.Node, result: fx.Node) -> Slice:
    """In the dimensions of a result that the operand is broadcast to."""
    return Slice(at.dim + len(shape_of(result)) - len(shape_of(operand)), at.outer, at.inner)


def _size_at(operand: fx.Node, result: fx.Node, dim: int) -> int:
    """The operand's size along the result's dimension; 1 where it is broadcast."""
    shape = shape_of(operand)
    at = dim - (len(shape_of(result)) - len(shape))
    return shape[at] if at >= 0 else 1


def shape_of(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def first_of(node: fx.Node) -> fx.Node:
    """The operand that an operation of one tensor acts on."""
    return node.args[0]  # type: ignore[return-value]


def _flops(node: fx.Node) -> int:
    """Of one operation, run on tensors without data."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)  # type: ignore[operator]
    return counter.get_total_flops()


def _is_node(value: object) -> bool:
    return isinstance(value, fx.Node)


def operation(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", str(node.target))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())
