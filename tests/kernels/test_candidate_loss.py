"""Candidates' losses and slopes against the float64 reference, and the errors they may have."""

import pytest
import torch
from backends import Kernels
from kernel_problems import SHAPES, Problem, assert_near, each_criterion, each_dtype
from torch import Tensor

from greedyprune.data.losses import Criterion, Target
from greedyprune.kernels import ops, reference
from greedyprune.kernels.backend import extension
from greedyprune.kernels.structs import Structs


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


@pytest.mark.parametrize("outputs", [3, 16, 17, 61, 150])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 8.0, 80.0])
@each_dtype
def test_cross_entropy_near_and_far_from_base(
    on: Kernels, outputs: int, scale: float, dtype: torch.dtype
) -> None:
    """Candidates within the range of exponents, candidates beyond it, and groups of both."""
    torch.manual_seed(outputs)
    features = torch.randn(19, 75)
    outgoing = torch.randn(19, outputs, dtype=torch.float64) * scale
    outgoing[::3] *= 0.01
    target = Criterion("cross_entropy").target(torch.randint(outputs, (75,)), (75, outputs))
    base = 5 * torch.randn(outputs, 75, dtype=torch.float64)
    base[1] -= 300  # float32 cuts it off, float64 does not
    base[:, :5] *= 30
    losses = on.candidate_loss(features, outgoing, base, target, dtype=dtype)
    expected = reference.candidate_loss(features, outgoing, base, target)
    torch.testing.assert_close(losses, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12,
                               atol=0)  # fmt: skip
