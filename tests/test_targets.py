"""Targets of every form: none, of positions, in lists and dicts, ignored, shifted, summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune import Loss, Selection


def mlp(outputs: int = 4, *, deep: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs)]
    return nn.Sequential(*layers, nn.Tanh()) if deep else nn.Sequential(*layers)


def same(one: Selection, other: Selection, scale: float = 1.0) -> None:
    for name, layer in one.layers.items():
        found = other.layers[name]
        assert layer.order.tolist() == found.order.tolist()
        torch.testing.assert_close(found.losses, layer.losses * scale, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.dense_loss, layer.dense_loss * scale, rtol=1e-6, atol=1e-9)
        for own, others in ((layer.bound, found.bound), (layer.gap, found.gap)):
            assert (own is None) == (others is None)
            if own is not None and others is not None:
                torch.testing.assert_close(others, own * scale, rtol=1e-6, atol=1e-9)


def test_without_targets_layers_imitate() -> None:
    model, inputs = mlp(), torch.randn(40, 6)
    expected = greedyprune.select(model, (inputs, torch.randint(4, (40,))), objective="imitation")
    for data in (inputs, [(inputs,)], [{"input": inputs}], [inputs]):
        same(expected, greedyprune.select(model, data))
    assert expected.layers["0"].objective == "imitation"
    with pytest.warns(UserWarning, match=r"loss: not used, because the data have no targets"):
        greedyprune.select(model, inputs, loss="mse")
    for objective in ("loss", "fisher"):
        with pytest.raises(ValueError, match=r"data: found inputs without targets, .*imitation"):
            greedyprune.select(model, inputs, objective=objective)


WAYS: list[dict[str, Any]] = [
    {}, {"objective": Loss(candidates=4, draw="gradient")}, {"weights": "refit"},
    {"objective": Loss(batch_size=200)}, {"steps": 12}, {"backend": "reference"},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_each_position_is_a_sample(way: dict[str, Any]) -> None:
    inputs, labels = torch.randn(20, 5, 6), torch.randint(4, (20, 5))
    labels[3, 2:] = -100
    counts = labels != -100
    rows = (inputs[counts], labels[counts])
    for criterion in ("auto", nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5, 1.0]))):
        expected = greedyprune.select(mlp(), rows, loss=criterion, **way)
        same(expected, greedyprune.select(mlp(), [(inputs, labels)], loss=criterion, **way))
        layer = greedyprune.select(mlp(), (inputs, labels), loss=criterion, **way).layers["0"]
        loss = nn.CrossEntropyLoss() if criterion == "auto" else criterion
        outputs = mlp()(inputs)
        expected_loss = loss(outputs.flatten(0, 1), labels.flatten())
        assert float(layer.dense_loss) == pytest.approx(float(expected_loss), rel=1e-5)


def test_deeper_layers_take_the_loss_of_all_positions() -> None:
    inputs, labels = torch.randn(20, 5, 6), torch.randint(4, (20, 5))
    found = greedyprune.select(mlp(deep=True), (inputs, labels), objective="loss")
    rows = (inputs.flatten(0, 1), labels.flatten())
    same(greedyprune.select(mlp(deep=True), rows, objective="loss"), found)


class Maps(nn.Module):
    """Outputs (m, C, ...) of convolutions, as torch's losses take them."""

    def __init__(self, dims: int, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = nn.Conv1d if dims == 1 else nn.Conv2d
        self.a, self.b = kind(3, 10, 3, padding=1), kind(10, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("shape", [(7,), (5, 6)], ids=["sequence", "image"])
@pytest.mark.parametrize("objective", ["loss", "fisher"])
def test_torch_puts_classes_second(shape: tuple[int, ...], objective: str) -> None:
    model = Maps(len(shape))
    inputs, labels = torch.randn(12, 3, *shape), torch.randint(4, (12, *shape))
    labels[:2] = -100
    selection = greedyprune.select(model, (inputs, labels), objective=objective, size=5)
    if objective == "loss":
        expected = functional.cross_entropy(model(inputs), labels)
        assert float(selection.dense_loss) == pytest.approx(float(expected), rel=1e-5)
        pruned = functional.cross_entropy(greedyprune.prune(model, selection)(inputs), labels)
        assert float(selection.losses[-1]) == pytest.approx(float(pruned), rel=1e-4)
        fewer = greedyprune.select(model, (inputs[2:], labels[2:]), objective=objective, size=5)
        same(selection, fewer)
    monitor = greedyprune.PretrainingMonitor(model, (inputs, labels), size=5, progress=False)
    check, counts = monitor.check(), labels != -100
    right = (model(inputs).argmax(1) == labels)[counts].double().mean()
    assert check.dense_metric == pytest.approx(float(right))


@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_class_probabilities_of_positions(loss: Any) -> None:
    """Classes are second, as in torch, or last where a Linear gives the model's output."""
    criterion = nn.CrossEntropyLoss() if isinstance(loss, str) else loss
    images, likely = torch.randn(12, 3, 5, 6), torch.randn(12, 4, 5, 6).softmax(1)
    selection = greedyprune.select(Maps(2), (images, likely), objective="loss", loss=loss)
    expected = criterion(Maps(2)(images), likely)
    assert float(selection.dense_loss) == pytest.approx(float(expected), rel=1e-5)
    inputs, likely = torch.randn(20, 5, 6), torch.randn(20, 5, 4).softmax(-1)
    found = greedyprune.select(mlp(), (inputs, likely), loss=loss, objective="loss")
    rows = (inputs.flatten(0, 1), likely.flatten(0, 1))
    same(greedyprune.select(mlp(), rows, loss=loss, objective="loss"), found)


def test_which_dimension_has_the_classes() -> None:
    """With as many positions as classes, only the layer that gives the outputs tells."""
    inputs, labels = torch.randn(12, 4, 6), torch.randint(4, (12, 4))
    expected = functional.cross_entropy(mlp()(inputs).flatten(0, 1), labels.flatten())
    selection = greedyprune.select(mlp(), (inputs, labels))  # a Linear: they are last
    assert float(selection.dense_loss) == pytest.approx(float(expected), rel=1e-5)
    model, maps = Maps(1), torch.randn(12, 3, 4)
    with pytest.raises(ValueError, match=r"data: found model outputs of shape \(12, 4, 4\) with"):
        greedyprune.select(model, (maps, labels), objective="loss")
    long = torch.randn(12, 3, 9), torch.randint(4, (12, 9))
    selection = greedyprune.select(
        model, [long, (maps, labels)], objective="loss"
    )  # a longer first
    losses = [
        functional.cross_entropy(model(x), y, reduction="sum") for x, y in (long, (maps, labels))
    ]
    assert float(selection.dense_loss) == pytest.approx(float(sum(losses)) / (12 * 13), rel=1e-5)


def test_targets_of_another_shape_are_refused() -> None:
    message = r"loss: found model outputs of shape \(12, 4, 4\) with targets of shape \(12, 3\)"
    with pytest.raises(ValueError, match=message):
        greedyprune.select(mlp(), (torch.randn(12, 4, 6), torch.randint(4, (12, 3))))


SUMS: list[tuple[Callable[[str], nn.Module], Tensor]] = [
    (lambda reduction: nn.MSELoss(reduction=reduction), torch.randn(40, 4)),
    (lambda reduction: nn.CrossEntropyLoss(reduction=reduction), torch.randint(4, (40,))),
    (
        lambda reduction: nn.CrossEntropyLoss(torch.arange(1.0, 5.0), reduction=reduction),
        torch.randint(4, (40,)),
    ),
    (lambda reduction: nn.BCEWithLogitsLoss(reduction=reduction), torch.rand(40, 4)),
]


@pytest.mark.parametrize("index", range(4), ids=["mse", "cross_entropy", "weighted", "bce"])
@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 9}, {"objective": "fisher"}, {"tolerance": 0.3}, {"weights": "uniform"},
     {"objective": Loss(candidates=4, draw="gradient")}],
    ids=str,
)  # fmt: skip
def test_a_sum_selects_as_the_mean(index: int, options: dict[str, Any]) -> None:
    """The same units; losses are sums, as torch's own are."""
    loss, targets = SUMS[index]
    model, inputs = mlp(), torch.randn(40, 6)
    mean, total = (
        greedyprune.select(model, (inputs, targets), loss=loss(kind), **options)
        for kind in ("mean", "sum")
    )
    scale = float(loss("sum")(model(inputs), targets) / loss("mean")(model(inputs), targets))
    same(mean, total, scale)
    if options.get("objective") != "fisher":
        value = loss("sum")(greedyprune.prune(model, total)(inputs), targets)
        assert float(total.losses[-1]) == pytest.approx(float(value), rel=1e-4)
        dense = loss("sum")(model(inputs), targets)
        assert float(total.dense_loss) == pytest.approx(float(dense), rel=1e-5)


