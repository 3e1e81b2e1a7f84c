"""What goes wrong on one of several processes is raised on all: none waits for another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import alone, batches_of, check_same, cnn, mlp, part, select, tensors
from processes import TIMEOUT, Raised, Team, group_of
from torch import Tensor, nn

import greedyprune
from greedyprune import Selection
from greedyprune.kernels.backend import extension
from greedyprune.runtime.distributed import Ranks

pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team(4)
    yield team
    team.close()


def wrong(rank: int, what: str) -> Any:
    """Something is wrong on rank 1 only."""
    group: Any = group_of(3)
    bad, model, options = rank == 1, mlp(), dict[str, Any](steps=9)
    data: Any = part(rank, 4, "classes")
    if what in ("layers", "gates", "network"):
        model = cnn()
        more = {"gates": {"objective": "fisher"}, "network": {"objective": "loss"}}
        options = {"size": 0.5} | more.get(what, {})
    if what in ("none", "samples on no rank"):
        data = []
    elif bad and what in ("NaN", "layers", "gates", "network", "later"):
        inputs, classes = tensors("classes")
        inputs = inputs.clone()
        inputs[150 if what == "later" else 3, 2] = torch.nan
        data = batches_of((inputs, classes), 40)
    elif bad and what == "label":
        data = [(torch.randn(8, 12), torch.tensor([0, 1, 2, 9, 1, 2, 3, 4]))]
    elif bad and what == "shape":
        data = [(torch.randn(8, 11), torch.zeros(8, dtype=torch.int64))]
    elif bad and what == "data":
        data = 7
    elif bad and what == "argument":
        options = {"steps": 0}
    elif bad and what == "another argument":
        options = {"steps": 8}
    elif bad and what == "another loss":
        options |= {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}
    elif bad and what == "another model":
        with torch.no_grad():
            model[2].bias += 1e-3
    elif bad and what == "loader":
        data = broken()
    elif bad and what == "interrupted":
        options["progress"], data = None, interrupted()
    elif bad and what == "another processor":
        with another_instruction_set():
            return greedyprune.select(model, data, process_group=group, **options)
    elif what == "group":
        group = "all"
    return greedyprune.select(model, data, process_group=group, **options)


@contextmanager
def another_instruction_set() -> Iterator[None]:
    kernels = extension()
    before = kernels.active_instruction_set()
    kernels.use_instruction_set(next(n for n in kernels.instruction_sets() if n != before))
    try:
        yield
    finally:
        kernels.use_instruction_set(before)


def broken() -> Iterator[tuple[Tensor, Tensor]]:
    yield torch.randn(8, 12), torch.zeros(8, dtype=torch.int64)
    raise OSError("the disk is gone")


def interrupted() -> Iterator[tuple[Tensor, Tensor]]:
    yield torch.randn(8, 12), torch.zeros(8, dtype=torch.int64)
    raise KeyboardInterrupt


WRONG = {
    "samples on no rank": ("ValueError", "data: found no samples"),
    "NaN": ("ValueError", "layer '0': NaN or inf in its activations"),
    "later": ("ValueError", "layer '0': NaN or inf in its activations"),
    "layers": ("ValueError", "NaN or inf"),
    "gates": ("ValueError", "NaN or inf"),
    "network": ("ValueError", "NaN or inf"),
    "label": ("ValueError", "data: found labels from 0 to 9"),
    "shape": ("ValueError", "data: the model can't run on a batch"),
    "data": ("TypeError", "data: found int"),
    "argument": ("ValueError", "steps: found 0"),
    "another argument": ("ValueError", "steps: found 9 on rank 0 and 8 on rank 1"),
    "another loss": ("ValueError", "the loss's label_smoothing: found 0.0 on rank 0 and 0.1"),
    "another processor": ("ValueError", "instruction set (GREEDYPRUNE_ISA): found "),
    "another model": ("ValueError", "model: '2.bias': found "),
    "loader": ("OSError", "the disk is gone"),
    "interrupted": ("KeyboardInterrupt", ""),
    "group": ("TypeError", "process_group: found str, expected a group"),
}


# Found by comparing, in what is summed up, or wrong on each.
ON_ALL = {
    "samples on no rank", "another argument", "another loss", "another processor", "another model",
    "group", "network",
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_on_one_is_raised_on_all(team: Team, what: str) -> None:
    """None hangs; each names the rank, and the next call works."""
    if what == "another processor" and len(extension().instruction_sets()) < 2:
        pytest.skip("this processor has one instruction set")
    kind, text = WRONG[what]
    for rank, answer in enumerate(team.run(3, wrong, what)):
        assert isinstance(answer, Raised), rank
        assert text in answer.text
        told = answer.text.startswith("rank 1: ")
        if kind in ("ValueError", "TypeError"):
            assert answer.kind == kind
            assert told == (rank != 1 and what not in ON_ALL)
        else:
            assert (answer.kind, told) == ((kind, False) if rank == 1 else ("RuntimeError", True))
            assert not told or answer.text.startswith(f"rank 1: {kind}")
    check_same(team.results(2, select, 2, "cross-entropy")[1], alone("cross-entropy"))


@pytest.mark.parametrize(
    ("name", "at"),
    [("cross-entropy", "greedy step"), ("squared error, twins", "greedy step"),
     ("squared error, columns", "columns"), ("cross-entropy, streamed", "scores")],
)  # fmt: skip
def test_an_error_in_the_middle_of_the_loop(team: Team, name: str, at: str) -> None:
    first, second = team.run(2, fails_in_the_loop, name, at)
    assert (second.kind, second.text) == ("OSError", "the disk is gone")
    assert (first.kind, first.text) == ("RuntimeError", "rank 1: OSError: the disk is gone")
    check_same(team.results(2, select, 2, name)[0], alone(name))


def fails_in_the_loop(rank: int, name: str, at: str) -> Selection:
    """Rank 1 fails before its second sum of that name."""
    left, sum_up = 2, Ranks.sum

    def failing(self: Ranks, what: str, *tensors: Tensor) -> None:
        nonlocal left
        left -= rank == 1 and what.startswith(at)
        if left == 0:
            raise OSError("the disk is gone")
        sum_up(self, what, *tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "sum", failing)
        return select(rank, 2, name)


@pytest.mark.parametrize("name", ["squared error", "cross-entropy"])
def test_an_error_between_two_sums(team: Team, name: str) -> None:
    """No memory for the second of several tensors: that is found out before the first is sent."""
    first, second = team.run(2, fails_at_the_second, name)
    assert (second.kind, second.text) == ("MemoryError", "")
    assert (first.kind, first.text) == ("RuntimeError", "rank 1: MemoryError: ")
    check_same(team.results(2, select, 2, name)[0], alone(name))


def fails_at_the_second(rank: int, name: str) -> Selection:
    calls, on_device = 0, Ranks._on_device

    def failing(self: Ranks, tensor: Tensor) -> Tensor:
        nonlocal calls
        calls += rank == 1
        if calls == 2:
            raise MemoryError
        return on_device(self, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "_on_device", failing)
        return select(rank, 2, name)


def test_an_output_that_one_rank_takes_for_the_models(team: Team) -> None:
    """Its ReLU changes nothing on that rank's first batch."""
    one, other = team.results(2, ends_in_a_relu)
    check_same(one, other, exactly=True)
    assert one.layers["0"].objective == "imitation"


