"""Every kernel against the float64 reference, over instruction set x dtype x shape x loss."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import TOLERANCE, Kernels
from torch import Tensor, nn

from greedyprune.data.losses import Target, criterion_of
from greedyprune.kernels import backend as _backend
from greedyprune.kernels import ops, reference
from greedyprune.kernels.path import Moments, Path, Rule
from greedyprune.kernels.reference import QuadraticObjective
from greedyprune.kernels.structs import Struct, features_struct, target_struct

CRITERIA = {
    "mse": nn.MSELoss(),
    "cross_entropy": nn.CrossEntropyLoss(),
    "weighted cross_entropy": nn.CrossEntropyLoss(
        torch.tensor([0.3, 2.0, 1.0, 0.5, 0.1, 1.0, 1.0, 3.0, 1.0, 1.0, 0.7]), label_smoothing=0.1
    ),
    "logistic": nn.BCEWithLogitsLoss(),
    "weighted logistic": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.5])),
}
# Around the tile of 128 samples, the block of 8 units, and more classes than a vector is wide.
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


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


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
    found = on.candidate_loss(*arguments, shrink=0.4, dtype=dtype) / p.target.mass
    close(found, expected, dtype)


@each_criterion
def test_candidate_loss_bound_holds(instruction_set: str, criterion: str) -> None:
    """What the kernel says rounding can have done covers what it did, at any magnitude."""
    for scale in (1e-3, 1.0, 30.0):
        p = Problem(12, 500, 11, criterion, scale)
        exact = reference.candidate_loss(p.features, p.outgoing, p.outputs, p.target)
        screened, errors = _screen(p, p.target)
        if p.target.linear is not None:
            exact -= (p.target.linear * p.outputs).sum()
            exact -= reference.candidate_slope(p.features, p.outgoing, p.target.linear)
        assert ((screened - exact).abs() <= errors).all()
        assert (errors <= 1e-3 * exact.abs() + 1e-3 * scale).all()  # and it is of some use


def _screen(p: Problem, target: Target) -> tuple[Tensor, Tensor]:
    """losses and errors of the float32 kernel."""
    keep = Struct()
    features = p.features.float()
    units, n = torch.arange(len(features)), len(features)
    described = target_struct(keep, target, torch.float32, 1.0)
    losses, errors = torch.empty(n).double(), torch.empty(n).double()
    base, outgoing = target.relative(p.outputs).float().contiguous(), p.outgoing.float()
    p.features = features.double()
    known = features_struct(keep, features, ops.measure_features(features))
    _backend.extension().candidate_loss_f32(
        losses.data_ptr(), errors.data_ptr(), units.data_ptr(), n, known,
        outgoing.data_ptr(), 1.0, base.data_ptr(), described, 1,
    )  # fmt: skip
    return losses, errors


@pytest.mark.parametrize("logit", [1e3, 1e5, -1e5])
@pytest.mark.parametrize("criterion", ["cross_entropy", "logistic"])
def test_large_logits_do_not_overflow(on: Kernels, criterion: str, logit: float) -> None:
    p = Problem(4, 40, 3, criterion)
    p.outputs[1] = logit
    arguments = (p.features, p.outgoing, p.outputs, p.target)
    found = on.candidate_loss(*arguments, dtype=torch.float32)
    assert found.isfinite().all()
    close(found, reference.candidate_loss(*arguments), torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_candidate_slope(on: Kernels, shape: tuple[int, int, int]) -> None:
    p = Problem(*shape, "mse")
    expected = reference.candidate_slope(p.features, p.outgoing, p.outputs)
    found = on.candidate_slope(p.features, p.outgoing, p.outputs)
    close(found, expected, torch.float64)


@each_dtype
def test_some_units_of_strided_rows(on: Kernels, dtype: torch.dtype) -> None:
    p = Problem(20, 150, 3, "cross_entropy")
    part = p.features[:, 10:140]
    target = p.target[slice(10, 140)]
    units = torch.tensor([19, 3, 3, 0])
    arguments = (part, p.outgoing, p.outputs[:, 10:140].contiguous(), target)
    expected = reference.candidate_loss(*arguments)[units]
    close(on.candidate_loss(*arguments, units=units, dtype=dtype), expected, dtype)


def test_no_units() -> None:
    p = Problem(3, 10, 2, "mse")
    none = torch.empty(0, dtype=torch.int64)
    found = ops.candidate_loss(p.features, p.outgoing, p.outputs, p.target, units=none)
    assert found.shape == (0,)


def moments_of(p: Problem) -> tuple[Tensor, Moments]:
    """The Gram matrix and the sums, by einsum."""
    phi = p.features[:, None, :] * p.outgoing[:, :, None]
    gram = torch.einsum("ics,jcs->ij", phi, phi)
    t = p.target.value - p.bias[:, None]
    beta = torch.einsum("ics,cs->i", phi, t)
    norm = float(t.square().sum())
    count = p.target.samples
    return gram, Moments(count, p.target.mass, gram.diagonal().clone(), beta, norm, 0.0, 0.0, 0.0)


class Brute:
    """Equation (1) with every candidate's outputs written out, mini-batches included."""

    def __init__(self, p: Problem, starts: Tensor | None = None, batch: int = 0) -> None:
        self.p, self.units, self.starts, self.batch = p, len(p.features), starts, batch
        self.phi = p.features[:, None, :] * p.outgoing[:, :, None]
        self.z = torch.zeros_like(p.outputs)
        self.margins: list[float] = []

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        seen = slice(None)
        if self.starts is not None and not everywhere:
            seen = slice(self.starts[k - 1], self.starts[k - 1] + self.batch)
        outputs = self.p.bias[:, None] + (self.z + self.phi[candidates]) / k
        scores = self.p.target[seen].loss_sum(outputs[..., seen]) / self.p.target.mass
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


