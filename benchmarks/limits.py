"""The limits of this machine, measured in the same run as the benchmarks."""

from __future__ import annotations

import ctypes
import math
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).parent / "exp_throughput.cpp"
COMPILE = ["c++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]


@dataclass(frozen=True)
class Limits:
    """Rates with all threads, each the best of several tries.

    exponentials: float32 exponentials per second, of data in the cache
    exponentials_by: the code that was fastest
    bandwidth: bytes per second that a large copy reads and writes
    gemm: float32 operations per second of a large matrix product
    """

    exponentials: float
    exponentials_by: str
    bandwidth: float
    gemm: float


@dataclass(frozen=True)
class Floor:
    """A lower bound on the seconds of every method, and the limit that it comes from."""

    seconds: float
    limit: str


def measure(quick: bool) -> Limits:
    exponentials, by = exp_rate(quick)
    return Limits(exponentials, by, copy_bandwidth(quick), gemm_rate(quick))


def exp_rate(quick: bool) -> tuple[float, str]:
    """Exponentials per second, and the fastest code: one of two C++ loops or torch.exp."""
    repeats = 200 if quick else 20_000
    rates = {"torch.exp": _torch_exp_rate(repeats // 10)}
    library = _compiled()
    if library is not None:
        for scaling, name in ((0, "a loop on vectors"), (1, "a loop with scalef")):
            rates[name] = _loop_rate(library, scaling, repeats)
    best = max(rates, key=lambda name: rates[name])
    return rates[best], best


def copy_bandwidth(quick: bool) -> float:
    source = torch.ones(2**22 if quick else 2**26)  # larger than any cache, unless quick
    target = torch.zeros_like(source)
    return 2 * source.nbytes / best_time(lambda: target.copy_(source))


def gemm_rate(quick: bool) -> float:
    rows, inner, columns = (128, 512, 512) if quick else (1024, 4096, 8192)
    a, b, out = torch.rand(rows, inner), torch.rand(inner, columns), torch.zeros(rows, columns)
    return 2 * rows * inner * columns / best_time(lambda: torch.mm(a, b, out=out))


def best_time(work: Callable[[], object], tries: int = 7) -> float:
    """The seconds of the fastest of several runs, after a warm-up run."""
    work()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def candidates_floor(kind: str, m: int, n: int, c: int, limits: Limits) -> Floor:
    """The candidates of one step: every feature is read, and every logit is exponentiated."""
    reading = Floor(4 * m * n / limits.bandwidth, "bandwidth")
    if kind == "mse":
        return reading
    exponentials = Floor(m * n * c / limits.exponentials, "exponentials")
    return max(reading, exponentials, key=lambda floor: floor.seconds)


def steps_floor(m: int, n: int, c: int, steps: int, scored: int, limits: Limits) -> Floor:
    """Greedy steps by the losses: each reads the features for the gap, and scores candidates."""
    reading = steps * 4 * m * n / limits.bandwidth
    return Floor(reading + scored * m * c / limits.exponentials, "bandwidth, then exponentials")


def gram_floor(m: int, n: int, limits: Limits) -> Floor:
    """A Gram matrix: half the multiplications of a full product, by symmetry."""
    return Floor(n * n * m / limits.gemm, "GEMM")


def _torch_exp_rate(repeats: int) -> float:
    x = torch.rand(2**17) * 20 - 10  # 1 MiB with the results: fits the second-level caches
    out = torch.empty_like(x)

    def work() -> None:
        for _ in range(repeats):
            torch.exp(x, out=out)

    return repeats * len(x) / best_time(work)


def _loop_rate(library: ctypes.CDLL, scaling: int, repeats: int) -> float:
    x = _aligned(4096).uniform_(-10, 10)  # 16 KiB: fits the first-level cache
    threads = torch.get_num_threads()
    found = 0.0

    def work() -> None:
        nonlocal found
        found = library.sum_of_powers(scaling, x.data_ptr(), len(x), repeats, threads)

    seconds = best_time(work)
    expected = repeats * threads * float(x.double().exp2().sum())
    assert math.isclose(found, expected, rel_tol=1e-5), (found, expected)
    return repeats * threads * len(x) / seconds


def _aligned(n: int) -> Tensor:
    """n floats; the first one is at a multiple of 64 bytes."""
    whole = torch.empty(n + 16)
    return whole[-(whole.data_ptr() // 4) % 16 :][:n]


def _compiled() -> ctypes.CDLL | None:
    """The C++ loops; None where they cannot be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exp_throughput.so"
        try:
            subprocess.run([*COMPILE, "-o", path, SOURCE], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        library = ctypes.CDLL(str(path))  # stays loaded when the file is deleted
    library.sum_of_powers.restype = ctypes.c_double
    library.sum_of_powers.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int,
    ]  # fmt: skip
    return library
