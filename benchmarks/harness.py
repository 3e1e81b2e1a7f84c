"""What the benchmarks share: how often each one runs, and what it records for the report."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import baselines
import psutil
import pytest
import torch
from baselines import Layer
from limits import Limits
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import greedyprune
from greedyprune.kernels import backend as _backend

T = TypeVar("T")
BUDGET = 2.0  # seconds, approximately, for all rounds of one benchmark
LONG = 3.0  # seconds: work that takes longer is timed once
TOO_LONG = 12.0  # seconds: a baseline that takes longer is left out


@dataclass
class Notes:
    """What a whole run records besides the times."""

    quick: bool
    limits: Limits | None = None
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        limits = None if self.limits is None else asdict(self.limits)
        return {"quick": self.quick, "limits": limits, "skipped": self.skipped}


class Bench:
    """Times one way (`how`) to compute one case: a dataclass with the name of its table."""

    def __init__(self, benchmark: BenchmarkFixture, notes: Notes, case: Any, how: str) -> None:
        self._benchmark, self._notes = benchmark, notes
        self.quick = notes.quick
        self._about = {"table": case.table, "name": str(case), "case": asdict(case), "how": how}
        benchmark.group = f"{case.table}: {case}"
        benchmark.extra_info |= self._about

    def note(self, **info: Any) -> None:
        """Records values for the report; JSON has to be able to hold them."""
        self._benchmark.extra_info |= info

    def skip(self, reason: str) -> NoReturn:
        self._notes.skipped.append(self._about | {"reason": reason})
        pytest.skip(reason)

    def skip_if_long(self, seconds: float, limit: float = TOO_LONG) -> None:
        if seconds > limit:
            self.skip(f"one run would take about {seconds:.0f} s")

    def time(self, work: Callable[[], T], check: Callable[[T], object], seconds: float = 0.0) -> T:
        """Checks the answer, then times the work; returns the last answer, which is checked, too.

        seconds: how long one run takes, if that is known. Long work has no run before the timing.
        """
        if seconds <= LONG:
            result, seconds = clocked(work)
            check(result)
        rounds = max(1 if seconds > LONG else 3, min(50, int(BUDGET / max(seconds, 1e-9))))
        result = self._benchmark.pedantic(work, rounds=1 if self.quick else rounds)
        check(result)
        return result


def clocked(work: Callable[[], T]) -> tuple[T, float]:
    """The answer, and how long it took, in seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def predicted(work: Callable[[int], object], units: int) -> float:
    """The expected seconds of `work` for this many units, from a run on a few of them."""
    some = min(units, 4)
    work(some)
    while True:
        _, seconds = clocked(lambda n=some: work(n))  # type: ignore[misc]
        if seconds > 0.02 or some == units:
            return seconds * units / some
        some = min(units, 4 * some)


def time_vectorised(
    bench: Bench, layer: Layer, order: Tensor, steps: int, before: float = 0.0
) -> None:
    """Times a few steps of the vectorised baseline in its fastest form, to extrapolate from.

    order: our picks; before: the seconds that computing the features takes
    """
    form = baselines.best_form(layer.candidates(layer.nothing(), 1))
    timed = min(2, steps)
    _, seconds = clocked(lambda: baselines.greedy_vectorised(layer, 1, form))
    bench.note(chunk=form.chunk, layout=form.layout, timed=timed, steps=steps, before=before)
    bench.skip_if_long(timed * seconds, 5 * TOO_LONG)  # the report extrapolates from these steps
    bench.time(
        lambda: baselines.greedy_vectorised(layer, timed, form),
        lambda found: bench.note(same_picks=baselines.same_picks(layer, found, order)),
        10 * seconds,
    )


def machine() -> dict[str, str]:
    """The hardware and versions that the results depend on."""
    extension = _backend.extension()
    gigabytes = psutil.virtual_memory().total / 2**30
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads used",
        "instruction set": extension.active_instruction_set(),
        "memory": f"{gigabytes:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "greedyprune": f"{greedyprune.__version__}, compiled with {extension.compiler}",
    }


def _processor() -> str:
    """The processor's name: from a file on Linux, where platform.processor() is often empty."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
