"""The groups that a call of `select` is about: found, chosen, and cut on trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..data.batches import Batch
from ..data.forward import alike, main_output, run_model
from ..graph.groups import Group, analyse, find_groups, named_group
from ..graph.propagate import NotPrunableError
from .cut import cut, masked, with_units


def groups_of(model: nn.Module, example: Batch, chosen: Any) -> list[Group]:
    """The groups to select from: read off the graph, or as the caller named both ends."""
    if chosen.consumers is not None:
        groups = [named_group(model, *ends, example) for ends in chosen.consumers.items()]
        for group in groups:
            _check_cut(model, group, example)
    else:
        try:
            structure = analyse(model, example, _check_cut)
        except Exception as error:
            raise ValueError(
                f"model: torch.export can't trace it ({_first_line(error)}); name the layers in "
                "layers={producer: consumer}"
            ) from error
        groups = find_groups(model, structure, chosen.layers)
    if isinstance(chosen.size, Mapping):
        names = [group.producer for group in groups]
        for name in chosen.size:
            if name not in names:
                raise ValueError(f"size: found an entry for {name!r}, expected names among {names}")
    return groups


def _check_cut(model: nn.Module, group: Group, batch: Batch) -> None:
    """Cutting half of the units must do what masking them does: no graph vouches for it."""
    selection = with_units(model, [(group, torch.arange(0, group.units, 2))])
    expected = run_model(masked(model, selection), batch)
    why = f"something between it and {group.consumer!r} mixes them"
    if group.sized:
        why = f"{group.sized} may have their number written into it"
    same = False
    try:
        found = cut(masked(model, selection), selection)(*batch.args, **batch.kwargs)
        same = alike(main_output(expected), main_output(found))
    except Exception:
        same = False
    if not same:
        raise NotPrunableError(
            f"layer {group.producer!r}: cutting units is not what masking them is: {why}"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
