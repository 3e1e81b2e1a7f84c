"""`refit(epochs=...)`: all layers of the pruned network trained towards the dense one's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from networks import Attention, Inputs, network, outputs_of
from networks import batches_of as data_of
from torch import Tensor, nn

import greedyprune
from greedyprune.surgery.cut import masked


def two_attentions() -> tuple[nn.Module, Inputs]:
    """The second one's projection is refitted, and its outputs are split into heads."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval(), torch.randn(6, 7, 12)


@pytest.mark.parametrize(
    "name", ["resnet", "vgg", "mobilenet", "gpt2", "llama", "vit", "two attentions"]
)
@torch.no_grad()
def test_an_exact_pruned_network_stays(name: str) -> None:
    """The dropped units have no effect in this dense network, so the pruned one has no error.

    It would have one if a layer's outputs were compared with those of other units or heads.
    """
    model, inputs = two_attentions() if name == "two attentions" else network(name)
    selection = greedyprune.select(model, data_of(inputs), objective="imitation")
    dense = masked(model, selection).double()  # Adam's steps are long even for errors of rounding
    if isinstance(inputs, Tensor):
        inputs = inputs.double()
    ones = {key: replace(layer, fitted=None, weights=torch.ones(len(layer.kept)).double())
            for key, layer in selection.layers.items()}  # fmt: skip
    whole = replace(selection, layers=ones)
    before = greedyprune.prune(dense, whole)
    small = greedyprune.refit(dense, whole, [inputs], epochs=1)
    assert all(p.requires_grad for p in small.parameters())
    for key, value in small.state_dict().items():
        torch.testing.assert_close(value, before.state_dict()[key], rtol=0, atol=1e-7)


def test_more_epochs_come_closer() -> None:
    """Gradients lower the error that least squares, layer by layer, has left."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 5, 3),
    ).eval()  # fmt: skip
    inputs = torch.randn(256, 3, 9, 9)
    selection = greedyprune.select(model, [inputs], size=0.4)
    errors = []
    for epochs in (0, 10, 30):
        small = greedyprune.refit(model, selection, [inputs], epochs=epochs)
        errors.append(float((outputs_of(small, inputs) - outputs_of(model, inputs)).square().sum()))
    assert errors[1] < 0.95 * errors[0] and errors[2] < 0.95 * errors[1]
    same = greedyprune.refit(model, selection, [inputs], epochs=30)
    assert outputs_of(same, inputs).equal(outputs_of(small, inputs))


class WithoutLength:
    """Batches of unknown number."""

    def __init__(self, inputs: Tensor) -> None:
        self._parts = inputs.split(64)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._parts)


def test_the_rate_falls_the_same_where_the_number_of_batches_is_unknown() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 2))
    inputs = torch.randn(256, 5)
    selection = greedyprune.select(model, [inputs], size=0.5, objective="imitation")
    known, unknown = (
        greedyprune.refit(model, selection, data, epochs=2)
        for data in (list(inputs.split(64)), WithoutLength(inputs))
    )
    assert outputs_of(known, inputs).equal(outputs_of(unknown, inputs))


def test_epochs_are_a_count() -> None:
    model, inputs = network("vgg")
    selection = greedyprune.select(model, [inputs], objective="imitation")
    for epochs in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"epochs: found {epochs}, expected an int, 0 or more"):
            greedyprune.refit(model, selection, [inputs], epochs=epochs)  # type: ignore[arg-type]