def agree(found: Path, expected: Path, margins: list[float]) -> None:
    """The same picks up to the first near tie of the reference, and the same numbers."""
    unclear = [i for i, margin in enumerate(margins) if margin < 1e-6]
    sure = min([len(expected.order), *unclear])
    assert sure > 0
    assert found.order[:sure].tolist() == expected.order[:sure].tolist()
    assert len(found.order) == len(expected.order)
    torch.testing.assert_close(found.losses[:sure], expected.losses[:sure], rtol=1e-9, atol=1e-12)
    assert (found.gap is None) == (expected.gap is None)
    if expected.gap is not None:
        torch.testing.assert_close(found.gap[:sure], expected.gap[:sure], rtol=1e-7, atol=1e-10)


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
    brute, rule = Brute(p), on.few(rule)
    expected = reference.greedy(brute, rule)
    found = on.greedy_pointwise(p.features.to(dtype), p.outgoing, p.bias, p.target, rule)
    agree(found, expected, brute.margins)


@each_criterion
def test_greedy_pointwise_on_mini_batches(on: Kernels, criterion: str) -> None:
    p = Problem(40, 130, 4, criterion)
    starts = torch.randint(111, (50,), generator=torch.Generator().manual_seed(0))
    for drawn in (None, draws(50, 5)):
        for shortlist in (0, 1, 4):
            rule = on.few(Rule(50, 100, True, drawn, shortlist), steps=8)
            brute = Brute(p, starts, 20)
            expected = reference.greedy(brute, rule)
            found = on.greedy_pointwise(
                p.features, p.outgoing, p.bias, p.target, rule, starts=starts, batch=20
            )
            agree(found, expected, brute.margins)


@each_rule
@pytest.mark.parametrize("outputs", [1, 4])
def test_greedy_gram(on: Kernels, rule: Rule, outputs: int) -> None:
    p = Problem(40, 130, outputs, "mse")
    p.features = p.features.float().double()
    brute = Brute(p)
    expected = reference.greedy(brute, rule)
    gram, sums = moments_of(p)
    agree(on.greedy_gram(gram, sums, rule), expected, brute.margins)
    if on.backend == "cpu":
        rounded = gram.bfloat16().double()
        agree(on.greedy_gram(rounded, sums, rule, exact=rough(p)), expected, brute.margins)
    agree(reference.greedy_gram(gram, sums, rule), expected, brute.margins)


