"""Exchanges after least squares: what they bring, and where they end."""

import pytest
import torch
from test_refit import Fits

from greedyprune.kernels import exchange as swaps
from greedyprune.kernels import ops, reference
from greedyprune.kernels.path import Rule


def exchanged(p: Fits, kept: torch.Tensor, limit: int, backend: str = "cpu") -> torch.Tensor:
    start = swaps.on_units(p.gram, p.right, kept, p.width)
    return swaps.exchanged(start, p.gram.diagonal(), p.target_norm, p.width, limit, backend)


SHAPES = [(12, 1, 80, 3), (9, 4, 120, 5), (7, 9, 200, 17), (14, 2, 90, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gains_are_what_an_exchange_brings(
    instruction_set: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = Fits(*shape)
    kept = torch.tensor([2, 0, 5, 3])
    seen, own = {}, ops.swap_gains

    def watched(*arguments: torch.Tensor) -> torch.Tensor:
        seen["gains"], seen["units"] = own(*arguments), arguments[3:5]
        other = reference.swap_gains(*arguments)
        torch.testing.assert_close(seen["gains"], other, rtol=1e-7, atol=1e-7 * p.target_norm)
        return torch.full_like(other, -1.0)

    monkeypatch.setattr(swaps.ops, "swap_gains", watched)
    same = exchanged(p, kept, 9)
    monkeypatch.undo()
    assert same.equal(kept)
    before = p.left(kept.tolist())
    for i, out in enumerate(seen["units"][0].tolist()):
        for j, into in enumerate(seen["units"][1].tolist()):
            units = [into if unit == out else unit for unit in kept.tolist()]
            gain = before - p.left(units)
            torch.testing.assert_close(
                float(seen["gains"][i, j]), gain, rtol=1e-6, atol=1e-7 * p.target_norm
            )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_exchanges_end_where_none_helps(shape: tuple[int, ...], backend: str) -> None:
    p = Fits(*shape)
    start = torch.arange(shape[0])[-4:]
    found = exchanged(p, start, 100, backend)
    assert len(set(found.tolist())) == 4
    best = p.left(found.tolist())
    assert best < p.left(start.tolist())
    for out in found.tolist():
        for into in set(range(shape[0])) - set(found.tolist()):
            units = [into if unit == out else unit for unit in found.tolist()]
            assert p.left(units) >= best - 1e-8 * p.target_norm
    once = exchanged(p, start, 1, backend)
    assert len(set(once.tolist()) & set(start.tolist())) == 3
    fitted = swaps.refit_of(p.gram, p.right, found, p.width)
    weights = fitted.outgoing(4).reshape(shape[3], -1)
    error = p.y - p.features(found.tolist()) @ weights.T
    torch.testing.assert_close(float(error.square().sum()), best, rtol=1e-8, atol=1e-6)


def test_sweeping_in_and_out_is_nothing() -> None:
    p = Fits(6, 3, 90, 4)
    swept, right = p.gram.clone(), p.right.clone()
    rows = torch.arange(18).view(6, 3)
    for unit in (1, 4, 2):
        swaps.sweep(swept, right, rows[unit], 1)
    own = rows[[1, 4, 2]].flatten()
    weights = torch.linalg.solve(p.gram[own][:, own], p.right[own])
    torch.testing.assert_close(right[own], weights)
    for unit in (4, 1, 2):
        swaps.sweep(swept, right, rows[unit], -1)
    torch.testing.assert_close(swept, p.gram, rtol=1e-8, atol=1e-6)
    torch.testing.assert_close(right, p.right, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_some_at_a_time_are_swept_like_all(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = Fits(*shape)
    kept = torch.tensor([2, 0, 5, 3, 1])
    whole = swaps.on_units(p.gram, p.right, kept, p.width)
    monkeypatch.setattr(swaps, "TOGETHER", 2 * p.width)
    parts = swaps.on_units(p.gram, p.right, kept, p.width)
    torch.testing.assert_close(parts.swept, whole.swept)
    torch.testing.assert_close(parts.left, whole.left)


@pytest.mark.parametrize("shape", SHAPES)
def test_elimination_drops_what_costs_least(shape: tuple[int, ...]) -> None:
    p = Fits(*shape)
    units = list(range(shape[0]))
    while len(units) > 3:
        costs = [p.left([j for j in units if j != out]) for out in units]
        units.pop(min(range(len(units)), key=costs.__getitem__))
        found = swaps.eliminated(p.gram, p.right, len(units), p.width)
        assert found.units.tolist() == units


def test_the_better_of_both_directions() -> None:
    """Two units that are the target together, beside one that is close to it: only backward."""
    torch.manual_seed(0)
    a, b, other = torch.randn(3, 200, dtype=torch.float64)
    x = torch.stack([a, b, a + b + 0.3 * other, torch.randn(200, dtype=torch.float64)])
    gram, right, norm = x @ x.T, x @ (a + b)[:, None], float((a + b).square().sum())
    forward = ops.greedy_refit(gram, right, norm, Rule(2, 2, False))[1].units
    assert forward[0] == 2
    assert swaps.eliminated(gram, right, 2, 1).units.tolist() == [0, 1]
    best = swaps.best_exchanged(gram, right, norm, forward, 1, 0, "cpu")
    assert sorted(best.units.tolist()) == [0, 1]
    assert float(best.solved.square().sum()) == pytest.approx(norm)


def test_nothing_to_exchange() -> None:
    p = Fits(4, 2, 60, 3)
    every = torch.arange(4)
    assert exchanged(p, every, 9).equal(every)
    path, found = ops.greedy_refit(p.gram, p.right, p.target_norm, Rule(4, 4, False), width=2)
    assert len(found.units) == len(path.order) == 4
