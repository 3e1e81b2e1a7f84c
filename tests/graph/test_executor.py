"""A model's graph run in pieces, and what it says of each layer."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS, Inputs, network, outputs_of
from torch import Tensor, nn

import greedyprune
from greedyprune.data.batches import Batch
from greedyprune.data.forward import main_output
from greedyprune.graph import executors as executors_module
from greedyprune.graph.executor import GraphExecutor
from greedyprune.graph.executors import GraphExecutors
from greedyprune.graph.networks import Network, bytes_held, tensors_of
from greedyprune.graph.nodes import in_place


def batch_of(inputs: Inputs) -> Batch:
    return Batch((), inputs, None) if isinstance(inputs, dict) else Batch((inputs,), {}, None)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_piece_by_piece_is_the_whole(name: str) -> None:
    """Every node by itself: the same output, and no values are left that nothing uses."""
    model, inputs = network(name)
    executor, tensors = GraphExecutor(model, batch_of(inputs)), tensors_of(model)
    values, network_of_model = executor.inputs(batch_of(inputs)), Network(tensors)
    for start in range(len(executor.nodes)):
        later = {source for node in executor.nodes[start:] for source in node.all_input_nodes}
        assert set(values) <= later | set(executor.inputs(batch_of(inputs)))
        before = dict(values)
        if start % 5 == 0:
            output = main_output(executor.outputs(values, tensors, start))
            torch.testing.assert_close(output, outputs_of(model, inputs), rtol=0, atol=0)
            assert values == before
        executor.run(values, network_of_model, start, start + 1)
    assert main_output(executor.returned(values)).equal(outputs_of(model, inputs))


@pytest.mark.parametrize("name", ["resnet", "resnext", "conv3d", "gpt2"])
@torch.no_grad()
def test_a_layer_s_input_gives_its_output(name: str) -> None:
    """By its linear map on the padded input, and by the module on the input without padding."""
    model, inputs = network(name)
    executor, tensors = GraphExecutor(model, batch_of(inputs)), tensors_of(model)
    values, start, whole = executor.inputs(batch_of(inputs)), 0, Network(tensors)
    for layer, place in executor.place.items():
        executor.run(values, whole, start, place)
        start = place
        weight, bias = (tensors.get(name or "") for name in executor.layers[layer][1:3])
        padded = executor.input_of(layer, values, padded=True)
        output = executor.linear_map(layer, padded, weight, bias)
        assert model.get_submodule(layer)(executor.input_of(layer, values)).equal(output)
        after = dict(values)
        executor.run(after, whole, place, place + 1)
        assert executor.output_of(layer, after).equal(output)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_inputs_without_weights_are_left_out(name: str) -> None:
    """The output is as with zeros in their place, of every layer that is a module."""
    model, inputs = network(name)
    executor, tensors = GraphExecutor(model, batch_of(inputs)), tensors_of(model)
    changed, fewer = dict(tensors), 0
    for layer in executor.layers.values():
        if layer.groups == 1:
            weight = tensors[layer.weight].clone()
            weight.index_fill_(layer.in_dim, torch.arange(0, weight.shape[layer.in_dim], 3), 0.0)
            changed[layer.weight] = weight
    used = executor.inputs_used(changed)
    for weight, channels in used.items():
        dim = next(layer.in_dim for layer in executor.layers.values() if layer.weight == weight)
        size = changed[weight].shape[dim]
        fewer += len(channels) < size
        assert channels.equal(torch.arange(size)[torch.arange(size) % 3 > 0])
    assert fewer
    ends = []
    for whole in (Network(changed), Network(changed, used=used)):
        values = executor.inputs(batch_of(inputs))
        executor.run(values, whole, 0, len(executor.nodes))
        ends.append(main_output(executor.returned(values)))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_operations_in_place_change_no_value_that_is_used_again() -> None:
    """Those of one network are not those of the other, which has the same value before."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            own = self.first(x)
            own += x  # nothing else reads what is changed
            shared = self.second(own).relu_()
            return (shared.view(24) + 0).view(6, 4) + shared.add_(own)

    torch.manual_seed(0)
    model, inputs = InPlace(), torch.randn(6, 4)
    executor, batch = GraphExecutor(model, batch_of(inputs)), batch_of(inputs)
    whole, end = Network(tensors_of(model)), len(executor.nodes)
    assert sum(map(in_place, executor.nodes)) == 3
    expected = model(inputs.clone())
    for stop in range(end):
        values = executor.inputs(batch)
        executor.run(values, whole, 0, stop)
        other, before = dict(values), {node: value.clone() for node, value in values.items()}
        for both in (other, values):
            executor.run(both, whole, stop, end)
            assert main_output(executor.returned(both)).equal(expected)
            if both is other:
                assert all(values[node].equal(before[node]) for node in values)
    assert batch.args[0].equal(inputs)


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
    change = path.unscaled(torch.ones(3, 7))
    expected = torch.tensor([0.5, 0.0, -0.25])[:, None].expand(3, 7)
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(path.scaled(change)[[0, 2]], torch.ones(2, 7))


