"""Greedy paths of every kernel against equation (1), for each instruction set, dtype and rule."""

from functools import lru_cache, partial

import pytest
import torch
from backends import Kernels
from kernel_problems import (
    CRITERIA,
    BruteForce,
    Problem,
    assert_same_path,
    draws,
    each_criterion,
    each_dtype,
    each_rule,
    features_of,
    moments_of,
)
from torch import Tensor

from greedyprune.kernels import ops
from greedyprune.kernels.loop import greedy
from greedyprune.kernels.path import Moments, Path, Rule
from greedyprune.kernels.reference import QuadraticObjective


@each_criterion
@each_rule
@each_dtype
def test_greedy_pointwise(on: Kernels, criterion: str, rule: Rule, dtype: torch.dtype) -> None:
    p = Problem(40, 130, 4, criterion)
    p.features = p.features.to(dtype).double()
    brute, rule = BruteForce(p), on.few(rule)
    expected = greedy(brute, rule)
    path = on.greedy_pointwise(p.features.to(dtype), p.outgoing, p.bias, p.target, rule)
    assert_same_path(path, expected, brute.margins)


@each_criterion
def test_greedy_pointwise_on_mini_batches(on: Kernels, criterion: str) -> None:
    p = Problem(40, 130, 4, criterion)
    starts = torch.randint(111, (50,), generator=torch.Generator().manual_seed(0))
    for drawn in (None, draws(50, 5)):
        for shortlist in (0, 1, 4):
            rule = on.few(Rule(50, 100, True, drawn, shortlist), steps=8)
            brute = BruteForce(p, starts, 20)
            expected = greedy(brute, rule)
            path = on.greedy_pointwise(
                p.features, p.outgoing, p.bias, p.target, rule, starts=starts, batch=20
            )
            assert_same_path(path, expected, brute.margins)


@each_rule
@pytest.mark.parametrize("outputs", [1, 4])
def test_greedy_gram(on: Kernels, rule: Rule, outputs: int) -> None:
    p = Problem(40, 130, outputs, "mse")
    p.features = p.features.float().double()
    brute = BruteForce(p)
    expected = greedy(brute, rule)
    gram, sums = moments_of(p)
    assert_same_path(on.greedy_gram(gram, sums, rule), expected, brute.margins)
    if on.backend == "cpu":
        rounded = gram.bfloat16().double()
        path = on.greedy_gram(rounded, sums, rule, exact=features_of(p))
        assert_same_path(path, expected, brute.margins)
    path = ops.greedy_gram(gram, sums, rule, backend="reference")
    assert_same_path(path, expected, brute.margins)


each_cache = pytest.mark.parametrize(("block", "capacity"), [(1, 1), (4, 8), (16, 40), (64, 4096)])


@each_rule
@each_cache
def test_greedy_columns(on: Kernels, rule: Rule, block: int, capacity: int) -> None:
    check_columns(on, rule, block, capacity, exact=False)


@each_rule
@each_cache
def test_greedy_columns_that_are_rounded(
    instruction_set: str, rule: Rule, block: int, capacity: int
) -> None:
    check_columns(Kernels("cpu", "cpu"), rule, block, capacity, exact=True)


def check_columns(on: Kernels, rule: Rule, block: int, capacity: int, *, exact: bool) -> None:
    p = Problem(40, 130, 3, "mse")
    p.features = p.features.float().double()
    brute = BruteForce(p)
    expected = greedy(brute, rule)
    gram, sums = moments_of(p)
    fetched: list[int] = []

    def columns(units: Tensor, out: Tensor) -> None:
        fetched.extend(units.tolist())
        # With `exact`, even columns rounded to bfloat16 must not change a pick.
        out.copy_(gram[units].bfloat16() if exact else gram[units])

    path = on.greedy_columns(
        columns, sums, rule, block=block, capacity=capacity, exact=features_of(p) if exact else None
    )
    assert_same_path(path, expected, brute.margins)
    if capacity >= 40:
        assert len(fetched) == len(set(fetched))  # no column is fetched twice


def test_near_ties_are_decided_in_float64(on: Kernels) -> None:
    """Unit 1 is better than unit 0 by less than float32 can see, in every loss."""
    for criterion in CRITERIA:
        p = Problem(2, 200, 3, criterion)
        p.features[1] = p.features[0]
        phi = p.features[0] * p.outgoing[0][:, None]
        gradient = p.target.gradient(p.bias[:, None] + phi)
        slope = (gradient * p.features[0]).sum(1)
        p.outgoing[1] = p.outgoing[0] - 1e-10 * slope / slope.norm()
        path = on.greedy_pointwise(p.features, p.outgoing, p.bias, p.target, Rule(1, 2, True))
        assert path.order.tolist() == [1]
        assert path.rescored == 2


