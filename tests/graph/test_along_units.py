"""Convolutions of one channel along units, as in efficient channel attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import greedyprune


class Gate(nn.Module):
    """Units, each times a gate that a convolution along the units gives."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 12), gate, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        units = self.first(x).relu()
        return self.last(units * self.gate(units[:, None])[:, 0].sigmoid())


GATES = {
    "dilation": nn.Conv1d(1, 1, 3, padding=2, dilation=2),
    "the same size": nn.Conv1d(1, 1, 5, padding="same"),
    "transposed": nn.ConvTranspose1d(1, 1, 3, padding=1),
    "two": nn.Sequential(nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 5, padding=2)),
}


@pytest.mark.parametrize("name", GATES)
def test_the_units_go(name: str) -> None:
    model, inputs = Gate(GATES[name]).eval(), torch.randn(32, 6)
    with pytest.raises(ValueError, match="a convolution goes over its units"):
        greedyprune.select(model, inputs, progress=False)
    selection = greedyprune.select(model, inputs, size=5, layers="all", progress=False)
    assert greedyprune.prune(model, selection).last.weight.shape == (4, 5)  # it compares outputs


@pytest.mark.parametrize(
    "gate",
    [
        nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Conv1d(2, 1, 3, padding=1)),
        nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"),
        nn.Sequential(nn.Conv1d(1, 1, 2, stride=2), nn.Upsample(scale_factor=2)),
    ],
)
def test_other_convolutions_over_units_are_refused(gate: nn.Module) -> None:
    table = greedyprune.layers(Gate(gate).eval(), torch.randn(32, 6))
    assert "first" in table.refused


def test_an_input_without_a_batch() -> None:
    """Its first dimension is the channels, of which there are several."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 12)
            self.conv, self.c = nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean(0)
            maps = self.a(mean).relu()[:, None, None] * self.b(mean)[None, None]  # (4, 1, 12)
            return x[:, :3] + self.c(self.conv(maps)[:, 0].mean(-1))

    model, inputs = Net().eval(), torch.randn(32, 6)
    assert list(greedyprune.layers(model, inputs)) == ["a", "conv"]
    greedyprune.prune(model, greedyprune.select(model, inputs, layers="all", progress=False))
