"""The kernel `greedy_refit`, which refits the weights in every step, against its definition."""

import sys

import pytest
import torch
from torch import Tensor

from greedyprune.kernels import ops, reference
from greedyprune.kernels.path import Rule


class Problem:
    """Units of several features each, and targets."""

    def __init__(self, units: int, width: int, samples: int, outputs: int) -> None:
        rng = torch.Generator().manual_seed(units + width + outputs)
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

    def error(self, units: list[int]) -> float:
        """The squared error of the best weights on these units."""
        x = self.features(units)
        solution = torch.linalg.lstsq(x, self.y, driver="gelsd").solution
        return float((self.y - x @ solution).square().sum())


SHAPES = [(12, 1, 80, 3), (9, 4, 120, 5), (5, 9, 200, 17), (20, 2, 90, 1), (3, 70, 400, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_pick_is_the_best_refit(
    instruction_set: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["greedyprune.kernels.path"], "SOME", 4)  # rows of the norms
    p = Problem(*shape)
    steps = min(6, shape[0])
    path, refit = ops.greedy_refit(
        p.gram, p.right, p.target_norm, Rule(steps, steps, False), width=p.width
    )
    kept: list[int] = []
    for k in range(steps):
        errors = [p.error([*kept, j]) if j not in kept else float("inf") for j in range(shape[0])]
        best = min(range(shape[0]), key=errors.__getitem__)
        assert int(path.order[k]) == best
        kept.append(best)
        torch.testing.assert_close(float(path.losses[k]), errors[best], rtol=1e-8, atol=1e-6)
        weights = refit.outgoing(k + 1).reshape(shape[3], -1)
        error = p.y - p.features(kept) @ weights.T
        torch.testing.assert_close(float(error.square().sum()), errors[best], rtol=1e-8, atol=1e-6)
    squares = [float(refit.outgoing(k + 1).square().sum()) for k in range(steps)]
    torch.testing.assert_close(refit.norms(), torch.tensor(squares).double())
    other, _ = reference.greedy_refit(
        p.gram, p.right, p.target_norm, Rule(steps, steps, False), width=p.width
    )
    assert other.order.equal(path.order)
    torch.testing.assert_close(other.losses, path.losses, rtol=1e-8, atol=1e-6)


def test_dependent_and_dead_units(instruction_set: str) -> None:
    """Units in the span of others come last or lower nothing, and get no weights from rounding."""
    p = Problem(8, 3, 100, 4)
    torch.manual_seed(0)
    p.x[:, 3:6] = p.x[:, :3] @ torch.randn(3, 3, dtype=torch.float64)  # unit 1 from unit 0
    p.x[:, 6:9] = 0  # unit 2
    p.x[:, 10] = p.x[:, 9]  # a feature of unit 3 twice
    p.gram, p.right = p.x.T @ p.x, p.x.T @ p.y
    path, refit = ops.greedy_refit(p.gram, p.right, p.target_norm, Rule(8, 8, False), width=3)
    assert sorted(path.order.tolist()) == list(range(8))
    assert 2 in path.order[-2:].tolist()
    torch.testing.assert_close(
        float(path.losses[-1]), p.error(list(range(8))), rtol=1e-8, atol=1e-6
    )
    weights = refit.outgoing(8)
    assert weights.abs().max() < 1e3
    assert (path.losses.diff() <= 1e-9 * p.target_norm).all()


def test_ties_go_to_the_lowest_index(instruction_set: str) -> None:
    p = Problem(6, 2, 60, 3)
    p.x[:, 8:10] = p.x[:, 2:4]  # unit 4 is unit 1 again
    p.gram, p.right = p.x.T @ p.x, p.x.T @ p.y
    path, _ = ops.greedy_refit(p.gram, p.right, p.target_norm, Rule(4, 4, False), width=2)
    assert 1 in path.order.tolist()
    assert 4 not in path.order.tolist()


def test_the_number_of_threads_does_not_matter(instruction_set: str, threads: None) -> None:
    p = Problem(60, 4, 500, 33)
    rule, results = Rule(30, 30, False), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.greedy_refit(p.gram, p.right, p.target_norm, rule, width=4))
    expected_path, expected_refit = results[0]
    for path, refit in results[1:]:
        assert path.order.equal(expected_path.order)
        assert path.losses.equal(expected_path.losses)
        assert refit.factor.equal(expected_refit.factor)


def test_bad_tensors() -> None:
    p = Problem(4, 3, 50, 2)
    rule = Rule(2, 2, False)
    with pytest.raises(ValueError, match=r"^right: found shape"):
        ops.greedy_refit(p.gram, p.right[1:], 1.0, rule)
    with pytest.raises(TypeError, match=r"^gram: found"):
        ops.greedy_refit(p.gram.float(), p.right, 1.0, rule)
    with pytest.raises(ValueError, match=r"^width: found 5 for 12 features"):
        ops.greedy_refit(p.gram, p.right, 1.0, rule, width=5)
