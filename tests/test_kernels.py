"""Every kernel against the float64 reference, for each instruction set, dtype, shape and loss.

All in one file: the problems and the brute force defined here serve every test.
"""

from functools import partial

import pytest
import torch
from conftest import TOLERANCE, Kernels
from torch import Tensor, nn

from greedyprune.data.losses import Target, criterion_of
from greedyprune.kernels import ops, reference
from greedyprune.kernels.backend import extension
from greedyprune.kernels.loop import greedy
from greedyprune.kernels.path import Exact, Moments, Path, Rule
from greedyprune.kernels.reference import QuadraticObjective
from greedyprune.kernels.structs import Structs

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


@each_criterion
@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("feature_dtype", [torch.float32, torch.float64])
def test_candidate_loss(
    on: Kernels,
    criterion: str,
    dtype: torch.dtype,
    feature_dtype: torch.dtype,
    shape: tuple[int, int, int],
) -> None:
    p = Problem(*shape, criterion)
    features = p.features.to(feature_dtype)
    arguments = (features, p.outgoing, p.outputs, p.target)
    expected = reference.candidate_loss(*arguments, shrink=0.4) / p.target.mass
    losses = on.candidate_loss(*arguments, shrink=0.4, dtype=dtype) / p.target.mass
    assert_near(losses, expected, dtype)


@each_criterion
def test_candidate_loss_bound_holds(instruction_set: str, criterion: str) -> None:
    """The kernel's error bounds hold at any magnitude of the outputs, and are not too large."""
    for scale in (1e-3, 1.0, 30.0):
        p = Problem(12, 500, 11, criterion, scale)
        exact = reference.candidate_loss(p.features, p.outgoing, p.outputs, p.target)
        screened, errors = _screen(p, p.target)
        if p.target.linear is not None:
            exact -= (p.target.linear * p.outputs).sum()
            exact -= reference.candidate_slope(p.features, p.outgoing, p.target.linear)
        assert ((screened - exact).abs() <= errors).all()
        assert (errors <= 1e-3 * exact.abs() + 1e-3 * scale).all()


def _screen(p: Problem, target: Target) -> tuple[Tensor, Tensor]:
    """Losses and their error bounds from the float32 kernel, without the target's linear term."""
    structs = Structs()
    features = p.features.float()
    units, n = torch.arange(len(features)), len(features)
    losses, errors = torch.empty(n).double(), torch.empty(n).double()
    base, outgoing = target.relative(p.outputs).float().contiguous(), p.outgoing.float()
    extension().candidate_loss_f32(
        losses.data_ptr(), errors.data_ptr(), units.data_ptr(), n,
        structs.features(features, ops.measure_features(features)), outgoing.data_ptr(), 1.0,
        base.data_ptr(), structs.target(target, torch.float32, 1.0), 1,
    )  # fmt: skip
    return losses, errors


@pytest.mark.parametrize("logit", [1e3, 1e5, -1e5])
@pytest.mark.parametrize("criterion", ["cross_entropy", "logistic"])
def test_large_logits_do_not_overflow(on: Kernels, criterion: str, logit: float) -> None:
    p = Problem(4, 40, 3, criterion)
    p.outputs[1] = logit
    arguments = (p.features, p.outgoing, p.outputs, p.target)
    losses = on.candidate_loss(*arguments, dtype=torch.float32)
    assert losses.isfinite().all()
    assert_near(losses, reference.candidate_loss(*arguments), torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_candidate_slope(on: Kernels, shape: tuple[int, int, int]) -> None:
    p = Problem(*shape, "mse")
    expected = reference.candidate_slope(p.features, p.outgoing, p.outputs)
    slopes = on.candidate_slope(p.features, p.outgoing, p.outputs)
    assert_near(slopes, expected, torch.float64)


@each_dtype
def test_chosen_units_of_strided_rows(on: Kernels, dtype: torch.dtype) -> None:
    p = Problem(20, 150, 3, "cross_entropy")
    part = p.features[:, 10:140]
    target = p.target[slice(10, 140)]
    units = torch.tensor([19, 3, 3, 0])
    arguments = (part, p.outgoing, p.outputs[:, 10:140].contiguous(), target)
    expected = reference.candidate_loss(*arguments)[units]
    assert_near(on.candidate_loss(*arguments, units=units, dtype=dtype), expected, dtype)


def test_no_units() -> None:
    p = Problem(3, 10, 2, "mse")
    none = torch.empty(0, dtype=torch.int64)
    losses = ops.candidate_loss(p.features, p.outgoing, p.outputs, p.target, units=none)
    assert losses.shape == (0,)


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


def assert_same_path(path: Path, expected: Path, margins: list[float]) -> None:
    """The same picks and numbers up to the first step at which two candidates nearly tie."""
    ties = [i for i, margin in enumerate(margins) if margin < 1e-6]
    steps = min([len(expected.order), *ties])
    assert steps > 0
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


def features_of(p: Problem) -> Exact:
    """The features behind a Gram matrix that was rounded to bfloat16."""
    return Exact(2.0**-8, p.features.float(), p.outgoing, p.target.value - p.bias[:, None])


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


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "mse"])
def test_candidates_that_cannot_win_are_not_scored(on: Kernels, criterion: str) -> None:
    """The tangent bound rules candidates out, but none that would be picked."""
    p = Problem(2000, 150, 5, criterion, scale=3.0)
    p.features = p.features.float().double()
    rule = on.few(Rule(60, 2001, True), steps=5)
    brute = BruteForce(p)
    expected = greedy(brute, rule)
    path = on.greedy_pointwise(p.features.float(), p.outgoing, p.bias, p.target, rule)
    assert_same_path(path, expected, brute.margins)
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
