"""A model's graph run in pieces, and what it says of each layer."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS, Inputs, network, outputs_of
from torch import nn

from greedyprune.data.batches import Batch
from greedyprune.data.forward import main_output
from greedyprune.graph.executor import GraphExecutor, GraphExecutors, bytes_held, tensors_of


def batch_of(inputs: Inputs) -> Batch:
    return Batch((), inputs, None) if isinstance(inputs, dict) else Batch((inputs,), {}, None)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_piece_by_piece_is_the_whole(name: str) -> None:
    """Every node by itself: the same output, and no values are left that nothing uses."""
    model, inputs = network(name)
    executor, tensors = GraphExecutor(model, batch_of(inputs)), tensors_of(model)
    values = executor.inputs(batch_of(inputs))
    for start in range(len(executor.nodes)):
        later = {source for node in executor.nodes[start:] for source in node.all_input_nodes}
        assert set(values) <= later | set(executor.inputs(batch_of(inputs)))
        before = dict(values)
        if start % 5 == 0:
            output = main_output(executor.outputs(values, tensors, start))
            torch.testing.assert_close(output, outputs_of(model, inputs), rtol=0, atol=0)
            assert values == before
        executor.run(values, tensors, start, start + 1)
    assert main_output(executor.returned(values)).equal(outputs_of(model, inputs))


@pytest.mark.parametrize("name", ["resnet", "resnext", "conv3d", "gpt2"])
@torch.no_grad()
def test_a_layer_s_input_gives_its_output(name: str) -> None:
    """By its linear map on the padded input, and by the module on the input without padding."""
    model, inputs = network(name)
    executor, tensors = GraphExecutor(model, batch_of(inputs)), tensors_of(model)
    values, start = executor.inputs(batch_of(inputs)), 0
    for layer, place in executor.place.items():
        executor.run(values, tensors, start, place)
        start = place
        weight, bias = (tensors.get(name or "") for name in executor.layers[layer][1:3])
        padded = executor.input_of(layer, values, padded=True)
        output = executor.linear_map(layer, padded, weight, bias)
        assert model.get_submodule(layer)(executor.input_of(layer, values)).equal(output)
        after = dict(values)
        executor.run(after, tensors, place, place + 1)
        assert executor.output_of(layer, after).equal(output)


def test_linear_paths_end_at_what_is_not_linear() -> None:
    model, inputs = network("resnet")
    paths = GraphExecutor(model, batch_of(inputs)).linear_paths
    norm = model.get_submodule("3.bn1")
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(paths["3.conv1"].scale, scale.detach())
    assert paths["3.conv1"].norm == "3.bn1"
    assert paths["3.conv1"].shortcut is None
    assert paths["3.conv2"].shortcut is not None
    assert all(paths[name].rectified for name in ("0", "3.conv1", "3.conv2"))
    assert not paths["7"].rectified
    assert paths["7"].scale is None


def test_a_difference_as_one_of_the_layer_s_output() -> None:
    """It is divided by the scale, except where the scale is next to nothing."""
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.ReLU()).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([2.0, 1e-9, -4.0]))
    path = GraphExecutor(model, batch_of(torch.randn(5, 2, 7))).linear_paths["0"]
    change = path.as_output(torch.ones(5, 3, 7), (5, 3, 7))
    expected = torch.tensor([0.5, 0.0, -0.25])[:, None].expand(5, 3, 7)
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=0)


def test_layers_that_share_weights_are_not_refitted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    executor = GraphExecutor(model, batch_of(torch.randn(3, 4)))
    assert [layer.name for layer in executor.refittable.values()] == ["1"]


def test_one_executor_for_each_shape() -> None:
    model, inputs = network("resnet")
    executors = GraphExecutors(model)
    whole, part = batch_of(inputs), batch_of(inputs[:2])
    assert executors.of(whole) is executors.of(batch_of(inputs + 1))
    assert executors.of(whole) is not executors.of(part)


def test_bytes_are_counted_once() -> None:
    model, inputs = network("resnet")
    executor = GraphExecutor(model, batch_of(inputs))
    values = executor.inputs(batch_of(inputs))
    assert bytes_held([values, dict(values)]) == 4 * inputs.numel()
