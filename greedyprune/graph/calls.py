"""How the operation of a layer relates to the call of its module, which a hook sees.

torch's own modules, and classes that inherit their forward, do nothing but their linear map. Other
modules may do more: pad or scale the input before it, or apply an activation after it. Some are
never called, because another module uses their weight.
"""

from __future__ import annotations

import inspect

from torch import fx

from .names import module_of_layer
from .nodes import IDENTITY, call_of, module_name_of, operation
from .propagate import RESHAPING
from .tracing import Graph, is_plain


def sees_input(graph: Graph, node: fx.Node) -> bool:
    """Is the module's input, as a hook sees it, the input of its linear map?"""
    module = module_of_layer(graph.model, graph.layers[node].name)
    return module is not None and is_plain(module) and runs_in_own_module(graph, node)


def is_alone(graph: Graph, node: fx.Node) -> bool:
    """Are derivatives in the module's input and output those of its linear map?

    They are if the module at most pads the one input with zeros and gives tensors another shape.
    """
    if sees_input(graph, node):
        return True
    module = module_of_layer(graph.model, graph.layers[node].name)
    if module is None or not runs_in_own_module(graph, node):
        return False
    if len(inspect.signature(module.forward).parameters) != 1:
        return False
    call = call_of(node)
    others = (n for n in graph.nodes if n.op == "call_function" and n is not node)
    return all(_changes_nothing(other) for other in others if call_of(other) == call)


def runs_in_own_module(graph: Graph, node: fx.Node) -> bool:
    """Does the module run that the layer is named after?"""
    runs_in = graph.model.get_submodule(module_name_of(node))
    return runs_in is module_of_layer(graph.model, graph.layers[node].name)


def _changes_nothing(node: fx.Node) -> bool:
    op = operation(node)
    if op in ("pad", "constant_pad_nd"):
        fill = [value for value in (*node.args[2:], *node.kwargs.values()) if value is not None]
        return all(value in ("constant", 0) for value in fill)
    return op in IDENTITY | RESHAPING
