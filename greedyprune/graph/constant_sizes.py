"""Which operations may have the number of units as a constant among their arguments.

The graph of a trace has plain numbers for sizes. `x.view(len(x), 64)` and `x.view(x.shape)` look
the same in it, but only the second runs after units were removed. Where the size of the units'
dimension is inferred (-1), or is no argument at all, there is no doubt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch
from torch import fx, nn

from .nodes import SPLITTING, ancestors, first_of, operation, shape_of, title

_SIZES_AT = {"view": 1, "reshape": 1, "_unsafe_view": 1, "expand": 1, "unflatten": 2}  # in args


def may_hold_size(node: fx.Node, dim: int) -> bool:
    """May an argument be the size of the result's dimension `dim`, which holds the units?

    node: an operation that gives its operand another shape
    """
    place = _SIZES_AT.get(operation(node))
    if place is None or len(node.args) <= place:
        return False
    sizes = node.args[place]
    if not isinstance(sizes, (list, tuple)):
        return False
    if operation(node) == "unflatten":
        first = int(node.args[1]) % len(shape_of(first_of(node)))  # type: ignore[arg-type]
        dim -= first
    if not 0 <= dim < len(sizes):
        return False
    size = sizes[dim]
    return isinstance(size, int) and size != -1


def sizes_held(node: fx.Node) -> set[int]:
    """The sizes among the arguments of an operation that gives its operand another shape.

    Products of neighbours count, too: `x.reshape(-1, heads, width // heads)` holds the width.
    """
    is_reshape = node.op == "call_function" and operation(node) != "expand"
    place = _SIZES_AT.get(operation(node)) if is_reshape else None
    sizes: object = node.args[place] if place is not None and len(node.args) > place else None
    held = set[int]()
    for first in range(len(sizes) if isinstance(sizes, (list, tuple)) else 0):
        product = 1
        for size in sizes[first : first + 3]:  # type: ignore[index]
            if not isinstance(size, int):
                break
            product *= size
            held.add(product)
    return held


def split_may_hold_size(node: fx.Node, dim: int) -> bool:
    """May a split's argument be the size of the parts along `dim`? Not if it is their number."""
    along = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    same_dim = int(along) % len(shape_of(first_of(node))) == dim  # type: ignore[arg-type]
    return same_dim and operation(node) != "chunk"


def attributes_of(
    model: nn.Module, tensors: Mapping[str, str], node: fx.Node, value: int, dim: int | None
) -> list[str]:
    """The attributes that an operation's size may come from, some of them by chance.

    "module.attribute" is an int, and "module.attribute[i]" an entry of a tuple or list of ints. The
    modules of `_modules_of` are searched until one has an int, or a tuple of one int, of this
    value. Longer tuples and lists count if they have the value once, or are all of the operation's
    sizes.

    tensors: the model's name for a parameter or buffer, by the name of its placeholder
    dim: the result's dimension that has the size, where this is known
    """
    found, all_sizes = list[str](), _all_sizes(node)
    for path in _modules_of(model, tensors, node):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        has_int = False
        for name, size in vars(module).items():
            place = f"{path}.{name}".lstrip(".")
            sizes = [*size] if type(size) in (tuple, list, torch.Size) else [size]
            if not all(type(one) is int for one in sizes) or value not in sizes:
                continue
            entries = [i for i, one in enumerate(sizes) if one == value]
            if sizes == all_sizes and operation(node) not in SPLITTING and dim in entries:
                entries = [dim]
            if len(entries) == 1 or sizes == all_sizes:
                is_int = type(size) is int
                has_int |= len(sizes) == 1
                found += [place] if is_int else [f"{place}[{i}]" for i in entries]
        if has_int:
            break
    return [*dict.fromkeys(found)]


def _all_sizes(node: fx.Node) -> list[int]:
    """The sizes of an operation's result, or of the parts of a split."""
    if operation(node) not in SPLITTING:
        return [*shape_of(node)]
    sizes = node.args[1] if len(node.args) > 1 else node.kwargs.get("split_sizes")
    return [*sizes] if isinstance(sizes, (list, tuple)) else []


def _modules_of(model: nn.Module, tensors: Mapping[str, str], node: fx.Node) -> Iterator[str]:
    """The names of the modules that a size in an operation may come from, the likeliest first.

    They are the owners of the parameters and buffers that it is computed from, if these are all it
    is computed from; then the modules that run it, the innermost first; then the modules in this
    one.
    """
    sources = (source for source in ancestors(node) if source.op == "placeholder")
    names = {tensors.get(source.name) for source in sources}
    if None not in names:
        yield from sorted({str(name).rpartition(".")[0] for name in names})
    stack: dict[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in reversed(stack.values())]
    yield from paths
    with suppress(AttributeError):
        for name, _ in model.get_submodule(paths[0]).named_children() if paths else ():
            yield f"{paths[0]}.{name}".lstrip(".")


def line_of(node: fx.Node) -> str:
    """An operation, and the line of the model's code that it stems from, where that is known."""
    lines = [
        line.strip() for line in node.meta.get("stack_trace", "").splitlines()
        if line.strip().startswith("File ") and "/torch/" not in line
    ]  # fmt: skip
    if not lines:
        return title(node)
    file, number = lines[-1].removeprefix('File "').split('", line ')
    return f"{title(node)} ({file.rpartition('/')[2]} line {number.partition(',')[0]})"
