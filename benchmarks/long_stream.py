"""A generated stream of 50 million rows through a layer of 4096 units: does memory stay flat?

    python benchmarks/long_stream.py [--rows 50000000] [--units 4096] [--checkpoint FOLDER]

One pass, squared error, 200 greedy steps. Prints the rows so far and the resident bytes of the
process, and appends both to OUT/long_stream.csv. With --checkpoint the same command resumes after
an interruption; the rows are generated from their numbers.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

import greedyprune

BATCH, INPUTS, OUTPUTS = 8192, 64, 8
SECONDS = 20.0  # between two measurements of the memory


class Stream:
    """Batches of inputs and targets, without a length; measures the memory on the way."""

    def __init__(self, rows: int, out: Path) -> None:
        self._rows, self._out = rows, out
        self.seen: list[tuple[int, int]] = []
        torch.manual_seed(0)
        self._teacher = nn.Sequential(nn.Linear(INPUTS, 64), nn.Tanh(), nn.Linear(64, OUTPUTS))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        begun = looked = time.monotonic()
        for first in range(0, self._rows, BATCH):
            rng = torch.Generator().manual_seed(first)
            inputs = torch.randn(min(BATCH, self._rows - first), INPUTS, generator=rng)
            with torch.no_grad():
                yield inputs, self._teacher(inputs)
            if time.monotonic() - looked > SECONDS or first + BATCH >= self._rows:
                looked = time.monotonic()
                self._look(first + len(inputs), looked - begun)

    def _look(self, rows: int, seconds: float) -> None:
        held = psutil.Process().memory_info().rss
        self.seen.append((rows, held))
        print(f"{rows:>12,} rows  {held / 2**20:8.1f} MiB  {seconds:8.0f} s", flush=True)
        with self._out.open("a", newline="") as file:
            csv.writer(file).writerow([rows, held, round(seconds, 1)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--units", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    stream = Stream(args.rows, args.out / "long_stream.csv")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(INPUTS, args.units), nn.ReLU(), nn.Linear(args.units, OUTPUTS))
    begun = time.monotonic()
    selection = greedyprune.select(
        model, iter(stream), steps=args.steps, memory_limit=2**30, progress=False,
        checkpoint=args.checkpoint,
    )  # fmt: skip
    held = [
        each for rows, each in stream.seen if rows > args.rows // 50
    ]  # after all has been allocated
    print(
        f"{args.rows:,} rows, {len(selection.kept)} units kept, {time.monotonic() - begun:.0f} s; "
        f"between {min(held) / 2**20:.1f} and {max(held) / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