def test_layers_that_share_weights_are_not_refitted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    executor = GraphExecutor(model, batch_of(torch.randn(3, 4)))
    assert [layer.name for layer in executor.refittable.values()] == ["1"]


def test_one_executor_for_all_shapes() -> None:
    model, inputs = network("resnet")
    executors = GraphExecutors(model)
    whole, part = batch_of(inputs), batch_of(inputs[:2])
    assert executors.of(whole) is executors.of(batch_of(inputs + 1))
    opened = executors.of(part)
    assert executors.of(whole) is not opened
    assert executors.of(batch_of(inputs[:3])) is opened
    assert executors.of(batch_of(torch.randn(5, 3, 30, 18))) is opened


class Embedded(nn.Module):
    """Two inputs of one length, and a size that is written into the graph where `fixed`."""

    def __init__(self, fixed: int | None) -> None:
        super().__init__()
        self.fixed, self.embed = fixed, nn.Embedding(20, 6)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        x = self.embed(ids) * scale[..., None]
        x = x + self.down(self.up(x).relu())
        length = x.shape[1] if self.fixed is None else min(self.fixed, x.shape[1])
        return self.head(x.view(-1, length, 6).mean(1))


def test_sizes_that_the_graph_does_not_serve_take_a_trace_of_their_own() -> None:
    def batch(samples: int, length: int) -> Batch:
        return Batch((torch.randint(20, (samples, length)), torch.rand(samples, length)), {}, None)

    executors = GraphExecutors(Embedded(None).eval())
    executors.of(batch(4, 5))
    opened = executors.of(batch(4, 6))
    assert opened is executors.of(batch(7, 9))
    assert not opened.accepts(batch(1, 9))  # sizes of 1 are broadcast, so they are fixed
    ids, other = batch(4, 6).args[0], batch(4, 7).args[1]
    assert not opened.accepts(Batch((ids, other), {}, None))  # the model needs equal lengths
    fixed = GraphExecutors(Embedded(3).eval())
    traces = {id(fixed.of(batch(4, length))) for length in (3, 6, 9)}
    assert len(traces) >= 2


