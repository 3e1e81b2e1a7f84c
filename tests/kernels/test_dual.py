"""Least squares from the rows themselves, against the same from Gram matrices."""

import pytest
import torch
from torch import Tensor

from greedyprune.kernels import dual, ops
from greedyprune.kernels.least_squares import Halves, chosen_damping, on_units, ridge
from greedyprune.kernels.path import Rule

SHAPES = [(9, 4, 13, 5), (12, 1, 30, 3), (5, 9, 20, 17)]  # units, width, rows, outputs


class Problem:
    """Rows X, targets Y that are nearly X W^T, and a ridge."""

    def __init__(self, units: int, width: int, rows: int, outputs: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.units, self.width = units, width
        self.rows = torch.randn(rows, units * width).double().relu() + 0.1
        self.dense = torch.randn(outputs, units * width).double()
        self.targets = self.rows @ self.dense.T + 0.1 * torch.randn(rows, outputs).double()
        self.added = ridge(self.rows.square().sum(0), 0.03)
        self.gram = self.rows.T @ self.rows + torch.diag(self.added)
        self.right = self.rows.T @ self.targets + self.added[:, None] * self.dense.T

    @property
    def target_norm(self) -> float:
        return float(self.targets.square().sum() + (self.dense.square() * self.added).sum())

    def part(self, dtype: torch.dtype = torch.float64) -> dual.DualPart:
        rows, dense = self.rows.to(dtype), self.dense.to(dtype)
        return dual.DualPart(rows, self.targets, dense, self.added, self.width)

    def fit(self, units: Tensor, dtype: torch.dtype = torch.float64) -> dual.DualFit:
        at = (units[:, None] * self.width + torch.arange(self.width)).flatten()
        rows, dense = self.rows[:, at].to(dtype), self.dense[:, at].to(dtype)
        return dual.DualFit(units, rows, self.targets, dense, self.added[at])


@pytest.mark.parametrize("shape", SHAPES)
def test_paths_are_those_of_gram_matrices(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dual, "COPIED_FEATURES", 7)
    monkeypatch.setattr(dual, "GAIN_ENTRIES", 2 * shape[1] * shape[3])
    problems = [Problem(*shape), Problem(shape[0], 2, 6, 4, seed=1)]
    rule = Rule(shape[0], shape[0], False)
    path, units = dual.greedy_dual([p.part() for p in problems], rule, scale=0.5)
    expected, _ = ops.greedy_refit(
        [p.gram for p in problems], [p.right for p in problems],
        sum(p.target_norm for p in problems), rule, widths=[p.width for p in problems],
    )  # fmt: skip
    assert path.order.equal(expected.order)
    assert units.equal(path.order)
    lost = torch.zeros(shape[0]).double()
    for p in problems:
        fit, of_gram = p.fit(units), on_units(p.gram, p.right, units, p.width)
        assert fit.width == p.width
        for k in range(1, shape[0] + 1):
            weights = fit.outgoing(k)
            torch.testing.assert_close(weights, of_gram.outgoing(k), rtol=1e-8, atol=1e-8)
            left = p.targets - fit.rows[:, : k * p.width] @ weights.flatten(1).T
            lost[k - 1] += left.square().sum()
    torch.testing.assert_close(path.losses, 0.5 * lost, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_in_float32(shape: tuple[int, ...]) -> None:
    """What is picked is exact: only the scores are in float32."""
    p, rule = Problem(*shape), Rule(shape[0], shape[0], False)
    path, units = dual.greedy_dual([p.part(torch.float32)], rule)
    assert path.order.equal(dual.greedy_dual([p.part()], rule)[0].order)
    rows = p.rows.float().double()
    fit = p.fit(units, torch.float32)
    for k in (1, shape[0] // 2, shape[0]):
        at = (units[:k, None] * p.width + torch.arange(p.width)).flatten()
        error = p.targets - rows[:, at] @ fit.outgoing(k).flatten(1).T
        torch.testing.assert_close(path.losses[k - 1], error.square().sum(), rtol=1e-6, atol=1e-9)


def test_what_float32_can_not_tell_is_decided_in_float64() -> None:
    """Each unit has a twin that differs from it by about a millionth."""
    p = Problem(40, 3, 50, 37)
    for array in (p.rows, p.dense):
        array[:, 60:] = array[:, :60]
    p.rows[:, 60:] += 1e-6 * torch.randn(50, 60).double()
    p.rows, p.dense = p.rows.float().double(), p.dense.float().double()
    p.added, p.targets = ridge(p.rows.square().sum(0), 0.03), p.rows @ p.dense.T
    path, _ = dual.greedy_dual([p.part(torch.float32)], Rule(20, 20, False))
    assert path.order.equal(dual.greedy_dual([p.part()], Rule(20, 20, False))[0].order)


def test_a_ridge_below_the_rounding_of_float32() -> None:
    """What is left of a unit whose twin is picked is then less than its rounding."""
    p = Problem(12, 4, 60, 3)
    p.rows[:, 8:12] = p.rows[:, 4:8] + 1e-5 * p.rows[:, 8:12]
    p.rows[:, 12:16] = 300 * p.rows[:, 4:8]
    p.targets, p.added = p.rows @ p.dense.T, ridge(p.rows.square().sum(0), 1e-8)
    part, failed = p.part(torch.float32), False
    for unit in (1, 3, 0, 5):
        part.add(unit)
        failed |= bool(torch.linalg.cholesky_ex(part._blocks)[1].any())
        assert part.gains().isfinite().all()
    assert failed


def test_a_repeated_pick_changes_nothing() -> None:
    p = Problem(4, 3, 7, 2)
    path, units = dual.greedy_dual([p.part()], Rule(9, 4, True))
    assert len(units) == len(set(path.order.tolist())) <= len(path.order)
    objective = dual.DualObjective([p.part()], 1.0)
    objective.add(1, 2)
    before = objective.loss(1), objective.scores(2, torch.arange(4))
    objective.add(2, 2)
    assert objective.loss(2) == before[0]
    assert objective.scores(3, torch.arange(4)).equal(before[1])
    assert objective.scores(3, torch.tensor([2]))[0] == before[1].max()  # it gains nothing again


def test_candidates_and_the_end_of_a_path() -> None:
    p = Problem(6, 2, 5, 3)
    draws = torch.rand(3, 2).double()
    seen = []
    path, _ = dual.greedy_dual(
        [p.part()], Rule(3, 3, False, draws), step=lambda k, unit, loss: seen.append(loss) or k == 2
    )
    assert path.losses.tolist() == seen
    assert len(seen) == 2


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("noise", [0.01, 3.0])
def test_dampings_are_those_of_gram_matrices(*, free: bool, noise: float) -> None:
    torch.manual_seed(5)
    rows, change = torch.randn(31, 40).double(), torch.randn(3, 40).double()
    error = rows @ change.T + noise * torch.randn(31, 3).double() + 2.0 * free
    squares = rows.square().sum(0)
    with_constant = torch.cat([rows, torch.ones(31, free).double()], 1)
    halves = [(x, e) for x, e in zip(with_constant.split(16), error.split(16), strict=True)]
    of_grams = Halves(
        [x.T @ x for x, _ in halves], [x.T @ e for x, e in halves], squares, int(free)
    )
    of_rows = dual.DualHalves(rows, error, 16, squares, free=free)
    for damping in (1e-3, 1.0, 100.0):
        expected = of_grams.held_out_gain(damping)
        assert of_rows.held_out_gain(damping) == pytest.approx(expected, rel=1e-7)
    assert chosen_damping([of_rows], 1e-4) == pytest.approx(chosen_damping([of_grams], 1e-4))


def test_a_half_without_samples_and_dead_features() -> None:
    rows, error = torch.randn(4, 6).double(), torch.randn(4, 2).double()
    squares = rows.square().sum(0)
    assert chosen_damping([dual.DualHalves(rows, error, 4, squares)], 1e-4) == (0.1, 0.0)
    dead = dual.DualHalves(0 * rows, error, 2, 0 * squares)
    assert chosen_damping([dead], 1e-4) == (0.1, 0.0)
