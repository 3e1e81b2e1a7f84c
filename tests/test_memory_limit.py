"""`memory_limit` changes no pick: the same Selection, or a sentence that says what would do.

test_memory.py measures that no more is taken than the limit says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import greedyprune
from greedyprune import Budget, Fisher, Imitation, Loss, Selection
from greedyprune.graph.groups import Group
from greedyprune.objectives import fisher, imitation, memory

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
            selection = select(limit)
            selected += 1
        except ValueError as raised:
            error = raised
        if error is not None:
            enough = enough_by(str(error), limit)
            assert enough > limit
            selection = select(enough)
        check_same(selection, expected)
    assert selected >= 1


def enough_by(message: str, limit: int) -> int:
    """The bytes that an error says would do."""
    told = re.fullmatch(
        rf"memory_limit: found {limit} bytes, .*; expected (?:at least )?(\d+|that)\b.*", message
    )
    assert told is not None, message
    return int(re.findall(r"needs (\d+)", message)[-1] if told[1] == "that" else told[1])


def test_too_little_is_a_sentence() -> None:
    """It says what would do; that does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 4, 3))
    data = [torch.randn(8, 3, 7, 7)]
    expected = (
        r"'0' needs (\d+) for .* and (\d+) to .*; expected at least (\d+), "
        r"or (\d+) with Imitation\(swaps=0\)"
    )
    with pytest.raises(ValueError, match=expected) as raised:
        greedyprune.select(model, data, size=0.5, memory_limit=10_000)
    told = re.search(expected, str(raised.value))
    assert told is not None
    sums, work, enough, less = map(int, told.groups())
    assert sums + work == enough > less
    greedyprune.select(model, data, size=0.5, memory_limit=enough)
    greedyprune.select(model, data, size=0.5, memory_limit=less, objective=Imitation(swaps=0))
    for limit, swaps in ((enough - 1, None), (less - 1, 0)):
        with pytest.raises(ValueError, match="memory_limit: found"):
            greedyprune.select(
                model, data, size=0.5, memory_limit=limit, objective=Imitation(swaps=swaps)
            )


def test_least_squares_from_features_is_counted_too() -> None:
    model = one_layer(2000)
    data = [(torch.randn(16, 6), torch.randint(3, (16,)))]
    message = r"memory_limit: found 1000000 bytes, but least squares on .* '0' needs 81077856 byt"
    with pytest.raises(ValueError, match=message):
        greedyprune.select(model, data, size=1838, weights="refit", memory_limit=10**6)


def test_a_budget_counts_layers_that_are_judged_otherwise() -> None:
    """Here by the model's own loss, which takes no sums; the path for the size does."""
    data = [(torch.randn(16, 6), torch.randint(3, (16,)))]
    for objective in ("auto", "loss"):
        with pytest.raises(ValueError, match="memory_limit: found 90000 bytes, but layer '0' nee"):
            greedyprune.select(
                one_layer(200), data, size=Budget(params=0.5), objective=objective,
                memory_limit=90_000,
            )  # fmt: skip


def test_what_does_not_fit_together_takes_turns() -> None:
    """The picks are those of all layers at once; an iterator can't be gone through twice."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3)
    )
    data = [(torch.randn(60, 6), torch.randint(3, (60,)))]
    for limit, module, options in (
        (80_000, imitation, {"objective": Imitation(swaps=0, sequential=False)}),
        (28_000, fisher, {"objective": "fisher"}),
    ):  # fmt: skip
        expected = greedyprune.select(model, data, size=9, **options)
        with pytest.MonkeyPatch.context() as patch:
            rounds = counted_turns(patch, module)
            selection = greedyprune.select(model, data, size=9, memory_limit=limit, **options)
            assert rounds == [2]
        for name, layer in expected.layers.items():
            assert selection.layers[name].order.equal(layer.order)
    with pytest.raises(ValueError, match="all 2 layers from one pass over an iterator need up to"):
        greedyprune.select(model, iter(data), size=9, memory_limit=28_000, objective="fisher")


def counted_turns(patch: pytest.MonkeyPatch, module: ModuleType) -> list[int]:
    """How many turns the layers of an objective's module take, once for each call of `turns`."""
    counts, turns = list[int](), memory.turns

    def counted(*args: Any, **options: Any) -> list[list[Group]]:
        groups = turns(*args, **options)
        counts.append(len(groups))
        return groups

    patch.setattr(module, "turns", counted)
    return counts
