"""Problems for the kernels, and the sums and the brute force that judge their answers."""

import pytest
import torch
from backends import TOLERANCE
from torch import Tensor, nn

from greedyprune.data.losses import criterion_of
from greedyprune.kernels.path import Exact, Moments, Path, Rule

CRITERIA = {
    "mse": nn.MSELoss(),
    "cross_entropy": nn.CrossEntropyLoss(),
    "weighted cross_entropy": nn.CrossEntropyLoss(
        torch.tensor([0.3, 2.0, 1.0, 0.5, 0.1, 1.0, 1.0, 3.0, 1.0, 1.0, 0.7]), label_smoothing=0.1
    ),
    "logistic": nn.BCEWithLogitsLoss(),
    "weighted logistic": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.5])),
}

# Around the tile of 128 samples and the group of 8 units, and with more classes than a vector has
# lanes.
SHAPES = [(1, 1, 1), (3, 7, 2), (9, 128, 3), (17, 129, 11), (8, 300, 1), (5, 1000, 37)]

each_criterion = pytest.mark.parametrize("criterion", CRITERIA)

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class Problem:
    """Random features, outgoing weights and targets."""

    def __init__(
        self, units: int, samples: int, outputs: int, criterion: str, scale: float = 1.0
    ) -> None:
        rng = torch.Generator().manual_seed(units + samples + outputs)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        module = CRITERIA[criterion]
        if criterion == "weighted cross_entropy":
            weight = CRITERIA[criterion].weight.repeat(4)[:outputs]
            module = nn.CrossEntropyLoss(weight, label_smoothing=0.1)
        targets = normal(samples, outputs)
        if "cross_entropy" in criterion:
            targets = torch.randint(outputs, (samples,), generator=rng)
        elif "logistic" in criterion:
            targets = targets.sigmoid()
        self.features = normal(units, samples).relu()
        self.outgoing = scale * normal(units, outputs)
        self.outputs = scale * normal(outputs, samples)
        self.bias = normal(outputs)
        self.target = criterion_of(module, None).target(targets, (samples, outputs))


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal to what a kernel that computes in `dtype` may be off by."""
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def moments_of(p: Problem) -> tuple[Tensor, Moments]:
    """The Gram matrix and the other sums over the samples, by einsum."""
    phi = p.features[:, None, :] * p.outgoing[:, :, None]
    gram = torch.einsum("ics,jcs->ij", phi, phi)
    t = p.target.value - p.bias[:, None]
    beta = torch.einsum("ics,cs->i", phi, t)
    norm = float(t.square().sum())
    count = p.target.samples
    return gram, Moments(count, p.target.mass, gram.diagonal().clone(), beta, norm, 0.0, 0.0, 0.0)


class BruteForce:
    """Equation (1) with every candidate's outputs written out, also on mini-batches.

    margins: of each step, the best score's relative distance to the second best
    """

    def __init__(self, p: Problem, starts: Tensor | None = None, batch: int = 0) -> None:
        self.p, self.units, self.starts, self.batch = p, len(p.features), starts, batch
        self.phi = p.features[:, None, :] * p.outgoing[:, :, None]
        self.z = torch.zeros_like(p.outputs)
        self.margins: list[float] = []

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        samples = slice(None)
        if self.starts is not None and not everywhere:
            samples = slice(self.starts[k - 1], self.starts[k - 1] + self.batch)
        outputs = self.p.bias[:, None] + (self.z + self.phi[candidates]) / k
        scores = self.p.target[samples].loss_sum(outputs[..., samples]) / self.p.target.mass
        best = scores.sort().values
        self.margins.append(float((best[1] - best[0]) / best[0]) if len(best) > 1 else 1.0)
        return scores

    def add(self, k: int, unit: int) -> None:
        self.z += self.phi[unit]

    def loss(self, k: int) -> float:
        return float(self.p.target.loss_sum(self.p.bias[:, None] + self.z / k) / self.p.target.mass)

    def gap(self, k: int) -> float | None:
        if self.starts is not None:
            return None
        gradient = self.p.target.gradient(self.p.bias[:, None] + self.z / k) / self.p.target.mass
        along = (gradient * self.z).sum() / k
        return float(along - (self.phi * gradient).sum((1, 2)).min())


TIE = 1e-11  # relative: float64 scores so close may be ordered by their rounding


def assert_same_path(path: Path, expected: Path, margins: list[float]) -> None:
    """The same picks and numbers up to the first tie that float64 cannot decide, near the end."""
    ties = [i for i, margin in enumerate(margins) if margin < TIE]
    steps = min([len(expected.order), *ties])
    assert steps >= 0.9 * len(expected.order)
    assert path.order[:steps].tolist() == expected.order[:steps].tolist()
    assert len(path.order) == len(expected.order)
    torch.testing.assert_close(path.losses[:steps], expected.losses[:steps], rtol=1e-9, atol=1e-12)
    assert (path.gap is None) == (expected.gap is None)
    if expected.gap is not None:
        torch.testing.assert_close(path.gap[:steps], expected.gap[:steps], rtol=1e-7, atol=1e-10)


def draws(steps: int, candidates: int) -> Tensor:
    rng = torch.Generator().manual_seed(steps)
    return torch.rand(steps, candidates, dtype=torch.float64, generator=rng)


RULES = {
    "repeats": Rule(60, 100, True),
    "no repeats": Rule(30, 30, False),
    "all units": Rule(40, 40, False),
    "distinct": Rule(400, 12, True),
    "candidates": Rule(60, 100, True, draws(60, 5)),
    "last candidates": Rule(40, 40, False, draws(40, 7)),
}

each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def features_of(p: Problem) -> Exact:
    """The features behind a Gram matrix that was rounded to bfloat16."""
    return Exact(2.0**-8, p.features.float(), p.outgoing, p.target.value - p.bias[:, None])


class Fits:
    """Units of several features each, and a target."""

    def __init__(self, units: int, width: int, samples: int, outputs: int, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(units + width + outputs + seed)
        mixing = torch.randn(units * width, units * width, generator=rng, dtype=torch.float64)
        x = torch.randn(samples, units * width, generator=rng, dtype=torch.float64)
        self.x = (x @ mixing).relu()
        self.y = torch.randn(samples, outputs, generator=rng, dtype=torch.float64)
        self.y += self.x[:, : units * width // 2] @ torch.randn(
            units * width // 2, outputs, generator=rng, dtype=torch.float64
        )
        self.width = width
        self.gram, self.right = self.x.T @ self.x, self.x.T @ self.y
        self.target_norm = float(self.y.square().sum())

    def features(self, units: list[int]) -> Tensor:
        starts = torch.tensor(units)[:, None] * self.width
        return self.x[:, (starts + torch.arange(self.width)).flatten()]

    def left(self, units: list[int]) -> float:
        """The squared error of the best weights on some units."""
        x = self.features(units)
        solution = torch.linalg.lstsq(x, self.y, driver="gelsd").solution
        return float((self.y - x @ solution).square().sum())
