"""Which positions have a part in a layer's sums."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from greedyprune.data import positions
from greedyprune.data.batches import Batch, Batches
from greedyprune.data.positions import ALL, NO_DRAWS, Draws, Sampling, places

STARTS = (torch.arange(64) / 64).double()  # every start as often as any other


def draws_of(inputs: Tensor) -> Draws:
    return Draws.of(Batch((inputs,), {}, None))


@pytest.mark.parametrize(("length", "stride"), [(16, 4), (17, 4), (5, 8), (1, 2), (64, 16)])
def test_every_position_is_as_likely_as_any_other(length: int, stride: int) -> None:
    chosen = places(STARTS, len(STARTS) * length, stride, None)
    assert chosen.equal(chosen.sort().values)
    counts = (chosen % length).bincount(minlength=length)
    expected = torch.full((length,), len(STARTS) / stride)
    assert (counts - expected).abs().max() <= 2
    of_each = (chosen // length).bincount(minlength=len(STARTS))
    assert of_each.min() >= length // stride
    assert of_each.max() <= math.ceil(length / stride)


def test_a_run_of_positions_has_one_each() -> None:
    chosen = places(STARTS, 64 * 24, 8, None).view(64, 3) % 24
    assert (chosen // 8).equal(torch.arange(3).expand(64, 3))


def test_samples_have_positions_of_their_own_in_any_batch() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(50, 3, 8, 8)
    whole = places(draws_of(inputs).starts, 50 * 64, 16, None).view(50, 4) % 64
    assert len(whole.unique(dim=0)) > 12  # a sample's positions follow from one number in [0, 1)
    order = torch.randperm(50)
    parts = [
        places(draws_of(part).starts, len(part) * 64, 16, None).view(-1, 4) % 64
        for part in inputs[order].split(7)
    ]
    assert torch.cat(parts).equal(whole[order])


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_hidden_positions_are_not_chosen(stride: int) -> None:
    """Those that count are chosen as if there were no others."""
    keep = torch.rand(64, 20, generator=torch.Generator().manual_seed(0)) < 0.6
    keep[0], keep[1] = False, True
    chosen = places(STARTS, keep.numel(), stride, keep.flatten())
    assert keep.flatten()[chosen].all()
    for sample in range(64):
        of_sample = chosen[chosen // 20 == sample] - sample * 20
        count = int(keep[sample].sum())
        alone = places(STARTS[sample : sample + 1], count, stride, None)
        assert of_sample.equal(keep[sample].nonzero().flatten()[alone])


def test_rows_that_are_not_those_of_the_samples_count_as_one_sample() -> None:
    chosen = places(STARTS, 63, 4, None)
    assert chosen.equal(places(STARTS[:1], 63, 4, None)) and len(chosen) == 16
    assert len(places(STARTS, 0, 4, None)) == 0


def test_layers_keep_enough_positions_for_their_features() -> None:
    draws = Draws(torch.zeros(10, dtype=torch.bool), torch.zeros(10).double())

    def sampling(features: int, samples: int = 100_000, side: int = 32) -> Sampling:
        return Sampling.of(draws, samples, (10, side, side), None, features, 8)

    for features in (16, 64, 256, 1024, 4096):
        stride, long = sampling(features)
        assert math.log2(stride).is_integer() and long
        assert 1024 * 100_000 / stride >= positions.ROWS * features
    assert sampling(256).stride > sampling(2048).stride > 1
    assert sampling(256, samples=0) == ALL  # unknown
    assert sampling(256, samples=10) == ALL  # few
    assert sampling(16, samples=100) == ALL  # little work
    assert sampling(4096, samples=200) == Sampling(1, True)  # few for so many features
    mask = torch.zeros(10, 1024, dtype=torch.bool)
    mask[:, :64] = True
    masked = Sampling.of(draws, 100_000, (10, 1024), mask, 256, 8)
    assert masked == sampling(256, side=8)


class Numbers(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3,), float(index)), 0


class Endless(IterableDataset[Tensor]):
    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(torch.ones(21, 3))


ONES = torch.ones(21, 3)
DATA = {
    "tensor": (ONES, 21),
    "tensors": ((ONES, ONES), 21),
    "batches": ([(ONES[:20], ONES[:20]), (ONES[:1], ONES[:1])], 21),
    "dict": ([{"inputs": ONES}], 21),
    "Dataset": (Numbers(), 21),
    "TensorDataset": (TensorDataset(ONES, ONES), 21),
    "DataLoader": (DataLoader(Numbers(), batch_size=4), 21),
    "without the last": (DataLoader(Numbers(), batch_size=4, drop_last=True), 20),
    "IterableDataset": (DataLoader(Endless(), batch_size=4), 0),
    "iterator": (iter(ONES.split(4)), 0),
}


@pytest.mark.parametrize(("data", "samples"), DATA.values(), ids=DATA)
def test_the_number_of_samples_is_known_where_it_can_be(data: object, samples: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = Batches(data, nn.Linear(3, 2))
        batches.share_first()
    assert batches.samples == samples
    assert batches.of(nn.Linear(3, 2)).samples == samples


def test_no_draws_are_of_the_first_half() -> None:
    assert not NO_DRAWS.second_half.any() and NO_DRAWS.starts.tolist() == [0.0]
