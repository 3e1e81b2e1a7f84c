"""A model's groups: traced once, tried where the trace leaves a doubt, and found by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..data.forward import hooked
from .adapters import ADAPTED, has_adapter
from .group_reader import groups_in
from .groups import QUERY_KEY, VALUE, Group
from .head_groups import groups_inside_heads
from .refusals import by_reason, refused_in, why_not, without_layer
from .slices import NotPrunableError, Slice
from .tracing import Graph, is_plain

# Every producer's group, or why it has none.
Structure = Mapping[str, Group | NotPrunableError]
# Tries to cut groups, and gives each as it can be cut, or why it can't, by its first producer. The
# graph is the model's on the batch.
Check = Callable[[Graph, Sequence[Group], Batch], Structure]

# The structures that the last calls of `analyse` found for each model, with what they depend on.
_KNOWN: WeakKeyDictionary[nn.Module, dict[bool, tuple[object, Structure]]] = WeakKeyDictionary()


def analyse(
    model: nn.Module, batch: Batch, check: Check | None = None, heads: bool = False
) -> Structure:
    """Every producer's group, or why it has none, in the order in which the producers run.

    check: is called with the groups that have a `may_hold_size`, and with those inside heads
    heads: also the dimensions inside attention's heads, at the end

    Raises TraceError for a model that torch.export can't trace. A second call with an unchanged
    model returns what the first one found.
    """
    signature = check, _signature(model, batch)
    earlier = _KNOWN.setdefault(model, {})
    for has_heads in (heads, True):
        known = earlier.get(has_heads)
        if known is not None and known[0] == signature:
            return {
                name: group for name, group in known[1].items()
                if heads or not name.endswith((QUERY_KEY, VALUE))
            }  # fmt: skip
    graph = Graph(model, batch.args, batch.kwargs)
    found = groups_in(graph)
    if heads:
        found |= groups_inside_heads(graph, found)
    doubtful = {
        group.producer: group for group in found.values()
        if isinstance(group, Group) and (group.may_hold_size or group.part)
        and not any(has_adapter(model, name) for name in (*group.producers, *group.consumers))
    }  # fmt: skip
    checked: Mapping[str, Group | NotPrunableError] = {}
    if check is not None and doubtful:
        checked = check(graph, list(doubtful.values()), batch)
    structure: dict[str, Group | NotPrunableError] = {}
    for name, group in found.items():
        if name in structure:  # in the group of a layer before it
            continue
        names = [name]
        try:
            if isinstance(group, NotPrunableError):
                raise group
            names = [name] if group.part else [*dict.fromkeys((name, *group.producers))]
            if any(has_adapter(model, name) for name in (*group.producers, *group.consumers)):
                raise NotPrunableError(ADAPTED)
            group = checked.get(group.producer, group)
            if isinstance(group, NotPrunableError):
                raise group
            structure |= {name: group for name in names if name not in structure}
        except NotPrunableError as error:
            layer = name.removesuffix(QUERY_KEY).removesuffix(VALUE)
            reason = ADAPTED if has_adapter(model, layer) else without_layer(error)
            # A new one: the frames of its traceback and context would keep the model alive.
            structure |= {
                name: type(error)(f"layer {name!r}: {reason}")
                for name in names if name not in structure
            }  # fmt: skip
    for name, reason in graph.not_layers.items():
        structure.setdefault(name, NotPrunableError(f"layer {name!r}: {reason}"))
    _KNOWN[model][heads] = signature, structure
    return structure


def _signature(model: nn.Module, batch: Batch) -> object:
    """What a trace depends on: modules, their plain attributes, shapes of tensors and inputs."""

    def plain(value: object) -> object:
        if isinstance(value, (bool, int, float, str, type(None))):
            return value
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype, value.layout
        if isinstance(value, (tuple, list)):
            return type(value), tuple(map(plain, value))
        if isinstance(value, dict):
            return tuple((str(key), plain(entry)) for key, entry in value.items())
        return id(value)

    modules = [
        (name, type(module), plain({k: v for k, v in vars(module).items() if k != "_modules"}))
        for name, module in model.named_modules()
    ]
    return modules, plain(batch.args), plain(batch.kwargs)


def find_groups(
    model: nn.Module, structure: Structure, wanted: Sequence[str] | None, *,
    everything: bool = False, sized: Sequence[str] = (),
) -> list[Group]:  # fmt: skip
    """The groups of the wanted producers, from what `analyse` returned; None: all groups.

    everything: take residual streams and units under a norm, too, where `wanted` is None
    sized:      names of such groups that are taken all the same

    Raises NotPrunableError for a wanted layer that can't be pruned, or where no layer can, and
    ValueError for an unknown one.
    """
    groups: list[Group] = []
    if wanted is None:
        groups += [
            group for name, group in structure.items()
            if isinstance(group, Group) and name == group.producer
            if (everything and not group.part) or not group.left_out or name in sized
        ]  # fmt: skip
        _check_shares(groups)
        _check_apart(groups)
        if not groups:
            reasons = by_reason(refused_in(model, structure) | left_out_of(structure)) or [
                "it has no Linear and no convolution"
            ]
            raise NotPrunableError(f"model: no layer can be pruned: {'; '.join(reasons)}")
        return groups
    prunable = [name for name, group in structure.items() if isinstance(group, Group)]
    expected = f"expected any of: {', '.join(map(repr, prunable)) or 'none'}"
    for name in wanted:
        group = structure.get(name)
        if isinstance(group, Group):
            if group not in groups:
                groups.append(group)
        elif group is not None:
            reason = str(group).removeprefix(f"layer {name!r}: ")
            raise NotPrunableError(
                f"layers: found {name!r}, which can't be pruned ({reason}), {expected}"
            )
        else:
            module = dict(model.named_modules()).get(name)
            reason = "no such module" if module is None else why_not(module)
            if name.endswith((QUERY_KEY, VALUE)):
                reason = "no such dimensions of heads; `layers().inside_heads` has their names"
            raise ValueError(f"layers: found {name!r} ({reason}), {expected}")
    _check_shares(groups)
    _check_apart(groups)
    return groups


def _check_shares(groups: Sequence[Group]) -> None:
    """NotPrunableError where groups are missing that keep one share with one of these."""
    names = {group.producer for group in groups}
    for group in groups:
        missing = [name for name in group.share if name not in names]
        if missing:
            raise NotPrunableError(
                f"layers: found {group.producer!r} without {', '.join(map(repr, missing))}; the "
                "model needs them to keep one share of their units, expected all of them"
            )


def _check_apart(groups: Sequence[Group]) -> None:
    """ValueError where heads and dimensions inside them are to be selected together."""
    for inside in groups:
        for group in groups if inside.part else ():
            if group is inside:
                continue
            for name, at in inside.slices.items():
                other = group.slices.get(name)
                if other is None or other.dim != at.dim:
                    continue
                if np.isin(at.places, other.places).any():
                    raise ValueError(
                        f"layers: found {group.producer!r} and {inside.producer!r}, which are "
                        "dimensions inside its units; expected one of them, and the other in a "
                        "second call for the pruned model"
                    )


def left_out_of(structure: Structure) -> dict[str, str]:
    """The producers whose groups are only selected where they are asked for, and why."""
    return {
        name: group.left_out
        for name, group in structure.items() if isinstance(group, Group) and group.left_out
    }  # fmt: skip


def named_group(model: nn.Module, producer: str, consumer: str, batch: Batch) -> Group:
    """The group of a producer and a consumer that the caller names, for untraceable models.

    One forward pass shows which modules run between the two, and whether the consumer's output is
    the model's. Both must be nn.Linear, and between them only BatchNorm1d and PReLU may have
    tensors with an entry for each unit.

    Raises ValueError for names that don't fit, NotPrunableError for another module between them.
    """
    modules = dict(model.named_modules())
    first, last = modules.get(producer), modules.get(consumer)
    for name, module in ((producer, first), (consumer, last)):
        if not isinstance(module, nn.Linear) or not is_plain(module):
            kind = "no such module" if module is None else type(module).__name__
            raise ValueError(f"layers: found {name!r} ({kind}), expected the name of an nn.Linear")
        if "weight" not in module._parameters:
            raise NotPrunableError(f"layers: found {name!r} ({why_not(module)})")
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    units = first.out_features
    if units != last.in_features:
        raise ValueError(
            f"layers: {producer!r} has {units} output units, but {consumer!r} takes "
            f"{last.in_features} inputs"
        )
    calls, outputs = _calls(model, batch)
    names = [name for name, _ in calls]
    if names.count(producer) != 1 or names.count(consumer) != 1:
        raise ValueError(
            f"layers: {producer!r} ran {names.count(producer)} and {consumer!r} "
            f"{names.count(consumer)} times in one forward pass, expected once each"
        )
    slices = {f"{consumer}.weight": Slice.regular(1, units)}
    for name in [producer, *names[names.index(producer) + 1 : names.index(consumer)]]:
        module = modules[name]
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        per_unit = [key for key, tensor in tensors if tensor.dim() and len(tensor) == units]
        if name != producer and per_unit and not isinstance(module, (nn.BatchNorm1d, nn.PReLU)):
            raise NotPrunableError(
                f"layer {producer!r}: {name!r} ({type(module).__name__}) stands between its units "
                f"and {consumer!r}"
            )
        slices |= {f"{name}.{key}": Slice.regular(0, units) for key in per_unit}
    last_output = calls[names.index(consumer)][1]
    is_output = (
        isinstance(outputs, Tensor)
        and isinstance(last_output, Tensor)
        and torch.equal(outputs.flatten(), last_output.flatten())
    )
    not_output = "" if is_output else "something that was not traced"
    return Group((producer,), (consumer,), units, slices, is_output, not_output)


def _calls(model: nn.Module, batch: Batch) -> tuple[list[tuple[str, object]], object]:
    """The modules that run, in order, each with what it returns; and what the model returns."""
    calls: list[tuple[str, object]] = []

    def record(name: str, output: object) -> None:
        calls.append((name, output))

    with hooked(model, [name for name, _ in model.named_modules()], after=record):
        return calls, model(*batch.args, **batch.kwargs)
