"""What torch.export says of a model that it can't trace: one sentence, with the model's line."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import greedyprune


class Branch(nn.Module):
    """What it computes depends on the numbers."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return x + 1


def model() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.ReLU(), Branch())
    return nn.Sequential(nn.Linear(5, 8), inner, nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def refit(model: nn.Module, x: Tensor) -> object:
    selection = greedyprune.select(model, x, layers={"0": "2"}, objective="imitation")
    return greedyprune.refit(model, selection, x)


def monitor(model: nn.Module, x: Tensor) -> object:
    watching = greedyprune.PretrainingMonitor(model, (x, x[:, :3]), loss="mse")
    return watching.step(1)


CALLS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "layers": greedyprune.layers,
    "select": lambda model, x: greedyprune.select(model, x),
    "refit": refit,
    "monitor": monitor,
}


@pytest.mark.parametrize("call", CALLS)
def test_the_line_of_the_model_is_named(call: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=r"^model: torch.export can't trace it \(") as error:
        CALLS[call](net, torch.randn(20, 5))
    message = str(error.value)
    assert "in '1.1' (Branch), test_trace_errors.py line " in message
    assert "if x.sum() > 0:" in message
    assert "\n" not in message and len(message) < 500
    assert error.value.__suppress_context__  # torch's own lines are not printed
    assert ("layers={producer: consumer}" in message) == (call in ("select", "monitor"))


def test_modules_of_torch_are_named_without_a_line() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(9, 3))
    message = r"^example: the model can't run on it \([^\n]+, in '2' \(Linear\)\)$"
    with pytest.raises(ValueError, match=message):
        greedyprune.layers(copy.deepcopy(net), torch.randn(20, 5))
