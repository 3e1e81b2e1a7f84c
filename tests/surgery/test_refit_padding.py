"""refit leaves out hidden positions: padded and unpadded data give the same weights."""

from __future__ import annotations

import pytest
import torch
from padded import WIDTH, hidden_batch, padded, sequences, tagger, together
from torch import nn

import greedyprune
from greedyprune.surgery.distill import _relative_error


def test_training_of_all_layers_ignores_padding() -> None:
    """refit(epochs=) compares the shown positions of both networks only."""
    torch.manual_seed(0)
    one, other = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    mask = torch.rand(4, 6) > 0.4
    expected = (one[mask] - other[mask]).square().mean() / other[mask].square().mean()
    noisy = one.masked_fill(~mask[..., None], 1e6)
    torch.testing.assert_close(_relative_error(noisy, other, None, mask, -1), expected)
    flipped = (noisy.transpose(1, 2), other.transpose(1, 2))  # (m, C, T), a convolution's
    torch.testing.assert_close(_relative_error(*flipped, None, mask, 1), expected)
    flat = (noisy.flatten(0, 1), other.flatten(0, 1))
    torch.testing.assert_close(_relative_error(*flat, None, mask, -1), expected)


@pytest.mark.parametrize("epochs", [0, 2])
def test_refit(epochs: int) -> None:
    alone, model = sequences(), tagger().double()  # Adam would enlarge what rounding leaves
    selection = greedyprune.select(model, alone, size=0.5, progress=False)
    small = greedyprune.refit(model, selection, alone, epochs=epochs, progress=False)
    others = [padded(alone, "noise"), padded(alone, "zeros", left=True)]
    if not epochs:  # the rate of learning falls from batch to batch
        others.append([hidden_batch(), *padded(alone, "zeros")])
    for data in others:
        other = greedyprune.refit(model, selection, data, epochs=epochs, progress=False)
        for one, two in zip(small.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-7)


def test_refit_by_gradients_leaves_out_hidden_samples() -> None:
    batch, model = together(padded(sequences(), "noise"), 12)[0], tagger().double()
    hidden = {name: value[[0, 5, 7]] for name, value in batch.items()}
    hidden["attention_mask"] = torch.zeros_like(hidden["attention_mask"])
    more = {name: torch.cat([batch[name], hidden[name]]) for name in batch}
    selection = greedyprune.select(model, [batch], size=0.5, progress=False)
    one, two = (
        greedyprune.refit(model, selection, [data], epochs=3, progress=False)
        for data in (batch, more)
    )
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)


def test_refit_with_a_mask_by_name() -> None:
    """What is hidden may be NaN; the model takes no mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs, shown = torch.randn(40, 5, WIDTH), torch.rand(40, 5) > 0.4
    selection = greedyprune.select(model, inputs[shown], size=7)
    data = [{"input": inputs.masked_fill(~shown[..., None], torch.nan), "shown": shown}]
    zeros = [{"input": inputs.masked_fill(~shown[..., None], 0.0), "shown": shown}]
    found = greedyprune.refit(model, selection, data, mask="shown", progress=False)
    expected = greedyprune.refit(model, selection, zeros, mask="shown", progress=False)
    assert not torch.equal(expected[2].weight, greedyprune.prune(model, selection)[2].weight)
    for one, two in zip(expected.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-7)
