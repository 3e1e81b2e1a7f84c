"""Several processes select what one does on all their data: contract, invariant 5."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, alone, batches_of, check_same, cnn, mlp, part, select, tensors
from processes import Raised, Team, group_of
from torch import Tensor, nn

import greedyprune
from greedyprune import Selection
from greedyprune.data import positions
from greedyprune.kernels import products
from greedyprune.runtime import distributed, files, resume

pytestmark = [
    pytest.mark.filterwarnings("ignore:loss. a function of your own"),
    pytest.mark.xdist_group("processes"),
]


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team(4)
    yield team
    team.close()


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", CASES)
def test_parts_of_the_data(team: Team, name: str, size: int) -> None:
    selections = team.results(size, select, size, name)
    for selection in selections[1:]:
        check_same(selection, selections[0], exactly=True)
    check_same(selections[0], alone(name))


@pytest.mark.parametrize("name", ["cross-entropy", "squared error", "squared error, streamed"])
def test_sums_of_many_ranks(team: Team, name: str) -> None:
    """Are reduced, not gathered."""
    selections = team.results(4, select_as_many, name)
    for selection in selections[1:]:
        check_same(selection, selections[0], exactly=True)
    check_same(selections[0], alone(name))


def select_as_many(rank: int, name: str) -> Selection:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "GATHER_RANKS", 1)
        return select(rank, 4, name)


def test_a_group_of_one_process(team: Team) -> None:
    """No other rank is waited for."""
    selections = team.results(2, by_itself)
    check_same(selections[0], alone("cross-entropy"))
    assert selections[1] is None


def by_itself(rank: int) -> Selection | None:
    case = CASES["cross-entropy"]
    if rank == 1:
        return None
    data = batches_of(tensors(case.targets), 60)
    return greedyprune.select(case.model(), data, process_group=group_of(1), **case.options)


def test_refit_by_several(team: Team) -> None:
    """All ranks get the same weights, and these are one process's on all data."""
    selection = alone("in sequence")
    states = team.results(4, refit, 4, selection)
    data = batches_of(tensors("classes"), 60)
    expected = greedyprune.refit(cnn(), selection, data)
    pruned = greedyprune.prune(cnn(), selection).state_dict()
    assert any(not tensor.equal(pruned[name]) for name, tensor in expected.state_dict().items())
    for state in states:
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-4)
            assert torch.equal(state[name], states[0][name])


def refit(rank: int, size: int, selection: Selection) -> dict[str, Tensor]:
    data, group = part(rank, size, "classes"), group_of(size)
    return greedyprune.refit(cnn(), selection, data, process_group=group).state_dict()


def test_several_ranks_do_not_distill(team: Team) -> None:
    for refused in team.run(2, refit_with_epochs, alone("in sequence")):
        assert isinstance(refused, Raised) and refused.kind == "ValueError", refused
        assert "epochs: found 1 with 2 ranks, expected 0, or a process_group" in refused.text


def refit_with_epochs(rank: int, selection: Selection) -> None:
    data = part(rank, 2, "classes")
    greedyprune.refit(cnn(), selection, data, epochs=1, process_group=group_of(2))


def test_wrapped_models(team: Team) -> None:
    """DistributedDataParallel's inside is selected from; a sharded model is refused."""
    expected = alone("cross-entropy")
    for selection in team.results(2, wrapped):
        check_same(selection, expected)
    for refused in team.run(4, sharded):
        assert isinstance(refused, Raised) and refused.kind == "TypeError", refused
        assert "sharded over the ranks, expected a whole model: load get_model_sta" in refused.text


@pytest.mark.parametrize(
    "name",
    ["cross-entropy, streamed", "squared error, streamed columns", "in sequence", "by themselves",
     "gates", pytest.param("budget", marks=pytest.mark.slow),
     pytest.param("the network's loss", marks=pytest.mark.slow)],
)  # fmt: skip
def test_stopped_and_gone_on(team: Team, name: str, tmp_path: Path) -> None:
    """Each rank keeps its own sums, the first one what is found; whichever is stopped."""
    [expected, *_] = team.results(4, select, 4, name)
    stops = 0
    for stop, rank in ((2, 0), (3, 2), (4, 3), (5, 0), (9, 2), (12, 0)):
        for answer in team.run(4, checkpointed, name, str(tmp_path / f"{stop}"), rank, stop):
            assert isinstance(answer, Selection) or "Stop" in answer.where
            stops += not isinstance(answer, Selection)
        for answer in team.results(4, checkpointed, name, str(tmp_path / f"{stop}"), 0, 0):
            check_same(answer, expected, exactly=True)
    assert stops >= 8  # two of the six, on all ranks


