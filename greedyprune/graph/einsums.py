"""Writes `einsum` of two tensors as the matrix product, or the product of numbers, that it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .nodes import shape_of

_ATEN = torch.ops.aten


def write_einsum(node: fx.Node, *, swap: bool = False) -> None:
    """Replaces an einsum of two tensors by simpler operations.

    Others stay: those of one tensor or of three, and those that take diagonals, sum one tensor
    alone or repeat entries.

    swap: the second tensor comes first
    """
    named: Any = node.args[0]
    operands: Any = node.args[1]
    sides = _letters(named, [len(shape_of(operand)) for operand in operands])
    if sides is None:
        return
    (first, second), output = sides
    pairs = [(operands[0], first), (operands[1], second)]
    (left, a), (right, b) = reversed(pairs) if swap else pairs
    sizes: dict[str, int] = {}
    for operand, letters in pairs:
        for letter, size in zip(letters, shape_of(operand), strict=True):
            size = size if isinstance(size, int) else -1  # it is open
            if sizes.setdefault(letter, size) != size:
                return
    build = _Builder(node)
    summed = [letter for letter in a if letter in b and letter not in output]
    alone = ([c for c in letters if (c in a) != (c in b)] for letters in (a, b))
    if any(sum(sizes[letter] < 0 for letter in letters) > 1 for letters in alone):
        return  # `unflatten` infers one size only
    if not summed:
        product = build(_ATEN.mul.Tensor, *(
            build.in_order(operand, letters, output) for operand, letters in ((left, a), (right, b))
        ))  # fmt: skip
    else:
        product = _matrix_product(build, (left, a), (right, b), output, summed, sizes)
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def _matrix_product(
    build: _Builder, left: tuple[fx.Node, str], right: tuple[fx.Node, str], output: str,
    summed: list[str], sizes: dict[str, int],
) -> fx.Node:  # fmt: skip
    """The product of (batch, rows, summed) and (batch, summed, columns), in the output's order.

    Where there is no batch, the first tensor's rows may have several dimensions.
    """
    (one, a), (other, b) = left, right
    batch = [letter for letter in output if letter in a and letter in b]
    rows = [letter for letter in output if letter in a and letter not in b]
    columns = [letter for letter in output if letter in b and letter not in a]
    one = build.permuted(one, a, "".join([*batch, *rows, *summed]))
    other = build.permuted(other, b, "".join([*batch, *summed, *columns]))
    start, end = len(batch), len(batch) + len(rows)
    one = build.as_one(one, end, len(summed))
    other = build.as_one(other, start, len(summed))
    merged = bool(batch) or not rows
    if merged:
        one = build.as_one(one, start, len(rows))
    other = build.as_one(other, start + 1, len(columns))
    product = build(_ATEN.matmul.default, one, other)
    product = build.as_several(product, -1, [sizes[letter] for letter in columns])
    if merged:
        product = build.as_several(product, start, [sizes[letter] for letter in rows])
    return build.permuted(product, "".join([*batch, *rows, *columns]), output)


class _Builder:
    """Adds nodes in front of a node, with the shapes of their results."""

    def __init__(self, node: fx.Node) -> None:
        self._node = node

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        graph, node = self._node.graph, self._node
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
        new.meta = node.meta | {"val": target(*values)}
        return new

    def permuted(self, tensor: fx.Node, letters: str, wanted: str) -> fx.Node:
        """The tensor with its dimensions in another order."""
        order = [letters.index(letter) for letter in wanted]
        if order == sorted(order):
            return tensor
        return self(_ATEN.permute.default, tensor, order)

    def in_order(self, tensor: fx.Node, letters: str, wanted: str) -> fx.Node:
        """The tensor with the wanted dimensions; those that it lacks have size 1."""
        tensor = self.permuted(tensor, letters, "".join(c for c in wanted if c in letters))
        for dim, letter in enumerate(wanted):
            if letter not in letters:
                tensor = self(_ATEN.unsqueeze.default, tensor, dim)
        return tensor

    def as_one(self, tensor: fx.Node, dim: int, count: int) -> fx.Node:
        """The tensor with `count` dimensions, from `dim` on, as one; with a new one for 0."""
        if count == 0:
            return self(_ATEN.unsqueeze.default, tensor, dim)
        if count == 1:
            return tensor
        return self(_ATEN.flatten.using_ints, tensor, dim, dim + count - 1)

    def as_several(self, tensor: fx.Node, dim: int, sizes: list[int]) -> fx.Node:
        """Undoes `as_one`. sizes: of the dimensions that became one"""
        if not sizes:
            return self(_ATEN.squeeze.dim, tensor, dim)
        return tensor if len(sizes) == 1 else self(_ATEN.unflatten.int, tensor, dim, sizes)


def _letters(equation: object, dims: list[int]) -> tuple[tuple[str, str], str] | None:
    """A letter for each dimension of two tensors and of the result; None for other equations.

    dims: the tensors' numbers of dimensions
    """
    inputs, arrow, output = str(equation).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or len(dims) != 2 or not isinstance(equation, str):
        return None
    if not arrow:  # the letters that occur once, in their order
        once = sorted({c for c in inputs if c.isalpha() and inputs.count(c) == 1})
        output = "..." * ("..." in inputs) + "".join(once)
    dots = [count - len(term.replace("...", "")) for term, count in zip(terms, dims, strict=True)]
    most = max(dots)
    named = "".join(chr(ord("\u0391") + i) for i in range(most))  # Greek capitals
    first, second = (
        term.replace("...", named[most - count :])
        for term, count in zip(terms, dots, strict=True)
    )  # fmt: skip
    output = output.replace("...", named)
    for letters, other in ((first, second), (second, first), (output, first + second)):
        if len(set(letters)) < len(letters) or not set(letters) <= {*other, *output}:
            return None
    return (first, second), output
