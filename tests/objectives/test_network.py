"""`objective="loss"` inside networks that are out of the ordinary, and with odd batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import loss_of
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune import Loss
from greedyprune.data.batches import Batch
from greedyprune.graph import executors
from greedyprune.graph.executor import GraphExecutor
from greedyprune.graph.executors import GraphExecutors
from greedyprune.graph.networks import tensors_of
from greedyprune.objectives.network import Network


class Computed(nn.Module):
    """Batch normalisation with a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.norm, self.c = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        norm, hidden = self.norm, self.b(self.a(x).relu())
        weight = norm.weight.abs() + 1e-3
        hidden = functional.batch_norm(
            hidden, norm.running_mean, norm.running_var, weight, norm.bias
        )
        return self.c(hidden.relu().mean((2, 3)))


class Promoted(nn.Module):
    """A sum of bfloat16 and float32, which is float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.b.bfloat16()
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.c((self.b(self.a(x).relu().bfloat16()) + self.shift).relu())


def _folded(bfloat16: bool, norm: bool) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    nn.init.normal_(model[3].weight)  # type: ignore[arg-type]
    nn.init.normal_(model[3].running_mean)  # type: ignore[arg-type]
    if bfloat16:
        model.bfloat16()
    if norm:
        model[3].float()
    return model


@pytest.mark.parametrize("name", ["computed", "promoted", "bfloat16", "float32 norm"])
@pytest.mark.parametrize("together", [1, 7])
def test_types_and_normalisations_that_stay_as_they_are(
    name: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows a layer does what torch does, mixed types and computed weights included."""
    monkeypatch.setattr(Network, "_together", lambda *_: together)
    torch.manual_seed(0)
    model: nn.Module = {
        "computed": Computed, "promoted": Promoted, "bfloat16": lambda: _folded(True, False),
        "float32 norm": lambda: _folded(True, True),
    }[name]()  # fmt: skip
    inputs = torch.randn(20, 5) if name == "promoted" else torch.randn(20, 3, 7, 7)
    inputs = inputs.bfloat16() if "oat" in name else inputs
    targets = model.eval()(inputs).detach().float() + 0.3 * torch.randn(20, 3)
    layer = "0" if "oat" in name else "a"
    selection = greedyprune.select(
        model, [(inputs, targets)], layers=layer, objective=Loss(batch_size=16), loss="mse",
        size=4, weights="none",
    )  # fmt: skip
    with torch.no_grad():
        outputs = greedyprune.prune(model, selection)(inputs).double()
    loss = functional.mse_loss(outputs, targets.double())
    assert float(selection.losses[-1]) == pytest.approx(float(loss), rel=1e-5)


class Twice(nn.Module):
    """What a ReLU and a sum take is needed once more, by another name perhaps."""

    def __init__(self, alias: bool) -> None:
        super().__init__()
        self.alias = alias
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.b(self.a(x).relu())
        other = hidden.view(-1, 6) if self.alias else hidden
        hidden = self.c(other.relu() - hidden)
        return self.last((hidden + 1.0) * hidden)


@pytest.mark.parametrize("alias", [False, True])
def test_what_is_needed_again_is_not_overwritten(alias: bool) -> None:
    torch.manual_seed(0)
    model, pair = Twice(alias), (torch.randn(30, 5), torch.randn(30, 3))
    selection = greedyprune.select(model, [pair], layers="a", objective="loss", size=3)
    for k in (1, 2, 3):
        small = greedyprune.prune(model, selection.at(k))
        assert float(selection.losses[k - 1]) == pytest.approx(loss_of(small, pair), rel=1e-5)


