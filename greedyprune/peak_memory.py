"""The peak memory of a forward pass, and the memory at each moment for any sizes of the layers."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .data.batches import Batch, samples_of
from .data.forward import run_model
from .graph.costs import Cost
from .graph.networks import tensors_of
from .sizes.kinds import Kinds, KindSizes
from .sizes.knapsack import Numbers
from .surgery.cut import cut_to

FEW = 2, 4  # samples
MOMENTS = 64  # that limits are set for, at most


class LiveBytes(TorchDispatchMode):
    """Notes, after each of torch's operations, the bytes of all tensors that live.

    Tensors that share memory count once. What an operation needs inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moments = list[int]()
        self._bytes = 0
        self._alive = dict[int, weakref.ref[torch.UntypedStorage]]()

    def add(self, value: Any) -> None:
        """Counts the tensors in a nested value for as long as they live."""
        for tensor in tree_leaves(value):
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._alive:
                continue

            def freed(_: object, key: int = key, size: int = size) -> None:
                del self._alive[key]
                self._bytes -= size

            self._alive[key] = weakref.ref(storage, freed)
            self._bytes += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        self.moments.append(self._bytes)
        return result


@dataclass(frozen=True, eq=False)
class Moments:
    """What lives after each operation of a forward pass.

    bytes:  (T,) float64, of the batch and all other tensors, the model's among them
    events: each start and end of a module, as the number of operations before it and a text that
            names it
    """

    bytes: Numbers
    events: Sequence[tuple[int, str]]

    @property
    def peak(self) -> float:
        return float(self.bytes.max())

    def by_stage(self, common: Sequence[str]) -> Numbers:
        """The most bytes between any two of these events.

        (S + 1,) for S events. The pass has all of them in this order.
        """
        chosen = set(common)
        bounds = [operations for operations, event in self.events if event in chosen]
        stages = np.searchsorted(bounds, np.arange(len(self.bytes)), side="right")
        most = self.bytes[np.maximum(0, np.array([0, *bounds]) - 1)]  # where a stage starts
        np.maximum.at(most, stages, self.bytes)
        return most


def moments_of(model: nn.Module, batch: Batch) -> Moments:
    counter, events, calls = LiveBytes(), list[tuple[int, str]](), Counter[str]()
    counter.add(list(tensors_of(model).values()))
    counter.add((batch.args, batch.kwargs))

    def passed(name: str, *_: object) -> None:
        calls[name] += 1
        events.append((len(counter.moments), f"{name} {calls[name]}"))

    handles = list[RemovableHandle]()
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(passed, f"start of {name}")))
        handles.append(module.register_forward_hook(partial(passed, f"end of {name}")))
    try:
        with counter:
            run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return Moments(np.array(counter.moments, np.float64), events)


def peaks_of(model: nn.Module, batch: Batch, modules: Sequence[str]) -> dict[str, float]:
    """The most bytes at one moment while each of these modules runs; 0 for one that does not."""
    moments, peaks = moments_of(model, batch), dict.fromkeys(modules, 0.0)
    at = {event: operations for operations, event in moments.events}
    for name in modules:
        call = 1
        while f"end of {name} {call}" in at:
            first, end = (at[f"{edge} of {name} {call}"] for edge in ("start", "end"))
            peaks[name] = max([peaks[name], *moments.bytes[first:end].tolist()])
            call += 1
    return peaks


