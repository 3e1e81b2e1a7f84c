"""The time of `select` on several processes: predictions of a model, and measurements.

    python benchmarks/ranks.py            # measures 1, 2 and 4 processes of one thread each
    python benchmarks/ranks.py --predict  # only predicts, for 1 to 1024 GPUs

docs/scaling.md explains the model and has both tables.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import distributed, multiprocessing, nn

import greedyprune
from greedyprune.data.losses import Criterion
from greedyprune.kernels import ops
from greedyprune.objectives.output_loss import COLUMNS_PER_PICK, THIN_RATE, columns_are_cheaper
from greedyprune.runtime.distributed import PANEL_ROWS, Ranks

BATCH = 512  # samples per forward pass
EXCHANGES = 200


@dataclass(frozen=True)
class Machine:
    """The rates of one rank, per second.

    backend: "cpu" or "cuda"
    forward: operations in the matrix products of a forward pass
    products: operations in the matrix products of a Gram matrix: in float32 on a CPU, where the
        features then decide near ties; in float64 on a GPU
    pairs: terms of cross-entropy, one for each candidate, sample and output
    bytes: bytes per rank that a ring of ranks sums, however many ranks there are
    latency: seconds for two ranks to exchange some 4000 numbers; grows with log2 of the ranks
    memory: bytes
    """

    backend: str
    forward: float
    products: float
    pairs: float
    bytes: float
    latency: float
    memory: float

    def sum(self, size: float, ranks: int) -> float:
        """The seconds to sum `size` bytes over the ranks."""
        if ranks == 1:
            return 0.0
        steps = max(1.0, math.log2(ranks))
        return self.latency * steps + 2 * (ranks - 1) / ranks * size / self.bytes


@dataclass(frozen=True)
class Work:
    """Selecting from one hidden layer: N units, D inputs, C outputs, m samples, k steps."""

    loss: str
    samples: int
    units: int
    outputs: int
    inputs: int
    steps: int

    def columns(self, machine: Machine, ranks: int) -> bool:
        """Does `select` compute only the columns of the Gram matrix that it needs?"""
        fits = 4.0 * self.units * self.samples / ranks <= machine.memory / 2
        return fits and columns_are_cheaper(self.units, self.steps, machine.backend)

    def seconds(self, machine: Machine, ranks: int) -> dict[str, float]:
        m, n, cpu = self.samples / ranks, self.units, machine.backend == "cpu"
        found = {"forward": 2 * m * n * (self.inputs + self.outputs) / machine.forward}
        if self.loss == "mse" and self.columns(machine, ranks):
            columns, block = COLUMNS_PER_PICK[machine.backend] * self.steps, 16 if cpu else 64
            found["products"] = 2 * m * n * columns / machine.products / THIN_RATE
            found["sums"] = columns / block * 2 * machine.sum(4.0 * n * block, ranks)
            if cpu:  # near ties that float32 cannot decide, the loss and the gap
                found["sums"] += self.steps * 1.2 * machine.sum(0.0, ranks)
        elif self.loss == "mse":
            found["products"] = m * n * n / machine.products
            found["sums"] = (n / PANEL_ROWS) * machine.sum(0.0, ranks) + machine.sum(
                4.0 * n * n, ranks
            )
        else:
            found["candidates"] = self.steps * m * n * self.outputs / machine.pairs
            found["slopes"] = self.steps * 2 * m * n * self.outputs / machine.products
            exchanges = 4 if cpu else 3
            found["sums"] = self.steps * exchanges * machine.sum(16.0 * n, ranks)
        return found

    def memory(self, machine: Machine, ranks: int) -> float:
        """Bytes per rank: the features of its samples, or the Gram matrix and one batch."""
        if self.loss == "mse" and not self.columns(machine, ranks):
            return 8.0 * self.units**2 + 4.0 * self.units * BATCH
        return 4.0 * self.units * self.samples / ranks


# From data sheets, not measured. Matrix products run at about 80 % of the peak: float32 on plain
# cores, float64 on tensor cores. Candidates in float64 run at a tenth of the float32 rate in
# NOTES.md. The link has 400 Gb/s.
H100 = Machine("cuda", 50e12, 50e12, 2.5e11, 40e9, 40e-6, 80e9)
WORKS = [
    Work("mse", 60_000, 10_000, 1, 784, 200),
    Work("mse", 1_000_000_000, 10_000, 10, 1024, 200),
    Work("cross_entropy", 60_000, 10_000, 10, 784, 200),
    Work("cross_entropy", 10_000_000, 10_000, 100, 1024, 200),
]
HERE = [
    Work("mse", 60_000, 2048, 10, 784, 100),
    Work("cross_entropy", 60_000, 2048, 10, 784, 50),
]


def best(work: Callable[[], object], tries: int = 5) -> float:
    times = []
    for _ in range(tries):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def machine_here(ranks: Ranks) -> Machine:
    """The measured rates of one rank while the other ranks compute, too."""
    single = torch.rand(2048, 2048)
    features, outgoing = torch.rand(1024, 1024), torch.rand(1024, 10, dtype=torch.float64)
    outputs = torch.rand(10, 1024, dtype=torch.float64)
    target = Criterion("cross_entropy").target(torch.arange(1024) % 10, (1024, 10))
    large, small = torch.rand(2**22, dtype=torch.float64), torch.zeros(4096, dtype=torch.float64)

    def candidates() -> None:
        errors = torch.zeros(1024, dtype=torch.float64)
        ops.candidate_loss(features, outgoing, outputs, target, dtype=torch.float32, errors=errors)

    moved = best(lambda: ranks.sum("large", large))
    with ranks.loop(len(small)):
        begun = time.perf_counter()
        for _ in range(EXCHANGES):  # a mean: some take ten times as long as others
            ranks.sum("small", small)
        latency = (time.perf_counter() - begun) / EXCHANGES
    rate = 2 * 2048**3 / best(lambda: single @ single)
    bandwidth = 2 * (ranks.size - 1) / ranks.size * large.nbytes / moved
    return Machine(
        "cpu", rate, rate, 1024 * 1024 * 10 / best(candidates),
        bandwidth if ranks.size > 1 else math.inf, latency / max(1.0, math.log2(ranks.size)), 16e9,
    )  # fmt: skip


def seconds_of(work: Work, ranks: Ranks) -> float:
    """The seconds of a whole `select`, with tracing and forward passes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(work.inputs, work.units), nn.ReLU(), nn.Linear(work.units, work.outputs)
    )

    def run(samples: int) -> float:
        rng = torch.Generator().manual_seed(ranks.rank)
        own = samples // ranks.size
        inputs = torch.rand(own, work.inputs, generator=rng)
        targets: Any = inputs[:, : work.outputs].argmax(1)
        if work.loss == "mse":
            targets = inputs[:, : work.outputs].contiguous()
        begun = time.perf_counter()
        greedyprune.select(
            model, (inputs, targets), steps=work.steps, loss=work.loss, progress=False
        )
        return time.perf_counter() - begun

    run(8 * ranks.size)  # a warm-up: the first call takes longer
    return run(work.samples)


