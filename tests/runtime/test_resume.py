"""Runs that are killed go on: the same Selection, bit by bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, batches_of, check_same, mlp, tensors, two_layers
from cases import kept_select as select
from stops import opened, stopped
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import greedyprune
from greedyprune import Imitation, Selection
from greedyprune.data.batches import Batches
from greedyprune.runtime import resume

KILLS = int(os.environ.get("GREEDYPRUNE_KILLS", "28"))  # of the test that kills at random moments
NAMES = [
    "cross-entropy", "cross-entropy, streamed", "squared error", "squared error, streamed",
    "squared error, streamed columns", "imitation", "in sequence", "by themselves", "gates",
    "budget", "budget, gates", "the network's loss", "the network's loss, refit",
    "the network's loss, mini-batches",
]  # fmt: skip


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", NAMES)
def test_goes_on_after_every_write(name: str, tmp_path: Path) -> None:
    """Stopped at each write in turn, in one folder after the other and in one folder again and
    again: bit by bit the Selection of a run that was not."""
    expected = select(name)
    at, again = 1, 0
    while stopped(at, lambda: select(name, tmp_path / f"{at}"), after=at % 2 == 0):  # noqa: B023
        check_same(select(name, tmp_path / f"{at}"), expected, exactly=True)
        at += 1 if at < 8 else 7
    while stopped(1 + again % 3, lambda: select(name, tmp_path / "again")):
        again += 1
    check_same(select(name, tmp_path / "again"), expected, exactly=True)
    assert at > 3 and again >= 1


@pytest.mark.usefixtures("at_once")
def test_what_is_known_is_not_done_again(tmp_path: Path) -> None:
    """Of a pass, the batches that are in the sums; of layers, those that are finished."""
    model = CASES["by themselves"].model()
    ran = []
    model.register_forward_hook(lambda _, args, __: ran.append(len(args[0])))
    data = batches_of(tensors("classes"), 30)  # 8 batches

    def run(folder: Path | None) -> Selection:
        ran.clear()
        return greedyprune.select(
            model, data, objective=Imitation(sequential=False), checkpoint=folder
        )

    def batches() -> int:
        return ran.count(30)  # others are a few samples of the first one

    run(None)  # traces more
    expected = run(None)
    whole = batches()
    assert stopped(8, lambda: run(tmp_path / "a"))  # the call, the memory, six batches
    check_same(run(tmp_path / "a"), expected, exactly=True)
    assert batches() == whole - 6
    check_same(run(tmp_path / "a"), expected, exactly=True)
    assert batches() == whole - 8
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "a").iterdir()) == [
        ".lock", "call", "data", "layer", "layer", "memory.json"
    ]  # fmt: skip


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("sizes", [[8, 64, 64, 64, 40], [60, 60, 60, 60]])
@pytest.mark.parametrize("limit", [26_000, 30_000, 36_480, 40_000, 45_888])
def test_a_resumed_stream_fits_as_the_first_one_did(
    sizes: list[int], limit: int, tmp_path: Path
) -> None:
    """The first run's features take room that the Gram matrix then has in the second."""
    inputs, numbers = tensors("numbers")
    data = list(zip(inputs.split(sizes), numbers.split(sizes), strict=True))

    def run(folder: Path | None) -> Selection:
        return greedyprune.select(mlp(), data, steps=40, memory_limit=limit, checkpoint=folder)

    at, expected = 2, run(None)
    while stopped(at, lambda: run(tmp_path / f"{at}")):  # noqa: B023
        check_same(run(tmp_path / f"{at}"), expected, exactly=True)
        at += 2
    assert at > 2


def shuffled(kind: str) -> DataLoader[Any]:
    data = TensorDataset(*tensors("classes"))
    generator = torch.Generator().manual_seed(0)
    if kind == "generator":
        return DataLoader(data, batch_size=40, shuffle=True, generator=generator)
    if kind == "seed":
        torch.manual_seed(7)
        return DataLoader(data, batch_size=40, shuffle=True)
    sampler = RandomSampler(data, generator=generator)
    if kind == "sampler":
        return DataLoader(data, batch_size=40, sampler=sampler)
    return DataLoader(data, batch_sampler=BatchSampler(sampler, 40, drop_last=False))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kind", ["generator", "seed", "sampler", "batch sampler"])
