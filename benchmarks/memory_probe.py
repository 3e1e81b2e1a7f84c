"""Measures how much one `select` adds to the resident memory; test_memory.py runs it.

    python memory_probe.py KIND N m C STEPS MEMORY_LIMIT    (STEPS 0: half the units)

Prints one line of JSON. What is there before `select` does not count: the data, the model, and the
modules that the first `select` of a process imports (a small selection runs first).
"""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import greedyprune

STATUS = Path("/proc/self/status")
INPUTS = 64  # numbers per sample: few, so that the activations of the units dominate


def problem(kind: str, units: int, samples: int, outputs: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, units), nn.ReLU(), nn.Linear(units, outputs))
    inputs = torch.empty(samples, INPUTS).normal_()
    targets: Tensor = torch.empty(samples, outputs).normal_()
    if kind == "cross_entropy":
        targets = torch.empty(samples, dtype=torch.int64).random_(outputs)
    return model, (inputs, targets)


def peak_bytes() -> int:
    """The peak of the resident memory since the last reset, or since the start of the process."""
    if STATUS.is_file():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    # No reset is possible here, and some systems include the peak of the parent process.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    kind = sys.argv[1]
    units, samples, outputs, steps, limit = map(int, sys.argv[2:])
    options: dict[str, Any] = {"size": 0.5} if steps == 0 else {"steps": steps}
    tiny_model, tiny_data = problem(kind, 16, 64, outputs)
    greedyprune.select(tiny_model, tiny_data, steps=2, progress=False)
    model, data = problem(kind, units, samples, outputs)
    gc.collect()
    reset_peak()
    before = psutil.Process().memory_info().rss
    highest = peak_bytes()  # where it is above `before`, the result is only an upper bound
    greedyprune.select(model, data, memory_limit=limit, progress=False, **options)
    print(json.dumps({"grown": peak_bytes() - before, "uncertain": max(0, highest - before)}))
