"""The cost of a model, in parameters or FLOPs, as a function of the sizes of its layers.

The parameters of a group's layers, and the FLOPs of its layers and of its matrix products, are in
proportion to its size, the number of units. If two groups share a weight, as two convolutions in a
row do, they are in proportion to the product of both sizes. Of a concatenation, each group has its
share of the weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..data.batch import Batch, samples_of
from .groups import Group
from .names import layer_name

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """A cost that shrinks with the sizes of the layers, here called widths.

    dense: the dense model's cost
    units: how many units each layer has in the dense model
    parts: for one layer or several, the part of `dense` in proportion to the size, or to the
           product of the sizes; costs that no size changes are in no part
    """

    dense: int
    units: Mapping[str, int]
    parts: Mapping[tuple[str, ...], int]

    def at(self, widths: Mapping[str, int]) -> int:
        """The cost with these sizes; layers that are not named keep all units."""
        saved = 0
        for layers, amount in self.parts.items():
            full = math.prod(self.units[name] for name in layers)
            kept = math.prod(widths.get(name, self.units[name]) for name in layers)
            saved += amount * (full - kept) // full
        return self.dense - saved

    def of(self, layer: str) -> int:
        """The part of the dense model's cost that this layer's size changes."""
        return sum(amount for layers, amount in self.parts.items() if layer in layers)

    def as_json(self) -> dict[str, Any]:
        return {"dense": self.dense, "units": dict(self.units), "parts": list(self.parts.items())}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Cost:
        parts = {tuple(layers): amount for layers, amount in value["parts"]}
        return cls(value["dense"], value["units"], parts)


def count_flops(model: nn.Module, run: Callable[[], T]) -> tuple[T, int, dict[str, int]]:
    """Calls a function that runs a model without gradients.

    Returns its result, its FLOPs, and the FLOPs of each module that it runs, by name. Counted by
    torch.utils.flop_counter: a multiplication with an addition is two. Of recurrent modules, the
    products with `weight_ih` and `weight_hh` count in every step, and nothing else.

    The counter asks each module's inputs that require gradients for their node in autograd's graph.
    A view of a parameter, such as an expanded class token, requires them but has no node. So no
    parameter requires gradients meanwhile.
    """
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        with FlopCounterMode(display=False, custom_mapping=_RECURRENT) as counter:
            result = run()
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
    by_module = {
        name.partition(".")[2]: sum(by_operation.values())
        for name, by_operation in counter.get_flop_counts().items()
    }
    return result, counter.get_total_flops(), by_module


def in_samples_of(few: Batch, batch: Batch) -> Fraction:
    """How many times as many samples a batch has as some of its samples, `few`."""
    return Fraction(samples_of(batch) or 1, samples_of(few) or 1)


def _flops_of_layer(inputs: Sequence[int], *arguments: Any, **_: Any) -> int:
    """The FLOPs of one layer and direction, from the shapes of the inputs and of two weights."""
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(weight) for weight in arguments[:2])


def _flops_of_layers(
    inputs: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any
) -> int:
    """The FLOPs of all layers and directions, from the shapes of all weights and biases."""
    entries = sum(math.prod(weight) for weight in weights if len(weight) > 1)
    return 2 * math.prod(inputs[:-1]) * entries


# torch's counter does not know the operations of oneDNN and cuDNN.
_RECURRENT = {
    torch.ops.aten.mkldnn_rnn_layer: _flops_of_layer,
    torch.ops.aten._cudnn_rnn: _flops_of_layers,
}


def costs_of(
    model: nn.Module, groups: Sequence[Group], total: int, flops: Mapping[str, int]
) -> dict[str, Cost]:
    """The costs "params" and "flops".

    total: FLOPs of one run of the dense model
    flops: FLOPs of each of its modules in that run
    """
    params: Counter[tuple[str, ...]] = Counter()
    layers: Counter[tuple[str, ...]] = Counter()
    cut = {name for group in groups for name in group.slices}
    not_called = {name: amount for group in groups for name, amount in group.flops.items()}
    for name, parameter in model.named_parameters():  # one that has two names counts once
        if name not in cut:
            continue
        of_layer = not_called.get(name) or flops.get(layer_name(name), 0)
        for producers, entries in blocks_of(groups, name, parameter.shape).items():
            params[producers] += entries
            layers[producers] += of_layer * entries // parameter.numel()
    products = {name: amount for group in groups for name, amount in group.products.items()}
    for name, amount in products.items():
        layers[tuple(g.producer for g in groups if name in g.products)] += amount
    units = {group.producer: group.units for group in groups}
    dense = sum(parameter.numel() for parameter in model.parameters())
    return {"params": Cost(dense, units, params), "flops": Cost(total, units, layers)}


def blocks_of(
    groups: Sequence[Group], name: str, shape: Sequence[int]
) -> dict[tuple[str, ...], int]:
    """How many entries of a tensor belong to units of the same groups, by these groups' names.

    Along a dimension a group may have all entries, or a part of them, as after a concatenation.
    """
    blocks: dict[tuple[str, ...], int] = {(): 1}
    for dim, size in enumerate(shape):
        counts: dict[str, int] = {}
        for group in groups:
            for at in (group.slices.get(name), group.also.get(name)):
                if at is not None and at.dim == dim:
                    counts[group.producer] = at.places.numel()
        rest = size - sum(counts.values())
        along = {(producer,): count for producer, count in counts.items()} | {(): rest}
        blocks = {
            (*before, *new): entries * count
            for before, entries in blocks.items() for new, count in along.items() if count
        }  # fmt: skip
    order = [group.producer for group in groups]
    totals: dict[tuple[str, ...], int] = {}
    for producers, entries in blocks.items():
        key = tuple(sorted(producers, key=order.index))
        totals[key] = totals.get(key, 0) + entries
    totals.pop((), None)
    return totals
