"""Sizes from what the network's outputs lose: `Budget(trials=)`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import network
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import greedyprune
from greedyprune import Budget, Imitation
from greedyprune.data.batches import Batch, Batches
from greedyprune.data.losses import criterion_of
from greedyprune.data.padding import Padding
from greedyprune.size_trials import divergence, held_out

LABELS = torch.arange(6) % 3


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(80, 6).double(), torch.randint(3, (80,))


class Fixed(nn.Module):
    """Gives an output that is fixed, of any structure."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> object:
        return self.output


def measured(
    dense: object, outputs: object, targets: Tensor | None = None, loss: str = "auto",
    mask: Tensor | None = None,
) -> float:  # fmt: skip
    batch = Batch((torch.zeros(6, 1),), {}, targets, Padding(mask))
    return divergence(criterion_of(loss, targets), [dense], Fixed(outputs), [batch])


def kl(dense: Tensor, outputs: Tensor) -> float:
    """torch's own, of rows of logits."""
    logs = (each.double().log_softmax(-1) for each in (outputs, dense))
    return float(functional.kl_div(*logs, reduction="batchmean", log_target=True))


def test_the_divergence_of_classes() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 6, 3)
    assert measured(one, other, LABELS) == pytest.approx(kl(one, other), rel=1e-9)
    assert measured(one, one, LABELS) == 0


def test_the_divergence_of_classes_at_positions() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 6, 3, 4)
    labels = torch.randint(3, (6, 4))
    rows = [each.movedim(1, -1).reshape(-1, 3) for each in (one, other)]
    assert measured(one, other, labels) == pytest.approx(kl(*rows), rel=1e-9)


def test_the_divergence_of_probabilities() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 6, 3)
    pairs = [
        torch.stack([each, torch.zeros_like(each)], -1).reshape(-1, 2) for each in (one, other)
    ]
    found = measured(one, other, torch.rand(6, 3), "bce_with_logits")
    assert found == pytest.approx(kl(*pairs), rel=1e-6)


def test_outputs_named_logits_are_logits_without_labels() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 6, 4, 3)
    mask = torch.rand(6, 4) > 0.4
    outputs = [SimpleNamespace(logits=each) for each in (one, other)]
    assert measured(*outputs, mask=mask) == pytest.approx(kl(one[mask], other[mask]), rel=1e-6)


def test_other_outputs_are_compared_by_shares_of_their_squares() -> None:
    torch.manual_seed(0)
    (a, b), (c, d) = torch.randn(2, 6, 3), torch.randn(2, 6, 9, 2)
    shares = [float((y - x).square().sum() / x.square().sum()) for x, y in ((a, b), (c, d))]
    assert measured([a, {"c": c}], [b, {"c": d}]) == pytest.approx(np.mean(shares), rel=1e-5)
    assert measured(a, b) == pytest.approx(shares[0], rel=1e-5)
    one_score = [SimpleNamespace(logits=each[:, :1]) for each in (a, b)]  # a regression
    assert measured(*one_score) > 0


def whole_path(model: nn.Module, name: str) -> greedyprune.Selection:
    """The path of a layer by itself, on the samples that are not held out."""
    inputs, labels = data()
    return greedyprune.select(
        model, (inputs[20:], labels[20:]), layers=[name], size=1.0,
        objective=Imitation(sequential=False, swaps=0),
    )  # fmt: skip


@pytest.mark.parametrize("by_score", [False, True])
def test_the_sizes_lose_least_of_all_that_fit(by_score: bool) -> None:
    """All sizes are measured; the reference prunes, runs torch's loss and tries every pair."""
    model, (inputs, labels) = mlp(), data()
    dense = model(inputs[:20])

    def lost(small: nn.Module) -> float:
        return (
            float((small(inputs[:20]) - dense).square().sum())
            if by_score
            else kl(dense, small(inputs[:20]))
        )

    paths = {name: whole_path(model, name) for name in ("0", "2")}
    losses = {
        name: np.maximum.accumulate(
            [lost(greedyprune.prune(model, path.at(k))) for k in range(len(path.order), 0, -1)]
        )[::-1]
        for name, path in paths.items()
    }
    score = (lambda small: -lost(small)) if by_score else None
    budget = Budget(params=0.6, trials=20, score=score)
    selection = greedyprune.select(model, (inputs, labels), size=budget, objective="imitation")
    cost, report = selection.costs["params"], selection.budget
    best = min(
        losses["0"][i - 1] + losses["2"][j - 1]
        for i, j in itertools.product(range(1, 8), range(1, 6))
        if cost.at({"0": i, "2": j}) <= 0.6 * cost.dense
    )
    assert report.objective == pytest.approx(best, rel=1e-6)
    kept = {name: len(layer.kept) for name, layer in selection.layers.items()}
    assert sum(losses[name][k - 1] for name, k in kept.items()) == pytest.approx(best, rel=1e-6)


