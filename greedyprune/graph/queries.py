"""Attention's queries and keys, as a model computes them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import NamedTuple

from torch import Tensor, fx

from ..data.batches import Batch
from .executor import GraphExecutor
from .networks import Network
from .nodes import ATTENTION, ancestors, operation
from .tracing import Graph


class Given(NamedTuple):
    """Queries or keys, and the names of the layers that give them, the last before the product."""

    tensor: Tensor
    layers: frozenset[str]


def visit_queries(
    executor: GraphExecutor, batch: Batch, tensors: Mapping[str, Tensor], names: Container[str],
    add: Callable[[str, Given, Given], None],
) -> None:  # fmt: skip
    """Runs a model and calls add(name, queries, keys) at the products with these names.

    Queries are (..., T, d) and keys (..., S, d). Keys that several heads share are repeated.

    tensors: the model's parameters and buffers by name
    names:   of nodes of the graph, as in `Group.scores`
    """
    values, start = executor.inputs(batch), 0
    constants, network = executor.constants(tensors), Network(tensors)
    for node in executor.nodes:
        if node.name not in names:
            continue
        end = executor.graph.position[node]
        executor.run(values, network, start, end)
        start = end
        first = 1 if operation(node) == "baddbmm" else 0
        known = values | constants
        query, key = (known[node.args[at]] for at in (first, first + 1))
        if operation(node) != ATTENTION:
            key = key.transpose(-2, -1)
        elif key.dim() > 2 and key.shape[-3] != query.shape[-3]:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        of_query, of_key = (_layers_before(executor.graph, node.args[first + i]) for i in (0, 1))
        add(node.name, Given(query, of_query), Given(key, of_key))


def _layers_before(graph: Graph, node: fx.Node) -> frozenset[str]:
    before = ancestors(node, stop=graph.layers.__contains__)
    return frozenset(graph.layers[each].name for each in before if each in graph.layers)
