"""The CUDA half on a GPU, against the same reference as the CPU's. Skipped where there is none."""

import pytest
import torch
from conftest import TOLERANCE
from test_kernels import CRITERIA, SHAPES, Problem

from greedyprune import _backend, ops, reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not _backend.has_cuda(), reason="no GPU, or built without CUDA"),
]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("feature_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_candidate_loss(
    criterion: str,
    shape: tuple[int, int, int],
    feature_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    p = Problem(*shape, criterion)
    features = p.features.to(feature_dtype)
    expected = reference.candidate_loss(features, p.outgoing, p.outputs, p.target, shrink=0.4)
    gpu = torch.device("cuda")
    arguments = features.to(gpu), p.outgoing.to(gpu), p.outputs.to(gpu), p.target.to(gpu)
    found = ops.candidate_loss(*arguments, shrink=0.4, dtype=dtype, backend="cuda")
    again = ops.candidate_loss(*arguments, shrink=0.4, dtype=dtype, backend="cuda")
    assert found.equal(again)  # the same bits: sums are in a fixed order
    tolerance = 4 * TOLERANCE[dtype]  # the hardware's exp is good to 2 units in the last place
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)
