"""The peak memory of `select`, in a fresh process, compared with features and Gram matrix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Bench

PROBE = Path(__file__).parent / "memory_probe.py"
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One selection. steps: None for half the units; limit: memory_limit in MiB."""

    kind: str
    N: int
    m: int
    C: int
    steps: int | None
    limit: int
    table: str = "memory"

    def __str__(self) -> str:
        steps = "half" if self.steps is None else f"{self.steps} steps"
        return f"{self.kind} N={self.N} m={self.m} C={self.C} {steps} limit={self.limit} MiB"

    @property
    def hows(self) -> list[str]:
        return ["greedyprune"]

    @property
    def features(self) -> int:
        return 4 * self.N * self.m

    @property
    def gram(self) -> int:
        """Bytes of the Gram matrix for squared error, whether or not `select` computes it."""
        return 8 * self.N**2 if self.kind == "mse" else 0


FULL = [
    Case("mse", 4096, 20_000, 1, None, 8192),
    Case("mse", 4096, 20_000, 1, 200, 8192),
    Case("mse", 8192, 20_000, 1, 200, 8192),
    Case("mse", 8192, 20_000, 1, None, 8192),
    Case("mse", 2048, 20_000, 10, 50, 8192),
    Case("cross_entropy", 4096, 20_000, 10, 5, 8192),
    Case("cross_entropy", 2048, 20_000, 10, 2, 64),
    Case("mse", 2048, 100_000, 1, 100, 200),
    Case("mse", 2048, 100_000, 1, None, 200),
]
QUICK = [
    Case("mse", 512, 4000, 1, None, 1024),
    Case("mse", 512, 4000, 1, 10, 4),
]


@pytest.mark.cases(full=FULL, quick=QUICK)
def test_memory(bench: Bench, case: Case, how: str) -> None:
    numbers = [case.N, case.m, case.C, case.steps or 0, case.limit * MIB]
    command = [sys.executable, str(PROBE), case.kind, *map(str, numbers)]
    # The probe runs with as many threads as this process.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}

    def probe() -> dict[str, Any]:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    found = bench.time(probe, lambda found: None, seconds=100.0)
    bench.note(features=case.features, gram=case.gram, limit_bytes=case.limit * MIB, **found)
