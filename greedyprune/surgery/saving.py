"""A pruned model as one safetensors file, and a model of the dense architecture cut to match it."""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.networks import tensors_of
from ..runtime.files import read_tensors, write_tensors
from ..runtime.modules import module_of
from .attention import fit_attention
from .cut import in_format_of
from .hf_config import restore, saved_configs, saved_refusal
from .module_sizes import Size, can_be_cut, note_size, sizes_of
from .recurrent import fit_recurrent

FORMAT = "greedyprune-pruned-2"


def save_pruned(model: nn.Module, path: str | PathLike[str]) -> None:
    """Writes a pruned model as one safetensors file, for `load_pruned`; it contains no pickle.

    The file has all parameters and buffers under their names, those that are not persistent, too.
    Tied tensors are stored once. Its header has the modules' sizes, as JSON. The file does not
    contain the modules' code or their mode, nor which parameters require gradients.

    Args:
        model: a model that `prune` or `refit` returned, fine-tuned or not; or any nn.Module
        path: the file to write; it replaces any file of this name once it is complete

    Raises:
        TypeError: `model` is not an nn.Module, has state that is not in parameters and buffers, or
            is on the meta device; or `path` is no path
        FileNotFoundError: the folder of `path` does not exist

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> greedyprune.save_pruned(model, "small.safetensors")
    """
    model = module_of(model)
    tensors = tensors_of(model)
    for name in model.state_dict():
        if name not in tensors:
            raise TypeError(f"model: found {name!r} in its state, expected parameters and buffers")
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise TypeError(f"model: {name!r} is on the meta device, expected numbers in memory")
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"model: {name!r} is sparse ({tensor.layout}), expected dense tensors, as the file "
                "has no others; or torch.save the whole model"
            )
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    header = {
        "sizes": {name: sizes for name, m in model.named_modules() if (sizes := sizes_of(m))},
        "tied": {n: first[id(t)] for n, t in tensors.items() if first[id(t)] != n},
        "config": saved_configs(model),
        "refusal": saved_refusal(model),
        "buffers": [name for name, _ in model.named_buffers(remove_duplicate=False)],
        "persistent": list(model.state_dict()),
    }
    untied = {name: tensors[name].detach() for name in first.values()}
    storages = {tensor.untyped_storage().data_ptr() for tensor in untied.values()}
    if len(storages) < len(untied):  # tensors share memory, which the format does not allow
        untied = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in untied.items()
        }
    entries = {key: json.dumps(value) for key, value in header.items()}
    write_tensors(path, untied, {"format": FORMAT} | entries)


def load_pruned(path: str | PathLike[str], model_factory: Callable[[], nn.Module]) -> nn.Module:
    """Reads a file from `save_pruned` into a model of the dense architecture; returns the model.

    The layers of that model are cut to the sizes in the file. Every parameter and buffer comes from
    the file, with its dtype. Tensors that are tied in the file are tied again. Buffers may have any
    shape in the file, and may be missing in that model, since a forward can make them or let them
    grow.

    Args:
        path: the file
        model_factory: a function without arguments, which is called once. It returns a model of the
            architecture that was pruned, with any weights. If it builds the model under
            `torch.device("meta")`, this takes no time and no memory

    Returns:
        the factory's model. Its tensors are on the devices that they had (CPU instead of meta)

    Raises:
        FileNotFoundError: there is no such file
        ValueError: the file is damaged or has no pruned model, or the factory's model has another
            architecture
        TypeError: `model_factory` is not a function, or does not return an nn.Module

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
        sizes, tied, config, buffers, persistent = (
            json.loads(header[key]) for key in ("sizes", "tied", "config", "buffers", "persistent")
        )
        tensors |= {name: tensors[first] for name, first in tied.items()}
    except (KeyError, ValueError):
        raise ValueError(f"path: the header of {str(path)!r} is damaged") from None
    model = module_of(model_factory(), "model_factory: it returned")
    for name, module in model.named_modules():
        for attribute in sizes.get(name, {}):
            if attribute in vars(module):
                note_size(module, attribute)
    _check_architecture(model, sizes, tensors, set(buffers))
    for name, attributes in sizes.items():
        for attribute, size in attributes.items():
            module = model.get_submodule(name)
            dense: Any = getattr(module, attribute)
            value: Any = size
            if isinstance(size, list):
                is_plain = type(dense) in (list, torch.Size)
                value = type(dense)(size) if is_plain else tuple(size)
                value = dense if value == dense else value  # a named tuple stays one
            setattr(module, attribute, value)
    _fill(model, tensors, set(persistent))
    fit_attention(model)
    fit_recurrent(model)
    restore(model, config, json.loads(header.get("refusal", "null")))
    return model


def _fill(model: nn.Module, tensors: dict[str, Tensor], persistent: set[str]) -> None:
    """Gives the model the file's tensors; buffers that it lacks are registered."""
    dense, placed = tensors_of(model), dict[int, Tensor]()
    device = next((tensor.device for tensor in dense.values() if not tensor.is_meta), None)
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if name in dense:
            setattr(module, attribute, _placed(tensor, dense[name], placed))
        else:
            if attribute in vars(module):  # None, say, until a forward makes the buffer
                delattr(module, attribute)
            module.register_buffer(attribute, tensor.to(device), persistent=name in persistent)


