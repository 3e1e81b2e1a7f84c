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
from greedyprune.data.divergence import divergence, parts_of
from greedyprune.data.halves import held_out
from greedyprune.data.losses import criterion_of
from greedyprune.data.padding import Padding
from greedyprune.size_trials import _spread, held_out_of

LABELS = torch.arange(6) % 3


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(80, 6).double(), torch.randint(3, (80,))


def measured(
    dense: object, outputs: object, targets: Tensor | None = None, loss: str = "auto",
    mask: Tensor | None = None,
) -> float:  # fmt: skip
    batch = Batch((torch.zeros(6, 1),), {}, targets, Padding(mask))
    criterion = criterion_of(loss, targets)
    one, other = (parts_of(criterion, each, batch) for each in (dense, outputs))
    return divergence([one], [other])


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


def held(inputs: Tensor) -> Tensor:
    return held_out(Batch((inputs,), {}, None), one_in=4)


def whole_path(model: nn.Module, name: str) -> greedyprune.Selection:
    """The path of a layer by itself, on the samples that are not held out."""
    inputs, labels = data()
    rest = ~held(inputs)
    return greedyprune.select(
        model, (inputs[rest], labels[rest]), layers=[name], size=1.0,
        objective=Imitation(sequential=False, swaps=0),
    )  # fmt: skip


@pytest.mark.parametrize("by_score", [False, True])
def test_the_sizes_lose_least_of_all_that_fit(by_score: bool) -> None:
    """All sizes are measured; the reference prunes, runs torch's loss and tries every pair."""
    model, (inputs, labels) = mlp(), data()
    samples = inputs[held(inputs)]
    assert 10 <= len(samples) <= 30
    dense = model(samples)

    def lost(small: nn.Module) -> float:
        return (
            float((small(samples) - dense).square().sum())
            if by_score
            else kl(dense, small(samples))
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


class Mixing(nn.Module):
    """Samples have no outputs of their own."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("model", [nn.Linear(1, 1), Mixing()])
@pytest.mark.parametrize("batch_size", [2, 7])
def test_samples_that_are_held_out_are_in_no_other_pass(model: nn.Module, batch_size: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(280, 1)
    loader = DataLoader(inputs, batch_size=batch_size, shuffle=isinstance(model, nn.Linear))
    held, rest = held_out_of(model, Batches(loader, model))
    first = torch.cat([batch.args[0] for batch in held]).flatten()
    assert 30 <= len(first) <= 110
    if isinstance(model, Mixing):
        assert all(len(batch.args[0]) == batch_size for batch in (*held, *rest))
    for _ in range(2):
        others = torch.cat([batch.args[0] for batch in rest]).flatten()
        assert torch.cat([first, others]).sort().values.equal(inputs.flatten().sort().values)


def test_at_most_256_samples_are_used_and_none_of_the_quarter_is_in_a_path() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(1, 1), torch.randn(2000, 1)
    samples, rest = held_out_of(model, Batches(inputs, model))
    assert sum(len(batch.args[0]) for batch in samples) == 256
    assert torch.cat([batch.args[0] for batch in rest]).equal(inputs[~held(inputs)])


class Drawing(nn.Module):
    """Draws random numbers in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()) + torch.randn(len(x), 3, dtype=x.dtype)


def test_random_numbers_are_the_same_in_every_trial() -> None:
    torch.manual_seed(0)
    model, (inputs, _) = Drawing().double(), data()
    batches = list(inputs.split(4))
    budget = Budget(params=0.7, trials=20)
    selection = greedyprune.select(model, batches, size=budget, objective="imitation")
    assert selection.budget.objective < 0.1  # the noise alone is more than half of the squares


def test_a_score_may_change_the_weights() -> None:
    model, (inputs, labels) = mlp(), data()
    starts = list[Tensor]()

    def score(small: nn.Module) -> float:
        starts.append(small[4].bias.detach().clone())
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(1)
        return float(len(starts))

    greedyprune.select(model, (inputs, labels), size=Budget(flops=0.5, trials=8, score=score))
    assert len(starts) > 4 and all(start.equal(model[4].bias) for start in starts)


def test_masked_classes_do_no_harm() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 6, 3)
    both = [functional.pad(each, (0, 1), value=-torch.inf) for each in (one, other)]
    assert measured(*both, LABELS) == pytest.approx(kl(one, other), rel=1e-6)


def test_maps_of_logits_have_their_classes_first() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 6, 3, 4, 5)
    rows = [each.movedim(1, -1).reshape(-1, 3) for each in (one, other)]
    outputs = [SimpleNamespace(logits=each) for each in (one, other)]
    assert measured(*outputs) == pytest.approx(kl(*rows), rel=1e-6)


class Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()).argmax(1)


def test_outputs_that_can_not_be_compared_are_told() -> None:
    inputs = torch.randn(80, 6)
    with pytest.raises(ValueError, match="trials: found outputs without floating-point numbers"):
        greedyprune.select(Classes(), inputs, size=Budget(flops=0.5, trials=8))


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        (8, 5, [0, 1, 2, 3, 4]), (64, 5, [0, 3, 7, 15, 31]), (64, 1, [15]), (5, 9, [0, 1, 2, 3]),
        (1, 3, []),
    ],
)  # fmt: skip
def test_trials_are_spread_over_the_sizes(sizes: int, count: int, expected: list[int]) -> None:
    found = _spread(sizes, count)
    assert len(found) == min(count, sizes - 1)
    assert found == expected or sizes == 8


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
    torch.manual_seed(0)
    batches: list[Any]
    if isinstance(inputs, dict):
        ids = inputs["input_ids"]
        every = torch.randint(int(ids.max()), (40, *ids.shape[1:])).split(8)
        batches = [{"input_ids": each} for each in every]
    else:
        batches = list(torch.randn(40, *inputs.shape[1:], dtype=inputs.dtype).split(8))
    if "objective" in options:
        with torch.no_grad():
            batches = [(batch, model(batch).argmax(-1)) for batch in batches]
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
        (Budget(flops=0.5, trials=4), 1, ValueError, "trials: found 1 batches, which can't be"),
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
        if len(calls) == 8 and not tmp_path.joinpath("again").exists():
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
