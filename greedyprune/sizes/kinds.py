"""Which sizes layers can have, alone and together.

A kind is a list of layers that keep one share of their units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..graph.groups import Group
from ..graph.names import slice_of

ROUNDING = 1e-9  # of products with a share
Kinds = Sequence[Sequence[Group]]
KindSizes = Sequence[Sequence[tuple[int, ...]]]  # for each kind, its layers' sizes, ascending


def nearest(size: int, units: int, step: int) -> int:
    """The multiple of `step` nearest to `size`, or `units` if that is nearer; of two the larger."""
    below = size // step * step
    allowed = [multiple for multiple in (below, below + step, units) if 1 <= multiple <= units]
    return min(allowed, key=lambda multiple: (abs(multiple - size), -multiple))


def size_step(group: Group, round_to: int) -> int:
    """The least number of units whose channels are a multiple of `round_to`."""
    channels = math.gcd(*(slice_of(group.slices, name).neighbours for name in group.producers))
    return round_to // math.gcd(round_to, channels)


def sizes_in_one_share(
    groups: Sequence[Group], round_to: int, min_share: float = 0.0
) -> list[tuple[int, ...]]:
    """Each group's size, for all shares of their units that these groups can keep, ascending.

    Sizes are multiples of what `round_to` means for each group, or all units. They are at least
    `min_share` of the units.
    """
    parts = math.gcd(*(group.units for group in groups))
    steps = [size_step(group, round_to) for group in groups]
    every = [tuple(group.units // parts * m for group in groups) for m in range(1, parts + 1)]
    return [
        sizes for i, sizes in enumerate(every, 1)
        if i == parts or (
            i >= min_share * parts - ROUNDING
            and all(size % step == 0 for size, step in zip(sizes, steps, strict=True))
        )
    ]  # fmt: skip


def kinds_of(model: nn.Module, groups: Sequence[Group], uniform: bool) -> list[list[Group]]:
    """Layers that keep one share of their units: those that the model's code needs to do so.

    uniform: also those with equal numbers of units, cut in the same kinds of tensors
    """
    kinds: dict[object, list[Group]] = {}
    for group in groups:
        places = set()
        for tensor, at in group.places if uniform else ():
            module, _, attribute = tensor.rpartition(".")
            owner = model.get_submodule(module)
            if not isinstance(owner, nn.Embedding):  # a table of T5's biases, for some heads only
                kind = type(owner).__name__
                places.add((kind, attribute, at.dim, at.width, at.neighbours))
        key = (group.units, *sorted(places)) if uniform else group.producer
        kinds.setdefault(key, []).append(group)
    result: list[list[Group]] = []
    for members in kinds.values():
        shares = {name for group in members for name in group.share}
        tied = [kind for kind in result if any(group.producer in shares for group in kind)]
        result = [kind for kind in result if kind not in tied]
        result.append([group for kind in tied for group in kind] + members)
    return result


def without_kept(
    model: nn.Module, groups: Sequence[Group], patterns: Sequence[str]
) -> tuple[list[Group], list[str]]:
    """The groups that may be cut, and the names of the layers that keep all their units.

    patterns: `Budget.keep`; ValueError for one that matches no layer, or where all layers are kept
    """

    def match(group: Group, pattern: str) -> bool:
        names = (group.producer, *group.producers)
        blocks = pattern, f"{pattern}.*"
        return pattern in names or any(fnmatchcase(n, block) for n in names for block in blocks)

    for pattern in patterns:
        if not any(match(group, pattern) for group in groups):
            names = ", ".join(repr(group.producer) for group in groups)
            raise ValueError(
                f"keep: found {pattern!r}, which matches no layer, expected some of {names}"
            )
    left, kept = list[Group](), list[str]()
    for kind in kinds_of(model, groups, uniform=False) if patterns else [groups]:
        if any(match(group, pattern) for group in kind for pattern in patterns):
            kept += [group.producer for group in kind]
        else:
            left += kind
    if not left:
        raise ValueError("keep: found patterns that match all layers, expected one to be cut")
    return [group for group in groups if group in left], kept
