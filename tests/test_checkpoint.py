"""Runs that are killed and go on: the same Selection, or a sentence on what is not the same."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_distributed import CASES, batches_of, check_same, mlp, tensors, two_layers
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import greedyprune
from greedyprune import Imitation, Loss, Selection
from greedyprune.data.batches import Batches
from greedyprune.runtime import checkpoint, resume
from greedyprune.selector import _load, _save

KILLS = int(os.environ.get("GREEDYPRUNE_KILLS", "28"))  # of the test that kills at random moments
NAMES = [
    "cross-entropy", "cross-entropy, streamed", "squared error", "squared error, streamed",
    "squared error, streamed columns", "imitation", "in sequence", "by themselves", "gates",
    "budget", "budget, gates", "the network's loss", "the network's loss, refit",
    "the network's loss, mini-batches",
]  # fmt: skip


class StopError(Exception):
    """In the place of a kill."""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written when it is known."""
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    monkeypatch.setattr(resume, "SHARE", 0)


def select(name: str, folder: Path | None = None, data: object = None, **more: Any) -> Selection:
    case = CASES[name]
    data = batches_of(tensors(case.targets), 60) if data is None else data
    return greedyprune.select(case.model(), data, checkpoint=folder, **case.options | more)


def stopped(at: int, call: Callable[[], object], *, after: bool = True) -> bool:
    """Does the call come to its n-th write, and stop there, right after it or in its place?"""
    left = at

    def counting(write: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                raise StopError
            write(*args)
            if left == 0:
                raise StopError

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint, resume, sys.modules["greedyprune.surgery.selection"]):
            for name in ("write_tensors", "write_json"):
                if hasattr(module, name):
                    patch.setattr(module, name, counting(getattr(module, name)))
        try:
            call()
        except StopError:
            return True
    return False


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", NAMES)
def test_goes_on_after_every_write(name: str, tmp_path: Path) -> None:
    """Stopped at each write in turn, in one folder after the other and in one folder again and
    again: bit by bit the Selection of a run that was not."""
    expected = select(name)
    at, again = 1, 0
    while stopped(at, lambda: select(name, tmp_path / f"{at}"), after=at % 2 == 0):  # noqa: B023
        check_same(select(name, tmp_path / f"{at}"), expected, exactly=True)
        at += 1 if at < 12 else 7
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

    run(None)  # traces more
    expected = run(None)
    whole = len(ran)
    assert stopped(8, lambda: run(tmp_path / "a"))  # the call, the memory, six batches
    check_same(run(tmp_path / "a"), expected, exactly=True)
    assert len(ran) == whole - 6
    check_same(run(tmp_path / "a"), expected, exactly=True)
    assert len(ran) == whole - 8
    assert sorted(each.name.split("-")[0] for each in (tmp_path / "a").iterdir()) == [
        ".lock", "call", "data", "layer", "layer", "memory.json"
    ]  # fmt: skip


def other_model() -> nn.Module:
    model = CASES["cross-entropy"].model()
    with torch.no_grad():
        model[2].bias[1] += 1
    return model


@pytest.mark.usefixtures("at_once")
def test_another_call_is_refused(tmp_path: Path) -> None:
    """With what differs."""
    name, folder = "cross-entropy", tmp_path / "a"
    select(name, folder)
    inputs, classes = tensors("classes")
    shares = nn.functional.one_hot(classes, 5).float()
    refused: list[tuple[str, Callable[[], object]]] = [
        ("with steps 30, found 29;", lambda: select(name, folder, steps=29)),
        ("with seed 0, found 1;", lambda: select(name, folder, seed=1)),
        ("with memory_limit None, found 90000;", lambda: select(name, folder, memory_limit=90000)),
        ("first batch ", lambda: select(name, folder, batches_of((inputs + 1, classes), 60))),
        ("first batch ", lambda: select(name, folder, batches_of((inputs, classes), 59))),
        ("with loss cross_entropy, found mse;",
         lambda: select(name, folder, batches_of((inputs, shares), 60))),
        ("with model: '2.bias' ", lambda: greedyprune.select(
            other_model(), batches_of((inputs, classes), 60), steps=30, checkpoint=folder)),
    ]  # fmt: skip
    for text, call in refused:
        with pytest.raises(ValueError, match=r"checkpoint: .* is of another call") as error:
            call()
        assert text in str(error.value)
        assert str(error.value).endswith("; expected the same or another folder")


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"checkpoint: .* holds 'notes.txt' and no 'call-0.json'"):
        select("cross-entropy", tmp_path)
    with pytest.raises(ValueError, match="is no folder, expected a folder of its own"):
        select("cross-entropy", tmp_path / "notes.txt")
    with pytest.raises(TypeError, match="checkpoint: found int, expected the path of a folder"):
        select("cross-entropy", 7)  # type: ignore[arg-type]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", ["squared error, streamed", "by themselves", "in sequence"])