def rough(p: Problem) -> ops.Exact:
    """For sums that were rounded to bfloat16."""
    return ops.Exact(2.0**-8, p.features.float(), p.outgoing, p.target.value - p.bias[:, None])


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
    brute = Brute(p)
    expected = reference.greedy(brute, rule)
    gram, sums = moments_of(p)
    fetched: list[int] = []

    def columns(units: Tensor, out: Tensor) -> None:
        fetched.extend(units.tolist())
        # With the features at hand even columns rounded to bfloat16 must not change a pick.
        out.copy_(gram[units].bfloat16() if exact else gram[units])

    found = on.greedy_columns(
        columns, sums, rule, block=block, capacity=capacity, exact=rough(p) if exact else None
    )
    agree(found, expected, brute.margins)
    if capacity >= 40:
        assert len(fetched) == len(set(fetched))  # a column is never brought twice


def test_near_ties_are_decided_in_float64(on: Kernels) -> None:
    """Unit 1 is better than unit 0 by less than float32 can see, in every loss."""
    for criterion in CRITERIA:
        p = Problem(2, 200, 3, criterion)
        p.features[1] = p.features[0]
        phi = p.features[0] * p.outgoing[0][:, None]
        gradient = p.target.gradient(p.bias[:, None] + phi)
        slope = (gradient * p.features[0]).sum(1)
        p.outgoing[1] = p.outgoing[0] - 1e-10 * slope / slope.norm()
        for rule in (Rule(1, 2, True),):
            found = on.greedy_pointwise(p.features, p.outgoing, p.bias, p.target, rule)
            assert found.order.tolist() == [1]
            assert found.rescored == 2


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "mse"])
def test_candidates_that_cannot_win_are_not_scored(on: Kernels, criterion: str) -> None:
    """The tangent rules candidates out, and none of those that are picked."""
    p = Problem(2000, 150, 5, criterion, scale=3.0)
    p.features = p.features.float().double()
    rule = on.few(Rule(60, 2001, True), steps=5)
    brute = Brute(p)
    expected = reference.greedy(brute, rule)
    found = on.greedy_pointwise(p.features.float(), p.outgoing, p.bias, p.target, rule)
    agree(found, expected, brute.margins)
    assert found.scored < 0.8 * rule.steps * 2000
    everything = on.greedy_pointwise(
        p.features.float(), p.outgoing, p.bias, p.target, rule, with_gap=False
    )
    assert everything.scored == rule.steps * 2000
    assert everything.order.equal(found.order)


@pytest.mark.parametrize("criterion", ["cross_entropy", "logistic"])
def test_the_last_that_can_win_is_scored(on: Kernels, criterion: str) -> None:
    """The winner has the highest bound of all; 800 with low bounds are only just worse."""
    p = Problem(820, 200, 3, criterion)
    p.features = p.features.float().double()
    p.outgoing[800:] *= 1e-2  # so that the loss is nearly what the tangent says
    gradient = p.target.gradient(p.bias[:, None].expand_as(p.outputs)) / p.target.mass
    direction = p.outgoing[0].clone()
    downhill = -direction @ gradient
    p.features[:800] = (downhill / downhill.abs().mean()).float().double()
    p.outgoing[:800] = 0
    first = int(Brute(p).scores(1, torch.arange(820)).argmin())

    def second_losses(scale: float) -> Tensor:
        p.outgoing[:800] = scale * direction
        brute = Brute(p)
        brute.add(1, first)
        return brute.scores(2, torch.arange(820)).index_fill(0, torch.tensor(first), torch.inf)

    aim = (1 + 2e-6) * second_losses(0.0)[800:].min()
    far = next(10.0**i for i in range(1, 9) if second_losses(10.0**i)[0] > aim)
    near = next(far / 2**i for i in range(30) if second_losses(far / 2**i)[0] < aim)
    for _ in range(60):  # the loss is convex, and just above the winner's at `far`
        middle = (near + far) / 2
        near, far = (near, middle) if second_losses(middle)[0] > aim else (middle, far)
    second_losses(far)
    brute, rule = Brute(p), Rule(2, 821, False)
    expected = reference.greedy(brute, rule)
    found = on.greedy_pointwise(p.features, p.outgoing, p.bias, p.target, rule)
    assert expected.order[0] == first
    assert expected.order[1] >= 800
    assert found.order.equal(expected.order)


