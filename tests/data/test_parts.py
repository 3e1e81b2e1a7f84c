"""How many samples of a batch run at a time."""

import pytest
import torch
from torch import Tensor, nn

from greedyprune.data import parts
from greedyprune.data.batch import samples_of
from greedyprune.data.batches import Batches
from greedyprune.data.parts import Parts
from greedyprune.runtime.progress import bars

WIDE = 64  # the bytes of a sample's largest activation: 16 numbers


class Narrow(nn.Module):
    """Its output is larger than what is inside."""

    def __init__(self, *, together: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 100)
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.last(hidden - hidden.mean(0) if self.together else hidden)


class OfOneSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).view(10, 16).sum(1)


def sizes(model: nn.Module, data: object) -> list[int | None]:
    every = Parts(model, Batches(data, model))
    assert samples_of(every.first()) == samples_of(next(iter(every.all(bars(False)))))
    return [samples_of(part) for part in every.all(bars(False))]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ACTIVATION", 4 * WIDE)


def test_parts_are_as_small_as_activations_ask_for() -> None:
    data = [torch.randn(10, 4), torch.randn(3, 4)]
    assert sizes(Narrow(), data) == [4, 3, 3, 3]
    assert sizes(Narrow(), [torch.randn(1, 4)]) == [1]


def test_samples_that_belong_together_stay_together() -> None:
    data = [torch.randn(10, 4)]
    assert sizes(Narrow(together=True), data) == [10]
    assert sizes(OfOneSize(), data) == [10]


def test_large_activations_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ACTIVATION", WIDE - 1)
    assert sizes(Narrow(), [torch.randn(3, 4)]) == [1, 1, 1]
    monkeypatch.setattr(parts, "ACTIVATION", 10 * WIDE)
    assert sizes(Narrow(), [torch.randn(10, 4)]) == [10]


def test_no_hook_stays() -> None:
    model = Narrow()
    sizes(model, [torch.randn(10, 4)])
    assert not any(module._forward_hooks for module in model.modules())