def test_other_batches_are_noticed(name: str, tmp_path: Path) -> None:
    """In another order after the first one, or too few."""
    data = batches_of(tensors(CASES[name].targets), 40)
    assert stopped(5, lambda: select(name, tmp_path / "a", data))
    for other in ([data[0], *data[:0:-1]], data[:2]):
        with pytest.raises(ValueError, match=r"checkpoint: the first \d batches are not those"):
            select(name, tmp_path / "a", other)
    check_same(select(name, tmp_path / "a", data), select(name, None, data), exactly=True)


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


def test_other_data_are_refused_once_layers_are_finished(tmp_path: Path) -> None:
    """All batches count, not the first alone; also of an iterator, which nothing else reads."""
    data = batches_of(tensors("numbers"), 60)
    changed = [*data[:2], (data[2][0] + 1, data[2][1]), *data[3:]]

    def run(data: object, folder: str) -> Selection:
        return greedyprune.select(mlp(), data, steps=9, checkpoint=tmp_path / folder)

    for wrap in (list, iter):  # type: ignore[var-annotated]
        folder = wrap.__name__
        expected = run(wrap(data), folder)
        for other, count in ((changed, 4), (data[:2], 2)):
            with pytest.raises(ValueError, match=rf"of other data, of 4 batches, found {count};"):
                run(wrap(other), folder)
        check_same(run(wrap(data), folder), expected, exactly=True)


class Power(nn.Module):
    """A loss with a number and a tensor of its own, and a state that calls change."""

    def __init__(self, power: int, scale: float) -> None:
        super().__init__()
        self.power, self.log, self._calls = power, logging.getLogger("power"), 0
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self._calls += 1
        return (self.scale * (outputs - targets)).abs().pow(self.power).mean()


class Same(Power):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(outputs, 2 * targets)


def power(outputs: Tensor, targets: Tensor, power: int = 2, *, times: float = 1.0) -> Tensor:
    return times * (outputs - targets).abs().pow(power).mean()


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().mean()


LOSSES: list[tuple[object, object, str]] = [
    (power, absolute, "'?power'?, found '?absolute'?;"),
    (power, partial(power, power=2), "'?power'?, found '?partial'?;"),
    (Power(2, 1.0), Same(2, 1.0), "'?Power'?, found '?Same'?;"),
    (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1), "0.0, found 0.1;"),
    (nn.CrossEntropyLoss(torch.ones(5)), nn.CrossEntropyLoss(torch.arange(5.0)), r"\[1.0, .*\];"),
]


@pytest.mark.filterwarnings("ignore:loss. a function of your own")
@pytest.mark.parametrize(("one", "other", "text"), LOSSES)
def test_another_loss_is_refused(one: object, other: object, text: str, tmp_path: Path) -> None:
    """A function of the user's own is known by its name, torch's losses by their numbers too."""
    kind = "classes" if isinstance(one, nn.CrossEntropyLoss) else "numbers"

    def run(loss: object) -> Selection:
        data = batches_of(tensors(kind), 60)
        return greedyprune.select(mlp(), data, steps=3, loss=loss, checkpoint=tmp_path / "a")

    expected = run(one)
    with pytest.raises(ValueError, match=f"is of another call, with the loss's .* {text}"):
        run(other)
    check_same(run(one), expected, exactly=True)


@pytest.mark.filterwarnings("ignore:loss. a function of your own")
def test_any_loss_of_ones_own_is_taken(tmp_path: Path) -> None:
    """However it is made; one that was called, too."""
    for i, loss in enumerate([Power(2, 1.0), partial(power, times=2.0), lambda o, t: power(o, t)]):
        data = batches_of(tensors("numbers"), 60)
        one, other = (
            greedyprune.select(mlp(), data, steps=3, loss=loss, checkpoint=tmp_path / f"{i}")
            for _ in range(2)
        )
        check_same(one, other, exactly=True)


