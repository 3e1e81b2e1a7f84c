"""The peak memory of a forward pass, and the memory at each moment for any sizes of the layers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .data.batches import Batch
from .data.forward import hooked, run_model
from .graph.costs import Cost, in_samples_of
from .graph.executor import tensors_of
from .sizes.kinds import Kinds, KindSizes
from .sizes.knapsack import Numbers
from .surgery.cut import cut_to

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


def live_bytes(model: nn.Module, batch: Batch) -> Numbers:
    """(T,): after each operation of a forward pass, the bytes of the batch and all other tensors.

    The model's parameters and buffers are among them.
    """
    counter = _counting(model, batch)
    with counter:
        run_model(model, batch)
    return np.array(counter.moments, np.float64)


def peaks_of(model: nn.Module, batch: Batch, modules: Sequence[str]) -> dict[str, float]:
    """The most bytes at one moment while each of these modules runs."""
    counter, started, peaks = _counting(model, batch), dict[str, int](), dict[str, float]()

    def start(name: str, _: Tensor) -> None:
        started[name] = len(counter.moments)

    def stop(name: str, _: Tensor) -> None:
        peaks[name] = max([peaks.get(name, 0.0), *counter.moments[started[name] :]])

    with hooked(model, modules, before=start, after=stop), counter:
        run_model(model, batch)
    return peaks


def _counting(model: nn.Module, batch: Batch) -> LiveBytes:
    counter = LiveBytes()
    counter.add(list(tensors_of(model).values()))
    counter.add((batch.args, batch.kwargs))
    return counter


def memory_of(
    model: nn.Module, kinds: Kinds, sizes_of: KindSizes, batch: Batch, few: Batch, params: Cost
) -> list[Cost]:
    """Bytes at the moments that may be the peak, each as a function of the layers' sizes.

    At each moment, the bytes of activations are linear in each kind's sizes. The slope is that
    between the dense model and one in which this kind alone is cut to half.

    few:    some samples of the batch, to whose number activations are in proportion
    params: the number of parameters as a function of the sizes

    ValueError where a cut model runs other operations than the dense one.
    """
    groups = [group for kind in kinds for group in kind]
    units = {group.producer: group.units for group in groups}
    weights = _bytes_of(model)
    dense = live_bytes(model, few)
    slopes = list[Numbers]()
    for kind, sizes in zip(kinds, sizes_of, strict=True):
        half = sizes[len(sizes) // 2 - 1] if len(sizes) > 1 else sizes[0]
        widths = units | {g.producer: size for g, size in zip(kind, half, strict=True)}
        saved_share = 1 - half[0] / kind[0].units
        if not saved_share:
            slopes.append(np.zeros_like(dense))
            continue
        small = cut_to(model, groups, widths)
        bytes_of_small = live_bytes(small, few)
        if len(bytes_of_small) != len(dense):
            raise ValueError(
                f"memory: found other operations in the model when layer {kind[0].producer!r} is "
                "cut, expected the same; Budget(flops=), params= or latency= work"
            )
        saved_weights = weights - _bytes_of(small)
        slopes.append((dense - bytes_of_small - saved_weights) / saved_share)
    times = float(in_samples_of(few, batch))
    changing = np.stack(slopes) * times  # (kinds, T)
    whole = (dense - weights) * times
    a_number = weights / max(1, params.dense)
    fixed = {layers: round(a_number * amount) for layers, amount in params.parts.items()}
    costs = list[Cost]()
    for t in _undominated(whole - changing.sum(0), changing):
        parts = dict(fixed)
        for kind, amount in zip(kinds, changing[:, t].tolist(), strict=True):
            name = (kind[0].producer,)
            parts[name] = parts.get(name, 0) + round(amount)
        costs.append(Cost(round(weights + whole[t]), units, parts))
    return costs


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
