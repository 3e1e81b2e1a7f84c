"""What a selection is of: the model, the arguments, the loss; to be compared, between ranks say."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import CodeType, FunctionType, MethodType

import numpy as np
import torch
from torch import Tensor, nn

from ..data.losses import Criterion
from ..objectives.options import Settings
from .distributed import Ranks

DEEPEST = 8  # functions in functions


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
    found = dict[str, str]()
    for name, function in (("the loss", criterion.function), ("the metric", chosen.own_metric)):
        if function is not None:
            _add_parts(name, function, found, 0)
    return found


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


def _add_parts(name: str, value: object, found: dict[str, str], depth: int) -> None:
    """What a function or callable object does something by: its code, and what that is given.

    Defaults, closures, arguments of partials, public attributes, a module's parameters; not what
    is called by its global name, and not what is inside of other objects.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        found[name] = repr(value)
    elif isinstance(value, (Tensor, np.ndarray)):
        with suppress(RuntimeError, NotImplementedError, TypeError):  # sparse, say, or of objects
            found[name] = of_tensor(torch.as_tensor(value))
    elif depth == DEEPEST:
        found[name] = type(value).__qualname__
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            _add_parts(f"{name}[{i}]", each, found, depth + 1)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _add_parts(f"{name}[{key!r}]", each, found, depth + 1)
    elif isinstance(value, partial):
        _add_parts(f"{name}'s function", value.func, found, depth + 1)
        _add_parts(f"{name}'s arguments", value.args, found, depth + 1)
        _add_parts(f"{name}'s arguments", value.keywords, found, depth + 1)
    elif isinstance(value, MethodType):
        _add_parts(f"{name}'s function", value.__func__, found, depth + 1)
        _add_object(f"{name}'s object", value.__self__, found, depth)
    elif isinstance(value, FunctionType):
        code = repr(_code(value.__code__)).encode()
        found[f"{name}'s code"] = hashlib.blake2b(code, digest_size=8).hexdigest()
        defaults = value.__defaults__, value.__kwdefaults__
        _add_parts(f"{name}'s defaults", defaults, found, depth + 1)
        names = value.__code__.co_freevars
        for variable, cell in zip(names, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # nothing in it yet
                _add_parts(f"{name}'s {variable}", cell.cell_contents, found, depth + 1)
    elif callable(value) and not isinstance(value, type):
        call = type(value).forward if isinstance(value, nn.Module) else type(value).__call__
        if isinstance(call, FunctionType):
            _add_parts(name, call, found, depth + 1)
        _add_object(name, value, found, depth)
    else:
        found[name] = type(value).__qualname__


def _add_object(name: str, value: object, found: dict[str, str], depth: int) -> None:
    found[name] = type(value).__qualname__
    public = {k: each for k, each in getattr(value, "__dict__", {}).items() if k[0] != "_"}
    if isinstance(value, nn.Module):
        public |= {**dict(value.named_parameters()), **dict(value.named_children())}
        public.pop("training")
    for key, each in public.items():
        _add_parts(f"{name}'s {key}", each, found, depth + 1)


def _code(code: CodeType) -> tuple[object, ...]:
    """Without names of files, lines and addresses."""
    constants: list[object] = []
    for each in code.co_consts:
        if isinstance(each, CodeType):
            constants.append(_code(each))
        else:
            constants.append(sorted(map(repr, each)) if isinstance(each, frozenset) else each)
    return code.co_code, code.co_names, constants
