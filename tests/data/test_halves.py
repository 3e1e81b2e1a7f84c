"""Halves of the samples: decided by each sample's data, whatever the batches."""

import pytest
import torch
from torch import Tensor

from greedyprune.data.batches import Batch
from greedyprune.data.halves import held_out, in_second_half


def batch_of(inputs: Tensor) -> Batch:
    return Batch((inputs,), {}, None)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8,
     torch.complex64],
)  # fmt: skip
def test_a_sample_is_in_the_same_half_in_any_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = (100 * torch.randn(400, 3, 5).abs()).to(dtype)
    order = torch.randperm(400)
    for function, least, most in ((in_second_half, 150, 250), (held_out, 20, 65)):
        whole = function(batch_of(inputs))
        assert whole.shape == (400,) and whole.dtype == torch.bool
        assert least <= int(whole.sum()) <= most
        shuffled = torch.cat([function(batch_of(part)) for part in inputs[order].split(7)])
        assert shuffled.equal(whole[order])
        strided = inputs.transpose(1, 2).contiguous().transpose(1, 2)
        assert function(batch_of(strided)).equal(whole)


def test_equal_samples_are_together_and_keyword_inputs_count() -> None:
    ids = torch.randint(50, (30, 6))
    batch = Batch((), {"flag": True, "input_ids": torch.cat([ids, ids])}, None)
    first, second = in_second_half(batch).chunk(2)
    assert first.equal(second) and 0 < int(first.sum()) < 30


def test_inputs_without_samples_are_in_the_first_half() -> None:
    assert in_second_half(Batch((3,), {}, None)).tolist() == [False]
