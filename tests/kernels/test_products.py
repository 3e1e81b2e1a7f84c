"""Gram products that are added block by block."""

import pytest
import torch

from greedyprune.kernels.products import (
    PendingColumns,
    add_upper_product,
    has_fast_products,
    mirror,
    rounded_inputs,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_added_block_by_block(dtype: torch.dtype) -> None:
    """Of more units and samples than one block has, laid out as a model's activations are."""
    torch.manual_seed(0)
    hidden = torch.randn(2500, 1100)
    gram = torch.ones(1100, 1100, dtype=torch.float64)
    add_upper_product(gram, hidden.T, dtype)
    mirror(gram)
    expected = 1 + hidden.double().T @ hidden.double()
    assert gram.equal(gram.T)
    error = (gram - expected).abs().max() / expected.max()
    assert error < (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("rounded", [False, True])
def test_columns_wait_until_they_are_enough(rounded: bool) -> None:
    """Only inputs are rounded to bfloat16, and nothing on processors without it."""
    torch.manual_seed(0)
    rows, target = torch.randn(300, 20_000).relu(), torch.randn(7, 20_000)
    gram, right = torch.zeros(300, 300).double(), torch.zeros(300, 7).double()
    pending, size = PendingColumns(), 0
    for part, of_part in zip(rows.split(70, 1), target.split(70, 1), strict=True):
        size += part.shape[1]
        if pending.add(part, of_part):
            assert size >= 150  # half of the features
            pending.to_sums(gram, right, None, rounded=rounded)
            size = 0
    pending.to_sums(gram, right, None, rounded=rounded)
    assert pending.state() == {}
    mirror(gram)
    inputs, target = (
        values.bfloat16().double() if rounded and has_fast_products() else values.double()
        for values in (rows, target)
    )
    torch.testing.assert_close(gram, inputs @ inputs.T, rtol=1e-6, atol=0)
    torch.testing.assert_close(right, inputs @ target.T, rtol=1e-6, atol=1e-6 * 20_000)


def test_other_products_are_not_rounded() -> None:
    """Outside the block, after an error in it too."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision

    def fail() -> None:
        with rounded_inputs():
            assert (settings.fp32_precision == "bf16") == has_fast_products()
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert settings.fp32_precision == before
    with rounded_inputs(False):
        assert settings.fp32_precision == before
