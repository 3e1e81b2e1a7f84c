"""What a model costs, as a function of how many units its layers keep.

Parameters of a group's layers, and the FLOPs (torch.utils.flop_counter's) of its layers and of its
matrix products, are in proportion to its width; where two groups share a weight, as consecutive
convolutions do, to the product of their widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .groups import LAYERS, Group

T = TypeVar("T")
Parts = Mapping[tuple[str, ...], int]


@dataclass(frozen=True)
class Cost:
    """An amount that shrinks with the layers' widths.

    dense: of the dense model
    units: how many units each layer has
    parts: what of it is in proportion to the width of a layer, or the product of several widths;
           what belongs to no layer is in no part
    """

    dense: int
    units: Mapping[str, int]
    parts: Parts

    def at(self, widths: Mapping[str, int]) -> int:
        """What is left with so many units in these layers and all in the others."""
        saved = 0
        for layers, amount in self.parts.items():
            full = math.prod(self.units[name] for name in layers)
            kept = math.prod(widths.get(name, self.units[name]) for name in layers)
            saved += amount * (full - kept) // full
        return self.dense - saved

    def as_json(self) -> dict[str, Any]:
        return {"dense": self.dense, "units": dict(self.units), "parts": list(self.parts.items())}

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> Cost:
        parts = {tuple(layers): amount for layers, amount in found["parts"]}
        return cls(found["dense"], found["units"], parts)

    def of(self, layer: str) -> int:
        """What of the dense model's belongs to a layer's units."""
        return sum(amount for layers, amount in self.parts.items() if layer in layers)


@dataclass(frozen=True)
class BudgetReport:
    """How widths were chosen for a budget.

    what:      "flops", "params" or "latency"
    share:     of the dense model's that was asked for
    reached:   of the dense model's that the pruned model has, measured
    objective: the sum over layers of what each loses by itself at its width, as a share of what it
               does without units
    gap:       no widths within the budget have a sum below objective - gap; 0: these are the best
    """

    what: str
    share: float
    reached: float
    objective: float
    gap: float


def counted(run: Callable[[], T]) -> tuple[T, int, dict[str, int]]:
    """A function's result, its FLOPs, and those of every module that it runs, by name."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    by_module = {
        name.partition(".")[2]: sum(by_operation.values())
        for name, by_operation in counter.get_flop_counts().items()
    }
    return result, counter.get_total_flops(), by_module


def costs_of(
    model: nn.Module, groups: Sequence[Group], total: int, flops: Mapping[str, int]
) -> dict[str, Cost]:
    """The costs "params" and "flops".

    total: FLOPs of a run of the dense model; flops: of each of its modules in that run
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sizes = {
        name: parameters[name].numel() for g in groups for name in g.slices if name in parameters
    }
    layers = {
        f"{name}.weight": flops.get(name, 0)
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) or type(module).__name__ == "Conv1D"
    }
    products = {name: amount for group in groups for name, amount in group.products.items()}
    units = {group.producer: group.units for group in groups}
    dense = sum(each.numel() for each in model.parameters())
    return {
        "params": Cost(dense, units, _parts(groups, sizes)),
        "flops": Cost(total, units, _parts(groups, layers | products)),
    }


def _parts(groups: Sequence[Group], amounts: Mapping[str, int]) -> Parts:
    """The amounts of tensors and products, summed over those that the same groups cut."""
    parts: dict[tuple[str, ...], int] = {}
    for name, amount in amounts.items():
        cut = tuple(g.producer for g in groups if name in g.slices or name in g.products)
        if cut:
            parts[cut] = parts.get(cut, 0) + amount
    return parts
