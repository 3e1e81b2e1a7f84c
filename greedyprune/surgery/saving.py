"""A pruned model as one safetensors file, and back on top of the dense architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike

import torch
from torch import Tensor, nn

from ..runtime.files import read_tensors, write_tensors
from .hf_config import apply_sizes, config_sizes
from .module_sizes import can_be_cut, sizes_of

FORMAT = "greedyprune-pruned-1"


def save_pruned(model: nn.Module, path: str | PathLike[str]) -> None:
    """Writes a pruned model as one safetensors file, for `load_pruned`; no pickle.

    It holds all parameters and buffers, tied ones once, under their names in the state dict, and in
    its header, as JSON, the modules' sizes. Not kept: the modules' code, their mode, and which
    parameters require gradients.

    Args:
        model: what `prune` gave, before or after tuning; any other nn.Module will do, too
        path: the file to write

    Raises:
        TypeError: no nn.Module, or one with a state that is not in parameters and buffers
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, expected an nn.Module")
    tensors = _tensors(model)
    for name in model.state_dict():
        if name not in tensors:
            raise TypeError(f"model: found {name!r} in its state, expected parameters and buffers")
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise TypeError(f"model: {name!r} is on the meta device, expected numbers in memory")
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    header = {
        "sizes": {name: found for name, m in model.named_modules() if (found := sizes_of(m))},
        "tied": {n: first[id(t)] for n, t in tensors.items() if first[id(t)] != n},
        "config": config_sizes(model),
    }
    # A copy where one tensor is a view of another: the format has no shared memory.
    kept = {name: tensors[name].detach() for name in first.values()}
    shared = len({t.untyped_storage().data_ptr() for t in kept.values()}) < len(kept)
    write_tensors(
        path,
        {name: t.clone(memory_format=torch.contiguous_format) if shared else t
         for name, t in kept.items()},
        {"format": FORMAT} | {key: json.dumps(value) for key, value in header.items()},
    )  # fmt: skip


def load_pruned(path: str | PathLike[str], model_factory: Callable[[], nn.Module]) -> nn.Module:
    """Reads what `save_pruned` wrote into a model of the dense architecture, whose layers it cuts.

    Every parameter and buffer comes from the file, with its dtype; tensors that are tied in the
    file are tied again.

    Args:
        path: the file
        model_factory: called once, without arguments; returns the model that was pruned, with any
            weights, or made under `torch.device("meta")`, which takes no time and memory

    Returns:
        the factory's model, its tensors on the devices where they were (meta: on the CPU)

    Raises:
        FileNotFoundError: no file; ValueError: another file, or a factory of another architecture;
        TypeError: no factory

    Example:
        >>> def dense():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> inputs, targets = torch.randn(32, 4), torch.randn(32, 1)
        >>> model = dense()
        >>> small = greedyprune.prune(model, greedyprune.select(model, (inputs, targets), size=3))
        >>> greedyprune.save_pruned(small, "small.safetensors")
        >>> greedyprune.load_pruned("small.safetensors", dense)[0]
        Linear(in_features=4, out_features=3, bias=True)
    """
    if isinstance(model_factory, nn.Module) or not callable(model_factory):
        raise TypeError(
            f"model_factory: found {type(model_factory).__name__}, expected a function that "
            "returns the dense model"
        )
    tensors, header = read_tensors(path, FORMAT, "pruned model")
    try:
        sizes, tied, config = (json.loads(header[key]) for key in ("sizes", "tied", "config"))
        tensors |= {name: tensors[first] for name, first in tied.items()}
    except (KeyError, ValueError):
        raise ValueError(f"path: the header of {str(path)!r} is damaged") from None
    model = model_factory()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model_factory: found that it returns {type(model).__name__}, expected an nn.Module"
        )
    _check_same(model, sizes, tensors)
    for name, attributes in sizes.items():
        for attribute, size in attributes.items():
            setattr(model.get_submodule(name), attribute, size)
    new: dict[int, Tensor] = {}
    for name, old in _tensors(model).items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, _placed(tensors[name], old, new))
    apply_sizes(model, config)
    return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers under all of their names, also what the state dict leaves out."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _placed(tensor: Tensor, old: Tensor, known: dict[int, Tensor]) -> Tensor:
    """A tensor of the file in the place of an old one; the same one wherever it is tied."""
    if id(tensor) not in known:
        placed = tensor if old.is_meta else tensor.to(old.device)
        if isinstance(old, nn.Parameter):
            placed = nn.Parameter(placed, requires_grad=old.requires_grad)
        known[id(tensor)] = placed
    return known[id(tensor)]


def _check_same(
    model: nn.Module, sizes: dict[str, dict[str, int]], tensors: dict[str, Tensor]
) -> None:
    """ValueError unless pruning could have made the file's model of this one."""
    own, modules = _tensors(model), dict(model.named_modules())
    for name in tensors:
        if name not in own:
            raise ValueError(f"model_factory: its model lacks {name!r}, which the file has")
    for name in own:
        if name not in tensors:
            raise ValueError(f"model_factory: its model has {name!r}, which the file lacks")
    found = {name: sizes_of(module) for name, module in modules.items()}
    for name in sorted(sizes.keys() | {name for name, each in found.items() if each}):
        expected = sizes.get(name, {})
        if name not in found or found[name].keys() != expected.keys():
            kind = type(modules[name]).__name__ if name in modules else "no module"
            raise ValueError(
                f"model_factory: found {kind} at {name!r}, expected a module with "
                f"{sorted(expected) or 'no sizes'}"
            )
    for name, tensor in own.items():
        module = modules[name.rpartition(".")[0]]
        was, now = tuple(tensor.shape), tuple(tensors[name].shape)
        if len(was) != len(now) or not all(
            b == a or (b < a and can_be_cut(module, dim))
            for dim, (a, b) in enumerate(zip(was, now, strict=True))
        ):
            raise ValueError(
                f"model_factory: found {name!r} of shape {was}, expected one that pruning cuts to "
                f"the file's {now}"
            )