def test_the_monitor_reports_a_sum() -> None:
    model, data = mlp(), (torch.randn(40, 6), torch.randint(4, (40,)))
    loss = nn.CrossEntropyLoss(reduction="sum")
    check = greedyprune.PretrainingMonitor(model, data, size=5, loss=loss, progress=False).check()
    assert check.dense_loss == pytest.approx(float(loss(model(data[0]), data[1])), rel=1e-5)


def boxes_of(values: Tensor, form: str) -> Any:
    """The same numbers (m, 4) as a list of dicts, a dict, or a tuple of tensors."""
    if form == "list":
        return [{"boxes": row[:2], "more": {"size": row[2:]}} for row in values]
    if form == "dict":
        return {"boxes": values[:, :2], "more": {"size": values[:, 2:]}}
    return values[:, :2], values[:, 2:]


def values_of(targets: Any) -> Tensor:
    if isinstance(targets, list):
        return torch.stack([torch.cat([t["boxes"], t["more"]["size"]]) for t in targets])
    if isinstance(targets, dict):
        return torch.cat([targets["boxes"], targets["more"]["size"]], 1)
    return torch.cat(targets, 1)


@pytest.mark.filterwarnings("ignore:loss. a function of your own")
@pytest.mark.parametrize("form", ["list", "dict", "tuple"])
@pytest.mark.parametrize("deep", [False, True])
def test_targets_of_a_loss_of_your_own(form: str, deep: bool) -> None:
    inputs, values = torch.randn(24, 6), torch.randn(24, 4)
    model = mlp(deep=deep)
    batches = [
        (x, boxes_of(y, form)) for x, y in zip(inputs.split(10), values.split(10), strict=True)
    ]

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        return functional.mse_loss(outputs, values_of(targets).to(outputs))

    ways: list[dict[str, Any]] = [{}, {"weights": "none"}, {"objective": Loss(batch_size=24)}]
    for way in ways:
        options = {"objective": "loss", "size": 5} | way
        expected = greedyprune.select(model, (inputs, values), loss=functional.mse_loss, **options)
        found = greedyprune.select(model, batches, loss=loss, **options)
        assert expected.layers["0"].order.tolist() == found.layers["0"].order.tolist()
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=0)
    greedyprune.select(model, batches, objective="imitation", size=5)  # takes no targets at all
    dicts = [{"input": x, "labels": y} for x, y in batches]
    assert greedyprune.select(model, dicts, loss=loss, objective="fisher", size=5)
    for kind in ("mse", "cross_entropy", "bce_with_logits"):
        with pytest.raises(TypeError, match=r"data: found targets of type .*loss=a function"):
            greedyprune.select(model, batches, loss=kind, objective="loss")


@pytest.mark.filterwarnings("ignore:loss. a function of your own")
def test_a_loss_of_your_own_takes_one_shape() -> None:
    batches = [(torch.randn(2, n, 6), torch.randn(2, n, 4)) for n in (3, 5)]
    with pytest.raises(ValueError, match=r"loss: .* of all batches at once.*pad"):
        greedyprune.select(mlp(), batches, loss=lambda out, y: (out - y).square().mean())


class Supervised(nn.Module):
    """It runs only with labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(inputs)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def test_labels_reach_a_model_that_needs_them() -> None:
    inputs, labels = torch.randn(30, 6), torch.randint(4, (30,))
    batch = {"inputs": inputs, "labels": labels}
    for objective in ("imitation", "loss"):
        expected = greedyprune.select(mlp(), (inputs, labels), objective=objective)
        found = greedyprune.select(Supervised(), [batch], objective=objective)
        picks = found.layers["layers.0"].order
        assert picks.tolist() == expected.layers["0"].order.tolist()
