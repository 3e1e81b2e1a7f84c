"""The groups of units to select from.

Where the graph of the model cannot show that a group can be cut, a trial cut does (trials.py): the
caller has named the group by hand, or an operation may have the number of units written into it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from torch import nn

from ..data.batches import Batch, samples_of
from ..graph.groups import QUERY_KEY, VALUE, Group
from ..graph.head_groups import rescaling
from ..graph.refusals import by_reason, refused_in
from ..graph.slices import NotPrunableError
from ..graph.structure import Structure, analyse, find_groups, left_out_of, named_group
from ..graph.trace_errors import TraceError
from ..graph.tracing import Graph
from ..runtime.progress import warn
from .proof import example_of
from .trials import FailedTrialError, Trials, for_layer, general


def groups_of(
    model: nn.Module, example: Batch, layers: tuple[str, ...] | None,
    consumers: Mapping[str, str] | None, sized: Sequence[str] = (),
) -> tuple[list[Group], dict[str, str]]:  # fmt: skip
    """The groups to select from, and why other layers can't be pruned.

    The second is empty if the caller names the layers. If not, one warning names the layers whose
    trial cut failed.

    Args:
        model: the dense model
        example: a batch that the model is traced with
        layers: the names of the groups' producers; None: all that can be found in the graph, but
            for residual streams and units under a norm; ("all",): these, too. Dimensions inside
            heads are taken where they are named
        consumers: the name of the consumer for each producer's name. They are taken as the caller
            names them, without a graph. None: the graph says what follows the producers
        sized: names of layers that the argument `size` has entries for

    Raises:
        ValueError: a model that torch.export can't trace, an unknown layer, an entry of `size` for
            another layer, a model that fails with fewer units for a reason other than its shapes
        NotPrunableError: a layer whose units can't be removed
    """
    refused: dict[str, str] = {}
    if consumers is not None:
        groups = [named_group(model, *ends, example) for ends in consumers.items()]
        for group in groups:
            check_cut(model, group, example)
    else:
        try:
            named = (*(layers or ()), *sized)
            heads = any(name.endswith((QUERY_KEY, VALUE)) for name in named)
            structure = analyse(model, example, check_cuts, heads)
        except TraceError as error:
            raise TraceError(f"{error}; name the layers in layers={{producer: consumer}}") from None
        by_name = None if layers == ("all",) else layers
        groups = find_groups(model, structure, by_name, everything=layers is not None, sized=sized)
        if by_name is None:
            refused = refused_in(model, structure)
            taken = {name for group in groups for name in group.producers}
            left_out = left_out_of(structure).items()
            refused |= {name: reason for name, reason in left_out if name not in taken}
            failed = {
                name: refused[name]
                for name, reason in structure.items() if isinstance(reason, FailedTrialError)
            }  # fmt: skip
            if failed:
                warn(f"layers: not pruned: {'; '.join(by_reason(failed))}")
    names = [group.producer for group in groups]
    for name in sized:
        if name not in names:
            raise ValueError(f"size: found an entry for {name!r}, expected names among {names}")
    return groups, refused


def check_cuts(graph: Graph, groups: Sequence[Group], batch: Batch) -> Structure:
    """Each group as it can be cut, or why it can't be, by its first producer.

    A group keeps only those of its `sizes`, the attributes that are set, without which it can't be
    cut. All groups are tried together first, then those of the same layers of several blocks, and
    then each group. Those that can't be cut are tried with others in one share. A model on the meta
    device is not tried, since there are no numbers to compare.

    ValueError where the smaller model raises an error that is not about its shapes.
    """
    model = graph.model
    if any(parameter.is_meta for parameter in model.parameters()):
        return {group.producer: replace(group, sizes={}) for group in groups}
    example = example_of(model, batch)
    # The graph of the analysis serves the trials, too, if it is of so few samples.
    trials = Trials(model, example, graph if samples_of(example) == samples_of(batch) else None)
    inside = [group for group in groups if group.part]
    result = _checked(trials, [group for group in groups if not group.part])
    return result | _checked_inside_heads(trials, inside)


def _checked(trials: Trials, groups: Sequence[Group]) -> dict[str, Group | NotPrunableError]:
    """The same for groups of whole units."""
    kinds = defaultdict[str, list[Group]](list)
    for group in groups:
        kinds[general(group.producer)].append(group)
    result: dict[str, Group | NotPrunableError] = {}
    for some in ([*groups], *kinds.values()) if len(kinds) > 1 else ([*groups],):
        if len(some) > 1 and len(result) < len(groups):
            result |= {group.producer: group for group in trials.cuttable(some)}
    codes = defaultdict[tuple[object, ...], list[Group]](list)
    for group in groups:
        if group.producer not in result:
            codes[_code_of(group)].append(group)
    for some in codes.values():
        result |= trials.each_cuttable(some)
    failed = [g for g in groups if isinstance(result[g.producer], NotPrunableError)]
    for by_attributes in (True, False):
        for connected in _connected(failed, by_attributes):
            if any(isinstance(result[group.producer], NotPrunableError) for group in connected):
                result |= {g.producer: g for g in trials.cuttable_in_one_share(connected)}
    return result


def _checked_inside_heads(
    trials: Trials, groups: Sequence[Group]
) -> dict[str, Group | NotPrunableError]:
    """The same for dimensions inside heads.

    Most code has one size for queries, keys and values. So groups that have weights or attributes
    in common are also tried in one share. Whether the code divides the scores by the root of that
    size is tried, too. Each head loses other dimensions, so that the trials show whether it may.
    The first block of several alike tells which attributes are to be set, or that none can be cut.
    """
    if not groups:
        return {}
    trials.sharpen(groups)
    groups = [group.rolled(1) for group in groups]
    sets = _connected(groups, by_attributes=True)
    in_sets = {group.producer for one_set in sets for group in one_set}
    sets += [[group] for group in groups if group.producer not in in_sets]
    kinds = defaultdict[tuple[str, ...], list[list[Group]]](list)
    for one_set in sets:
        kinds[tuple(general(group.producer) for group in one_set)].append(one_set)
    cuttable = [alike for alike in kinds.values() if _of_one_size(trials, alike[:1], few=False)]
    found = _of_one_size(trials, [one_set for alike in cuttable for one_set in alike])
    for alike in cuttable if not found else ():
        alone = (_of_one_size(trials, [one_set]) for one_set in alike)
        found += _of_one_size(trials, alike) or [group for one_set in alone for group in one_set]
    result: dict[str, Group | NotPrunableError] = {group.producer: group for group in found}
    for alike in kinds.values():
        refused = [group for one_set in alike for group in one_set if group.producer not in result]
        why = (trials.failure_of(refused[0]) if refused else None) or "its units are mixed"
        for group in refused:
            result[group.producer] = for_layer(group.producer, refused[0].producer, why)
    return {
        name: group.rolled(-1) if isinstance(group, Group) else group
        for name, group in result.items()
    }


def _of_one_size(
    trials: Trials, sets: Sequence[Sequence[Group]], *, few: bool = True
) -> list[Group]:
    """The groups of all sets, if they can be cut, with one size for those of a set or without.

    few: try only all attributes at once
    """
    trials.gave_other_outputs = False
    for is_flipped in (False, True) if sets else ():
        if is_flipped and not trials.gave_other_outputs:
            break
        tried = [
            [
                rescaling(group, not group.rescaled) if is_flipped and group.scores else group
                for group in one_set
            ]
            for one_set in sets
        ]
        found = trials.cuttable([group for one_set in tried for group in one_set], few=True)
        if not found and all(len(one_set) > 1 for one_set in tried):
            found = trials.cuttable_in_one_share(*tried, few=few)
        if found:
            return found
    return []


def _code_of(group: Group) -> tuple[object, ...]:
    """The same for groups of the same layers of several blocks, which the same code cuts."""
    return general(group.producer), group.may_hold_size, *map(general, group.sizes)


def _connected(groups: Sequence[Group], by_attributes: bool) -> list[list[Group]]:
    """Sets of groups that the code may need in one share, each of at least two groups.

    In `x.reshape(*x.shape[:2], width)`, with the width of a stream's input to attention, the
    heads and the stream need one share. They have a weight in common.

    by_attributes: also groups whose sizes the same attribute may hold
    """
    place = {group.producer: {group.producer} for group in groups}
    for one, other in combinations(groups, 2):
        if one.stream and other.stream:
            continue
        named = (set(group.sizes) if by_attributes else set() for group in (one, other))
        tensors = ({*group.slices, *group.also} for group in (one, other))
        if set.intersection(*tensors) or set.intersection(*named):
            joined = place[one.producer] | place[other.producer]
            place |= dict.fromkeys(joined, joined)
    sets = dict.fromkeys(frozenset(names) for names in place.values() if len(names) > 1)
    return [[group for group in groups if group.producer in names] for names in sets]


def check_cut(model: nn.Module, group: Group, batch: Batch) -> None:
    """FailedTrialError unless cutting some units does what masking them does.

    ValueError where the smaller model raises an error that is not about its shapes. A model on the
    meta device is not tried.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        Trials(model, example_of(model, batch)).cut([group])
