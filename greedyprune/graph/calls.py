"""How the operation of a layer relates to the call of its module, which a hook sees.

torch's own modules, and classes that inherit their forward, do nothing but their linear map. Other
modules may do more: pad or scale the input before it, or apply an activation after it. Some are
never called, because another module uses their weight.
"""

from __future__ import annotations

import inspect

from torch import fx

from .labels import IDENTITY
from .propagate import RESHAPING
from .tracing import Graph, call_of, is_plain, module_name_of, operation


def sees_input(graph: Graph, node: fx.Node) -> bool:
    """Is the module's input, as a hook sees it, the input of its linear map?"""
    module = graph.model.get_submodule(graph.layers[node].name)
    return is_plain(module) and _runs_in_own_module(graph, node)


def is_alone(graph: Graph, node: fx.Node) -> bool:
    """Are derivatives in the module's input and output those of its linear map?

    They are if the module at most pads the one input with zeros and gives tensors another shape.
    """
    if sees_input(graph, node):
        return True
    module = graph.model.get_submodule(graph.layers[node].name)
    parameters = inspect.signature(module.forward).parameters.values()
    if len(parameters) != 1 or not _runs_in_own_module(graph, node):
        return False
    call = call_of(node)
    others = (n for n in graph.nodes if n.op == "call_function" and n is not node)
    return all(_changes_nothing(other) for other in others if call_of(other) == call)


def _runs_in_own_module(graph: Graph, node: fx.Node) -> bool:
    runs_in = graph.model.get_submodule(module_name_of(node))
    return runs_in is graph.model.get_submodule(graph.layers[node].name)


def _changes_nothing(node: fx.Node) -> bool:
    op = operation(node)
    if op in ("pad", "constant_pad_nd"):
        fill = [value for value in (*node.args[2:], *node.kwargs.values()) if value is not None]
        return all(value in ("constant", 0) for value in fill)
    return op in IDENTITY | RESHAPING
