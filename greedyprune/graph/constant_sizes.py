"""Which operations may have the number of units as a constant among their arguments.

The graph of a trace has plain numbers for sizes. `x.view(len(x), 64)` and `x.view(x.shape)` look
the same in it, but only the second runs after units were removed. Where the size of the units'
dimension is inferred (-1), or is no argument at all, there is no doubt.
"""

from __future__ import annotations

from torch import fx, nn

from .nodes import first_of, operation, shape_of, title

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
    """The sizes among the arguments of an operation that gives its operand another shape."""
    is_reshape = node.op == "call_function" and operation(node) != "expand"
    place = _SIZES_AT.get(operation(node)) if is_reshape else None
    sizes: object = node.args[place] if place is not None and len(node.args) > place else None
    return {s for s in sizes if isinstance(s, int)} if isinstance(sizes, (list, tuple)) else set()


def split_may_hold_size(node: fx.Node, dim: int) -> bool:
    """May a split's argument be the size of the parts along `dim`? Not if it is their number."""
    along = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    same_dim = int(along) % len(shape_of(first_of(node))) == dim  # type: ignore[arg-type]
    return same_dim and operation(node) != "chunk"


def attributes_of(model: nn.Module, node: fx.Node, value: int) -> list[str]:
    """The attributes that an operation's size may come from: "module.attribute" names.

    They are those attributes of the innermost module that runs the operation, or of the modules
    around it, which are ints of this value, or tuples of it alone.
    """
    stack: dict[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(stack.values()):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        names = [
            name for name, size in vars(module).items()
            if (isinstance(size, int) and not isinstance(size, bool) and size == value)
            or (type(size) is tuple and size == (value,))
        ]  # fmt: skip
        if names:
            return [f"{path}.{name}".lstrip(".") for name in names]
    return []


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
