"""What selecting from sums over the samples takes in memory: known before it starts.

Layers that imitate, and gates, are chosen from matrices of their features' products, one layer by
itself or as many together as `memory_limit` allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from ..graph.groups import Group
from ..graph.unfold import outputs_of, weight_of
from ..kernels.exchange import ELIMINATION_FEATURES
from ..kernels.path import Rule
from ..kernels.products import FLOAT64_ENTRIES
from .imitation import WIDEST
from .options import Settings

WORD = 8  # bytes of a float64


class Bytes(NamedTuple):
    """sums: that a layer is chosen from; work: what choosing takes beside them, at most."""

    sums: int
    work: int

    @property
    def together(self) -> int:
        return self.sums + self.work


def bytes_of(
    model: nn.Module, group: Group, rule: Rule, weights: str, *, swaps: bool = False,
    picked: bool = False, gates: bool = False,
) -> Bytes:  # fmt: skip
    """Of a layer that imitates, or of its gates.

    picked: are the units known, whose weights are refitted?
    """
    units, shapes = group.units, [(group.units, 1)]  # features and outputs, by consumer
    if not gates:
        shapes = []
        for name in group.consumers:
            outputs = outputs_of(model, group, name)
            shapes.append((weight_of(model.get_submodule(name)).numel() // outputs, outputs))
    features, outputs = sum(f for f, _ in shapes), sum(c for _, c in shapes)
    sums = sum(f * f + 2 * f * c for f, c in shapes)  # with weights and right sides
    picks, width = rule.most(units), features // units
    kept, whole, sides = picks * width, features**2, 3 * features * outputs
    if weights not in ("auto", "refit"):
        gram = 0 if width == 1 else units**2
        work = max(f for f, _ in shapes) ** 2 + gram + max(3 * picks**2, sides)
        return Bytes(WORD * sums, WORD * work)
    if picked:
        return Bytes(WORD * sums, WORD * (3 * kept**2 + sides))
    steps = max(features * kept + kept**2, 3 * kept**2)  # Cholesky's factor; the losses' ridge
    exchanges = 0
    if swaps and width <= WIDEST:  # a swept matrix; from the other side, an inverse
        exchanges = whole + kept**2 if features > ELIMINATION_FEATURES else 2 * (whole + kept**2)
        sides += 4 * kept * outputs
    side_by_side = whole + kept**2 if len(shapes) > 1 else 0
    return Bytes(WORD * sums, WORD * (side_by_side + sides + max(steps, exchanges)))


def needed_by(model: nn.Module, group: Group, rule: Rule, chosen: Settings) -> Bytes:
    return bytes_of(
        model, group, rule, chosen.weights, gates=chosen.objective == "fisher",
        swaps=chosen.swaps > 0 and chosen.tolerance is None, picked=chosen.objective == "loss",
    )  # fmt: skip


def of_metrics(model: nn.Module, groups: Sequence[Group], chosen: Settings) -> int:
    """Bytes that the roots of all consumers' metrics take."""
    if chosen.metric == "none":
        return 0
    return sum(WORD * outputs_of(model, g, name) ** 2 for g in groups for name in g.consumers)


def least_squares(picks: int) -> int:
    """Bytes that least squares on so many features in memory takes."""
    return 3 * WORD * picks**2


def check_least_squares(layer: str, picks: int, limit: int) -> None:
    """ValueError where it takes too much."""
    needed = least_squares(picks)
    if needed > max(limit, WORD * FLOAT64_ENTRIES):  # which a block of samples takes anyway
        raise ValueError(
            f"memory_limit: found {limit} bytes, but least squares on {picks} units of layer "
            f"{layer!r} needs {needed}; expected that, fewer units or weights='none'"
        )


def check_fits(model: nn.Module, group: Group, rule: Rule, chosen: Settings, held: int = 0) -> None:
    """ValueError that says how much it takes, and what would take less.

    held: bytes that something else takes
    """
    needed, limit = needed_by(model, group, rule, chosen), chosen.memory_limit
    if needed.together + held <= limit:
        return
    other = needed_by(model, group, rule, replace(chosen, swaps=0)).together
    less = f", or {other + held} with swaps=0" if other < needed.together else ""
    metric = f", {held} for the metric" if held else ""
    raise ValueError(
        f"memory_limit: found {limit} bytes, but layer {group.producer!r} needs {needed.sums} for "
        f"the products of its features{metric} and {needed.work} to choose by them; expected "
        f"{needed.together + held}{less}"
    )


def turns(groups: Sequence[Group], needed: Mapping[str, Bytes], limit: int) -> list[list[Group]]:
    """As many groups at a time as `limit` bytes allow, in their order, and at least one."""
    found: list[list[Group]] = []
    for group in groups:
        together = [*(found[-1] if found else []), group]
        each = [needed[one.producer] for one in together]
        fits = sum(one.sums for one in each) + max(one.work for one in each) <= limit
        if found and fits:
            found[-1] = together
        else:
            found.append([group])
    return found
