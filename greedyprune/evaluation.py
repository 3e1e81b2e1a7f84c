"""How a model is left while it is looked at: in eval mode, and then as it was. Bars, warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

BAR_DELAY = 2.0  # seconds before a progress bar shows


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast; afterwards modes, buffers and RNG are as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next((t.device.type for t in model.parameters()), "cpu")
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        model.eval()
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices),
            torch.autocast(device, enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)
        for module, training in modes.items():
            module.training = training


def alike(expected: Tensor, found: Tensor) -> bool:
    """Are two floating outputs the same but for rounding?"""
    rounding = 0.02 if torch.finfo(expected.dtype).bits == 16 else 1e-4
    return expected.shape == found.shape and (
        float((found - expected).abs().max()) <= rounding * (float(expected.abs().max()) or 1.0)
    )


def bars(progress: bool | None) -> Callable[..., Any]:
    def bar(source: Iterable[Any] | None = None, desc: str = "", total: int | None = None) -> Any:
        if total is None and source is not None:
            total = len(source) or None  # type: ignore[arg-type]
        return tqdm(
            source, desc=desc, total=total, delay=BAR_DELAY, leave=False,
            disable=progress is False,
        )  # fmt: skip

    return bar


def warn(message: str) -> None:
    """A UserWarning at the line that called this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(f"{__package__}."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
