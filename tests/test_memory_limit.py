"""`memory_limit` changes no pick: the same Selection, or a sentence that says what would do.

test_memory.py measures that no more is taken than the limit says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import greedyprune
from greedyprune import Budget, Fisher, Imitation, Loss, Selection

pytestmark = pytest.mark.usefixtures("one_thread")

MUCH = 2**31
LIMITS = [100, 2_000, 10_000, 30_000, 80_000, 300_000, 9_000_000]


def one_layer(units: int = 40) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, units), nn.ReLU(), nn.Linear(units, 3))


def wide() -> nn.Module:
    """Its Gram matrix is larger than all its features."""
    return one_layer(300)


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)
    )


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


APART = Imitation(sequential=False)
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    **{
        f"imitation, {weights}, {make.__name__}": (
            make, {"objective": "imitation", "weights": weights, "size": 0.3}
        )
        for make in (one_layer, wide, two_layers, images)
        for weights in ("counts", "uniform", "none", "refit")
    },
    **{
        f"imitation with repeats, {make.__name__}": (
            make, {"objective": "imitation", "weights": "counts", "steps": 9}
        )
        for make in (one_layer, wide)
    },
    **{
        f"loss, {weights}, {make.__name__}": (
            make, {"objective": "loss", "weights": weights, "size": 0.2}
        )
        for make in (one_layer, images)
        for weights in ("counts", "none", "refit")
    },
    "imitation apart": (two_layers, {"objective": APART, "size": 0.4}),
    "imitation apart, counts": (two_layers, {"objective": APART, "weights": "counts"}),
    "imitation apart, images": (images, {"objective": APART, "size": 0.4}),
    "imitation, metric": (two_layers, {"objective": Imitation(metric="fisher"), "size": 0.4}),
    "imitation, tolerance": (two_layers, {"objective": "imitation", "tolerance": 0.05}),
    "loss, wide": (wide, {"objective": "loss", "steps": 9}),
    "loss, mini-batches": (one_layer, {"objective": Loss(batch_size=9), "size": 5}),
    "loss, candidates": (one_layer, {"objective": Loss(candidates=5), "size": 5}),
    "loss, by the gradient": (
        images, {"objective": Loss(candidates=5, draw="gradient"), "size": 3}
    ),
    "loss, tolerance": (one_layer, {"objective": "loss", "tolerance": 0.3}),
    "gates": (two_layers, {"objective": "fisher", "size": 0.4}),
    "gates, counts": (images, {"objective": Fisher(), "weights": "counts", "size": 0.4}),
    "auto": (images, {"size": 0.5}),
    "a budget": (images, {"size": Budget(flops=0.5)}),
    "a budget, gates": (two_layers, {"size": Budget(params=0.5), "objective": "fisher"}),
}  # fmt: skip


def data(targets: str) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    inputs = torch.randn(90, 6)
    numbers = inputs[:, :3] - inputs[:, 3:] ** 2
    chosen = numbers if targets == "numbers" else numbers.argmax(1)
    return list(zip(inputs.split(25), chosen.split(25), strict=True))


def check_same(found: Selection, expected: Selection) -> None:
    assert list(found.layers) == list(expected.layers)
    for name, layer in expected.layers.items():
        other = found.layers[name]
        assert other.order.tolist() == layer.order.tolist(), name
        torch.testing.assert_close(other.losses, layer.losses, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(other.weights, layer.weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("targets", ["classes", "numbers"])
@pytest.mark.parametrize("name", CASES)
def test_the_same_or_a_sentence(name: str, targets: str) -> None:
    make, options = CASES[name]
    model, batches, selected = make(), data(targets), 0

    def select(limit: int) -> Selection:
        return greedyprune.select(model, batches, memory_limit=limit, progress=False, **options)

    expected = select(MUCH)
    for limit in LIMITS:
        error = None
        try:
            found = select(limit)
            selected += 1
        except ValueError as raised:
            error = raised
        if error is not None:
            enough = enough_by(str(error), limit)
            assert enough > limit
            found = select(enough)
        check_same(found, expected)
    assert selected >= 1


def enough_by(message: str, limit: int) -> int:
    """The bytes that an error says would do."""
    told = re.fullmatch(rf"memory_limit: found {limit} bytes, .*; expected (\d+|that)\b.*", message)
    assert told is not None, message
    return int(re.findall(r"needs (\d+)", message)[-1] if told[1] == "that" else told[1])
