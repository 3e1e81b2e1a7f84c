"""The one account of bytes: what selecting a layer takes in memory, known before it starts.

Layers that imitate, and gates, are chosen from matrices of products of their features. As many
layers are chosen together as `memory_limit` allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from ..graph.groups import Group
from ..graph.names import weight_of
from ..graph.unfold import outputs_of
from ..kernels.dual import COPIED_FEATURES
from ..kernels.exchange import eliminates
from ..kernels.path import Rule
from ..kernels.products import FLOAT64_ENTRIES, most_pending
from .job import Job

WORD = 8  # bytes of a float64
# The most features that a unit may have in a consumer for exchanges to be tried. csrc/kernels.h has
# the same number as kMostSwapWidth. Any number of consumers may be so wide: the work of exchanges
# grows with their number, but so does that of the path before, which takes about as long.
WIDEST = 64


class Bytes(NamedTuple):
    """sums: bytes of the matrices that a layer is selected from; work: the most bytes beside."""

    sums: int
    work: int

    @property
    def together(self) -> int:
        return self.sums + self.work


def bytes_of(
    model: nn.Module, group: Group, rule: Rule, weights: str, *, swaps: bool = False,
    picked: bool = False, gates: bool = False, wide: Mapping[str, int] | None = None,
) -> Bytes:  # fmt: skip
    """The bytes of one layer.

    swaps:  may exchanges follow?
    picked: are the units known already, and only their weights refitted?
    gates:  is the layer judged by gates, of one feature a unit?
    wide:   how many columns each consumer keeps; None: sums are kept
    """
    if wide and not gates:
        return _wide_bytes(model, group, rule, wide)
    units = group.units
    shapes = [(group.units * group.heads, 1)]  # features and outputs of each consumer
    if not gates and not group.scores:
        shapes = []
        for name in group.consumers:
            outputs = outputs_of(model, group, name)
            shapes.append((weight_of(model, name).numel() // outputs, outputs))
    weights = "none" if group.scores else weights
    halves = 1 + (weights in ("auto", "refit") and not gates and not picked)
    sums = sum(halves * f * f + (1 + halves) * f * c for f, c in shapes)  # with W and K W^T
    if not gates and not group.scores:  # and columns that wait, of half a word each
        sums += sum(halves * most_pending(f) * (f + c) // 2 for f, c in shapes)
    picks, widths = rule.most(units), [f // units for f, _ in shapes]
    sides = 3 * sum(f * c for f, c in shapes)
    if weights not in ("auto", "refit"):
        gram = 0 if sum(widths) == 1 else units**2
        work = max(f for f, _ in shapes) ** 2 + gram + max(3 * picks**2, sides)
        return Bytes(WORD * sums, WORD * work)
    kept = [(picks * width) ** 2 for width in widths]  # each consumer's Cholesky factor
    least_squares = sum(kept) + 2 * max(kept)  # the ridge in the losses takes two more
    if picked:
        return Bytes(WORD * sums, WORD * (least_squares + sides))
    rows = sum(f * picks * width for (f, _), width in zip(shapes, widths, strict=True))
    steps, exchanges = max(rows + sum(kept), least_squares), 0  # all units' rows of the factors
    if swaps and max(widths) <= WIDEST:
        exchanges = _exchange_words(shapes, units, picks)
    work = sides + max(steps, exchanges)
    if halves == 2:  # then both halves' products are added up, in the memory of the first
        spare = sum(f * f for f, _ in shapes)
        chosen = spare + sides  # products of at most half the features, four times; see `damping`
        work = max(chosen, work - spare)
    return Bytes(WORD * sums, WORD * work)


def _wide_bytes(model: nn.Module, group: Group, rule: Rule, wide: Mapping[str, int]) -> Bytes:
    """The bytes of a layer whose consumers' columns are kept (kernels/dual.py).

    Of each consumer with F features and C outputs there are m columns and the weights, and while
    units are picked r (F, C), M and kernels (m, m), s (F, w), V (w, F), and blocks of float64. In
    the end there is the least squares of the picked units.
    """
    sums, work, picks = 0, 0, rule.most(group.units)
    for name, columns in wide.items():
        weight, outputs = weight_of(model, name), outputs_of(model, group, name)
        features = weight.numel() // outputs
        width, word = features // group.units, 8 if weight.dtype == torch.float64 else 4
        sums += word * features * (columns + outputs) + WORD * columns * outputs
        kept = picks * width
        path = word * features * (outputs + columns // 16) + WORD * 3 * features * width
        fit = word * kept * (columns + outputs) + WORD * kept * outputs
        blocks = COPIED_FEATURES * columns + 3 * columns**2 + 3 * columns * outputs
        work += max(path, word * kept * columns) + fit + WORD * blocks
    return Bytes(sums, work)


def _exchange_words(shapes: Sequence[tuple[int, int]], units: int, picks: int) -> int:
    """The float64 numbers that exchanges take, beside the right sides."""
    swept = sum(f * f for f, _ in shapes)
    if eliminates(f for f, _ in shapes):
        swept *= 2  # the parts' inverses, and their copy in a stack
    kept = [picks * f // units for f, _ in shapes]
    factors = sum(k * k for k in kept)  # of the path's least squares
    weights = sum(k * min(f, c) for k, (f, c) in zip(kept, shapes, strict=True))
    return swept + factors + 2 * weights


def imitation_bytes(job: Job, group: Group) -> Bytes:
    """The bytes of a layer that imitates."""
    swaps = job.imitation.swaps != 0 and job.tolerance is None
    return bytes_of(
        job.model, group, job.rule(group), job.weights, swaps=swaps,
        wide=job.wide.get(group.producer),
    )  # fmt: skip


def gates_bytes(job: Job, group: Group, *, swaps: bool = True) -> Bytes:
    """The bytes of a layer that is judged by gates."""
    swaps = swaps and job.tolerance is None
    return bytes_of(job.model, group, job.rule(group), job.weights, swaps=swaps, gates=True)


def refit_bytes(job: Job, group: Group) -> Bytes:
    """The bytes of least squares on units that the network's loss has picked."""
    return bytes_of(
        job.model, group, job.rule(group), "refit", picked=True, wide=job.wide.get(group.producer)
    )