def ends_in_a_relu(rank: int) -> Selection:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1), nn.ReLU(inplace=True))
    inputs, _ = tensors("classes")
    positive = model[:3](inputs)[:, 0] > 0
    part = inputs[positive][:20] if rank == 0 else inputs[~positive][:20]
    data, group = [(part, part[:, :1])], group_of(2)
    return greedyprune.select(model, data, steps=3, process_group=group, layers={"0": "2"})


def test_a_group_of_others(team: Team) -> None:
    """A rank that is not in the group is told so."""
    one, _, other = team.run(3, select, 2, "squared error")
    check_same(one, alone("squared error"))
    assert isinstance(other, Raised) and "process_group: this process is not in it" in other.text


def test_a_rank_that_dies_ends_the_others() -> None:
    team = Team(3)
    try:
        team.results(3, rank_of)  # they have started
        for pipe in team.pipes:
            pipe.send((3, dies, ()))
        for rank in (0, 2):
            assert team.pipes[rank].poll(TIMEOUT / 2)
            answer = team.pipes[rank].recv()
            assert isinstance(answer, Raised) and answer.kind == "RuntimeError"
            assert f"process_group: rank {rank} of 3 lost the others" in answer.text
    finally:
        team.close()


def rank_of(rank: int) -> int:
    return rank


def dies(rank: int) -> Selection:
    def data() -> Iterator[tuple[Tensor, Tensor]]:
        yield from part(rank, 4, "classes")
        yield from part(0, 4, "classes")
        if rank == 1:
            os._exit(1)

    return greedyprune.select(mlp(), data(), steps=9)
