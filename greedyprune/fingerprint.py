"""What a selection is of: the model, the arguments, the loss; to be compared, between ranks say."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .distributed import Ranks
from .losses import Criterion
from .settings import Settings


def of_call(chosen: Settings, criterion: Criterion, backend: str) -> dict[str, str]:
    """The arguments, each with what it is; not how much memory there is."""
    found = {name: repr(value) for name, value in vars(chosen).items() if name != "memory_limit"}
    if chosen.own_metric is not None:
        found["own_metric"] = _name(chosen.own_metric)
    found["backend"] = backend
    for item in dataclasses.fields(Criterion):
        value = getattr(criterion, item.name)
        if isinstance(value, Tensor):
            value = value.tolist()
        name = "loss" if item.name == "kind" else f"the loss's {item.name}"
        found[name] = _name(value) if callable(value) else repr(value)
    return found


def of_model(model: nn.Module) -> dict[str, str]:
    """A digest of every parameter and buffer, and the modules' types."""
    kinds = " ".join(f"{name}:{type(module).__name__}" for name, module in model.named_modules())
    found = {"model: modules": hashlib.blake2b(kinds.encode(), digest_size=8).hexdigest()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"model: {name!r}"] = of_tensor(tensor)
    return found


def of_tensor(tensor: Tensor) -> str:
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def difference(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The first thing that differs: its name and both values; None where nothing does."""
    for name in dict.fromkeys((*one, *other)):
        pair = one.get(name, "nothing"), other.get(name, "nothing")
        if pair[0] != pair[1]:
            return name, *pair
    return None


@contextmanager
def same_on_all(ranks: Ranks, model: nn.Module, call: Mapping[str, str]) -> Iterator[None]:
    """ValueError, on all ranks, where they have other parameters or arguments.

    Inside, all have the first rank's buffers: DistributedDataParallel lets statistics of batches
    differ until the next forward pass.
    """
    if ranks.size == 1:
        yield
        return
    tensors = of_model(model)
    buffers = {name: tensors.pop(f"model: {name!r}") for name, _ in model.named_buffers()}
    _check_same(ranks.gather("arguments", {**call}))
    if len(set(ranks.gather("model", _of(tensors)))) > 1:
        _check_same(ranks.gather("tensors", tensors))
    before = {}
    if len(set(ranks.gather("buffers", _of(buffers)))) > 1:
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        first = {name: buffer.cpu() for name, buffer in before.items()}
        _copy(ranks.from_rank(0, "the first rank's buffers", first), model)
    try:
        yield
    finally:
        _copy(before, model)


def _of(found: Mapping[str, str]) -> str:
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()


def _copy(buffers: Mapping[str, Tensor], model: nn.Module) -> None:
    own = dict(model.named_buffers())
    with torch.no_grad():
        for name, buffer in buffers.items():
            own[name].copy_(buffer)


def _check_same(found: Sequence[Mapping[str, str]]) -> None:
    for rank, other in enumerate(found):
        if differs := difference(found[0], other):
            name, *values = differs
            raise ValueError(
                f"{name}: found {values[0]} on rank 0 and {values[1]} on rank {rank}, expected the "
                "same on all ranks"
            )


def _name(value: object) -> str:
    return str(getattr(value, "__qualname__", type(value).__name__))