class Float(nn.Module):
    """Bytes that it takes to float32 itself; half of its units are dead."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        nn.init.constant_(self.a.bias[:4], -9.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x.float() / 255).relu()).tanh())


def test_models_that_only_run_in_float32() -> None:
    """Dead units tie, and float64 can't tell them apart, either."""
    torch.manual_seed(0)
    model, inputs = Float(), torch.randint(256, (40, 5), dtype=torch.uint8)
    data = inputs, model(inputs).detach()
    options = {"layers": "a", "objective": "loss", "weights": "none"}
    selection = greedyprune.select(model, data, size=6, **options)
    assert set(selection.order[:4].tolist()) == {4, 5, 6, 7} and selection.order[4:].tolist() == [
        0,
        1,
    ]
    with pytest.raises(ValueError, match="backend: found 'reference', which runs the network in f"):
        greedyprune.select(model, data, size=6, backend="reference", **options)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_loss_with_tensors_of_its_own(backend: str) -> None:
    """It gets outputs of the model's type, also where float64 decides."""
    torch.manual_seed(0)
    model, weight = Float(), torch.tensor([1.0, 2.0, 3.0])
    model = nn.Sequential(model.a, nn.ReLU(), model.b, nn.Tanh(), model.c)
    data = torch.randn(40, 5), torch.randint(3, (40,))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, weight)

    options = {"layers": "0", "objective": "loss", "size": 6, "weights": "none"}
    selection = greedyprune.select(model, data, loss=loss, backend=backend, **options)
    known = greedyprune.select(model, data, loss=nn.CrossEntropyLoss(weight), **options)
    torch.testing.assert_close(selection.losses, known.losses, rtol=1e-6, atol=0)


class Unseparated(nn.Module):
    """Samples that do not go through by themselves."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.BatchNorm1d(6, track_running_stats=False)
        self.a, self.b, self.c = nn.Linear(48, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, more: Any = None) -> Tensor:
        hidden = self.b(self.a(x).relu())
        if self.kind == "statistics":
            hidden = self.norm(hidden)
        elif self.kind == "nested":
            hidden = hidden + more[0]
        elif self.kind == "mask":
            hidden = (more.softmax(-1) @ hidden).mean(1)
        elif self.kind == "positions":
            hidden = hidden.flatten(0, 1)
        return self.c(hidden.tanh())


@pytest.mark.parametrize("kind", ["statistics", "nested", "mask", "positions", "one"])
def test_batches_that_can_not_be_parted(kind: str) -> None:
    """The loss is that of the batches as they are: a mask as long as the batch, one sample, ..."""
    torch.manual_seed(0)
    model = Unseparated(kind).eval()
    shape = {"mask": (40, 40, 48), "positions": (40, 4, 48), "one": (48,)}.get(kind, (40, 48))
    inputs: dict[str, Any] = {"x": torch.randn(shape)}
    if kind in ("nested", "mask"):
        inputs["more"] = (torch.randn(40, 6),) if kind == "nested" else torch.randn(40, 40)
    targets = torch.randn(model(**inputs).shape)
    batch = inputs | {"labels": targets}
    options: dict[str, Any] = {"layers": "a", "loss": "mse", "size": 3}
    selection = greedyprune.select(model, [batch], objective="loss", **options)
    loss = functional.mse_loss(model(**inputs), targets)
    assert float(selection.dense_loss) == pytest.approx(float(loss), rel=1e-5)
    if kind == "positions":
        with pytest.raises(ValueError, match=r"batch_size: found targets of shape \(160, 3\) for"):
            greedyprune.select(model, [batch], objective=Loss(batch_size=4), **options)


def test_derivatives_are_taken_batch_by_batch() -> None:
    """No more is kept for ten batches than for one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    batch, live, peaks = (torch.randn(8, 4), torch.randn(8, 2)), set[int](), list[int]()

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            live.add(id(self))
            peaks[-1] = max(peaks[-1], len(live))

        def __del__(self) -> None:
            live.discard(id(self))

    for count in (1, 10):
        peaks.append(0)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            greedyprune.select(
                model, [batch] * count, layers="0", size=2,
                objective=Loss(candidates=2, draw="gradient"),
            )  # fmt: skip
    assert 0 < peaks[1] <= 2 * peaks[0]


