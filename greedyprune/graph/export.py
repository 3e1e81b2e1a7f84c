"""Exports a model with torch.export."""

from __future__ import annotations

import inspect
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.modules import transformer
from torch.utils._pytree import tree_map

from ..runtime.threads import WhileAnyThread
from .in_place import is_overwritten
from .trace_errors import trace_error

# torch.export keeps what it does in variables of the whole process.
_ONE_AT_A_TIME = threading.RLock()


def exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool
) -> ExportedProgram:
    """The model's graph, in which no operation changes a part of a tensor that is used later.

    dynamic: may the graph serve other sizes of the inputs' dimensions, too?

    Raises TraceError for a model that torch.export can't trace.
    """
    sizes = _any_sizes(model, args, kwargs) if dynamic else None
    try:
        with _ONE_AT_A_TIME, _silent, _without_search_for_causal_masks:
            program = torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=sizes)
            if is_overwritten(program.graph):
                program = program.run_decompositions({})  # writes it with new tensors only
    except Exception as error:
        raise trace_error(model, error) from None
    return program


@WhileAnyThread
@contextmanager
def _silent() -> Iterator[None]:
    """Inside, nothing is logged: torch.export logs whole graphs when it fails.

    It also warns of attributes that the forward sets. Those of recurrent modules are as before.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The tensor attributes? .*_flat_weights\[")
            yield
    finally:
        logging.disable(disabled)


@WhileAnyThread
@contextmanager
def _without_search_for_causal_masks() -> Iterator[None]:
    """Inside, torch's transformer layers take a mask for causal only where they are told so.

    Otherwise they compare its values with those of a causal mask, which can't be traced. The answer
    decides about speed only.
    """
    name, known = "_detect_is_causal_mask", vars(transformer)
    search = known.get(name)
    try:
        if search is not None:
            known[name] = lambda mask, is_causal=None, size=None: is_causal is True
        yield
    finally:
        if search is not None:
            known[name] = search


def without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments, with those that keep a transformer's cache out of its outputs."""
    if getattr(getattr(model, "config", None), "use_cache", False):
        return {"use_cache": False} | kwargs  # a cache among the outputs is no tensor
    return kwargs


def _any_sizes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """torch.export's `dynamic_shapes` that leave all sizes of the inputs open, by parameter."""

    def open_sizes(value: Any) -> dict[int, Any] | None:
        return dict.fromkeys(range(value.dim()), Dim.AUTO) if isinstance(value, Tensor) else None

    signature = inspect.signature(model.forward)
    sizes = signature.bind(*tree_map(open_sizes, args), **tree_map(open_sizes, kwargs)).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            sizes |= sizes.pop(name, {})
    return sizes
