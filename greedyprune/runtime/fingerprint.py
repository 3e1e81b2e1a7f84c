"""What a call is of, as texts by name: arguments and model, to be compared between ranks or runs.

The user's functions are compared by their qualified names: two functions of one name count as
the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import Ranks
from .sparse import held_tensors


def of_fields(record: Any, prefix: str = "") -> dict[str, str]:
    """The fields of a dataclass, those of dataclasses in it too; functions by qualified name."""
    texts: dict[str, str] = {}
    for item in dataclasses.fields(record):
        name, value = f"{prefix}{item.name}", getattr(record, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            texts[name] = type(value).__name__
            texts |= of_fields(value, f"{name}.")
        elif isinstance(value, Tensor):
            texts[name] = repr(value.tolist())
        elif callable(value):
            texts[name] = str(getattr(value, "__qualname__", type(value).__name__))
        else:
            texts[name] = repr(value)
    return texts


def of_versions() -> dict[str, str]:
    """The versions of this package and of torch."""
    versions = {}
    for name in ("greedyprune", "torch"):
        with suppress(PackageNotFoundError):
            versions[f"the version of {name}"] = version(name)
    return versions


def of_model(model: nn.Module) -> dict[str, str]:
    """A digest of every parameter and buffer, and one of the modules' types."""
    kinds = " ".join(f"{name}:{type(module).__name__}" for name, module in model.named_modules())
    digests = {"model: modules": _digest(kinds)}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digests[f"model: {name!r}"] = of_tensor(tensor)
    return digests


def of_tensor(tensor: Tensor) -> str:
    """A digest of a tensor's dtype, shape and bytes."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
    for held in held_tensors(tensor.detach()):
        flat = held.cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def difference(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The first entry that differs: its name and both values; None where all are equal."""
    for name in dict.fromkeys((*one, *other)):
        pair = one.get(name, "nothing"), other.get(name, "nothing")
        if pair[0] != pair[1]:
            return name, *pair
    return None


@contextmanager
def same_on_all(ranks: Ranks, model: nn.Module, call: Mapping[str, str]) -> Iterator[None]:
    """Raises ValueError, on all ranks, where their parameters or arguments differ.

    Inside, all ranks have the first rank's buffers, because DistributedDataParallel lets statistics
    of batches differ until the next forward pass.
    """
    if ranks.size == 1:
        yield
        return
    tensors = of_model(model)
    buffers = {name: tensors.pop(f"model: {name!r}") for name, _ in model.named_buffers()}
    _check_same(ranks.gather("arguments", {**call}))
    if len(set(ranks.gather("model", _digest(repr(tensors))))) > 1:
        _check_same(ranks.gather("tensors", tensors))
    before = {}
    if len(set(ranks.gather("buffers", _digest(repr(buffers))))) > 1:
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        first = {name: buffer.cpu() for name, buffer in before.items()}
        _copy(ranks.from_rank(0, "the first rank's buffers", first), model)
    try:
        yield
    finally:
        _copy(before, model)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _copy(values: Mapping[str, Tensor], model: nn.Module) -> None:
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in values.items():
            buffers[name].copy_(value)


def _check_same(by_rank: Sequence[Mapping[str, str]]) -> None:
    for rank, texts in enumerate(by_rank):
        if differs := difference(by_rank[0], texts):
            name, *values = differs
            raise ValueError(
                f"{name}: found {values[0]} on rank 0 and {values[1]} on rank {rank}, expected the "
                "same on all ranks"
            )
