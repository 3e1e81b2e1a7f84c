"""What a checkpoint keeps and refuses: other calls, other data, damage, other processes."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import CASES, batches_of, check_same, mlp, tensors, two_layers
from cases import kept_select as select
from safetensors import safe_open
from stops import opened, stopped
from torch import Tensor, nn

import greedyprune
from greedyprune import Loss, Selection


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
        with pytest.raises(ValueError, match=r"checkpoint: .* belongs to another call") as error:
            call()
        assert text in str(error.value)
        assert str(error.value).endswith("; expected the same or another folder")


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"checkpoint: .* holds 'notes.txt' and no 'call-0.json'"):
        select("cross-entropy", tmp_path)
    with pytest.raises(ValueError, match="is not a folder, expected a folder for this call alone"):
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
            with pytest.raises(ValueError, match=rf"to other data, of 4 batches, found {count};"):
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
    with pytest.raises(ValueError, match=f"belongs to another call, with the loss's .* {text}"):
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
        with pytest.raises(ValueError, match="belongs to other data, of 4 batches, found"):
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
    with pytest.raises(ValueError, match="belongs to other data, of 4 batches, found 4"):
        run([*data[:3], (data[3][0] + 1, data[3][1])])
    check_same(run(data), expected, exactly=True)


HOLDS = """
import sys, time
from greedyprune.runtime.checkpoint import Checkpoint
with Checkpoint(sys.argv[1], {}, load=lambda file: {}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_a_folder(tmp_path: Path) -> None:
    """Until it ends, even by a kill."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "a")]
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
def test_damage_is_noticed(tmp_path: Path) -> None:
    """One bit of a file that another program changed."""
    folder = tmp_path / "a"
    assert stopped(5, lambda: select("by themselves", folder))
    [file] = folder.glob("pass-*")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its checksum does not match"):
        select("by themselves", folder)
    [call] = folder.glob("call-*")
    call.write_text(call.read_text().replace("0", "1", 1))
    with pytest.raises(ValueError, match=r"call-0.json' is damaged: its checksum"):
        select("by themselves", folder)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    """What a killed write leaves is not taken for the file, and is cleared away."""
    selection = select("cross-entropy")
    selection.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert "checksum" in file.metadata()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    folder = tmp_path / "kept"
    select("cross-entropy", folder)
    (folder / ".layer-0~x.safetensors.77.part").write_bytes(b"half")
    select("cross-entropy", folder)
    assert [path.name for path in folder.glob(".*")] == [".lock-0"]
    assert json.loads((folder / "call-0.json").read_text())["value"]["steps"] == "30"