def test_a_shuffled_loader_with_a_seed_goes_on(kind: str, tmp_path: Path) -> None:
    """In its second pass, too: every pass has the order of the first."""

    def run(folder: Path) -> Selection:
        return greedyprune.select(
            two_layers(), shuffled(kind), size=9, memory_limit=80_000,
            objective=Imitation(swaps=0, sequential=False), checkpoint=folder,
        )  # fmt: skip

    expected, at = run(tmp_path / "whole"), 2
    while stopped(at, lambda: run(tmp_path / f"{at}")):  # noqa: B023
        check_same(run(tmp_path / f"{at}"), expected, exactly=True)
        at += 3
    assert at > 12  # two turns of six batches


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kind", ["generator", "seed", "sampler", "batch sampler"])
def test_a_shuffled_stream_goes_on_in_its_first_pass(kind: str, tmp_path: Path) -> None:
    """Which reading the data for comparison comes before."""

    def run(folder: Path) -> Selection:
        return greedyprune.select(
            mlp(), shuffled(kind), steps=4, memory_limit=9000, checkpoint=folder
        )

    expected, at = run(tmp_path / "whole"), 3
    while stopped(at, lambda: run(tmp_path / f"{at}")):  # noqa: B023
        check_same(run(tmp_path / f"{at}"), expected, exactly=True)
        at += 2
    assert at > 9


def test_without_a_checkpoint_loaders_shuffle_anew() -> None:
    """As tuning does best."""
    loader = shuffled("generator")
    batches = Batches(loader, mlp())
    first, second = ([batch.targets for batch in batches] for _ in range(2))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("at_once")
def test_steps_are_read_file_by_file(tmp_path: Path) -> None:
    """And where one did not come again, only what was before it stays."""
    kept = opened(tmp_path / "a")

    def run(labels: str) -> list[str]:
        steps, computed = resume.Steps(kept, "0"), []

        def compute(label: str) -> Tensor:
            computed.append(label)
            return torch.tensor(ord(label))

        for label in labels:
            assert int(steps.once(label, lambda: compute(label))) == ord(label)  # noqa: B023
        return computed

    assert run("abcd") == ["a", "b", "c", "d"]
    assert run("abcde") == ["e"]
    assert run("abxde") == ["x", "d", "e"]
    assert run("abxdef") == ["f"]
    kept.close()


@pytest.mark.usefixtures("at_once")
def test_a_generator_goes_on(tmp_path: Path) -> None:
    """One pass, from a source that begins anew in each run."""

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches_of(tensors("numbers"), 16)

    name = "squared error, streamed"
    expected = select(name, None, stream())
    for at in (3, 6, 12, 15):
        assert stopped(at, lambda: select(name, tmp_path / f"{at}", stream()))  # noqa: B023
        check_same(select(name, tmp_path / str(at), stream()), expected, exactly=True)


FORKS = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
torch.set_num_threads(1)
from greedyprune.runtime import resume
from cases import kept_select as select
resume.SHARE = 0
for line in sys.stdin:
    name, folder, out, resume.SECONDS, seconds = json.loads(line)
    child = os.fork()
    if child == 0:
        select(name, Path(folder), progress=False).save(out)
        os._exit(0)
    ended = 0, 0
    while not ended[0] and not (Path(folder) / "call-0.json").is_file():
        time.sleep(0.001)
        ended = os.waitpid(child, os.WNOHANG)
    begun = time.monotonic()
    if not ended[0]:
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(ended[1]), time.monotonic() - begun]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """kill -9, twice in each run, and then to the end. A process that has threads can't fork, so
    one that has none does.

    The moment is counted from the first file in the run's folder, and is uniform over the time
    that a whole run takes from there. A kill lands if the run had not ended by then.
    """
    rng, took, landed = random.Random(KILLS), dict[str, float](), 0
    command = [sys.executable, "-c", FORKS, str(Path(__file__).parents[1] / "support")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as forks:
        assert forks.stdin is not None and forks.stdout is not None

        def run(name: str, folder: str, every: float, wait: float | None) -> tuple[int, float]:
            """The run's status, and the seconds from its folder's first file to its end."""
            assert forks.stdin is not None and forks.stdout is not None
            out = str(tmp_path / f"{folder}.safetensors")
            forks.stdin.write(json.dumps([name, str(tmp_path / folder), out, every, wait]) + "\n")
            forks.stdin.flush()
            status, elapsed = json.loads(forks.stdout.readline())
            return status, elapsed

        for kill in range(KILLS // 2):
            name, every = NAMES[kill % len(NAMES)], rng.choice([0.0, 0.02])
            if name not in took:
                status, took[name] = run(name, f"whole {name}", every, None)
                assert status == 0
            for _ in range(2):
                status, _ = run(name, f"{kill}", every, rng.uniform(0, took[name]))
                assert status in (0, -signal.SIGKILL)
                landed += status != 0
            assert run(name, f"{kill}", every, None)[0] == 0
            selection = Selection.load(tmp_path / f"{kill}.safetensors")
            check_same(selection, select(name), exactly=True)
        forks.stdin.close()
    assert landed >= KILLS // 2
