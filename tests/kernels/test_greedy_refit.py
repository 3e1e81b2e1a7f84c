"""Least squares refitted in every step, against the same by its definition."""

from typing import Any

import pytest
import torch
from kernel_problems import Fits
from torch import Tensor

from greedyprune.kernels import ops, reference
from greedyprune.kernels.path import NestedFit, Path, Rule

SHAPES = [(12, 1, 80, 3), (9, 4, 120, 5), (5, 9, 200, 17), (20, 2, 90, 1), (3, 70, 400, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_pick_is_the_best_refit(
    instruction_set: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("greedyprune.kernels.path.NORM_ROWS", 4)
    p = Fits(*shape)
    steps = min(6, shape[0])
    path, [fitted] = ops.greedy_refit(
        [p.gram], [p.right], p.target_norm, Rule(steps, steps, False), widths=[p.width]
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
        [p.gram], [p.right], p.target_norm, Rule(steps, steps, False), widths=[p.width]
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
    path, [fitted] = ops.greedy_refit(
        [p.gram], [p.right], p.target_norm, Rule(8, 8, False), widths=[3]
    )
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
    path, _ = ops.greedy_refit([p.gram], [p.right], p.target_norm, Rule(4, 4, False), widths=[2])
    assert 4 not in path.order.tolist()


def test_threads_do_not_show(instruction_set: str, threads: None) -> None:
    parts = [Fits(60, 4, 500, 33), Fits(60, 1, 500, 70)]
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(refit(parts, Rule(30, 30, False)))
    for path, fits in results[1:]:
        assert path.order.equal(results[0][0].order)
        assert path.losses.equal(results[0][0].losses)
        for fit, first in zip(fits, results[0][1], strict=True):
            assert fit.factor.equal(first.factor)
            assert fit.solved.equal(first.solved)


def refit(parts: list[Fits], rule: Rule, **options: Any) -> tuple[Path, list[NestedFit]]:
    grams, rights = [p.gram for p in parts], [p.right for p in parts]
    norm, widths = sum(p.target_norm for p in parts), [p.width for p in parts]
    return ops.greedy_refit(grams, rights, norm, rule, widths=widths, **options)


def block_diagonal(parts: list[Fits]) -> tuple[Tensor, Tensor, float, int]:
    """All parts as one problem: Gram matrix, right side, |t|^2 and the features of a unit."""
    units, width = len(parts[0].gram) // parts[0].width, sum(p.width for p in parts)
    gram = torch.zeros(units, width, units, width, dtype=torch.float64)
    right = torch.zeros(units, width, sum(p.right.shape[1] for p in parts), dtype=torch.float64)
    column, output = 0, 0
    for p in parts:
        columns, outputs = p.width, p.right.shape[1]
        at = slice(column, column + columns)
        gram[:, at, :, at] = p.gram.view(units, columns, units, columns)
        right[:, at, output : output + outputs] = p.right.view(units, columns, outputs)
        column, output = column + columns, output + outputs
    norm = sum(p.target_norm for p in parts)
    return gram.view(units * width, -1), right.view(units * width, -1), norm, width


def same_as_block_diagonal(parts: list[Fits], rule: Rule, **options: Any) -> Path:
    """The path of the parts, after a comparison with that of the block-diagonal problem."""
    path, fits = refit(parts, rule, **options)
    gram, right, norm, width = block_diagonal(parts)
    expected, [whole] = ops.greedy_refit([gram], [right], norm, rule, widths=[width], **options)
    assert path.order.equal(expected.order)
    torch.testing.assert_close(path.losses, expected.losses, rtol=1e-9, atol=1e-9 * norm)
    column, output = 0, 0
    for p, fit in zip(parts, fits, strict=True):
        assert fit.units.equal(whole.units)
        outputs = p.right.shape[1]
        for distinct in range(1, len(fit.units) + 1):
            weights = whole.outgoing(distinct)[output : output + outputs, :]
            weights = weights[:, :, column : column + p.width]
            torch.testing.assert_close(fit.outgoing(distinct), weights, rtol=1e-7, atol=1e-7)
        column, output = column + p.width, output + outputs
    return path


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("widths", [(1, 9, 4), (1, 1), (70, 1), (3,)])
@pytest.mark.parametrize("replacement", [False, True])
def test_parts_are_the_block_diagonal_problem(
    instruction_set: str, widths: tuple[int, ...], backend: str, replacement: bool
) -> None:
    parts = [Fits(7, width, 30 + 8 * width, 3 + 5 * i) for i, width in enumerate(widths)]
    rule = Rule(5, 5, replacement)
    path = same_as_block_diagonal(parts, rule, backend=backend, scale=0.25)
    assert len(path.order) == 5
    assert refit(parts, rule, scale=0.25)[0].order.equal(path.order)


def test_a_part_is_what_it_is_alone(instruction_set: str) -> None:
    """A part without a target changes no pick, no loss and no weight, to the last bit."""
    p, silent = Fits(9, 4, 120, 5), Fits(9, 2, 90, 3)
    silent.right, silent.target_norm = torch.zeros_like(silent.right), 0.0
    alone, [fit] = refit([p], Rule(6, 6, False))
    path, [same, zero] = refit([p, silent], Rule(6, 6, False))
    assert path.order.equal(alone.order)
    assert path.losses.equal(alone.losses)
    assert same.factor.equal(fit.factor)
    assert same.solved.equal(fit.solved)
    assert not zero.solved.any()


def test_dependent_features_and_ties_in_parts(instruction_set: str) -> None:
    parts = [Fits(8, 1, 60, 3), Fits(8, 9, 200, 2), Fits(8, 4, 100, 5)]
    for p in parts:
        w = p.width
        p.x[:, 5 * w : 6 * w] = p.x[:, 2 * w : 3 * w]  # unit 5 is unit 2 again
    for p in parts[1:]:
        w = p.width
        p.x[:, 6 * w : 7 * w] = 0  # unit 6, but for the first part
        p.x[:, 4 * w + 1] = p.x[:, 4 * w]  # a feature of unit 4 twice
    for p in parts:
        p.gram, p.right = p.x.T @ p.x, p.x.T @ p.y
    order = same_as_block_diagonal(parts, Rule(6, 6, False)).order.tolist()
    assert 2 in order
    assert 5 not in order
    path, fits = refit(parts, Rule(8, 8, False))
    left = sum(p.left(list(range(8))) for p in parts)
    torch.testing.assert_close(float(path.losses[-1]), left, rtol=1e-8, atol=1e-6)
    assert max(float(fit.outgoing(8).abs().max()) for fit in fits) < 1e3


def test_one_unit_in_parts(instruction_set: str) -> None:
    parts = [Fits(1, width, 40, 2) for width in (1, 9, 4)]
    assert same_as_block_diagonal(parts, Rule(3, 3, False)).order.tolist() == [0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_step_ends_the_path_in_parts(backend: str) -> None:
    parts = [Fits(8, width, 100, 4) for width in (1, 4)]
    every = refit(parts, Rule(8, 8, False), backend=backend)[0]
    seen: list[tuple[int, int, float]] = []

    def step(k: int, unit: int, loss: float) -> bool:
        seen.append((k, unit, loss))
        return len(seen) % 3 == 0

    path = same_as_block_diagonal(parts, Rule(8, 8, False), step=step, backend=backend)
    assert path.order.equal(every.order[:3])
    assert [unit for _, unit, _ in seen[:3]] == path.order.tolist()


def test_repeated_picks_in_parts() -> None:
    """After all gains are gone, the lowest index is picked again, which changes no weight."""
    parts = [Fits(3, width, 60, 2) for width in (1, 4)]
    path = same_as_block_diagonal(parts, Rule(6, 4, True))
    assert sorted(path.order[:3].tolist()) == [0, 1, 2]
    assert len(path.order) == 6
    assert len(refit(parts, Rule(6, 4, True))[1][0].units) == 3


def test_bad_tensors() -> None:
    p, other = Fits(4, 3, 50, 2), Fits(5, 3, 50, 2)
    rule = Rule(2, 2, False)
    with pytest.raises(ValueError, match=r"^rights\[0\]: found shape"):
        ops.greedy_refit([p.gram], [p.right[1:]], 1.0, rule, widths=[1])
    with pytest.raises(TypeError, match=r"^grams\[1\]: found torch.float32"):
        ops.greedy_refit([p.gram, p.gram.float()], 2 * [p.right], 1.0, rule, widths=[1, 1])
    with pytest.raises(ValueError, match=r"^widths\[0\]: found 5 for 12 features"):
        ops.greedy_refit([p.gram], [p.right], 1.0, rule, widths=[5])
    with pytest.raises(ValueError, match=r"^grams\[1\]: found 5 units, expected 4"):
        ops.greedy_refit([p.gram, other.gram], [p.right, other.right], 1.0, rule, widths=[3, 3])
    with pytest.raises(ValueError, match=r"^grams: found 2 with 1 right sides and 1 widths"):
        ops.greedy_refit([p.gram, p.gram], [p.right], 1.0, rule, widths=[3])
    with pytest.raises(ValueError, match=r"^grams: found 0 "):
        ops.greedy_refit([], [], 1.0, rule, widths=[])
    wide = torch.eye(2 * 513).double()
    with pytest.raises(ValueError, match=r"^widths: found 513, expected at most 512"):
        ops.greedy_refit([wide], [wide[:, :1]], 1.0, rule, widths=[513])
