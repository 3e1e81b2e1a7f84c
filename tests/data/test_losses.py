"""The kernels' form of each loss against torch's own functions and autograd."""

import pytest
import torch
from torch import Tensor, nn

from greedyprune.data.losses import Criterion, bound, criterion_of, harmonic

C, M = 5, 60
torch.manual_seed(0)
LOGITS = torch.randn(M, C, dtype=torch.float64) * 3
CLASSES = torch.randint(C, (M,))
SOFT = torch.rand(M, C, dtype=torch.float64).softmax(1)
BITS = torch.randint(2, (M, C)).double()
SHARES = torch.rand(M, C, dtype=torch.float64)
WEIGHT = torch.rand(C, dtype=torch.float64) * 3
CASES: list[tuple[str, nn.Module, Tensor]] = [
    ("mse", nn.MSELoss(), LOGITS.roll(1, 0)),
    ("cross_entropy", nn.CrossEntropyLoss(), CLASSES),
    ("class weights", nn.CrossEntropyLoss(weight=WEIGHT), CLASSES),
    ("ignored labels", nn.CrossEntropyLoss(ignore_index=2), CLASSES),
    ("negative ignore_index", nn.CrossEntropyLoss(), torch.where(CLASSES == 1, -100, CLASSES)),
    ("smoothing", nn.CrossEntropyLoss(label_smoothing=0.2), CLASSES),
    ("all", nn.CrossEntropyLoss(WEIGHT, ignore_index=0, label_smoothing=0.1), CLASSES),
    ("probabilities", nn.CrossEntropyLoss(), SOFT),
    ("weighted probabilities", nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), SOFT),
    ("bits", nn.BCEWithLogitsLoss(), BITS),
    ("shares", nn.BCEWithLogitsLoss(), SHARES),
    ("pos_weight", nn.BCEWithLogitsLoss(pos_weight=WEIGHT), BITS),
    ("pos_weight 0", nn.BCEWithLogitsLoss(pos_weight=torch.zeros(C).double()), BITS),
    ("both weights", nn.BCEWithLogitsLoss(WEIGHT, pos_weight=WEIGHT.flip(0)), SHARES),
]
each_case = pytest.mark.parametrize(
    ("module", "targets"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)


@each_case
def test_is_torchs_loss(module: nn.Module, targets: Tensor) -> None:
    target = criterion_of(module, None).target(targets, (M, C))
    loss_value = target.loss_sum(LOGITS.T) / target.mass
    torch.testing.assert_close(loss_value, module(LOGITS, targets), rtol=1e-12, atol=1e-14)


@each_case
def test_gradient_is_autograds(module: nn.Module, targets: Tensor) -> None:
    outputs = LOGITS.clone().requires_grad_()
    module(outputs, targets).backward()
    target = criterion_of(module, None).target(targets, (M, C))
    gradient = target.gradient(LOGITS.T) / target.mass
    torch.testing.assert_close(gradient.T, outputs.grad, rtol=1e-10, atol=1e-14)


@each_case
def test_parts_add_up(module: nn.Module, targets: Tensor) -> None:
    target = criterion_of(module, None).target(targets, (M, C))
    parts = [slice(0, 7), slice(7, 50), slice(50, M)]
    total = sum(target[part].loss_sum(LOGITS.T[:, part]) for part in parts)
    torch.testing.assert_close(total, target.loss_sum(LOGITS.T), rtol=1e-12, atol=0)


@each_case
def test_smoothness(module: nn.Module, targets: Tensor) -> None:
    """The largest curvature of a sample's loss is the B that the certificate uses, and no less."""
    criterion = criterion_of(module, None)
    target = criterion.target(targets, (M, C))
    weight = torch.ones(M, dtype=torch.float64)
    if target.weight is not None:
        weight = target.weight if target.weight.dim() == 1 else target.weight.amax(0)
    for s in range(0, M, 7):
        one = target[slice(s, s + 1)]
        hessian = torch.autograd.functional.hessian(
            lambda x, one=one: one.loss_sum(x[:, None]), LOGITS[s]
        )
        assert torch.linalg.eigvalsh(hessian).max() <= criterion.smoothness * weight[s] + 1e-9


def test_functions_and_modules_are_known_by_name() -> None:
    assert criterion_of(nn.functional.mse_loss, None).kind == "mse"
    assert criterion_of("bce_with_logits", None).kind == "bce_with_logits"
    assert criterion_of("auto", CLASSES).kind == "cross_entropy"
    assert criterion_of("auto", SHARES).kind == "mse"
    assert criterion_of(nn.L1Loss(), None).kind == "custom"


def test_outputs_without_a_class_dimension() -> None:
    target = Criterion("mse").target(SHARES[:, 0], (M,))
    loss_value = target.loss_sum(LOGITS.T[:1]) / target.mass
    torch.testing.assert_close(loss_value, nn.functional.mse_loss(LOGITS[:, 0], SHARES[:, 0]))


def test_bound_by_hand() -> None:
    assert harmonic(3).tolist() == pytest.approx([1, 1.5, 1.5 + 1 / 3])
    assert bound(0.5, 2.0, 2).tolist() == pytest.approx([2.5, 0.5 + 2 * 1.5 / 2])
