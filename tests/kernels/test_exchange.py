"""Exchanges of kept for dropped units after least squares: their gains, and when they end."""

import pytest
import torch
from kernel_problems import Fits

from greedyprune.kernels import exchange, ops, reference
from greedyprune.kernels.least_squares import on_units
from greedyprune.kernels.path import Rule


def exchanged(p: Fits, kept: torch.Tensor, limit: int, backend: str = "cpu") -> torch.Tensor:
    start = exchange.swept_on(p.gram, p.right, kept, p.width)
    return exchange.exchanged(start, p.gram.diagonal(), p.target_norm, p.width, limit, backend)


SHAPES = [(12, 1, 80, 3), (9, 4, 120, 5), (7, 9, 200, 17), (14, 2, 90, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gains_are_those_of_the_exchange(
    instruction_set: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = Fits(*shape)
    kept = torch.tensor([2, 0, 5, 3])
    calls, swap_gains = [], ops.swap_gains

    def watched(*arguments: torch.Tensor, backend: str) -> torch.Tensor:
        gains, expected = swap_gains(*arguments, backend=backend), reference.swap_gains(*arguments)
        torch.testing.assert_close(gains, expected, rtol=1e-7, atol=1e-7 * p.target_norm)
        calls.append((gains, *arguments[3:5]))
        return torch.full_like(gains, -1.0)  # no exchange helps

    monkeypatch.setattr(ops, "swap_gains", watched)
    assert exchanged(p, kept, 9).equal(kept)
    [(gains, tried, dropped)] = calls
    before = p.left(kept.tolist())
    for i, out in enumerate(tried.tolist()):
        for j, into in enumerate(dropped.tolist()):
            units = [into if unit == out else unit for unit in kept.tolist()]
            gain = before - p.left(units)
            torch.testing.assert_close(
                float(gains[i, j]), gain, rtol=1e-6, atol=1e-7 * p.target_norm
            )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_exchanges_end_where_none_helps(shape: tuple[int, ...], backend: str) -> None:
    p = Fits(*shape)
    start = torch.arange(shape[0])[-4:]
    kept = exchanged(p, start, 100, backend)
    assert len(set(kept.tolist())) == 4
    best = p.left(kept.tolist())
    assert best < p.left(start.tolist())
    for out in kept.tolist():
        for into in set(range(shape[0])) - set(kept.tolist()):
            units = [into if unit == out else unit for unit in kept.tolist()]
            assert p.left(units) >= best - 1e-8 * p.target_norm
    once = exchanged(p, start, 1, backend)
    assert len(set(once.tolist()) & set(start.tolist())) == 3
    refit = on_units(p.gram, p.right, kept, p.width)
    weights = refit.outgoing(4).reshape(shape[3], -1)
    error = p.y - p.features(kept.tolist()) @ weights.T
    torch.testing.assert_close(float(error.square().sum()), best, rtol=1e-8, atol=1e-6)


def test_sweeping_out_undoes_sweeping_in() -> None:
    p = Fits(6, 3, 90, 4)
    swept, right = p.gram.clone(), p.right.clone()
    rows = torch.arange(18).view(6, 3)
    for unit in (1, 4, 2):
        exchange.sweep(swept, right, rows[unit], 1)
    picked = rows[[1, 4, 2]].flatten()
    weights = torch.linalg.solve(p.gram[picked][:, picked], p.right[picked])
    torch.testing.assert_close(right[picked], weights)
    for unit in (4, 1, 2):
        exchange.sweep(swept, right, rows[unit], -1)
    torch.testing.assert_close(swept, p.gram, rtol=1e-8, atol=1e-6)
    torch.testing.assert_close(right, p.right, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_sweeping_in_parts_gives_the_same(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = Fits(*shape)
    kept = torch.tensor([2, 0, 5, 3, 1])
    whole = exchange.swept_on(p.gram, p.right, kept, p.width)
    monkeypatch.setattr(exchange, "SWEPT_FEATURES", 2 * p.width)
    parts = exchange.swept_on(p.gram, p.right, kept, p.width)
    torch.testing.assert_close(parts.matrix, whole.matrix)
    torch.testing.assert_close(parts.right, whole.right)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("features", [4, 64])
def test_elimination_drops_the_cheapest_unit(
    shape: tuple[int, ...], features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """features: after so many the whole matrix changes; with 4 after each unit or two."""
    monkeypatch.setattr(exchange, "LATE_FEATURES", features)
    p = Fits(*shape)
    units = list(range(shape[0]))
    while len(units) > 3:
        costs = [p.left([j for j in units if j != out]) for out in units]
        units.pop(min(range(len(units)), key=costs.__getitem__))
        swept = exchange.eliminated(p.gram, p.right, len(units), p.width)
        assert swept.units.tolist() == units
        expected = exchange.swept_on(p.gram, p.right, swept.units, p.width)
        torch.testing.assert_close(swept.matrix, expected.matrix)


def test_many_columns_give_the_same_exchanges() -> None:
    """A right side of more columns than rows counts by the products of its rows only."""
    p = Fits(12, 2, 200, 5)
    wide = p.right @ torch.linalg.qr(torch.randn(90, 5, dtype=torch.float64)).Q.T
    few = exchange.narrowed(wide)
    assert few.shape == (24, 24)
    torch.testing.assert_close(few @ few.T, p.right @ p.right.T)
    assert exchange.narrowed(p.right) is p.right
    kept = torch.tensor([2, 0, 5, 3])
    best = exchange.best_exchanged(p.gram, p.right, p.target_norm, kept, 2, 9, "cpu")
    assert not best.units.equal(kept)
    for right in (wide, few):
        other = exchange.best_exchanged(p.gram, right, p.target_norm, kept, 2, 9, "cpu")
        assert other.units.equal(best.units)


def test_the_better_of_both_directions() -> None:
    """Units 0 and 1 sum to the target, unit 2 is near it: only elimination finds the two."""
    torch.manual_seed(0)
    a, b, other = torch.randn(3, 200, dtype=torch.float64)
    x = torch.stack([a, b, a + b + 0.3 * other, torch.randn(200, dtype=torch.float64)])
    gram, right, norm = x @ x.T, x @ (a + b)[:, None], float((a + b).square().sum())
    forward = ops.greedy_refit([gram], [right], norm, Rule(2, 2, False), widths=[1])[1][0].units
    assert forward[0] == 2
    assert exchange.eliminated(gram, right, 2, 1).units.tolist() == [0, 1]
    best = exchange.best_exchanged(gram, right, norm, forward, 1, 0, "cpu")
    assert sorted(best.units.tolist()) == [0, 1]
    assert float(best.solved.square().sum()) == pytest.approx(norm)


def test_nothing_to_exchange() -> None:
    p = Fits(4, 2, 60, 3)
    every = torch.arange(4)
    assert exchanged(p, every, 9).equal(every)
    best = exchange.best_exchanged(p.gram, p.right, p.target_norm, every, 2, 9, "cpu")
    assert best.units.equal(every)
