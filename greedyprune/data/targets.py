"""Targets of any form: a tensor, or lists and dicts of tensors, as detection has them.

Only a user's own loss takes other targets than tensors. A list has one entry for each sample; a
tensor inside a dict or tuple has one row for each sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime.distributed import Ranks
from ..runtime.sparse import rows_at


def parsed(value: Any) -> Any:
    """Numbers as a tensor; tensors, dicts, tuples and lists of these as they are.

    TypeError for something that cannot be targets.
    """
    if isinstance(value, (Tensor, Mapping, tuple)) or hasattr(value, "__array__"):
        return value
    if isinstance(value, (int, float, list)):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):  # a list of other things than numbers
            return value
    raise TypeError(
        f"data: found targets of type {type(value).__name__}, expected a tensor, or a list or dict "
        "for a loss of your own"
    )


def part_of(targets: Any, samples: slice | Tensor) -> Any:
    """The targets of some of the samples: a slice of them, or their indices (s,) int64."""
    if isinstance(targets, Tensor):
        if isinstance(samples, Tensor) and targets.dim():
            return rows_at(targets, samples)
        return targets[samples] if targets.dim() else targets
    if isinstance(targets, list):
        if isinstance(samples, slice):
            return targets[samples]
        return [targets[i] for i in samples.tolist()]
    if isinstance(targets, Mapping):
        return {name: part_of(value, samples) for name, value in targets.items()}
    if isinstance(targets, tuple):
        return tuple(part_of(value, samples) for value in targets)
    return targets


def joined(parts: Sequence[Any], what: str = "targets") -> Any:
    """The targets (or outputs) of several batches, one after the other.

    ValueError for tensors of different shapes: a user's loss is called with all of them at once.
    """
    first = parts[0]
    if isinstance(first, list):
        return [entry for part in parts for entry in part]
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts], what) for name in first}
    if isinstance(first, tuple):
        return tuple(joined(values, what) for values in zip(*parts, strict=True))
    if not isinstance(first, Tensor):
        return first
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        found = " and ".join(map(str, sorted(shapes)[:2]))
        raise ValueError(
            f"loss: a function of your own gets the {what} of all batches at once, but found "
            f"samples of shapes {found}; expected one shape: pad all batches to one length"
        )
    return torch.cat(list(parts)) if len(parts) > 1 else first


def joined_over(ranks: Ranks, targets: Any) -> Any:
    """Every rank's targets, one after the other."""
    if isinstance(targets, Tensor):
        return ranks.joined("targets", targets)
    return joined(ranks.gather("targets", targets)) if ranks.size > 1 else targets


def samples_in(targets: Any) -> int | None:
    """How many samples these targets are for; None: unknown."""
    if isinstance(targets, Tensor):
        return len(targets) if targets.dim() else None
    if isinstance(targets, list):
        return len(targets)
    if isinstance(targets, Mapping):
        targets = tuple(targets.values())
    if not isinstance(targets, tuple):
        return None
    return next((count for count in map(samples_in, targets) if count is not None), None)
