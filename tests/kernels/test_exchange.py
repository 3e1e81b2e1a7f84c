"""Exchanges of kept for dropped units after least squares: their gains, and when they end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from kernel_problems import Fits
from torch import Tensor

from greedyprune.kernels import exchange, ops, reference
from greedyprune.kernels.exchange import Part
from greedyprune.kernels.least_squares import on_units
from greedyprune.kernels.path import Rule


def part_of(p: Fits) -> Part:
    return Part(p.gram, p.right, p.width)


def exchanged(p: Fits, kept: Tensor, limit: int, backend: str = "cpu") -> Tensor:
    start = exchange.swept_on([part_of(p)], kept)
    return exchange.exchanged(start, p.target_norm, limit, backend)


SHAPES = [(12, 1, 80, 3), (9, 4, 120, 5), (7, 9, 200, 17), (14, 2, 90, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gains_are_those_of_the_exchange(
    instruction_set: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = Fits(*shape)
    kept = torch.tensor([2, 0, 5, 3])
    calls, swap_gains = [], ops.swap_gains

    def watched(*arguments: Tensor, backend: str) -> Tensor:
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
    swept, right = p.gram.clone()[None], p.right.clone()[None]
    rows = torch.arange(18).view(6, 3)
    for unit in (1, 4, 2):
        exchange.sweep(swept, right, rows[unit], 1)
    picked = rows[[1, 4, 2]].flatten()
    weights = torch.linalg.solve(p.gram[picked][:, picked], p.right[picked])
    torch.testing.assert_close(right[0, picked], weights)
    for unit in (4, 1, 2):
        exchange.sweep(swept, right, slice(3 * unit, 3 * unit + 3), -1)
    torch.testing.assert_close(swept[0], p.gram, rtol=1e-8, atol=1e-6)
    torch.testing.assert_close(right[0], p.right, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_sweeping_in_some_at_a_time_gives_the_same(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = Fits(*shape)
    kept = torch.tensor([2, 0, 5, 3, 1])
    [whole] = exchange.swept_on([part_of(p)], kept).stacks
    monkeypatch.setattr(exchange, "SWEPT_FEATURES", 2 * p.width)
    [some_at_a_time] = exchange.swept_on([part_of(p)], kept).stacks
    torch.testing.assert_close(some_at_a_time.matrix, whole.matrix)
    torch.testing.assert_close(some_at_a_time.right, whole.right)


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
        assert exchange.eliminated([part_of(p)], len(units)).tolist() == units


def test_many_columns_give_the_same_exchanges() -> None:
    """A right side of more columns than rows counts by the products of its rows only."""
    p = Fits(12, 2, 200, 5)
    wide = p.right @ torch.linalg.qr(torch.randn(90, 5, dtype=torch.float64)).Q.T
    few = exchange.narrowed(wide)
    assert few.shape == (24, 24)
    torch.testing.assert_close(few @ few.T, p.right @ p.right.T)
    assert exchange.narrowed(p.right) is p.right
    kept = torch.tensor([2, 0, 5, 3])
    best = exchange.best_exchanged([part_of(p)], p.target_norm, kept, 9, "cpu")
    assert not best.equal(kept)
    for right in (wide, few):
        part = Part(p.gram, right, 2)
        assert exchange.best_exchanged([part], p.target_norm, kept, 9, "cpu").equal(best)


def test_the_better_of_both_directions() -> None:
    """Units 0 and 1 sum to the target, unit 2 is near it: only elimination finds the two."""
    torch.manual_seed(0)
    a, b, other = torch.randn(3, 200, dtype=torch.float64)
    x = torch.stack([a, b, a + b + 0.3 * other, torch.randn(200, dtype=torch.float64)])
    gram, right, norm = x @ x.T, x @ (a + b)[:, None], float((a + b).square().sum())
    forward = ops.greedy_refit([gram], [right], norm, Rule(2, 2, False), widths=[1])[1][0].units
    assert forward[0] == 2
    part = Part(gram, right, 1)
    assert exchange.eliminated([part], 2).tolist() == [0, 1]
    best = exchange.best_exchanged([part], norm, forward, 0, "cpu")
    assert sorted(best.tolist()) == [0, 1]
    assert float(on_units(*part[:2], best, 1).solved.square().sum()) == pytest.approx(norm)


def test_nothing_to_exchange() -> None:
    p = Fits(4, 2, 60, 3)
    every = torch.arange(4)
    assert exchanged(p, every, 9).equal(every)
    best = exchange.best_exchanged([part_of(p)], p.target_norm, every, 9, "cpu")
    assert best.equal(every)


# Of each part: features of a unit, samples, outputs, and a seed.
PARTS = {
    "equal": [(2, 90, 3, 0), (2, 90, 3, 100), (2, 90, 3, 200)],
    "other widths": [(1, 80, 4, 0), (4, 120, 4, 1), (2, 90, 4, 2)],
    "other outputs": [(3, 90, 1, 0), (3, 90, 17, 1), (3, 90, 5, 2)],
    "all kinds": [(1, 80, 3, 0), (4, 120, 5, 1), (1, 80, 3, 100), (1, 80, 9, 2), (4, 120, 5, 300)],
}
UNITS = 10


def problems_of(name: str) -> list[Fits]:
    return [Fits(UNITS, *shape[:3], seed=shape[3]) for shape in PARTS[name]]


def block_diagonal(parts: Sequence[Part]) -> Part:
    """Parts as a single one, with zeros between them: its w and C are the sums of theirs."""
    features, start = [], 0
    for part in parts:
        features.append(torch.arange(start, start + len(part.gram)).view(-1, part.width))
        start += len(part.gram)
    rows = torch.cat(features, 1).flatten()  # a unit's features side by side
    gram = torch.block_diag(*(part.gram for part in parts))[rows][:, rows]
    right = torch.block_diag(*(part.right for part in parts))[rows]
    return Part(gram, right, sum(part.width for part in parts))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_parts_are_exchanged_like_one_problem(
    name: str, zero: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zero: the right side of one part is zero"""
    monkeypatch.setattr(exchange, "TRIED_UNITS", 2)
    problems = problems_of(name)
    if zero:
        problems[1].right.zero_()
    parts = [part_of(p) for p in problems]
    norm, start = sum(p.target_norm for p in problems), torch.arange(UNITS)[-4:]
    whole, copies = [block_diagonal(parts)], [part.gram.clone() for part in parts]
    for limit in (1, 100):
        kept = exchange.exchanged(exchange.swept_on(parts, start), norm, limit, backend)
        other = exchange.exchanged(exchange.swept_on(whole, start), norm, limit, backend)
        assert kept.equal(other)
        assert not kept.equal(start)
    for count in range(1, UNITS):
        assert exchange.eliminated(parts, count).equal(exchange.eliminated(whole, count))
    best = exchange.best_exchanged(parts, norm, start, 100, backend)
    assert best.equal(exchange.best_exchanged(whole, norm, start, 100, backend))
    if zero:  # as if the part were not there
        del parts[1]
        assert best.equal(exchange.best_exchanged(parts, norm, start, 100, backend))
        del copies[1]
    for part, copy in zip(parts, copies, strict=True):
        assert part.gram.equal(copy)