def test_trials_are_forward_passes_of_the_samples_that_are_held_out() -> None:
    model, (inputs, labels) = mlp(), data()
    scored = list[int]()

    def score(small: nn.Module) -> float:
        scored.append(sum(parameter.numel() for parameter in small.parameters()))
        return -float((small(inputs) - model(inputs)).square().sum())

    greedyprune.select(model, (inputs, labels), size=Budget(flops=0.5, trials=20, score=score))
    dense = sum(parameter.numel() for parameter in model.parameters())
    assert scored[0] == dense and len(scored) == 1 + 6 + 4  # every size of 7 and of 5 but the whole
    assert max(scored[1:]) < dense


@pytest.mark.parametrize("batch_size", [3, 7, 50])
def test_samples_that_are_held_out_are_in_no_other_pass(batch_size: int) -> None:
    torch.manual_seed(0)
    loader = DataLoader(torch.arange(40.0)[:, None], batch_size=batch_size, shuffle=True)
    held, rest = held_out(Batches(loader, nn.Linear(1, 1)))
    first = torch.cat([batch.args[0] for batch in held]).flatten()
    assert len(first) == 10
    for _ in range(2):
        others = torch.cat([batch.args[0] for batch in rest]).flatten()
        assert torch.cat([first, others]).sort().values.equal(torch.arange(40.0))


NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "streams under norms": ("llama", {"layers": "all"}),
    "a stream of convolutions": ("resnet", {"layers": "all"}),
    "uniform": ("gpt2", {}),
    "gates": ("mobilenet", {"objective": "fisher"}),
    "weights as they are": ("vgg", {"weights": "none"}),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_keep_to_their_budgets(kind: str) -> None:
    name, options = NETWORKS[kind]
    model, inputs = network(name)
    share = 0.95 if name == "gpt2" else 0.8
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [inputs] * 4
    if "objective" in options:
        with torch.no_grad():
            batches = [(inputs, model(inputs).argmax(-1))] * 4
    budget = Budget(params=share, trials=60, uniform=kind == "uniform")
    selection = greedyprune.select(model, batches, size=budget, **options)
    params, small = selection.change("params"), greedyprune.prune(model, selection)
    assert params is not None and params[1] <= share * params[0]
    assert sum(parameter.numel() for parameter in small.parameters()) <= share * params[0]
    assert all(before[key].equal(value) for key, value in model.state_dict().items())


WRONG: list[tuple[Callable[[], Budget], type[Exception], str]] = [
    (lambda: Budget(flops=0.5, trials=2.5), TypeError, "trials: found 2.5, expected an int"),
    (lambda: Budget(flops=0.5, trials=-1), ValueError, "trials: found -1, expected at least 0"),
    (lambda: Budget(flops=0.5, trials=9, score=3), TypeError, "score: found 3, expected a func"),
    (lambda: Budget(flops=0.5, score=len), ValueError, "score: found one without trials"),
]


@pytest.mark.parametrize(("make", "kind", "message"), WRONG)
def test_wrong_budgets(make: Callable[[], Budget], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("budget", "samples", "kind", "message"),
    [
        (Budget(flops=0.5, trials=1), 80, ValueError, "trials: found 1, expected at least 2, one"),
        (Budget(flops=0.5, trials=4), 3, ValueError, "trials: found 3 samples in the data, exp"),
        (
            Budget(flops=0.5, trials=4, score=lambda model: None), 80, TypeError,
            "score: your function returned NoneType, expected one number",
        ),
        (
            Budget(flops=0.5, trials=4, score=lambda model: float("nan")), 80, ValueError,
            "score: your function returned nan, expected a finite number",
        ),
    ],
)  # fmt: skip
def test_wrong_trials(budget: Budget, samples: int, kind: type[Exception], message: str) -> None:
    inputs, labels = data()
    with pytest.raises(kind, match=message):
        greedyprune.select(mlp(), (inputs[:samples], labels[:samples]), size=budget)


def test_trials_are_not_repeated_after_an_interruption(tmp_path: Any) -> None:
    model, (inputs, labels) = mlp(), data()
    calls = list[int]()

    def score(small: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 6 and not tmp_path.joinpath("again").exists():
            raise KeyboardInterrupt
        return -float((small(inputs) - model(inputs)).square().sum())

    def select(folder: str | None) -> list[int]:
        budget = Budget(flops=0.5, trials=8, score=score)
        where = None if folder is None else tmp_path / folder
        selection = greedyprune.select(model, (inputs, labels), size=budget, checkpoint=where)
        return [len(layer.kept) for layer in selection.layers.values()]

    with pytest.raises(KeyboardInterrupt):
        select("folder")  # in the trials of the second layer
    tmp_path.joinpath("again").touch()
    calls.clear()
    sizes = select("folder")
    assert len(calls) == 1 + 4  # the dense score again, and the second layer's four
    assert sizes == select(None)