def _placed(tensor: Tensor, dense: Tensor, placed: dict[int, Tensor]) -> Tensor:
    """A tensor of the file, as the parameter or buffer that replaces the dense model's tensor.

    placed: by the identity of the file's tensors: their replacements so far, for tied tensors
    """
    if id(tensor) not in placed:
        if dense.is_meta:
            new = tensor
            if isinstance(dense, nn.Parameter):
                new = nn.Parameter(new, requires_grad=dense.requires_grad)
        else:
            new, dense.grad = dense, None  # the same object: functions that hold it use the new one
            with torch.inference_mode(False), torch.no_grad():
                new.data = in_format_of(dense, tensor.to(dense.device))
        placed[id(tensor)] = new
    return placed[id(tensor)]


def _check_architecture(
    model: nn.Module, sizes: dict[str, dict[str, Size]], tensors: dict[str, Tensor],
    buffers: set[str],
) -> None:  # fmt: skip
    """ValueError unless pruning could have made the file's model of this one."""
    dense = tensors_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in tensors:
        is_added = name in buffers and name.rpartition(".")[0] in modules
        if name not in dense and not is_added:
            raise ValueError(f"model_factory: its model lacks {name!r}, which the file has")
    for name in dense:
        if name not in tensors:
            raise ValueError(f"model_factory: its model has {name!r}, which the file lacks")
    dense_sizes = {
        name: module_sizes
        for name, module in model.named_modules() if (module_sizes := sizes_of(module))
    }  # fmt: skip
    for name in sorted(sizes.keys() | dense_sizes.keys()):
        attributes = sizes.get(name, {}).keys()
        if name not in modules or dense_sizes.get(name, {}).keys() != attributes:
            kind = type(modules[name]).__name__ if name in modules else "no module"
            raise ValueError(
                f"model_factory: found {kind} at {name!r}, expected a module with "
                f"{sorted(attributes) or 'no sizes'}"
            )
    for name, tensor in dense.items():
        module = modules[name.rpartition(".")[0]]
        if name in buffers and not type(module).__module__.startswith("torch."):
            continue  # a forward may give it any shape
        before, after = tuple(tensor.shape), tuple(tensors[name].shape)
        if len(before) != len(after) or not all(
            size == full or (size < full and can_be_cut(module, dim))
            for dim, (full, size) in enumerate(zip(before, after, strict=True))
        ):
            raise ValueError(
                f"model_factory: found {name!r} of shape {before}, expected one that pruning cuts "
                f"to the file's {after}"
            )
    for name, module_sizes in dense_sizes.items():
        for attribute, size in sizes[name].items():
            full_size = module_sizes[attribute]
            if isinstance(size, int) and isinstance(full_size, int) and size > full_size:
                raise ValueError(
                    f"model_factory: found {type(modules[name]).__name__} at {name!r} with "
                    f"{attribute}={full_size}, expected a module with at least {size}"
                )
