"""What remains of tensors, and of the sizes that modules hold, after a selection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..graph.slices import Entries
from .layer_selection import LayerSelection


def entries_left(layers: Iterable[LayerSelection]) -> Entries:
    """What stays of each dimension that is cut: its entries, ascending, by tensor and dimension.

    Several layers may cut the same dimension, as the parts of a concatenation do.
    """
    stays: dict[tuple[str, int], Tensor] = {}
    for layer in layers:
        for name, at in (*layer.slices.items(), *layer.also.items()):
            mask = stays.setdefault((name, at.dim), torch.ones(at.size, dtype=torch.bool))
            mask &= at.stays(layer.kept)
    return {key: mask.nonzero().flatten() for key, mask in stays.items()}


def sizes_left(layers: Iterable[LayerSelection]) -> dict[str, int]:
    """How many of the entries are left that attributes of modules count, by "module.attribute".

    An attribute may count the units of several layers after each other, or be the size of several
    that keep one share.
    """
    gone: dict[str, Tensor] = {}
    for layer in layers:
        for name, at in layer.sizes.items():
            new = ~at.stays(layer.kept)
            old = gone.setdefault(name, torch.zeros(at.size, dtype=torch.bool))
            of_both = old[at.places.flatten()].any()
            gone[name] = old if of_both else old | new
    return {name: int((~entries).sum()) for name, entries in gone.items()}


def check_shares(layers: Mapping[str, LayerSelection]) -> None:
    """ValueError where layers that have to keep one share of their units do not."""
    for name, layer in layers.items():
        for other_name in layer.share:
            other = layers.get(other_name)
            kept = "none" if other is None else f"{len(other.kept)} of {len(other.counts)}"
            same = other is not None and (
                len(layer.kept) * len(other.counts) == len(other.kept) * len(layer.counts)
            )
            if not same:
                raise ValueError(
                    f"selection: keeps {len(layer.kept)} of {len(layer.counts)} units of {name!r} "
                    f"and {kept} of {other_name!r}, but the model needs one share of both"
                )
