"""Which units another tool has kept: read off a pruned model's weights, or named by the caller.

A tool that removes units leaves the others as they are. So the weights that compute a kept unit are
slices of the dense model's. Tensors that are cut along two dimensions are compared once the
units along the other one are known, which those of the first layers are from the start.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..graph.groups import Group
from ..graph.names import layer_name
from ..graph.networks import tensors_of
from ..graph.slices import Slice
from ..graph.structure import analyse
from ..runtime.arguments import is_int
from .cut import selection_of_units
from .remaining import check_shares, entries_left
from .selection import Selection
from .trial_cut import check_cuts

EXPECTED = (
    "expected a model from which whole units of `greedyprune.layers` were removed, and whose other "
    "weights are still those of `model`; or pass the kept units, as {layer: [0, 2, ...]}"
)


def selection_of(model: nn.Module, pruned: object, batch: Batch) -> Selection:
    """The Selection of the units that a pruned model has, or that a mapping names.

    pruned: a pruned copy of the model, or the kept units by the name of a layer of
        `greedyprune.layers`

    Raises:
        TypeError: `pruned` is neither
        ValueError: its units can't be told from its weights; or the mapping names another layer, or
            units that the layer does not have; or layers that have to keep one share of their units
            do not
    """
    groups = _groups_of(model, batch)
    if isinstance(pruned, nn.Module):
        kept = _kept_by(model, pruned, groups)
    elif isinstance(pruned, Mapping):
        kept = dict(_named(pruned, groups))
    else:
        raise TypeError(
            f"selection: found {type(pruned).__name__}, expected a Selection, a pruned model, or "
            "the kept units by layer"
        )
    selection = selection_of_units(model, ((groups[name], units) for name, units in kept.items()))
    check_shares(selection.layers)
    if isinstance(pruned, nn.Module):
        _check_shapes(model, pruned, selection)
    return selection


def _groups_of(model: nn.Module, batch: Batch) -> dict[str, Group]:
    structure = analyse(model, batch, check_cuts)
    return {g.producer: g for g in structure.values() if isinstance(g, Group)}


def _named(
    kept: Mapping[str, Sequence[int]], groups: Mapping[str, Group]
) -> Iterator[tuple[str, Tensor]]:
    for name, units in kept.items():
        if name not in groups:
            raise ValueError(
                f"selection: found {name!r}, expected names among {', '.join(map(repr, groups))}"
            )
        count, found = groups[name].units, [*units]
        is_valid = all(is_int(unit) and 0 <= unit < count for unit in found)
        if not found or not is_valid or len(set(found)) < len(found):
            raise ValueError(
                f"selection: found {units!r} for {name!r}, expected different units, at least one, "
                f"each from 0 to {count - 1}"
            )
        yield name, torch.tensor(sorted(found))


def _kept_by(model: nn.Module, pruned: nn.Module, groups: Mapping[str, Group]) -> dict[str, Tensor]:
    """The kept units of each group that was cut, by comparing weights."""
    dense, small = tensors_of(model), tensors_of(pruned)
    cutters = defaultdict[tuple[str, int], list[str]](list)  # the groups that cut a dimension
    for name, group in groups.items():
        for tensor, at in group.places:
            cutters[tensor, at.dim].append(name)
    stays = {
        (tensor, at.dim): torch.ones(at.size, dtype=torch.bool)
        for group in groups.values() for tensor, at in group.places
    }  # fmt: skip
    kept, waiting = dict[str, Tensor](), dict(groups)
    while waiting:
        known = {
            key: stays[key].nonzero().flatten()
            for key, names in cutters.items() if waiting.keys().isdisjoint(names)
        }  # fmt: skip
        found = {
            name: units for name, group in waiting.items()
            if (units := _match(group, dense, small, known)) is not None
        }  # fmt: skip
        if not found:
            break
        for name, units in found.items():
            group = waiting.pop(name)
            if len(units) < group.units:
                kept[name] = units
            for tensor, at in group.places:
                stays[tensor, at.dim] &= at.stays(units)
    for name, group in waiting.items():
        if any(n not in small or small[n].shape != dense[n].shape for n, _ in group.places):
            raise ValueError(f"selection: the units of {name!r} in the pruned model are not among "
                             f"those of `model`; {EXPECTED}")  # fmt: skip
    return kept


def _match(
    group: Group, dense: Mapping[str, Tensor], small: Mapping[str, Tensor],
    known: Mapping[tuple[str, int], Tensor],
) -> Tensor | None:  # fmt: skip
    """The units that the smaller tensors hold; None where they can't be told, or not yet.

    The weight of a producer has to have them. Tensors whose numbers have changed do not count, such
    as the weights that a tool has adapted to the loss of the others.
    """
    candidates, anchored = list[set[int]](), False
    for name, at in group.places:
        tensor, cut = dense[name].detach(), small.get(name)
        if cut is None or cut.dim() != tensor.dim() or not _is_whole(at):
            continue
        for dim in range(tensor.dim()):
            if dim != at.dim and (name, dim) in known:
                tensor = tensor.index_select(dim, known[name, dim].to(tensor.device))
        rest = [i for i in range(tensor.dim()) if i != at.dim]
        if any(tensor.shape[i] != cut.shape[i] for i in rest) or cut.shape[at.dim] % at.width:
            continue
        units = cut.shape[at.dim] // at.width
        if not 0 < units <= at.units:
            return None
        rows = dict[bytes, set[int]]()
        for unit, row in enumerate(_rows(tensor, at.dim, at.places)):
            rows.setdefault(row, set()).add(unit)
        places = torch.searchsorted(at.entries(torch.arange(units)), at.places[:units])
        own = [rows.get(row, set()) for row in _rows(cut.detach(), at.dim, places)]
        both = [a & b for a, b in zip(candidates, own, strict=True)] if candidates else own
        if all(both):
            candidates = both
            anchored |= layer_name(name) in group.producers
    if not candidates or not anchored:
        return None
    kept = list[int]()
    for each in candidates:
        free = sorted(each - set(kept))
        if not free:
            return None
        later = [unit for unit in free if not kept or unit > kept[-1]]
        kept.append((later or free)[0])
    return torch.tensor(sorted(kept))


def _rows(tensor: Tensor, dim: int, places: Tensor) -> list[bytes]:
    """The bytes of each unit's entries of a tensor."""
    taken = tensor.movedim(dim, 0).cpu()[places].flatten(1).contiguous()
    return [row.view(torch.uint8).numpy().tobytes() for row in taken]


def _is_whole(at: Slice) -> bool:
    """Do all entries of the dimension belong to the units?"""
    return at.size == at.places.numel()


def _check_shapes(model: nn.Module, pruned: nn.Module, selection: Selection) -> None:
    """ValueError unless cutting the model gives the pruned model's shapes."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors_of(model).items()}
    for (name, dim), left in entries_left(selection.layers.values()).items():
        shapes[name][dim] = len(left)
    small = tensors_of(pruned)
    for name, shape in shapes.items():
        if name not in small or list(small[name].shape) != shape:
            found = tuple(small[name].shape) if name in small else "nothing"
            raise ValueError(
                f"selection: the pruned model has {found} as {name!r}, where {tuple(shape)} "
                f"belongs to its units; {EXPECTED}"
            )