@pytest.mark.parametrize("objective", ["imitation", "loss"])
@torch.no_grad()
def test_varying_lengths_give_what_a_trace_for_each_gives(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = Embedded(None).eval(), []
    for length in range(5, 25):
        targets = torch.randint(3, (3,))
        inputs = torch.randint(20, (3, length)), torch.rand(3, length)
        batches.append((inputs, targets))
    results = []
    for most, opened in ((2, True), (40, False)):
        monkeypatch.setattr(executors_module, "MOST_SHAPES", most)
        if not opened:
            monkeypatch.setattr(GraphExecutors, "_with_open_sizes", lambda self, form, batch: None)
        selection = greedyprune.select(model, batches, layers="up", objective=objective)
        refitted = greedyprune.refit(model, selection, batches)
        results.append((selection.order, selection.losses, refitted(*batches[0][0])))
    assert results[0][0].equal(results[1][0])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Conditioned(nn.Module):
    """A vector for each sample is added to all positions of a feature map."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.enter = first, nn.Conv2d(3, 8, 3, padding=1)
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 8)
        self.wide, self.leave = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, vector = self.enter(x), self.down(self.up(t).relu())[:, :, None, None]
        x = vector + x if self.first else x + vector
        return self.leave(self.wide(x).relu())


@pytest.mark.parametrize("first", [True, False])
def test_a_vector_that_is_added_to_a_map(first: bool) -> None:
    """The vector's layer is refitted to its own output; nothing is added in its own shape."""
    model = Conditioned(first).eval()
    data = [((torch.randn(20, 3, 6, 6), torch.randn(20, 5)), torch.zeros(20))]
    executor = GraphExecutor(model, Batch(data[0][0], {}, None))
    assert executor.linear_paths["down"].shortcut is None
    selection = greedyprune.select(model, data, objective="imitation")
    assert set(selection.layers) == {"up", "wide"}
    assert float(selection.layers["up"].losses[-1]) < float(selection.layers["up"].losses[0])
    pruned = greedyprune.prune(model, selection)
    refitted = greedyprune.refit(model, selection, data)
    wanted = model(*data[0][0])
    errors = [(small(*data[0][0]) - wanted).square().mean() for small in (pruned, refitted)]
    assert errors[1] <= errors[0] * 1.01


@torch.no_grad()
def test_new_tensors_of_one_operation_are_no_aliases() -> None:
    """topk's values are changed in place, and its indices are used later, as in a router."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(6, 4), nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            values, indices = self.gate(x).topk(2, -1)
            values /= values.sum(-1, keepdim=True)
            return self.down(self.up(x).relu()) * values.sum(-1, keepdim=True) + indices.sum()

    model, inputs = Router().eval(), torch.rand(30, 6)
    executor = GraphExecutor(model, batch_of(inputs))
    outputs = executor.outputs(executor.inputs(batch_of(inputs)), tensors_of(model), 0)
    torch.testing.assert_close(outputs, model(inputs))

    class Halves(Router):
        def forward(self, x: Tensor) -> Tensor:
            whole = self.up(x)
            first, _ = whole.split(4, -1)
            first += 1
            return self.down(whole)

    model = Halves().eval()  # its graph is written with new tensors
    executor = GraphExecutor(model, batch_of(inputs))
    outputs = executor.outputs(executor.inputs(batch_of(inputs)), tensors_of(model), 0)
    torch.testing.assert_close(outputs, model(inputs))


def test_bytes_are_counted_once() -> None:
    model, inputs = network("resnet")
    executor = GraphExecutor(model, batch_of(inputs))
    values = executor.inputs(batch_of(inputs))
    assert bytes_held([values, dict(values)]) == 4 * inputs.numel()


def test_varying_lengths_of_a_model_without_logits() -> None:
    """The open trace is compared with outputs of any structure, such as an encoder's record."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.down(self.up(x).relu())
            return {"last_hidden_state": hidden, "pooler_output": hidden.mean(1).tanh()}

    torch.manual_seed(0)
    model, batches = Encoder(), [torch.randn(4, length, 6) for length in (5, 7, 6, 9)]
    executors = GraphExecutors(model)
    opened = [executors.of(Batch((x,), {}, None)) for x in batches]
    assert opened[1] is opened[2] is opened[3]
    selection = greedyprune.select(model, batches, size=9)
    together = torch.cat([x.flatten(0, 1) for x in batches])[:, None]
    assert selection.kept.equal(greedyprune.select(model, together, size=9).kept)


def test_an_open_trace_that_is_not_the_model_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphExecutor, "outputs", lambda self, values, *_: torch.zeros(4, 3))
    executors = GraphExecutors(nn.Linear(6, 3))
    made = [executors.of(Batch((torch.randn(4, n, 6),), {}, None)) for n in (5, 7, 6)]
    assert len(set(map(id, made))) == 3