@pytest.mark.parametrize("kernel", ["pointwise", "gram"])
def test_what_a_callback_raises_arrives(kernel: str) -> None:
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
    found = ops.greedy_gram(*moments_of(p), Rule(10, 10, True), step=lambda k, *_: k == 4)
    assert len(found.order) == len(found.losses) == len(found.gap) == 4


def test_threads_do_not_show(instruction_set: str, threads: None) -> None:
    p = Problem(300, 700, 5, "cross_entropy")
    paths = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        rule = Rule(30, 300, True)
        paths.append(ops.greedy_pointwise(p.features.float(), p.outgoing, p.bias, p.target, rule))
    for path in paths[1:]:
        assert path.order.equal(paths[0].order)
        assert path.losses.equal(paths[0].losses)  # to the last bit
        assert path.gap.equal(paths[0].gap)


def loss_with(**changes: Callable[[Problem], object]) -> Callable[[Problem], object]:
    """candidate_loss on a problem with some arguments changed."""

    def call(p: Problem) -> object:
        names = ("features", "outgoing", "outputs", "target")
        arguments = {name: getattr(p, name) for name in names}
        return ops.candidate_loss(**arguments | {n: change(p) for n, change in changes.items()})

    return call


def bad_gram(p: Problem) -> object:
    return ops.greedy_gram(torch.ones(3, 3), moments_of(p)[1], Rule(1, 1, True))


def bad_bias(p: Problem) -> object:
    return ops.greedy_pointwise(p.features, p.outgoing, p.bias[:1], p.target, Rule(1, 1, True))


BAD: list[tuple[str, Callable[[Problem], object], type[Exception]]] = [
    ("features", loss_with(features=lambda p: p.features.half()), TypeError),
    ("features", loss_with(features=lambda p: p.features.T), ValueError),
    ("outgoing", loss_with(outgoing=lambda p: p.outgoing[1:]), ValueError),
    ("outputs", loss_with(outputs=lambda p: p.outputs.T), ValueError),
    ("target", loss_with(target=lambda p: p.target[:5]), ValueError),
    ("units", loss_with(units=lambda p: torch.tensor([9])), ValueError),
    ("units", loss_with(units=lambda p: torch.tensor([0.5])), TypeError),
    ("gradient", lambda p: ops.candidate_slope(p.features, p.outgoing, p.outputs[:1]), ValueError),
    ("gram", bad_gram, ValueError),
    ("bias", bad_bias, ValueError),
]


@pytest.mark.parametrize(("name", "call", "error"), BAD)
def test_bad_tensors(name: str, call: Callable[[Problem], object], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name}: found .* expected"):
        call(Problem(6, 30, 2, "mse"))


def test_quadratic_objective_by_hand() -> None:
    """Two units, one sample: phi = (1, 3), t = 2. The mean of both is exact."""
    gram = torch.tensor([[1.0, 3.0], [3.0, 9.0]]).double()
    sums = Moments(1, 1.0, torch.tensor([1.0, 9.0]).double(), torch.tensor([2.0, 6.0]).double(),
                   4.0, 0.0, 0.0, 4.0)  # fmt: skip
    for solve in (ops.greedy_gram, reference.greedy_gram):
        path = solve(gram, sums, Rule(2, 3, True))
        assert path.order.tolist() == [0, 1]  # a tie at first: both are off by 1
        assert path.losses.tolist() == [1.0, 0.0]
        # At u = 1: L' = 2 (1 - 2) = -2, <L', u> = -2, min over phi: -6. At u = 2 it is optimal.
        assert path.gap.tolist() == [4.0, 0.0]
    assert QuadraticObjective(gram, sums, with_gap=False).gap(1) is None
