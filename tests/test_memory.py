"""What is said to be needed is what is taken: the peak of a process that has nothing else to do."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Team
from torch import Tensor, nn

import greedyprune
from greedyprune import Imitation, Loss
from greedyprune.graph.executor import GraphExecutor
from greedyprune.kernels.products import FLOAT64_ENTRIES
from greedyprune.objectives import memory

UNITS = 3200  # a matrix of them takes 82 MB
BATCH = 32
# Beside what is counted: what libraries keep, and a batch.
SLACK = 3 * 2**24 + 5 * BATCH * UNITS * 4
MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
pytestmark = [
    pytest.mark.skipif(not RESET.exists(), reason="the system has no peak to reset"),
    pytest.mark.xdist_group("processes"),
]


def one_layer(units: int = UNITS, outputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(32, units), nn.ReLU(), nn.Linear(units, outputs))


def two_layers() -> nn.Module:
    return nn.Sequential(
        nn.Linear(32, UNITS), nn.ReLU(), nn.Linear(UNITS, UNITS), nn.ReLU(), nn.Linear(UNITS, 10)
    )


def two_consumers() -> nn.Module:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(32, UNITS // 2)
            self.first = nn.Linear(UNITS // 2, 10)
            self.second = nn.Linear(UNITS // 2, 10)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.inside(inputs).relu()
            return torch.cat([self.first(hidden), self.second(hidden)], 1)

    return Two()


def apart(swaps: int | None = None) -> dict[str, Any]:
    """All layers imitate, from one pass through the dense network."""
    return {"objective": Imitation(swaps=swaps, sequential=False)}


def in_sequence(swaps: int | None = None) -> dict[str, Any]:
    return {"objective": Imitation(swaps=swaps)}


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "least squares": (one_layer, {"size": 0.5, **apart(swaps=0)}),
    "least squares, all units": (one_layer, {"size": 1.0, **apart(swaps=0)}),
    "exchanges": (one_layer, {"size": 0.5, **apart(swaps=3)}),
    "exchanges from both sides": (lambda: one_layer(2304), {"size": 0.5, **apart(swaps=3)}),
    "counts, many outputs": (
        lambda: one_layer(1000, 9000), {"steps": 50, "weights": "counts", **apart()}
    ),
    "counts": (one_layer, {"steps": 50, "weights": "counts", **apart()}),
    "as they are": (one_layer, {"size": 0.5, "weights": "none", **apart()}),
    "in sequence": (two_layers, {"size": 0.3, **in_sequence(swaps=0)}),
    "two consumers": (two_consumers, {"size": 0.5, **in_sequence(swaps=0)}),
    "two consumers, exchanges": (two_consumers, {"size": 0.5, **in_sequence(swaps=3)}),
    "one after the other": (two_layers, {"size": 0.3, **apart(swaps=0)}),
    "gates": (two_layers, {"size": 0.3, "tolerance": 0.0, "objective": "fisher"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def process() -> Iterator[Team]:
    team = Team(1)
    team.results(1, give_back_at_once)
    yield team
    team.close()


def give_back_at_once(_: int) -> None:
    """Larger arrays get pages of their own, which go back to the system when they are freed.

    By default, malloc takes them from its heap once some have been freed. Then the heap keeps
    holes, of some 20 MB, which differ from run to run.
    """
    assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**17)


# Half a minute each.
LONG = {"least squares, all units", "exchanges from both sides", "in sequence",
        "one after the other", "two consumers, exchanges"}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in CASES],
)
def test_what_sums_need(process: Team, name: str) -> None:
    [[needed, taken]] = process.results(1, measured, name)
    assert needed / 2 < taken < needed + SLACK


def test_the_gram_matrix_needs_its_own(process: Team) -> None:
    """In one pass over more data than would fit."""
    limit = int(1.1 * 8 * UNITS**2)
    [taken] = process.results(1, streamed, limit)
    assert 8 * UNITS**2 < taken < limit + SLACK


def test_targets_are_in_the_limit(process: Team) -> None:
    """With squared error's work they are 160 times the features here: 960 MB."""
    limit = 40 * 2**20
    [taken] = process.results(1, many_targets, limit)
    assert taken < limit + SLACK + 8 * FLOAT64_ENTRIES


