"""The groups of units to select from, and the trial cut that shows that a group can be cut.

A trial cut is made where the graph of the model cannot show that a group can be cut: the caller has
named the group by hand, or an operation may have the number of units written into it. It removes
half of the units. The smaller model has to give the outputs that the model gives with these units
masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..data.batches import Batch
from ..data.forward import alike, run_model, shown_output, untraceable
from ..graph.groups import Group, analyse, find_groups, named_group
from ..graph.propagate import NotPrunableError
from .cut import cut, masked, selection_of_units


def groups_of(
    model: nn.Module, example: Batch, layers: tuple[str, ...] | None,
    consumers: Mapping[str, str] | None, sized: Iterable[str] = (),
) -> list[Group]:  # fmt: skip
    """The groups to select from.

    Args:
        model: the dense model
        example: a batch that the model is traced with
        layers: the names of the groups' producers; None: all that can be found in the graph
        consumers: the name of the consumer for each producer's name. They are taken as the caller
            names them, without a graph. None: the graph says what follows the producers
        sized: names of layers that the argument `size` has entries for

    Raises:
        ValueError: a model that torch.export can't trace, an unknown layer, an entry of `size` for
            another layer
        NotPrunableError: a layer whose units can't be removed
    """
    if consumers is not None:
        groups = [named_group(model, *ends, example) for ends in consumers.items()]
        for group in groups:
            _check_cut(model, group, example)
    else:
        try:
            analysis = analyse(model, example, _check_cut)
        except Exception as error:
            reason = untraceable(model, error)
            raise ValueError(
                f"model: torch.export can't trace it ({reason}); name the layers in "
                "layers={producer: consumer}"
            ) from error
        groups = find_groups(model, analysis, layers)
    names = [group.producer for group in groups]
    for name in sized:
        if name not in names:
            raise ValueError(f"size: found an entry for {name!r}, expected names among {names}")
    return groups


def _check_cut(model: nn.Module, group: Group, batch: Batch) -> None:
    """NotPrunableError unless cutting every other unit does what masking these units does."""
    selection = selection_of_units(model, [(group, torch.arange(0, group.units, 2))])
    expected = run_model(masked(model, selection), batch)
    reason = f"something between it and {group.consumer!r} mixes them"
    if group.may_hold_size:
        reason = f"{group.may_hold_size} may have their number as a constant"
    try:
        outputs = cut(masked(model, selection), selection)(*batch.args, **batch.kwargs)
        same = alike(shown_output(expected, batch), shown_output(outputs, batch))
    except Exception:  # of any kind: the smaller model can't run
        same = False
    if not same:
        raise NotPrunableError(
            f"layer {group.producer!r}: cutting units gives other outputs than masking them: "
            f"{reason}"
        )