def checkpointed(rank: int, name: str, folder: str, stopped_rank: int, stop: int) -> Selection:
    """Stops the rank at that one of its writes."""
    left = stop if rank == stopped_rank else 0
    with pytest.MonkeyPatch.context() as patch:

        def counted(*args: Any) -> None:
            nonlocal left
            left -= 1
            write(*args)
            if left == 0:
                raise InterruptedError("Stop")

        write = files.write_tensors
        patch.setattr(resume, "SECONDS", 0.0)
        patch.setattr(resume, "SHARE", 0)
        patch.setattr(resume, "write_tensors", counted)
        patch.setattr(sys.modules["greedyprune.surgery.selection"], "write_tensors", counted)
        case = CASES[name]
        return greedyprune.select(
            case.model(), part(rank, 4, case.targets), checkpoint=folder,
            process_group=group_of(4), **case.options,
        )  # fmt: skip


def test_wide_layers_are_the_same(team: Team) -> None:
    """Their columns are gathered, in `select` and in `refit`."""
    expected, state = wide(0, 1)
    for selection, other in team.results(2, wide, 2):
        check_same(selection, expected)
        for name, tensor in state.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


def wide(rank: int, ranks: int) -> tuple[Selection, dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions, "MOST_FEATURES", 0)
        data = batches_of(tensors("classes"), 60) if ranks == 1 else part(rank, ranks, "classes")
        options: dict[str, Any] = {} if ranks == 1 else {"process_group": group_of(ranks)}
        selection = greedyprune.select(cnn(), data, **options)
        return selection, greedyprune.refit(cnn(), selection, data, **options).state_dict()


def test_a_sample_of_positions_is_the_same(team: Team) -> None:
    """Each rank adds up its share of it."""
    expected = sampled(0, 1)
    exact = greedyprune.select(cnn(), tensors("classes"))
    assert not expected.layers["1"].losses.equal(exact.layers["1"].losses)
    for selection in team.results(2, sampled, 2):
        check_same(selection, expected)


def sampled(rank: int, ranks: int) -> Selection:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "has_fast_products", lambda: False)
        patch.setattr(positions, "CHEAP", 0)
        patch.setattr(positions, "ROWS", 4)
        if ranks == 1:
            return greedyprune.select(cnn(), batches_of(tensors("classes"), 60))
        data = part(rank, ranks, "classes")
        return greedyprune.select(cnn(), data, process_group=group_of(ranks))


def test_buffers_are_the_first_ranks(team: Team) -> None:
    """Statistics of batches differ from rank to rank after DistributedDataParallel's last step."""
    expected = alone("in sequence")
    for selection in team.results(2, other_buffers):
        check_same(selection, expected)


def other_buffers(rank: int) -> Selection:
    model = cnn()
    buffer = model.get_buffer("2.running_mean")
    buffer += rank
    before = buffer.clone()
    data, group = part(rank, 2, "classes"), group_of(2)
    selection = greedyprune.select(model, data, process_group=group, size=0.5)
    assert torch.equal(before, buffer)
    greedyprune.refit(model, selection, data, process_group=group)
    assert torch.equal(before, buffer)
    return selection


def sharded(rank: int) -> Selection:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_device_mesh("cpu", (4,))
    model = mlp()
    fully_shard(model)
    return greedyprune.select(model, part(rank, 4, "classes"), steps=30)


def wrapped(rank: int) -> Selection:
    group = group_of(2)
    model = nn.parallel.DistributedDataParallel(mlp(), process_group=group)
    data = part(rank, 2, "classes")
    selection = greedyprune.select(model, data, process_group=group, steps=30)
    small = greedyprune.prune(model, selection)
    assert isinstance(small, nn.Sequential) and len(small[0].weight) == len(selection.kept)
    return selection
