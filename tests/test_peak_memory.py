"""The peak memory of a forward pass, and budgets of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import network
from torch import Tensor, nn

import greedyprune
from greedyprune import Budget
from greedyprune.data.batches import Batch
from greedyprune.graph.costs import costs_of
from greedyprune.peak_memory import memory_of, moments_of, peaks_of
from greedyprune.sizes.curves import Curves
from greedyprune.sizes.kinds import kinds_of, sizes_in_one_share
from greedyprune.surgery.cut import cut_to
from greedyprune.surgery.trial_cut import groups_of


def batch_of(inputs: object) -> Batch:
    if isinstance(inputs, Tensor):
        return Batch((inputs,), {}, None)
    return Batch((), dict(inputs), None)  # type: ignore[call-overload]


@torch.no_grad()
def test_bytes_that_live() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    inputs = torch.randn(10, 4)
    weights, batch = 4 * (4 * 8 + 8 + 8 * 2 + 2), 4 * 10 * 4
    always = weights + batch
    hidden, output = 4 * 10 * 8, 4 * 10 * 2
    peak = always + 2 * hidden  # while the ReLU has its input and its output
    moments = moments_of(model, batch_of(inputs))
    assert moments.peak == peak
    assert moments.bytes[-1] == always + hidden + output
    model[1] = nn.ReLU(inplace=True)
    assert moments_of(model, batch_of(inputs)).peak == always + hidden + output
    peaks = peaks_of(model, batch_of(inputs), ["0", "2"])
    assert peaks == {"0": always + hidden, "2": always + hidden + output}


@pytest.mark.parametrize("name", ["resnet", "vgg", "mobilenet", "excited", "gpt2", "bert"])
@torch.no_grad()
def test_the_memory_of_other_sizes_is_foreseen(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = network(name)
    batch = batch_of(inputs)
    groups, _ = groups_of(model, batch, None, None, ())
    params = costs_of(model, groups, 0, {})["params"]
    kinds = kinds_of(model, groups, uniform=False)
    sizes_of = [sizes_in_one_share(kind, 1) for kind in kinds]
    costs = memory_of(model, kinds, sizes_of, batch, params)
    curves = Curves.of(kinds, sizes_of, [], {"memory": costs}, uniform=False)
    dense = moments_of(model, batch).peak
    assert curves.dense("memory") == dense
    for share in (0.25, 0.5, 0.75):
        widths = {group.producer: max(1, round(share * group.units)) for group in groups}
        real = moments_of(cut_to(model, groups, widths), batch).peak
        assert real < dense
        assert curves.share("memory", widths) == pytest.approx(real / dense, rel=0.02)


def test_a_budget_of_memory() -> None:
    model, inputs = network("vgg")
    selection = greedyprune.select(
        model, [inputs], objective="imitation", size=Budget(memory=0.7, params=0.8)
    )
    with torch.no_grad():
        peaks = [
            moments_of(m.eval(), batch_of(inputs)).peak
            for m in (greedyprune.prune(model, selection), model)
        ]
    assert selection.budget.left["memory"] == pytest.approx(peaks[0] / peaks[1])
    assert selection.budget.left["memory"] <= 0.7
    assert selection.budget.left["params"] <= 0.8
    with pytest.raises(ValueError, match=r"memory: found 0\.01, but .* dearest layers"):
        greedyprune.select(model, [inputs], size=Budget(memory=0.01))


class Many(nn.Module):
    """Runs its activation more often when it has fewer units."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(4, 8), nn.Linear(8, 2), activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(1 if x.shape[-1] == 8 else 3):
            x = self.activation(x)
        return self.last(x)


def test_other_operations_when_cut() -> None:
    x = torch.randn(20, 4)
    for activation in (torch.relu, nn.ReLU()):
        selection = greedyprune.select(Many(activation), x, size=Budget(memory=0.8))
        assert selection.budget.left["memory"] <= 0.8


class Masked(nn.Module):
    """Makes a large tensor whose size is not that of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * torch.ones(100, 100).tril()[0, 0]


def test_tensors_that_do_not_grow_with_the_batch() -> None:
    model, x = Masked(), torch.randn(512, 16)
    selection = greedyprune.select(model, x, size=Budget(memory=0.8))
    assert 0.6 < selection.budget.left["memory"] <= 0.8
    with torch.no_grad():
        peak = moments_of(model, batch_of(x)).peak
    assert selection.curves.dense("memory") == peak


class Compared(nn.Module):
    """Compares all samples with one another: memory grows with the square of their number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * (x @ x.T)[0, 0]


def test_tensors_that_grow_with_the_square_of_the_batch() -> None:
    model, x = Compared(), torch.randn(128, 16)
    selection = greedyprune.select(model, x, size=Budget(memory=0.95))
    with torch.no_grad():
        assert selection.curves.dense("memory") == moments_of(model, batch_of(x)).peak


def test_attention_that_runs_other_operations_when_cut() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 3))
    selection = greedyprune.select(model, torch.randn(64, 5, 16), size=Budget(memory=0.9))
    assert 0.7 < selection.budget.left["memory"] <= 0.9