def memory_of(
    model: nn.Module, kinds: Kinds, sizes_of: KindSizes, batch: Batch, params: Cost
) -> list[Cost]:
    """Bytes at the moments that may be the peak, each as a function of the layers' sizes.

    At each moment, the bytes of activations are linear in each kind's sizes. The slope is that
    between the dense model and one in which this kind alone is cut to half.

    params: the number of parameters as a function of the sizes
    """
    groups = [group for kind in kinds for group in kind]
    units = {group.producer: group.units for group in groups}
    runs = _runs_for(model, batch)
    passes, weights, shares = [[moments_of(model, b) for b, _ in runs]], [_bytes_of(model)], [0.0]
    for kind, sizes in zip(kinds, sizes_of, strict=True):
        half = sizes[len(sizes) // 2 - 1] if len(sizes) > 1 else sizes[0]
        widths = units | {g.producer: size for g, size in zip(kind, half, strict=True)}
        small = cut_to(model, groups, widths)
        passes.append([moments_of(small, b) for b, _ in runs])
        weights.append(_bytes_of(small))
        shares.append(1 - half[0] / kind[0].units)
    live = np.array([
        sum(factor * bytes_of for bytes_of, (_, factor) in zip(of_model, runs, strict=True))
        for of_model in _aligned(passes)
    ])  # fmt: skip
    activations = live - np.array(weights)[:, None]  # (1 + kinds, T)
    saved = np.array([[share or 1.0] for share in shares[1:]])
    changing = (activations[0] - activations[1:]) / saved
    a_number = weights[0] / max(1, params.dense)
    fixed = {layers: round(a_number * amount) for layers, amount in params.parts.items()}
    costs = list[Cost]()
    for t in _undominated(activations[0] - changing.sum(0), changing):
        parts = dict(fixed)
        for kind, amount in zip(kinds, changing[:, t].tolist(), strict=True):
            name = (kind[0].producer,)
            parts[name] = parts.get(name, 0) + round(amount)
        costs.append(Cost(round(float(live[0, t])), units, parts))
    return costs


def _aligned(passes: Sequence[Sequence[Moments]]) -> list[list[Numbers]]:
    """The bytes of several passes at the same moments.

    Where cut models run other operations, as packed attention does, a moment is a stage between
    starts and ends of modules that all passes have.
    """
    every = [moments for of_model in passes for moments in of_model]
    if len({len(moments.bytes) for moments in every}) == 1:
        return [[moments.bytes for moments in of_model] for of_model in passes]
    events = [[event for _, event in moments.events] for moments in every]
    shared = set.intersection(*map(set, events))
    common = [event for event in events[0] if event in shared]
    if any([event for event in others if event in shared] != common for others in events):
        common = []  # the order differs: the whole pass is one stage
    return [[moments.by_stage(common) for moments in of_model] for of_model in passes]


def _runs_for(model: nn.Module, batch: Batch) -> list[tuple[Batch, float]]:
    """Batches, and the factors with which their bytes add up to those of the whole batch.

    A few samples are enough where every moment's bytes grow evenly with their number.
    """
    few = [batch.few(count) for count in FEW]
    counts = [samples_of(b) or 1 for b in (*few, batch)]
    if counts[1] < counts[2]:
        factor = (counts[2] - counts[0]) / (counts[1] - counts[0])
        runs = [(few[0], 1 - factor), (few[1], factor)]
        with suppress(ValueError, RuntimeError):  # the model runs on no part of the batch
            moments, whole = [moments_of(model, b) for b in few], moments_of(model, batch)
            if len({len(m.bytes) for m in (*moments, whole)}) == 1:
                added = sum(f * m.bytes for m, (_, f) in zip(moments, runs, strict=True))
                if np.allclose(added, whole.bytes, rtol=1e-6):
                    return runs
    return [(batch, 1.0)]


def _bytes_of(model: nn.Module) -> int:
    """The bytes of the parameters and buffers; tied ones count once."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in tensors_of(model).values()}.values())


def _undominated(constant: Numbers, changing: Numbers) -> list[int]:
    """The moments that may have the most bytes for some sizes.

    At a moment t, constant[t] bytes are there whatever the sizes, and changing[:, t] in proportion
    to the kinds' sizes. A moment at which none of these is higher than at another one is left out.
    """
    order = np.argsort(-(constant + changing.sum(0)), kind="stable")
    chosen = list[int]()
    for t in order.tolist():
        dominated = any(
            constant[t] <= constant[s] and (changing[:, t] <= changing[:, s]).all() for s in chosen
        )
        if not dominated:
            chosen.append(t)
        if len(chosen) == MOMENTS:
            break
    return chosen
