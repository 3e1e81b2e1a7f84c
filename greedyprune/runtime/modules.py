"""The module that an argument `model` means, or one sentence that says what to pass instead."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

SHARDS = ("DTensor", "FlatParameter")  # of FSDP2 and tensor parallelism, of FSDP
SHARDING = "FullyShardedDataParallel"  # its parameters may be views of shards
EXPORTED = "expected the nn.Module that was exported: prune that, then export the result"


def module_of(model: Any, source: str = "model: found") -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile's wrapper.

    It has the same parameters.

    source: how the errors begin

    TypeError for anything else than a module, one whose parameters are shards, and modules that
    have no Python code to run with other sizes.
    """
    while isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
            model = compiled
        else:
            break
    if not isinstance(model, nn.Module):
        raise TypeError(f"{source} {_no_module(model)}")
    for name, module in model.named_modules():
        if problem := _unfit(module):
            found = f"{name!r}, " if name else ""
            raise TypeError(f"{source} {found}{problem}")
    argument = source.partition(":")[0]
    for name, tensor in model.named_parameters():
        if type(tensor).__name__ in SHARDS or type(tensor.data).__name__ in SHARDS:
            raise TypeError(_sharded(argument, name))
    for name, module in model.named_modules():
        if type(module).__name__ == SHARDING:
            raise TypeError(_sharded(argument, name or SHARDING))
    return model


def _sharded(argument: str, name: str) -> str:
    return (
        f"{argument}: {name!r} is sharded over the ranks, expected a whole model: load "
        "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), from "
        "torch.distributed.checkpoint.state_dict, into a model that is not sharded"
    )


def _no_module(value: object) -> str:
    """What was found in the place of a module, and what was expected."""
    name, expected = type(value).__name__, "expected an nn.Module"
    if isinstance(value, type):
        instance = f": {value.__name__}(...)" if issubclass(value, nn.Module) else ""
        return f"the class {value.__name__}, {expected}{instance}"
    if isinstance(value, torch.export.ExportedProgram):
        return f"an {name}, {EXPORTED}"
    if isinstance(value, (str, PathLike)):
        return f"{name}, {expected}: load the file first"
    if isinstance(value, Mapping):
        return f"{name}, {expected}: build the model and load the state with load_state_dict"
    if isinstance(getattr(value, "__self__", None), nn.Module):
        return f"a method of {type(value.__self__).__name__}, {expected}, such as that object"  # type: ignore[attr-defined]
    for attribute in ("model", "module", "module_"):  # pipelines, trainers, engines
        if isinstance(getattr(value, attribute, None), nn.Module):
            return f"{name}, {expected}, such as its attribute {attribute!r}"
    return f"{name}, {expected}"


def _unfit(module: nn.Module) -> str:
    """Why a module cannot be pruned, whatever it computes; "" for others."""
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return (
            f"a TorchScript module ({name}), expected the nn.Module that it was made from: prune "
            "that, then script or trace the result"
        )
    home = type(module).__module__
    if home.startswith("torch.export.") or type(module).__mro__[1].__module__.startswith(
        "torch.export."
    ):
        kind = "GraphModule" if isinstance(module, fx.GraphModule) else name
        return f"the module of an exported program ({kind}), {EXPORTED}"
    return ""
