"""Which dimensions of attention's heads make a unit: the best of each head, the second best, ...

All heads keep as many dimensions. So a unit inside heads has one dimension of each head, and the
units are free to choose. Here each head's dimensions get an order of their own, by greedy selection
against the contribution of the whole head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.path import Rule
from .layer_products import LayerProducts, unscaled_path
from .options import DAMPING
from .products import Products


def matched(products: LayerProducts, backend: str) -> LayerProducts:
    """The same products for units that have the dimensions of heads in their greedy order.

    The sums are put into the new order in place.
    """
    group = products.group
    order = torch.stack([_order_of(products, head, backend) for head in range(group.heads)])
    for consumer in products.consumers:
        of_units = torch.arange(consumer.features).view(group.units, group.heads, -1)
        of_heads = [of_units[order[head], head] for head in range(group.heads)]
        consumer.rearrange(torch.stack(of_heads, 1).flatten())
    return LayerProducts(group.matched(order), products.consumers, products.outputs)


def _order_of(products: LayerProducts, head: int, backend: str) -> Tensor:
    """The greedy order of one head's dimensions: (N,) int64."""
    group, parts = products.group, list[Products]()
    for consumer in products.consumers:
        of_units = torch.arange(consumer.features).view(group.units, group.heads, -1)
        parts.append(consumer.part(of_units[:, head].flatten()))
    part = LayerProducts(group, parts, products.outputs)
    rule = Rule(group.units, group.units, False)
    if group.scores:
        gram, moments = part.moments()
        return unscaled_path(gram, moments, rule, backend).order
    return part.refit_path(rule, backend, None, swaps=0, damping=DAMPING)[0].order
