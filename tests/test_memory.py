"""What is said to be needed is what is taken: the peak of a process that has nothing else to do."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processes import Team
from torch import Tensor, nn

import greedyprune
from greedyprune import Budget, Imitation, Loss
from greedyprune.graph.executor import GraphExecutor
from greedyprune.graph.groups import Group
from greedyprune.kernels.products import FLOAT64_ENTRIES
from greedyprune.objectives import fisher, imitation, memory
from greedyprune.runtime.free_memory import free_in_cgroups

UNITS = 3200  # a matrix of them takes 82 MB
BATCH = 32
# Beside what is counted: what libraries keep, and a batch.
SLACK = 3 * 2**24 + 5 * BATCH * UNITS * 4
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

pytestmark = pytest.mark.skipif(not RESET.exists(), reason="the system has no peak to reset")


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
            self.second = nn.Linear(UNITS // 2, 20)

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
    "one after the other": (two_layers, {"size": 0.3, **apart(swaps=0)}),
    "gates": (two_layers, {"size": 0.3, "tolerance": 0.0, "objective": "fisher"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def process() -> Iterator[Team]:
    team = Team(1)
    yield team
    team.close()


@pytest.mark.parametrize("name", CASES)
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
    [(2**24, {"size": 0.25, **in_sequence(swaps=0)}),
     (2**23, {"size": 1, "objective": Loss(candidates=2)})],
)  # fmt: skip
def test_values_between_layers_are_in_the_limit(
    limit: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the wider layer they take 15 MB, in each of both networks that imitation has."""
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

    monkeypatch.setattr(GraphExecutor, "run", watched)
    before, found = bytes_alive(), []
    for fits in (True, False):
        most = 0
        given = 2**30 if fits else limit
        found.append(
            greedyprune.select(model, batches, layers=["0", "2"], memory_limit=given, **options)
        )
        assert (most - before > limit + 2**21) == fits
    for name, layer in found[0].layers.items():
        assert layer.order.equal(found[1].layers[name].order)


def bytes_alive() -> int:
    """Of all tensors; the process's size says less, as its heap has holes between small ones."""
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if type(each) is Tensor
    }
    return sum(storages.values())


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/job/step", {"job/memory.max": "900", "job/memory.current": "700",
                          "job/memory.stat": "anon 5\ninactive_file 30\nactive_file 20\nfile 9",
                          "job/step/memory.max": "max", "job/step/memory.current": "3"}, [250]),
        ("5:cpu:/a\n4:memory:/a", {"memory/a/memory.limit_in_bytes": "900",
                                   "memory/a/memory.usage_in_bytes": "950",
                                   "memory/memory.limit_in_bytes": "1000",
                                   "memory/memory.usage_in_bytes": "960"}, [0, 40]),
        ("0::/elsewhere", {"memory.max": "900", "memory.current": "100"}, [800]),
        ("4:cpu:/", {}, []),
    ],
)  # fmt: skip
def test_limits_of_containers(
    groups: str, files: dict[str, str], free: list[int], tmp_path: Path
) -> None:
    """Of version 2 and 1, of the group and those it is in."""
    for name, text in {"../../../proc/self/cgroup": groups, **files}.items():
        path = (tmp_path / "sys/fs/cgroup" / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert list(free_in_cgroups(tmp_path)) == free


def test_too_little_is_a_sentence() -> None:
    """It says what would do; that does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 4, 3))
    data = [torch.randn(8, 3, 7, 7)]
    expected = (
        r"'0' needs (\d+) for .* and (\d+) to .*; expected (\d+), "
        r"or (\d+) with Imitation\(swaps=0\)"
    )
    with pytest.raises(ValueError, match=expected) as raised:
        greedyprune.select(model, data, size=0.5, memory_limit=10_000)
    found = re.search(expected, str(raised.value))
    assert found is not None
    sums, work, enough, less = map(int, found.groups())
    assert sums + work == enough > less
    greedyprune.select(model, data, size=0.5, memory_limit=enough)
    greedyprune.select(model, data, size=0.5, memory_limit=less, **in_sequence(swaps=0))
    for limit, swaps in ((enough - 1, None), (less - 1, 0)):
        with pytest.raises(ValueError, match="memory_limit: found"):
            greedyprune.select(model, data, size=0.5, memory_limit=limit, **in_sequence(swaps))


def test_least_squares_from_features_is_counted_too() -> None:
    model = one_layer(2000)
    data = [(torch.randn(16, 32), torch.randint(10, (16,)))]
    message = r"memory_limit: found 1000000 bytes, but least squares on .* '0' needs 81077856;"
    with pytest.raises(ValueError, match=message):
        greedyprune.select(model, data, size=1838, weights="refit", memory_limit=10**6)


def test_a_budget_counts_layers_that_are_judged_otherwise() -> None:
    """Here by the model's own loss, which takes no sums; the path for the size does."""
    data = [(torch.randn(16, 32), torch.randint(10, (16,)))]
    for objective in ("auto", "loss"):
        with pytest.raises(ValueError, match="memory_limit: found 90000 bytes, but layer '0' nee"):
            greedyprune.select(
                one_layer(200), data, size=Budget(params=0.5), objective=objective,
                memory_limit=90_000,
            )  # fmt: skip


def test_what_does_not_fit_together_takes_turns() -> None:
    """The picks are those of all layers at once; an iterator can't be gone through twice."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3)
    )
    data = [(torch.randn(60, 6), torch.randint(3, (60,)))]
    for limit, module, options in (
        (50_000, imitation, apart(swaps=0)), (28_000, fisher, {"objective": "fisher"})
    ):  # fmt: skip
        expected = greedyprune.select(model, data, size=9, **options)
        with pytest.MonkeyPatch.context() as patch:
            rounds = counted_turns(patch, module)
            found = greedyprune.select(model, data, size=9, memory_limit=limit, **options)
            assert rounds == [2]
        for name, layer in expected.layers.items():
            assert found.layers[name].order.equal(layer.order)
    with pytest.raises(ValueError, match="all 2 layers from one pass over an iterator need up to"):
        greedyprune.select(model, iter(data), size=9, memory_limit=28_000, objective="fisher")


def counted_turns(patch: pytest.MonkeyPatch, module: ModuleType) -> list[int]:
    """How many turns the layers of an objective's module take, once for each call of `turns`."""
    counts, turns = list[int](), memory.turns

    def counted(*args: Any, **options: Any) -> list[list[Group]]:
        groups = turns(*args, **options)
        counts.append(len(groups))
        return groups

    patch.setattr(module, "turns", counted)
    return counts


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
    found = re.search(rf"{what}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])


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
    limit = max(each.together for each in needed)

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