@lru_cache
def many_units(criterion: str, steps: int) -> tuple[Problem, Path, list[float]]:
    """2000 of them, the path, and by how much the best was ahead in each step."""
    p = Problem(2000, 150, 5, criterion, scale=3.0)
    p.features = p.features.float().double()
    brute = BruteForce(p)
    return p, greedy(brute, Rule(steps, 2001, True)), brute.margins


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "mse"])
def test_candidates_that_cannot_win_are_not_scored(on: Kernels, criterion: str) -> None:
    """The tangent bound rules candidates out, but none that would be picked."""
    rule = on.few(Rule(60, 2001, True), steps=5)
    p, expected, margins = many_units(criterion, rule.steps)
    path = on.greedy_pointwise(p.features.float(), p.outgoing, p.bias, p.target, rule)
    assert_same_path(path, expected, margins)
    assert path.scored < 0.8 * rule.steps * 2000
    all_scored = on.greedy_pointwise(
        p.features.float(), p.outgoing, p.bias, p.target, rule, with_gap=False
    )
    assert all_scored.scored == rule.steps * 2000
    assert all_scored.order.equal(path.order)


@pytest.mark.parametrize("criterion", ["cross_entropy", "logistic"])
def test_a_winner_with_the_highest_bound_is_scored(on: Kernels, criterion: str) -> None:
    """800 candidates have lower bounds than the winner, and losses just above the winner's."""
    p = Problem(820, 200, 3, criterion)
    p.features = p.features.float().double()
    p.outgoing[800:] *= 1e-2  # so that the loss is close to its tangent
    gradient = p.target.gradient(p.bias[:, None].expand_as(p.outputs)) / p.target.mass
    direction = p.outgoing[0].clone()
    downhill = -direction @ gradient
    p.features[:800] = (downhill / downhill.abs().mean()).float().double()
    p.outgoing[:800] = 0
    first = int(BruteForce(p).scores(1, torch.arange(820)).argmin())

    def second_losses(scale: float) -> Tensor:
        p.outgoing[:800] = scale * direction
        brute = BruteForce(p)
        brute.add(1, first)
        return brute.scores(2, torch.arange(820)).index_fill(0, torch.tensor(first), torch.inf)

    aim = (1 + 2e-6) * second_losses(0.0)[800:].min()
    above = next(10.0**i for i in range(1, 9) if second_losses(10.0**i)[0] > aim)
    below = next(above / 2**i for i in range(30) if second_losses(above / 2**i)[0] < aim)
    for _ in range(60):  # the loss is convex in the scale: bisection finds where it reaches `aim`
        middle = (below + above) / 2
        below, above = (below, middle) if second_losses(middle)[0] > aim else (middle, above)
    second_losses(above)
    brute, rule = BruteForce(p), Rule(2, 821, False)
    expected = greedy(brute, rule)
    path = on.greedy_pointwise(p.features, p.outgoing, p.bias, p.target, rule)
    assert expected.order[0] == first
    assert expected.order[1] >= 800
    assert path.order.equal(expected.order)


@pytest.mark.parametrize("kernel", ["pointwise", "gram"])
def test_an_error_in_a_callback_is_raised(kernel: str) -> None:
    p = Problem(10, 20, 2, "mse")

    def step(k: int, unit: int, loss: float) -> bool:
        if k == 3:
            raise KeyError("enough")
        return False

    solve = partial(ops.greedy_gram, *moments_of(p))
    if kernel == "pointwise":
        solve = partial(ops.greedy_pointwise, p.features, p.outgoing, p.bias, p.target)
    with pytest.raises(KeyError, match="enough"):
        solve(Rule(10, 10, True), step=step)


def test_a_callback_can_stop_the_path() -> None:
    p = Problem(10, 20, 2, "mse")
    path = ops.greedy_gram(*moments_of(p), Rule(10, 10, True), step=lambda k, *_: k == 4)
    assert len(path.order) == len(path.losses) == len(path.gap) == 4


def test_the_number_of_threads_changes_no_bit(instruction_set: str, threads: None) -> None:
    p = Problem(300, 700, 5, "cross_entropy")
    paths = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        rule = Rule(30, 300, True)
        paths.append(ops.greedy_pointwise(p.features.float(), p.outgoing, p.bias, p.target, rule))
    for path in paths[1:]:
        assert path.order.equal(paths[0].order)
        assert path.losses.equal(paths[0].losses)
        assert path.gap.equal(paths[0].gap)


def test_quadratic_objective_by_hand() -> None:
    """Two units, one sample: phi = (1, 3), t = 2. The mean of both is exact."""
    gram = torch.tensor([[1.0, 3.0], [3.0, 9.0]]).double()
    sums = Moments(1, 1.0, torch.tensor([1.0, 9.0]).double(), torch.tensor([2.0, 6.0]).double(),
                   4.0, 0.0, 0.0, 4.0)  # fmt: skip
    for name in ("cpu", "reference"):
        path = ops.greedy_gram(gram, sums, Rule(2, 3, True), backend=name)
        assert path.order.tolist() == [0, 1]  # a tie at first: both are off by 1
        assert path.losses.tolist() == [1.0, 0.0]
        # At u = 1: L' = 2 (1 - 2) = -2, <L', u> = -2, min over phi: -6. At u = 2 it is optimal.
        assert path.gap.tolist() == [4.0, 0.0]
    assert QuadraticObjective(gram, sums, with_gap=False).gap(1) is None
