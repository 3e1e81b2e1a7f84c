"""What torch.export says of a model that it can't trace, as one sentence with the model's line."""

from __future__ import annotations

import linecache
import os
import sysconfig
from pathlib import Path
from traceback import walk_tb
from types import FrameType

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

LONGEST = 300  # characters of torch.export's own message

_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]


class TraceError(ValueError):
    """A ValueError: torch.export can't trace the model. The message says where in the model."""


def trace_error(model: nn.Module, error: Exception) -> TraceError:
    """The error to raise in the place of torch.export's own."""
    for name, module in model.named_modules():
        if hasattr(module, "_packed_params") and not isinstance(module, nn.RNNBase):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            reason = f"{name!r} is quantised, {kind}: prune first, then quantise"
            return TraceError(f"model: torch.export can't trace it ({reason})")
    if any(_packs(frame) for frame, _ in walk_tb(error.__traceback__)):
        reason = f"it runs on packed sequences{place_of(model, error)}; expected padded ones"
        return TraceError(f"model: torch.export can't trace it ({reason})")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0][:LONGEST].rstrip(".") if lines else type(error).__name__
    return TraceError(f"model: torch.export can't trace it ({reason}{place_of(model, error)})")


def _packs(frame: FrameType) -> bool:
    """Does a frame pack sequences, or run a recurrent module on packed ones?"""
    packs = frame.f_code.co_name in ("pack_padded_sequence", "pad_packed_sequence")
    return packs or isinstance(frame.f_locals.get("orig_input"), PackedSequence)


def place_of(model: nn.Module, error: BaseException) -> str:
    """The innermost module and the line of the model's code that an error passed through.

    As the end of a sentence: ", in 'encoder' (Encoder), net.py line 12: if x.sum() > 0:". Empty
    where the error passed through neither.
    """
    names = {id(module): name for name, module in model.named_modules()}
    module, line = "", ""
    for frame, number in walk_tb(error.__traceback__):
        running = frame.f_locals.get("self")
        if isinstance(running, nn.Module) and id(running) in names:
            name = names[id(running)]
            module = f", in {name!r} ({type(running).__name__})" if name else ", in the model"
        if _is_model_code(frame):
            file, code = (
                frame.f_code.co_filename,
                linecache.getline(frame.f_code.co_filename, number),
            )
            line = f", {os.path.basename(file)} line {number}: {code.strip()}"
    return module + line


def _is_model_code(frame: FrameType) -> bool:
    """Is this frame neither torch's, this package's nor the standard library's?"""
    file = frame.f_code.co_filename
    if file.startswith("<") or file.startswith(_NOT_THE_MODEL):
        return False
    return not file.startswith(_STANDARD_LIBRARY) or "site-packages" in file