def rank_of_many(rank: int, size: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    if size > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
            timeout=datetime.timedelta(minutes=30),
        )  # fmt: skip
    ranks = Ranks(distributed.group.WORLD if size > 1 else None)
    machine = machine_here(ranks)
    found = [seconds_of(work, ranks) for work in HERE]
    if rank == 0:
        results.put((machine, found))


def measured(size: int) -> tuple[Machine, list[float]]:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=rank_of_many, args=(rank, size, store, results))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise SystemExit(f"a process ended with {process.exitcode}")
    found: tuple[Machine, list[float]] = results.get()
    return found


def measure() -> None:
    rates = Table(title="a rank's rates", box=SIMPLE_HEAD)
    for column in ("ranks", "products", "pairs", "sum", "latency"):
        rates.add_column(column, justify="right")
    times = Table(title="select, s", box=SIMPLE_HEAD)
    for column in ("work", "ranks", "measured", "predicted", "ratio", "of which sums", "speed-up"):
        times.add_column(column, justify="left" if column == "work" else "right")
    ones: list[float] = []
    for size in (1, 2, 4):
        machine, found = measured(size)
        ones = ones or found
        rates.add_row(
            f"{size}", f"{machine.products / 1e9:.0f} GFLOP/s", f"{machine.pairs / 1e9:.2f} G/s",
            f"{machine.bytes / 1e9:.2f} GB/s", f"{machine.latency * 1e6:.0f} us",
        )  # fmt: skip
        for work, seconds, one in zip(HERE, found, ones, strict=True):
            parts = work.seconds(machine, size)
            predicted = sum(parts.values())
            times.add_row(
                work.loss, f"{size}", f"{seconds:.2f}", f"{predicted:.2f}",
                f"{seconds / predicted:.2f}", f"{parts['sums']:.2f}", f"{one / seconds:.2f}",
            )  # fmt: skip
    rich.print(rates, times, f"{os.cpu_count()} processors")


def predict() -> None:
    for work in WORKS:
        table = Table(
            title=f"{work.loss}: N = {work.units:,}, m = {work.samples:,}, C = {work.outputs}, "
            f"k = {work.steps}, H100, a model", box=SIMPLE_HEAD,
        )  # fmt: skip
        parts = list(work.seconds(H100, 1))
        for column in ("GPUs", *parts, "together", "GB a GPU"):
            table.add_column(column, justify="right")
        for ranks in (1, 8, 64, 1024):
            found = work.seconds(H100, ranks)
            table.add_row(
                f"{ranks}", *(f"{found[part]:.3g} s" for part in parts),
                f"{sum(found.values()):.3g} s", f"{work.memory(H100, ranks) / 1e9:.3g}",
            )  # fmt: skip
        rich.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predict", action="store_true", help="the model for GPUs")
    if parser.parse_args().predict:
        predict()
    else:
        measure()
