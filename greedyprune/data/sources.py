"""What can be data: everything that gives batches, and the random generators that it draws from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, TensorDataset

# Samples in a forward pass, for data that come without batches. On a CPU, activations of more than
# about 32 MB cost extra, because the system gives every batch fresh memory pages for them.
BATCH = 512


def batches_in(data: object) -> Iterable[Any]:
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        data = tuple(data.tensors)
    if isinstance(data, Tensor) or hasattr(data, "__array__"):
        data = (tensor_of(data),)
    if isinstance(data, tuple) and data and all(_is_array(part) for part in _flat(data)):
        if len(data) > 2:
            raise TypeError(f"data: found {len(data)} tensors, expected (inputs, targets)")
        return _Slices(data)
    if isinstance(data, Mapping):
        return [data]
    if hasattr(data, "with_format") and hasattr(data, "iter"):
        return _Rows(data)
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=BATCH)
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        return data
    raise TypeError(
        f"data: found {type(data).__name__}, expected (inputs, targets), a Dataset, a DataLoader "
        "or an iterable of batches"
    )


class _Slices:
    """(inputs, targets) of the same length, in batches of about the same size."""

    def __init__(self, data: tuple[Any, ...]) -> None:
        self._inputs = [tensor_of(part) for part in _flat(data[:1])]
        self._targets = [tensor_of(part) for part in _flat(data[1:])]
        for tensor in (*self._inputs, *self._targets):
            if not tensor.dim():
                raise ValueError("data: found a tensor of shape (), expected one entry a sample")
            if tensor.layout != torch.strided:  # torch can't take a slice of it
                raise TypeError(
                    "data: found a sparse tensor, expected a dense one (tensor.to_dense()), or a "
                    "list of batches"
                )
        self.samples = len(self._inputs[0])
        for tensor in (*self._inputs, *self._targets):
            if len(tensor) != self.samples:
                raise ValueError(
                    f"data: found {self.samples} inputs and {len(tensor)} targets, expected one "
                    "for each"
                )

    def __len__(self) -> int:
        return -(-self.samples // BATCH)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        size = -(-self.samples // max(1, len(self)))
        for i in range(0, self.samples, max(1, size)):
            inputs = tuple(t[i : i + size] for t in self._inputs)
            targets = (t[i : i + size] for t in self._targets)
            yield (inputs if len(inputs) > 1 else inputs[0], *targets)


class _Rows:
    """A dataset of Hugging Face's `datasets`, read from its files as dicts of tensors."""

    def __init__(self, data: Any) -> None:
        self._data = data.with_format("torch")

    @property
    def samples(self) -> int:
        return len(self._data)

    def __len__(self) -> int:
        return -(-self.samples // BATCH)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self._data.iter(batch_size=BATCH))


def samples_in_all(source: object) -> int | None:
    """How many samples the batches have together; None where this takes reading them."""
    try:
        if isinstance(source, (_Slices, _Rows)):
            return source.samples
        if isinstance(source, DataLoader) and source.batch_size is not None:
            whole = len(source) * source.batch_size
            return whole if source.drop_last else len(source.sampler)  # type: ignore[arg-type]
    except TypeError:  # a stream has no length
        return None
    if isinstance(source, (list, tuple)):
        lengths = [next(filter(_has_length, tree_leaves(batch)), ()) for batch in source]
        return sum(map(len, lengths)) if all(map(len, lengths)) else None
    return None


def _has_length(value: object) -> bool:
    return _is_array(value) and len(value.shape) > 0  # type: ignore[attr-defined]


def _flat(parts: tuple[Any, ...]) -> list[Any]:
    return [item for p in parts for item in (p if isinstance(p, (tuple, list)) else (p,))]


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def tensor_of(value: Any) -> Tensor:
    with warnings.catch_warnings():  # the array is only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.as_tensor(value)


def generators_of(source: object) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers draw from, besides torch's global one."""
    if not isinstance(source, DataLoader):
        return []
    batched = source.batch_sampler
    owners = source, source.sampler, batched, getattr(batched, "sampler", None)
    generators = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())


def random_states(source: object) -> list[tuple[torch.Generator, Tensor]]:
    """The states of all generators that a DataLoader draws from, torch's global one included."""
    if not isinstance(source, DataLoader):
        return []
    generators = torch.default_generator, *generators_of(source)
    return [(generator, generator.get_state()) for generator in generators]