def test_data_of_one_pass_are_compared_in_it(tmp_path: Path) -> None:
    """Where a layer is finished, and the other needs that pass again."""
    data = batches_of(tensors("classes"), 60)

    def run(data: object) -> Selection:
        return greedyprune.select(
            two_layers(), data, size=5, objective="fisher", checkpoint=tmp_path / "a"
        )

    expected = run(iter(data))
    second = sorted(tmp_path.glob("a/layer-*"))[1]
    for other in ([*data[:3], (data[3][0] + 1, data[3][1])], data[:3]):
        second.unlink(missing_ok=True)
        with pytest.raises(ValueError, match="is of other data, of 4 batches, found"):
            run(iter(other))
    check_same(run(iter(data)), expected, exactly=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_networks_loss_knows_its_data(backend: str, tmp_path: Path) -> None:
    data = batches_of(tensors("classes"), 60)

    def run(data: object) -> Selection:
        return greedyprune.select(
            two_layers(), data, layers="0", size=3, objective=Loss(candidates=2),
            backend=backend, checkpoint=tmp_path / "a",
        )  # fmt: skip

    expected = run(data)
    with pytest.raises(ValueError, match="is of other data, of 4 batches, found 4"):
        run([*data[:3], (data[3][0] + 1, data[3][1])])
    check_same(run(data), expected, exactly=True)


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
            two_layers(), shuffled(kind), size=9, memory_limit=42_000,
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


def opened(folder: Path) -> checkpoint.Checkpoint[Any]:
    return checkpoint.Checkpoint(folder, {}, save=_save, load=_load)


HOLDS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from greedyprune.runtime.checkpoint import Checkpoint
with Checkpoint(sys.argv[2], {}, load=lambda file: {}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_a_folder(tmp_path: Path) -> None:
    """Until it ends, even by a kill."""
    command = [sys.executable, "-c", HOLDS, str(Path(__file__).parent), str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"checkpoint: .* is used by another process"):
            opened(tmp_path / "a")
        other.kill()
    with opened(tmp_path / "a") as kept:
        assert kept.folder == tmp_path / "a"


def test_layers_of_no_known_call_are_refused(tmp_path: Path) -> None:
    select("cross-entropy", tmp_path)
    (tmp_path / "call-0.json").unlink()
    with pytest.raises(ValueError, match=r"holds 'layer-0~.*safetensors' and no 'call-0.json'"):
        select("cross-entropy", tmp_path, steps=7)


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
def test_damage_is_noticed(tmp_path: Path) -> None:
    """One bit of a file that another program changed."""
    folder = tmp_path / "a"
    assert stopped(5, lambda: select("by themselves", folder))
    [file] = folder.glob("pass-*")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its checksum does not fit"):
        select("by themselves", folder)
    [call] = folder.glob("call-*")
    call.write_text(call.read_text().replace("0", "1", 1))
    with pytest.raises(ValueError, match=r"call-0.json' is damaged: its checksum"):
        select("by themselves", folder)


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
from test_checkpoint import select
resume.SHARE = 0
for line in sys.stdin:
    name, folder, out, resume.SECONDS, seconds = json.loads(line)
    begun, child = time.monotonic(), os.fork()
    if child == 0:
        select(name, Path(folder), progress=False).save(out)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, time.monotonic() - begun]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """kill -9, twice in each run, and then to the end. A process that has threads can't fork, so
    one that has none does.

    A kill lands where the run had begun its folder and was not at its end.
    """
    rng, took, landed = random.Random(KILLS), dict[str, float](), 0
    command = [sys.executable, "-c", FORKS, str(Path(__file__).parent)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as forks:
        assert forks.stdin is not None and forks.stdout is not None
        for kill in range(KILLS // 2):
            name, out = NAMES[kill % len(NAMES)], str(tmp_path / f"{kill}.safetensors")
            seconds = rng.choice([0.0, 0.02])
            for attempt in range(3):
                wait = rng.uniform(0, took.get(name, 1.0)) if attempt < 2 else None
                forks.stdin.write(json.dumps([name, str(tmp_path / f"{kill}"), out, seconds, wait]))
                forks.stdin.write("\n")
                forks.stdin.flush()
                status, elapsed = json.loads(forks.stdout.readline())
                assert status == 0 or (attempt < 2 and status == -signal.SIGKILL)
                landed += status != 0 and (tmp_path / f"{kill}" / "call-0.json").is_file()
                took[name] = max(took.get(name, 0.0), elapsed)
            check_same(Selection.load(out), select(name), exactly=True)
        forks.stdin.close()
    assert landed >= KILLS // 4


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    """What a killed write leaves is not taken for the file, and is cleared away."""
    selection = select("cross-entropy")
    selection.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert "checksum" in file.metadata()
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
    folder = tmp_path / "kept"
    select("cross-entropy", folder)
    (folder / ".layer-0~x.safetensors.77.part").write_bytes(b"half")
    select("cross-entropy", folder)
    assert [each.name for each in folder.glob(".*")] == [".lock-0"]
    assert json.loads((folder / "call-0.json").read_text())["value"]["steps"] == "30"
