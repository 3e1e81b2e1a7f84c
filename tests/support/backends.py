"""Backends and instruction sets to run a test with, and the tolerance of each dtype."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from greedyprune.data.losses import Target
from greedyprune.kernels import backend as _backend
from greedyprune.kernels import ops
from greedyprune.kernels.path import Moments, Rule
from greedyprune.kernels.path import Path as GreedyPath

# Relative: how far a kernel computing in a dtype may be from the float64 reference. Losses are
# means over samples, so that rounding mostly cancels; this is what one sample may be off by.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}

INSTRUCTION_SETS = _backend.extension().instruction_sets() if _backend.has_extension() else []

ON_GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not _backend.has_cuda(), reason="no GPU, or built without CUDA"),
    ],
)

BACKENDS = ["cpu", "reference", "emulated", ON_GPU]


class Kernels:
    """The functions of `ops` on some device, for tensors on the CPU and with results there."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, torch.device(device)

    def few(self, rule: Rule, steps: int = 20) -> Rule:
        """The rule with fewer steps where each takes some milliseconds: emulated."""
        emulated = self.backend == "cuda" and self.device.type == "cpu"
        return replace(rule, steps=min(rule.steps, steps)) if emulated else rule

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, getattr(ops, name))

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        there = [self._there(value) for value in args]
        named = {key: self._there(value) for key, value in kwargs.items() if key != "step"}
        steps = {"step": kwargs["step"]} if "step" in kwargs else {}
        result = function(*there, **named, **steps, backend=self.backend)
        return result if isinstance(result, GreedyPath) else result.cpu()

    def _there(self, value: Any) -> Any:
        if isinstance(value, (Tensor, Target)):
            return value.to(self.device)
        if isinstance(value, Moments):
            return replace(value, norm=value.norm.to(self.device), beta=value.beta.to(self.device))
        if callable(value) and self.device.type != "cpu":  # columns(units, out)

            def columns(units: Tensor, out: Tensor) -> None:
                on_cpu = torch.empty(out.shape, dtype=out.dtype)
                value(units.cpu(), on_cpu)
                out.copy_(on_cpu)

            return columns
        return value