def test_starts_are_compared_by_all_parts() -> None:
    """One start is better for the first part, the other for all parts together."""
    problems = problems_of("other widths")
    parts, norm = [part_of(p) for p in problems], sum(p.target_norm for p in problems)
    for_first, for_all = exchange.eliminated(parts[:1], 3), exchange.eliminated(parts, 3)
    assert problems[0].left(for_first.tolist()) < problems[0].left(for_all.tolist())
    errors = [sum(p.left(units.tolist()) for p in problems) for units in (for_first, for_all)]
    assert errors[1] < errors[0]
    best = exchange.best_exchanged(parts, norm, for_first, 0, "cpu")
    assert best.sort().values.equal(for_all)


def gains_of(
    parts: Sequence[Part], kept: Tensor, backend: str, monkeypatch: pytest.MonkeyPatch
) -> dict[tuple[int, int], float]:
    """The gain of every exchange (out, into), added up over the parts."""
    calls, swap_gains = [], ops.swap_gains

    def watched(*arguments: Tensor, backend: str) -> Tensor:
        calls.append((swap_gains(*arguments, backend=backend), *arguments[3:5]))
        return torch.full_like(calls[-1][0], -1.0)  # no exchange helps

    with monkeypatch.context() as patch:
        patch.setattr(ops, "swap_gains", watched)
        exchange.exchanged(exchange.swept_on(parts, kept), 1.0, 9, backend)
    assert len(calls) == len(parts)
    gains: dict[tuple[int, int], float] = {}
    for found, tried, dropped in calls:
        for i, out in enumerate(tried.tolist()):
            for j, into in enumerate(dropped.tolist()):
                gains[out, into] = gains.get((out, into), 0.0) + float(found[i, j])
    return gains


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gains_are_added_up(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problems, kept = problems_of(name), torch.tensor([2, 0, 5, 3])
    check_gains(problems, kept, backend, monkeypatch)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_unit_dependent_in_one_part_gains_in_the_others(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units 2 and 7 have the same features in the first part, and unit 8 has none there."""
    problems, kept = problems_of("all kinds"), torch.tensor([2, 0, 5, 3])
    first = problems[0]
    first.x[:, 7], first.x[:, 8] = first.x[:, 2], 0
    first.gram, first.right = first.x.T @ first.x, first.x.T @ first.y
    gains = check_gains(problems, kept, backend, monkeypatch)
    others = gains_of([part_of(p) for p in problems[1:]], kept, backend, monkeypatch)
    for out in (0, 5, 3):
        costs = [others[out, into] - gains[out, into] for into in (7, 8)]  # of the first part
        assert costs[0] > 0
        assert costs[0] == pytest.approx(costs[1])


def check_gains(
    problems: Sequence[Fits], kept: Tensor, backend: str, monkeypatch: pytest.MonkeyPatch
) -> dict[tuple[int, int], float]:
    """Gains of parts are the drop of the sum of their errors; returns them."""
    norm = sum(p.target_norm for p in problems)
    gains = gains_of([part_of(p) for p in problems], kept, backend, monkeypatch)
    assert len(gains) == len(kept) * (UNITS - len(kept))
    before = sum(p.left(kept.tolist()) for p in problems)
    for (out, into), gain in gains.items():
        units = [into if unit == out else unit for unit in kept.tolist()]
        expected = before - sum(p.left(units) for p in problems)
        assert gain == pytest.approx(expected, rel=1e-6, abs=1e-7 * norm)
    return gains


def test_elimination_has_a_limit_on_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small parts take less time than a single part of all their features."""
    most = exchange.ELIMINATION_FEATURES
    assert exchange.eliminates([most])
    assert not exchange.eliminates([most, 1])
    assert exchange.eliminates([most // 2] * 8)
    assert not exchange.eliminates([most // 2] * 9)
    p = Fits(12, 1, 80, 3)
    better, worse = sorted(([1, 3, 4], [2, 0, 5]), key=p.left)
    kept, part = torch.tensor(worse), part_of(p)
    monkeypatch.setattr(exchange, "ELIMINATION_FEATURES", 12)
    monkeypatch.setattr(exchange, "eliminated", lambda parts, count: torch.tensor(better))
    assert exchange.best_exchanged([part], p.target_norm, kept, 0, "cpu").tolist() == better
    assert exchange.best_exchanged([part, part], p.target_norm, kept, 0, "cpu").equal(kept)