def metric_bytes(job: Job, groups: Sequence[Group]) -> int:
    """The bytes of the square roots of all consumers' metrics."""
    if job.imitation.metric == "none":
        return 0
    names = ((group, name) for group in groups for name in group.consumers)
    return sum(WORD * outputs_of(job.model, group, name) ** 2 for group, name in names)


def refitted_units(job: Job, group: Group, imitation: bool) -> int:
    """How many units get least squares from features after all picks; 0 where that is unknown."""
    known = job.weights == "refit" and not imitation and job.tolerance is None
    return job.rule(group).most(group.units) if known else 0


def least_squares_bytes(picks: int) -> int:
    """The bytes of least squares on this many features in memory."""
    return 3 * WORD * picks**2


def check_least_squares(layer: str, picks: int, limit: int) -> None:
    """ValueError if least squares on this many units takes more than `limit` bytes."""
    needed = least_squares_bytes(picks)
    if needed > max(limit, WORD * FLOAT64_ENTRIES):  # a block of samples takes so much anyway
        raise ValueError(
            f"memory_limit: found {limit} bytes, but least squares on {picks} units of layer "
            f"{layer!r} needs {needed} bytes; expected at least that, fewer units or weights='none'"
        )


def check_imitation(job: Job, group: Group, held: int = 0) -> None:
    """ValueError if a layer that imitates takes more than the limit; says how much it needs.

    held: bytes that something else takes
    """
    needed, limit = imitation_bytes(job, group), job.memory_limit
    if needed.together + held <= limit:
        return
    fewer = replace(job, imitation=replace(job.imitation, swaps=0))
    other = imitation_bytes(fewer, group).together
    less = f", or {other + held} with Imitation(swaps=0)" if other < needed.together else ""
    raise _too_much(group, needed, limit, held, less)


def check_bytes(group: Group, needed: Bytes, limit: int) -> None:
    """ValueError where choosing a layer takes more than the limit."""
    if needed.together > limit:
        raise _too_much(group, needed, limit, 0, "")


def _too_much(group: Group, needed: Bytes, limit: int, held: int, less: str) -> ValueError:
    metric = f", {held} for the metric" if held else ""
    return ValueError(
        f"memory_limit: found {limit} bytes, but layer {group.producer!r} needs {needed.sums} for "
        f"the products of its features{metric} and {needed.work} to select from them; expected at "
        f"least {needed.together + held}{less}"
    )


def turns(
    groups: Sequence[Group], needed: Sequence[Bytes], limit: int, *, once: bool = False
) -> list[list[Group]]:
    """The groups in their order, as many at a time as fit in `limit` bytes, and at least one.

    needed: the bytes of each group
    once:   are the data an iterator, which has one pass? ValueError where that is not enough
    """
    result: list[list[Group]] = []
    members: list[Bytes] = []
    for group, size in zip(groups, needed, strict=True):
        together = [*members, size]
        fits = sum(member.sums for member in together) + max(m.work for m in together) <= limit
        if result and fits:
            result[-1].append(group)
            members = together
        else:
            result.append([group])
            members = [size]
    if len(result) > 1 and once:
        total = sum(size.together for size in needed)
        raise ValueError(
            f"memory_limit: found {limit} bytes, but all {len(groups)} layers from one pass over "
            f"an iterator need up to {total}; expected at least that, or a list, Dataset or "
            "DataLoader"
        )
    return result
