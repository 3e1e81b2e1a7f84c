"""Columns of the Gram matrix, the paths on them, and near ties that float32 cannot decide."""

from functools import lru_cache

import pytest
import torch
from backends import Kernels
from kernel_problems import TIE
from torch import Tensor

from greedyprune.data.losses import Criterion
from greedyprune.kernels import cpu, ops, reference
from greedyprune.kernels.loop import greedy
from greedyprune.kernels.path import Exact, Moments, Rule
from greedyprune.objectives import output_loss as objectives

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@each_dtype
@pytest.mark.parametrize(("units", "samples", "wanted"), [(1, 1, 1), (50, 4100, 17), (7, 33, 70)])
def test_gram_columns(
    instruction_set: str, units: int, samples: int, wanted: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    features = torch.randn(units, samples + 3).to(dtype)[:, :samples]
    outgoing = torch.randn(units, 3, dtype=torch.float64)
    picked = torch.randint(units, (wanted,))
    out = torch.empty(wanted, units, dtype=torch.float64)
    ops.gram_columns(features, outgoing, picked, out)
    h = features.double()
    expected = (h[picked] @ h.T) * (outgoing[picked] @ outgoing.T)
    size = (h.square().sum(1) * outgoing.square().sum(1)).sqrt()
    error = (out - expected).abs() / (size[picked][:, None] * size)
    assert error.max() < ops.columns_rounding(dtype)
    assert error.max() < {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]


def quadratic(units: int = 300, samples: int = 200, seed: int = 0) -> tuple[Tensor, Moments]:
    """A Gram matrix of units that resemble one another, as a layer's do."""
    rng = torch.Generator().manual_seed(seed)
    basis = torch.randn(12, samples, generator=rng, dtype=torch.float64)
    mixing = torch.randn(units, 12, generator=rng, dtype=torch.float64)
    noise = torch.randn(units, samples, generator=rng, dtype=torch.float64)
    phi = mixing @ basis + 0.3 * noise
    t = torch.randn(samples, generator=rng, dtype=torch.float64)
    gram = phi @ phi.T
    norm = float(t.square().sum())
    moments = Moments(samples, samples, gram.diagonal().clone(), phi @ t, norm, 0.0, 0.0, 0.0)
    return gram, moments


@pytest.mark.parametrize("capacity", [16, 40, 1000])
@pytest.mark.parametrize(
    "rule", [Rule(120, 301, True), Rule(300, 300, False)], ids=["repeats", "all units"]
)
def test_columns_give_the_path_of_the_gram_matrix(on: Kernels, rule: Rule, capacity: int) -> None:
    gram, moments = quadratic()
    fetched: list[int] = []

    def columns(units: Tensor, out: Tensor) -> None:
        assert len(units.unique()) == len(units) <= 16
        fetched.extend(units.tolist())
        out.copy_(gram[units])

    path = on.greedy_columns(columns, moments, rule, capacity=capacity)
    expected = reference.greedy_gram(gram, moments, rule)
    assert path.order.equal(expected.order)
    torch.testing.assert_close(path.losses, expected.losses, rtol=1e-9, atol=1e-12)
    if capacity == 1000:
        assert len(fetched) == len(set(fetched))  # no column is fetched twice


def test_coming_picks_are_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where units resemble one another, fewer columns are fetched than by the current scores."""
    gram, moments = quadratic(units=1000, samples=2000)

    def fetches() -> int:
        fetched: list[int] = []

        def columns(units: Tensor, out: Tensor) -> None:
            fetched.append(len(units))
            out.copy_(gram[units])

        path = ops.greedy_columns(columns, moments, Rule(200, 1001, True))
        assert len(path.order.unique()) > 40
        return len(fetched)

    foreseen = fetches()
    monkeypatch.setattr(cpu, "FORESEEN_RANK", 0)  # no approximation of the missing columns
    by_scores = fetches()
    assert foreseen < 0.7 * by_scores


def test_cost_model_prefers_columns_for_few_picks() -> None:
    assert objectives.columns_are_cheaper(8192, 200)
    assert not objectives.columns_are_cheaper(8192, 4096)


class Twins:
    """Pairs of units that differ by less than float32 can tell, but do differ; and the path."""

    def __init__(self, loss: str) -> None:
        torch.manual_seed(0)
        units, samples, outputs = 400, 3000, 3
        half = torch.randn(units // 2, samples).relu()
        self.features = torch.cat([half, half * (1 + 4e-6 * torch.randn(units // 2, 1))])
        weights = torch.randn(units // 2, outputs, dtype=torch.float64)
        change = 1 + 2e-5 * torch.randn(units // 2, 1).double()
        self.outgoing = torch.cat([weights, weights * change])
        labels = torch.randint(outputs, (samples,))
        targets = {
            "mse": torch.randn(samples, outputs),
            "cross_entropy": labels,
            "bce_with_logits": torch.nn.functional.one_hot(labels, outputs).float(),
        }[loss]
        self.target = Criterion(loss).target(targets, (samples, outputs))
        self.rule, self.units = Rule(40, units + 1, True), units
        self.z = torch.zeros(outputs, samples, dtype=torch.float64)
        self.margins: list[float] = []
        self.order = greedy(self, self.rule).order

    @property
    def phi(self) -> Tensor:
        return self.features.double()[:, None] * self.outgoing[:, :, None]

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        scores = self.target.loss_sum((self.z + self.phi[candidates]) / k)
        best = scores.sort().values
        self.margins.append(float((best[1] - best[0]) / best[0]))
        return scores

    def add(self, k: int, unit: int) -> None:
        self.z = self.z + self.phi[unit]

    def loss(self, k: int) -> float:
        return 0.0

    def gap(self, k: int) -> None:
        return None


twins = lru_cache(Twins)


@pytest.mark.parametrize("kind", ["mse columns", "mse Gram", "cross_entropy", "bce_with_logits"])
def test_near_ties_are_decided_exactly(instruction_set: str, kind: str) -> None:
    p = twins(kind.split()[0])
    assert min(p.margins) < 1e-6  # float32 cannot decide these
    if kind.startswith("mse"):
        flat, t, samples = p.phi.flatten(1), p.target.value, p.target.samples
        gram = flat @ flat.T
        sums = Moments(samples, 1.0, gram.diagonal().clone(), flat @ t.flatten(),
                       float(t.square().sum()), 0.0, 0.0, 0.0)  # fmt: skip
        rounding = ops.columns_rounding(torch.float32)
        exact = Exact(rounding, p.features, p.outgoing, t)
        if kind == "mse Gram":
            path = ops.greedy_gram(gram.float().double(), sums, p.rule, exact=exact)
        else:
            path = ops.greedy_columns(
                lambda picked, out: ops.gram_columns(p.features, p.outgoing, picked, out),
                sums, p.rule, exact=exact,
            )  # fmt: skip
    else:
        bias = torch.zeros(3, dtype=torch.float64)
        path = ops.greedy_pointwise(p.features, p.outgoing, bias, p.target, p.rule)
    ties = [i for i, margin in enumerate(p.margins) if margin < TIE]
    steps = min([len(p.order), *ties])
    assert steps >= 0.9 * len(p.order)
    assert path.order[:steps].tolist() == p.order[:steps].tolist()
    assert path.rescored > 0
