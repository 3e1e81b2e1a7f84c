"""Gram products that are added block by block."""

import pytest
import torch

from greedyprune.kernels.products import add_upper_product, mirror


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
