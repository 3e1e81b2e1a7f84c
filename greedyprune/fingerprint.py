"""What a selection is of: the model, the arguments, the loss; to be compared, between ranks say."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, FunctionType, MethodType, ModuleType

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


def of_functions(chosen: Settings, criterion: Criterion) -> dict[str, str]:
    """A loss or metric of the user's own: what it is made of, not only its name."""
    own = {"the loss's function": criterion.function, "the metric": chosen.own_metric}
    return {
        name: hashlib.blake2b(repr(_made_of(each, set())).encode(), digest_size=8).hexdigest()
        for name, each in own.items() if each is not None
    }  # fmt: skip


def of_versions() -> dict[str, str]:
    found = {}
    for name in ("greedyprune", "torch"):
        with suppress(PackageNotFoundError):
            found[f"the version of {name}"] = version(name)
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


def _made_of(value: object, seen: set[int]) -> object:
    """Code, defaults and closure of functions; attributes of objects, and so on; no addresses."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if id(value) in seen or isinstance(value, ModuleType):
        return name
    seen.add(id(value))

    def of(*parts: object) -> list[object]:
        return [_made_of(part, seen) for part in parts]

    if isinstance(value, (list, tuple, set, frozenset)):
        return name, of(*(sorted(value, key=repr) if isinstance(value, Set) else value))
    if isinstance(value, Mapping):
        return name, of(*value.keys()), of(*value.values())
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, of(*value.co_consts)
    if isinstance(value, partial):
        return of(value.func, value.args, value.keywords)
    if isinstance(value, FunctionType):
        closure = {}
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
            with suppress(ValueError):  # nothing in it yet
                closure[name] = cell.cell_contents
        return value.__qualname__, of(value.__code__, value.__defaults__, closure)
    if isinstance(value, MethodType):
        return value.__qualname__, of(value.__self__)
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return name, str(getattr(value, "__qualname__", ""))
    return name, of(vars(value))