def test_what_functions_of_the_users_own_must_give() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    data = torch.randn(8, 4), torch.randint(2, (8,))

    def errors(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) != targets).double().mean()

    def accurate(outputs: Tensor, targets: Tensor) -> float:
        return 1 - float(errors(outputs, targets))

    def select(metric: Any) -> greedyprune.Selection:
        return greedyprune.select(
            model, data, layers="0", tolerance=0.2, objective=Loss(metric=metric)
        )

    measured = select(accurate)
    outputs = greedyprune.prune(model, measured)(data[0])
    assert accurate(outputs, data[1]) >= 0.8 * accurate(model(data[0]), data[1])
    with pytest.raises(TypeError, match="metric: your function returned str, expected one number"):
        select(lambda *_: "good")
    with pytest.raises(ValueError, match="metric: your function returned nan, expected a finite"):
        select(lambda *_: torch.nan)
    for objective in (Loss(candidates=2, draw="gradient"), "fisher"):
        with pytest.raises(ValueError, match="loss: your function has no derivative, expected one"):
            greedyprune.select(model, data, layers="0", loss=errors, objective=objective)
    with pytest.raises(TypeError, match="loss: your function returned float, expected a tensor"):
        greedyprune.select(model, data, loss=lambda *_: 3.0, layers="0", objective="fisher")


class InPlace(nn.Module):
    """Tensors that change in place, in part or under another name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.before = kind, nn.Linear(5, 7)
        self.a, self.b, self.c = nn.Linear(7, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.b(self.a(self.before(x).relu()).relu()).tanh()
        if self.kind == "slice":
            hidden[:, :2] *= 3
        elif self.kind == "view":
            hidden.view(-1).mul_(3)
        elif self.kind == "constant":
            shift = torch.zeros(6)
            shift[2:4] = 1
            hidden = hidden + shift
        elif self.kind == "whole":
            hidden = hidden.view(-1).mul_(3).view(-1, 6)
            hidden += 1
        return self.c(hidden)


@pytest.mark.parametrize("kind", ["slice", "view", "constant", "whole"])
def test_what_changes_in_place(kind: str) -> None:
    torch.manual_seed(0)
    model, inputs = InPlace(kind), torch.randn(40, 5)
    data = inputs, torch.randn(40, 3)
    selection = greedyprune.select(model, data, layers="a", objective="loss", size=3)
    for k in (1, 3):
        small = greedyprune.prune(model, selection.at(k))
        assert float(selection.losses[k - 1]) == pytest.approx(loss_of(small, data), rel=1e-5)
    in_sequence = greedyprune.select(model, data, layers="all", size=0.5, objective="imitation")
    assert "a" in in_sequence.layers
    executor = GraphExecutor(model, Batch((inputs,), {}, None))  # what selection in sequence runs
    values = executor.inputs(Batch((inputs,), {}, None))
    assert torch.allclose(executor.outputs(values, tensors_of(model), 0), model(inputs))
    greedyprune.prune(model, in_sequence)
    greedyprune.refit(model, in_sequence, data)


@pytest.mark.parametrize("most", [1, 16])
def test_more_shapes_than_there_are_traces(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself runs on the others."""
    monkeypatch.setattr(executors, "MOST_SHAPES", most)
    monkeypatch.setattr(GraphExecutors, "_with_open_sizes", lambda self, form, batch: None)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 8, 1), nn.ReLU(), nn.Conv1d(8, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    pairs = [(torch.randn(5, 2, n), torch.randn(5, 2)) for n in (3, 4, 6)]
    selection = greedyprune.select(model, pairs, layers="0", objective="loss", size=3)
    losses = [loss_of(greedyprune.prune(model, selection), pair) for pair in pairs]
    assert float(selection.losses[-1]) == pytest.approx(sum(losses) / 3, rel=1e-5)
