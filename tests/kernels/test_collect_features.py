"""Collecting features: copies batch by batch, with norms and largest magnitudes."""

import pytest
import torch
from torch import Tensor

from greedyprune.kernels import ops

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@each_dtype
@pytest.mark.parametrize(("units", "sizes"), [(1, [1]), (70, [3, 64, 1, 200]), (129, [65, 7])])
def test_collect_features(
    instruction_set: str, units: int, sizes: list[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(n, units, dtype=dtype) for n in sizes]
    store = torch.full((units, sum(sizes) + 5), 7.0, dtype=dtype)
    extent, at = None, 0
    for hidden in batches:
        extent = ops.collect_features(store, hidden, at, extent)
        at += len(hidden)
    activations = torch.cat(batches).T
    assert store[:, :at].equal(activations) and (store[:, at:] == 7).all()
    for measured in (extent, ops.measure_features(store[:, :at])):
        torch.testing.assert_close(measured.squares, activations.double().square().sum(1))
        assert measured.largest.equal(activations.double().abs().amax(1))


@pytest.mark.parametrize(
    ("hidden", "at", "named"),
    [
        (torch.zeros(4, 6), 0, "hidden"),
        (torch.zeros(4, 5).double(), 0, "hidden"),
        (torch.zeros(4, 5), 7, "at"),
        (torch.zeros(4, 5), -1, "at"),
    ],
)
def test_activations_that_do_not_fit_are_refused(hidden: Tensor, at: int, named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{named}: found"):
        ops.collect_features(torch.zeros(5, 10), hidden, at)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 9, 63, 64, 130])
def test_a_nan_or_inf_shows_in_the_extent(instruction_set: str, bad: float, at: int) -> None:
    hidden = torch.zeros(131, 5)
    hidden[at, 3] = bad
    extent = ops.collect_features(torch.empty(5, 131), hidden, 0)
    assert extent.largest.isfinite().tolist() == [True, True, True, False, True]