def many_targets(_: int, limit: int) -> int:
    torch.manual_seed(0)
    inputs, numbers = torch.randn(24_000, 8), torch.randn(24_000, 1).expand(-1, 1000)
    batches = list(zip(inputs.split(64), numbers.split(64), strict=True))
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1000))
    greedyprune.select(model, batches[:2], steps=2)  # what is loaded first
    return peak(lambda: greedyprune.select(model, batches, steps=2, memory_limit=limit))


@pytest.mark.parametrize(
    ("limit", "options"),
    [(9 * 2**21, {"size": 0.25, **in_sequence(swaps=0)}),
     (2**23, {"size": 1, "objective": Loss(candidates=2)})],
)  # fmt: skip
def test_values_between_layers_are_in_the_limit(
    process: Team, limit: int, options: dict[str, Any]
) -> None:
    """Behind the wider layer they take 15 MB, in each of both networks that imitation has."""
    [(much, little)] = process.results(1, values_alive, limit, options)
    assert little[0] < limit + 2**21 < much[0]
    assert little[1] == much[1]


def values_alive(
    _: int, limit: int, options: dict[str, Any]
) -> list[tuple[int, dict[str, list[int]]]]:
    """With much memory and with little: the most bytes of tensors at once, and the picks."""
    torch.manual_seed(0)
    inputs = torch.randn(4800, 8)
    batches = list(zip(inputs.split(200), inputs.split(200), strict=True))
    model = nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 800), nn.ReLU(), nn.Linear(800, 8), nn.ReLU(),
        nn.Linear(8, 8),
    )  # fmt: skip
    run, calls, most = GraphExecutor.run, 0, 0

    def watched(self: GraphExecutor, *args: Any) -> None:
        nonlocal calls, most
        calls += 1
        most = most if calls % 12 else max(most, bytes_alive())
        run(self, *args)

    before, results = bytes_alive(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphExecutor, "run", watched)
        for memory_limit in (2**30, limit):
            most = 0
            selection = greedyprune.select(
                model, batches, layers=["0", "2"], memory_limit=memory_limit, progress=False,
                **options,
            )  # fmt: skip
            picks = {name: layer.order.tolist() for name, layer in selection.layers.items()}
            results.append((most - before, picks))
    return results


def bytes_alive() -> int:
    """Of all tensors; the process's size says less, as its heap has holes between small ones."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) is Tensor
    }
    return sum(storages.values())


def data(samples: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    inputs = torch.randn(samples, 32)
    return list(zip(inputs.split(BATCH), inputs[:, :10].argmax(1).split(BATCH), strict=True))


def peak(work: Callable[[], Any]) -> int:
    """How much memory it takes at once beside what was there."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be taken again
    RESET.write_text("5")
    before = held("VmRSS")
    work()
    return held("VmHWM") - before


def held(what: str) -> int:
    match = re.search(rf"{what}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    return 1024 * int(match[1])


def measured(_: int, name: str) -> tuple[int, int]:
    """What a case needs at least, and what it takes when it may take no more."""
    make, options = CASES[name]
    torch.manual_seed(0)
    model, batches, needed = make(), data(256), list[memory.Bytes]()
    with pytest.MonkeyPatch.context() as patch:
        bytes_of = memory.bytes_of

        def noted(*args: Any, **options: Any) -> memory.Bytes:
            needed.append(bytes_of(*args, **options))
            return needed[-1]

        patch.setattr(memory, "bytes_of", noted)
        greedyprune.select(model, batches, progress=False, **options)
    limit = max(bytes_needed.together for bytes_needed in needed)

    def select() -> None:
        greedyprune.select(model, batches, progress=False, memory_limit=limit, **options)

    return limit, min(peak(select), peak(select))  # libraries now and then keep more, once


def streamed(_: int, limit: int) -> int:
    torch.manual_seed(0)
    model = one_layer()
    inputs = torch.randn(8192, 32)
    batches = list(zip(inputs.split(BATCH), inputs[:, :10].split(BATCH), strict=True))
    greedyprune.select(model, batches[:2], steps=3, progress=False)
    return peak(
        lambda: greedyprune.select(
            model, iter(batches), steps=UNITS, progress=False, memory_limit=limit
        )
    )
