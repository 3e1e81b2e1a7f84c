"""The pruned model computes what the masked one does: contract, invariant 4."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS, Block, data_of, network, outputs_of
from torch import nn

import greedyprune
from greedyprune.surgery.cut import masked

each_network = pytest.mark.parametrize("name", NETWORKS)
each_weights = pytest.mark.parametrize("weights", ["counts", "uniform", "none", "refit"])


@each_network
@each_weights
def test_the_pruned_model_is_the_masked_one(name: str, weights: str) -> None:
    """DESIGN.md's invariant 4, for all layers of a network at once."""
    model, inputs = network(name)
    selection = greedyprune.select(model, data_of(inputs), objective="imitation", weights=weights)
    assert set(selection.layers) == set(NETWORKS[name][1])
    small = greedyprune.prune(model, selection)
    expected = outputs_of(masked(model, selection), inputs)
    error = outputs_of(small, inputs) - expected
    assert float(error.abs().max()) <= 1e-5 * float(expected.abs().max())
    assert size_of(small) < size_of(model)
    for layer in selection.layers.values():
        assert len(layer.kept) == max(1, round(0.5 * len(layer.counts)))


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@each_network
def test_a_selection_survives_its_file(name: str, tmp_path: object) -> None:
    model, inputs = network(name)
    selection = greedyprune.select(model, data_of(inputs), objective="imitation")
    selection.save(f"{tmp_path}/selection.safetensors")
    loaded = greedyprune.Selection.load(f"{tmp_path}/selection.safetensors")
    small = greedyprune.prune(model, selection.at(1))
    again = greedyprune.prune(model, loaded.at(1))
    assert outputs_of(small, inputs).equal(outputs_of(again, inputs))


def test_recalibrated_statistics_are_those_of_the_data() -> None:
    model, inputs = network("resnet")
    model = model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert greedyprune.recalibrate(model, [inputs, inputs]) is model
    hidden = model[0](inputs)
    torch.testing.assert_close(model[1].running_mean, hidden.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, hidden.var((0, 2, 3)))
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    for name, value in model.state_dict().items():
        assert value.equal(before[name]) == (name not in statistics)
    assert model.training
    with pytest.raises(TypeError, match="model: found int"):
        greedyprune.recalibrate(3, [inputs])


def test_a_block_with_a_convolution_as_shortcut() -> None:
    block = Block(8, 16, 2).eval()
    inputs = torch.randn(4, 8, 10, 10)
    small = greedyprune.prune(block, greedyprune.select(block, [inputs], size=5))
    assert small.conv1.out_channels == small.bn1.num_features == small.conv2.in_channels == 5
    assert small.conv2.out_channels == 16
    assert small(inputs).shape == block(inputs).shape
