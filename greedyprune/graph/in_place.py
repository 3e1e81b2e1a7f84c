"""Operations that write into their operand, and the tensors that share memory with it."""

from __future__ import annotations

from typing import Any

from torch import fx

from .nodes import IDENTITY, in_place, operation


def is_overwritten(graph: fx.Graph) -> bool:
    """Does a node read memory that an earlier one changed through another tensor?

    The executor lets in-place operations act on a copy, and the ids of entries follow results only.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in filter(in_place, graph.nodes):
        base = node.args[0]
        while isinstance(base, fx.Node) and _is_alias(base):
            base = base.args[0]
        aliases, todo = set[fx.Node](), _same_item(base)
        while todo:
            alias = todo.pop()
            if isinstance(alias, fx.Node) and alias is not node and alias not in aliases:
                aliases.add(alias)
                todo += [user for user in alias.users if _is_alias(user)]
        users = {user for alias in aliases for user in alias.users}
        if any(position[user] > position[node] for user in users):
            return True
    return False


def _is_alias(node: fx.Node) -> bool:
    """May a node's value share memory with its first operand's?"""
    if node.op != "call_function" or not node.args:
        return False
    schema = getattr(node.target, "_schema", None)
    is_view = schema is not None and any(arg.alias_info for arg in schema.arguments[:1])
    if _is_item(node):  # of several outputs: split gives parts of its operand, topk new tensors
        return _is_alias(node.args[0])  # type: ignore[arg-type]
    return is_view or operation(node) in IDENTITY


def _is_item(node: object) -> bool:
    """Does a node take one of an operation's several outputs?"""
    return isinstance(node, fx.Node) and getattr(node.target, "__name__", "") == "getitem"


def _same_item(node: Any) -> list[Any]:
    """All nodes that take the same one of an operation's outputs; the node itself for others."""
    if not _is_item(node):
        return [node]
    return [user for user in node.args[0].users if _is_item(user) and user.args == node.args]
