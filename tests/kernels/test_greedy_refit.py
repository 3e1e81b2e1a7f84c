"""Least squares refitted in every step, against the same by its definition."""

import pytest
import torch
from kernel_problems import Fits

from greedyprune.kernels import ops, reference
from greedyprune.kernels.path import Rule

SHAPES = [(12, 1, 80, 3), (9, 4, 120, 5), (5, 9, 200, 17), (20, 2, 90, 1), (3, 70, 400, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_pick_is_the_best_refit(
    instruction_set: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("greedyprune.kernels.path.NORM_ROWS", 4)
    p = Fits(*shape)
    steps = min(6, shape[0])
    path, fitted = ops.greedy_refit(
        p.gram, p.right, p.target_norm, Rule(steps, steps, False), width=p.width
    )
    kept: list[int] = []
    for k in range(steps):
        left = [p.left([*kept, j]) if j not in kept else float("inf") for j in range(shape[0])]
        best = min(range(shape[0]), key=left.__getitem__)
        assert int(path.order[k]) == best
        kept.append(best)
        torch.testing.assert_close(float(path.losses[k]), left[best], rtol=1e-8, atol=1e-6)
        weights = fitted.outgoing(k + 1).reshape(shape[3], -1)
        error = p.y - p.features(kept) @ weights.T
        torch.testing.assert_close(float(error.square().sum()), left[best], rtol=1e-8, atol=1e-6)
    squares = [float(fitted.outgoing(k + 1).square().sum()) for k in range(steps)]
    ones = torch.ones(len(fitted.factor)).double()
    torch.testing.assert_close(fitted.norms(ones), torch.tensor(squares).double())
    dense = torch.randn(shape[3], shape[0], p.width).double()
    factors = torch.rand(shape[0], p.width).double()
    distances = fitted.distances(dense.flatten(1), factors.flatten())
    for k in range(steps):
        difference = dense.clone()
        difference[:, fitted.units[: k + 1]] -= fitted.outgoing(k + 1)
        expected = float((difference.square() * factors).sum())
        torch.testing.assert_close(float(distances[k]), expected)
    other, _ = reference.greedy_refit(
        p.gram, p.right, p.target_norm, Rule(steps, steps, False), width=p.width
    )
    assert other.order.equal(path.order)
    torch.testing.assert_close(other.losses, path.losses, rtol=1e-8, atol=1e-6)


def test_dependent_and_dead_units(instruction_set: str) -> None:
    """What others span already lowers nothing, and gets no weights of rounding."""
    p = Fits(8, 3, 100, 4)
    p.x[:, 3:6] = p.x[:, :3] @ torch.randn(3, 3, dtype=torch.float64)  # unit 1 from unit 0
    p.x[:, 6:9] = 0  # unit 2
    p.x[:, 10] = p.x[:, 9]  # a feature of unit 3 twice
    p.gram, p.right = p.x.T @ p.x, p.x.T @ p.y
    path, fitted = ops.greedy_refit(p.gram, p.right, p.target_norm, Rule(8, 8, False), width=3)
    assert sorted(path.order.tolist()) == list(range(8))
    assert 2 in path.order[-2:].tolist()
    torch.testing.assert_close(float(path.losses[-1]), p.left(list(range(8))), rtol=1e-8, atol=1e-6)
    weights = fitted.outgoing(8)
    assert weights.abs().max() < 1e3
    assert (path.losses.diff() <= 1e-9 * p.target_norm).all()


def test_ties_go_to_the_lowest_index(instruction_set: str) -> None:
    p = Fits(6, 2, 60, 3)
    p.x[:, 8:10] = p.x[:, 2:4]  # unit 4 is unit 1 again
    p.gram, p.right = p.x.T @ p.x, p.x.T @ p.y
    path, _ = ops.greedy_refit(p.gram, p.right, p.target_norm, Rule(4, 4, False), width=2)
    assert 4 not in path.order.tolist()


def test_threads_do_not_show(instruction_set: str, threads: None) -> None:
    p = Fits(60, 4, 500, 33)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(
            ops.greedy_refit(p.gram, p.right, p.target_norm, Rule(30, 30, False), width=4)
        )
    for path, fitted in results[1:]:
        assert path.order.equal(results[0][0].order)
        assert path.losses.equal(results[0][0].losses)
        assert fitted.factor.equal(results[0][1].factor)


def test_bad_tensors() -> None:
    p = Fits(4, 3, 50, 2)
    rule = Rule(2, 2, False)
    with pytest.raises(ValueError, match=r"^right: found shape"):
        ops.greedy_refit(p.gram, p.right[1:], 1.0, rule)
    with pytest.raises(TypeError, match=r"^gram: found"):
        ops.greedy_refit(p.gram.float(), p.right, 1.0, rule)
    with pytest.raises(ValueError, match=r"^width: found 5 for 12 features"):
        ops.greedy_refit(p.gram, p.right, 1.0, rule, width=5)
