"""Networks with convolutions and attention: their groups, their selection, their cutting."""

from __future__ import annotations

import copy
from io import StringIO

import pytest
import torch
from networks import NETWORKS, TOTALS, Block, Inputs, network, outputs_of
from rich.console import Console
from torch import Tensor, nn

import greedyprune
from greedyprune import plan as ways
from greedyprune.data.batches import Batch
from greedyprune.graph.groups import Group, analyse, find_groups
from greedyprune.graph.propagate import NotPrunableError
from greedyprune.graph.replay import Replay
from greedyprune.surgery.cut import masked

each_network = pytest.mark.parametrize("name", NETWORKS)
each_weights = pytest.mark.parametrize("weights", ["counts", "uniform", "none", "refit"])


def data_of(inputs: Inputs) -> object:
    return inputs if isinstance(inputs, dict) else [inputs]


def groups_of(model: nn.Module, inputs: Inputs) -> list[Group]:
    batch = Batch((), inputs, None) if isinstance(inputs, dict) else Batch((inputs,), {}, None)
    return find_groups(model, analyse(model, batch), None)


@each_network
def test_groups(name: str) -> None:
    found = {
        group.producer: (group.units, group.producers[1:], group.consumers)
        for group in groups_of(*network(name))
    }
    assert found == NETWORKS[name][1]


@each_network
@each_weights
def test_the_pruned_model_is_the_masked_one(name: str, weights: str) -> None:
    """Invariant 4, all layers of a network at once."""
    model, inputs = network(name)
    selection = greedyprune.select(model, data_of(inputs), objective="imitation", weights=weights)
    assert set(selection.layers) == set(NETWORKS[name][1])
    small = greedyprune.prune(model, selection)
    expected = outputs_of(masked(model, selection), inputs)
    found = outputs_of(small, inputs)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    count = [sum(p.numel() for p in each.parameters()) for each in (model, small)]
    assert count[1] < count[0]
    for layer in selection.layers.values():
        assert len(layer.kept) == max(1, round(0.5 * len(layer.counts)))


def consumer_outputs(
    model: nn.Module, inputs: Inputs, consumers: list[str], weights: nn.Module
) -> list[Tensor]:
    """What the consumers compute in the dense network, and what with another model's weights."""
    found: list[Tensor] = []

    def hook(name: str) -> object:
        def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            other = copy.deepcopy(weights.get_submodule(name))
            found.append((other(*args) - out).double().flatten())

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in consumers]
    outputs_of(model, inputs)
    for handle in handles:
        handle.remove()
    return found


@each_network
@each_weights
def test_losses_are_those_of_the_consumers(name: str, weights: str) -> None:
    """Invariant 1: the mean squared error of the consumers' outputs, for any length of the path."""
    model, inputs = network(name)
    selection = greedyprune.select(
        model, data_of(inputs), objective="imitation", weights=weights, sequential=False
    )
    for producer, layer in selection.layers.items():
        for k in {1, len(layer.order)}:
            cut = layer.at(k)
            other = masked(model, greedyprune.Selection({producer: cut}))
            errors = consumer_outputs(model, inputs, list(cut.outputs), other)
            expected = torch.cat(errors).square().mean()
            torch.testing.assert_close(cut.losses[-1], expected, rtol=1e-5, atol=1e-9)


@torch.no_grad()
def test_weights_as_they_are_are_what_is_selected_for() -> None:
    """Each pick is the one that leaves the least error once no weight changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4), nn.Softmax(1))
    inputs = torch.randn(50, 6)
    hidden, outgoing = model[:2](inputs).double(), model[2].weight.double()
    dense, left, order, losses = hidden @ outgoing.T, list(range(10)), [], []
    while left:
        found = [(hidden[:, [*order, j]] @ outgoing[:, [*order, j]].T - dense).square().mean()
                 for j in left]  # fmt: skip
        losses.append(min(found))
        order.append(left.pop(found.index(min(found))))
    for backend in ("cpu", "reference"):
        layer = greedyprune.select(model, [inputs], size=1.0, weights="none", backend=backend)
        assert layer.order.tolist() == order
        torch.testing.assert_close(layer.losses, torch.stack(losses), rtol=1e-5, atol=1e-9)
    smaller = greedyprune.select(model, [inputs], size=4, weights="none")
    assert smaller.order.tolist() == order[:4]


def recorded(
    model: nn.Module, inputs: Inputs, consumer: str, total: tuple[str, str | None] | None
) -> Tensor:
    """What a layer computes, or its sum with the shortcut, in the layer's own scale."""
    found: list[Tensor] = []
    if total is None:
        handle = model.get_submodule(consumer).register_forward_hook(
            lambda _, __, out: found.append(out.double())
        )
    else:
        handle = model.get_submodule(total[0]).register_forward_pre_hook(
            lambda _, args: found.append(args[0].double())
        )
    outputs_of(model, inputs)
    handle.remove()
    if total is None or total[1] is None:
        return found[0]
    norm = model.get_submodule(total[1])
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return found[0] / scale[:, None, None]


# Not "excited": what its second consumer is given changes with what its first one is left with.
SEVERAL = [n for n, (_, groups) in NETWORKS.items() if len(groups) > 1 and n != "excited"]


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("weights", ["counts", "refit"])
@pytest.mark.parametrize("room", [True, False])
def test_layers_make_up_for_those_before_them(
    name: str, weights: str, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are the distance of the network pruned up to a layer from the dense one there.

    Where the layer's output is added to a shortcut, of the sums.
    """
    model, inputs = network(name)
    batches = [inputs] if isinstance(inputs, dict) else list(inputs.split(4))
    options = {"objective": "imitation", "weights": weights}
    if not room:  # for the values between two layers
        monkeypatch.setattr(ways, "Replay", lambda model, data, _: Replay(model, data, 0))
    found = greedyprune.select(model, batches, **options)
    apart = greedyprune.select(model, batches, **options, sequential=False)
    first = next(iter(NETWORKS[name][1]))
    assert found.layers[first].order.equal(apart.layers[first].order)
    done: dict[str, greedyprune.selection.LayerSelection] = {}
    for producer in NETWORKS[name][1]:
        layer = found.layers[producer]
        done[producer] = layer
        [consumer] = layer.outputs
        what = consumer, TOTALS.get(name, {}).get(consumer)
        small = masked(model, greedyprune.Selection(done))
        error = recorded(small, inputs, *what) - recorded(model, inputs, *what)
        torch.testing.assert_close(layer.losses[-1], error.square().mean(), rtol=1e-4, atol=1e-9)
        if len(done) > 1 and weights == "refit":
            other = masked(model, greedyprune.Selection({**done, producer: apart.layers[producer]}))
            worse = recorded(other, inputs, *what) - recorded(model, inputs, *what)
            assert error.square().mean() <= worse.square().mean() * 1.05


def test_dead_layers_and_odd_shortcuts() -> None:
    """Units that never fire, a sum with itself, a parameter of the output's own shape beside it."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
            self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 4)
            self.e, self.f = nn.Linear(4, 6), nn.Linear(6, 4)
            self.place = nn.Parameter(torch.randn(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x).relu())
            y = self.d(self.c(y + y).relu()) + self.place
            return self.f(self.e(y).relu()).softmax(-1)

    torch.manual_seed(0)
    model = Odd()
    with torch.no_grad():
        model.c.bias.fill_(-1e3)
    batches = list(torch.randn(30, 4).split(1))
    for backend in ("cpu", "reference"):
        selection = greedyprune.select(model, batches, backend=backend)
        assert all(2 * len(e.kept) == len(e.counts) for e in selection.layers.values())
        assert selection.layers["c"].losses.eq(0).all()
        assert selection.layers["c"].weights.eq(0).all()
        small, inputs = greedyprune.prune(model, selection), torch.cat(batches)
        torch.testing.assert_close(small(inputs), masked(model, selection)(inputs))


def test_batches_of_many_shapes() -> None:
    model, inputs = network("resnet")
    batches = [inputs[:n] for n in (1, 2, 3)]
    some = greedyprune.select(model, batches)
    assert set(some.layers) == {"3.conv1", "4.conv1"}
    sizes = [torch.randn(1, 3, n, 12) for n in range(6, 25)]
    with pytest.raises(ValueError, match=r"data: found batches of more than 16 shapes"):
        greedyprune.select(model, sizes)
    assert set(greedyprune.select(model, sizes, sequential=False).layers) == set(some.layers)


def test_in_place_operations_do_not_reach_the_other_network() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
            self.c, self.d = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            x += self.b(self.a(x).relu_())
            x.mul_(1.5)
            x += self.d(self.c(x).relu_())
            return x

    torch.manual_seed(0)
    model, inputs = InPlace().eval(), torch.randn(8, 3, 6, 6)
    selection = greedyprune.select(model, [inputs])
    small = masked(model, selection)
    error = outputs_of(small, inputs).double() - outputs_of(model, inputs).double()
    torch.testing.assert_close(
        selection.layers["c"].losses[-1], error.square().mean(), rtol=1e-5, atol=0
    )


@each_network
def test_backends_agree(name: str) -> None:
    model, inputs = network(name)
    for weights in ("counts", "refit"):
        paths = [
            greedyprune.select(
                model, data_of(inputs), objective="imitation", weights=weights, backend=backend
            )
            for backend in ("cpu", "reference")
        ]
        for producer, layer in paths[0].layers.items():
            other = paths[1].layers[producer]
            assert layer.order.equal(other.order)
            torch.testing.assert_close(layer.losses, other.losses, rtol=1e-6, atol=1e-9)


@each_network
def test_a_selection_survives_its_file(name: str, tmp_path: object) -> None:
    model, inputs = network(name)
    selection = greedyprune.select(model, data_of(inputs), objective="imitation")
    selection.save(f"{tmp_path}/selection.safetensors")
    loaded = greedyprune.Selection.load(f"{tmp_path}/selection.safetensors")
    small = greedyprune.prune(model, selection.at(1))
    again = greedyprune.prune(model, loaded.at(1))
    assert outputs_of(small, inputs).equal(outputs_of(again, inputs))


@pytest.mark.parametrize("name", ["resnet", "bottleneck", "vgg", "mobilenet", "excited"])
def test_groups_are_torch_pruning_s(name: str) -> None:
    """The same layers are cut together as in another library's dependency graph."""
    tp = pytest.importorskip("torch_pruning")
    model, inputs = network(name)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
    names = {module: name for name, module in model.named_modules()}
    for group in groups_of(model, inputs):
        root = model.get_submodule(group.producer)
        prune = tp.prune_conv_out_channels
        if isinstance(root, nn.Linear):
            prune = tp.prune_linear_out_channels
        theirs = {names[dep.target.module] for dep, _ in graph.get_pruning_group(root, prune, [0])
                  if dep.target.module in names}  # fmt: skip
        ours = {tensor.rpartition(".")[0] for tensor in group.slices}
        assert ours == theirs


@each_network
def test_the_table_of_layers(name: str) -> None:
    model, inputs = network(name)
    found = greedyprune.layers(model, inputs)
    assert {n: (e.units, e.producers[1:], e.consumers) for n, e in found.items()} == (
        NETWORKS[name][1]
    )
    weights = {
        n for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }  # fmt: skip
    shown = {each for layer in found.values() for each in layer.producers} | set(found.refused)
    assert weights <= shown
    for layer in found.values():
        assert layer.flops > 0
    text = Console(width=400, file=StringIO())
    text.print(found.summary())
    assert all(each in text.file.getvalue() for each in [*found, *found.refused.values()])


def test_the_table_s_numbers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))
    found = greedyprune.layers(model, torch.randn(2, 3, 4, 4))
    assert model.training
    assert found["0"].features == 4
    assert found["0"].parameters == 8 * 27 + 8 + 8 + 8 + 32 * 5
    assert found["0"].flops == 2 * (2 * 4 * 8 * 27 + 2 * 32 * 5)
    assert found.refused == {"3": "its units are the model's output"}
    with pytest.raises(TypeError, match="example: found int"):
        greedyprune.layers(model, 3)
    with pytest.raises(ValueError, match=r"model: torch.export can't trace it"):
        greedyprune.layers(model, torch.randn(2, 4, 4, 4))


def test_a_large_model_without_weights() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        ids = torch.zeros(1, 16, dtype=torch.int64)
    found = greedyprune.layers(model, {"input_ids": ids})
    assert len(found) == 2 * 22
    assert sum(layer.parameters for layer in found.values()) > 9e8
    assert found["model.layers.7.self_attn.q_proj"].units == 4
    assert found["model.layers.7.mlp.gate_proj"].units == 5632


def test_recalibrated_statistics_are_the_data_s() -> None:
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


def refused(model: nn.Module, inputs: Tensor, layer: str) -> str:
    with pytest.raises(NotPrunableError) as error:
        find_groups(model, analyse(model.eval(), Batch((inputs,), {}, None)), [layer])
    return str(error.value)


def test_refusals_name_the_operation() -> None:
    model, inputs = network("resnet")
    for layer in ("0", "3.conv2", "4.shortcut"):
        assert "aten.add.Tensor combines its units" in refused(model, inputs, layer)
    assert "its units are the model's output" in refused(model, inputs, "7")
    model, inputs = network("resnext")
    assert "a grouped convolution" in refused(model, inputs, "2")

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(7, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat([x, self.a(x)], 1))

    assert "aten.cat.default puts other numbers" in refused(Dense(), torch.randn(2, 3, 4, 4), "a")
    norm = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
    assert "aten.group_norm" in refused(norm, torch.randn(2, 3, 4, 4), "0")


def test_sizes_written_into_the_model_are_found() -> None:
    class LeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 6, 3), nn.Linear(6 * 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(x).relu().view(-1, 96))

    with pytest.raises(ValueError, match=r"layer 'conv': .* aten.view.default may have their"):
        greedyprune.select(LeNet(), [torch.randn(4, 1, 6, 6)])


def test_named_layers_can_be_any_of_a_group() -> None:
    model, inputs = network("excited")
    by_gate = greedyprune.select(model, [inputs], layers=["excite"], size=3)
    assert list(by_gate.layers) == ["conv"]


def test_bad_activations_name_the_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    inputs = torch.randn(4, 3, 5, 5)
    inputs[1, 1, 1, 1] = torch.inf
    with pytest.raises(ValueError, match="layer '0': NaN or inf in its activations"):
        greedyprune.select(model, [inputs])
    with pytest.raises(ValueError, match="memory_limit: found 100 bytes, but layer '0' needs"):
        greedyprune.select(model, [torch.randn(4, 3, 5, 5)], memory_limit=100)
    with pytest.raises(ValueError, match="batch_size: layer '0' imitates"):
        greedyprune.select(model, [torch.randn(4, 3, 5, 5)], batch_size=2)


def test_a_tolerance_stops_each_layer() -> None:
    model, inputs = network("resnet")
    nothing = copy.deepcopy(model)
    for parameter in nothing.parameters():
        nn.init.zeros_(parameter)
    found = greedyprune.select(model, [inputs], tolerance=1e-4, sequential=False)
    for layer in found.layers.values():
        errors = consumer_outputs(model, inputs, list(layer.outputs), nothing)
        enough = 1e-4 * float(torch.cat(errors).square().mean())
        assert 1 < len(layer.order) < len(layer.counts)
        assert float(layer.losses[-1]) <= enough
        assert (layer.losses[:-1] > enough).all()


def test_a_trained_shape_block_keeps_its_shortcut() -> None:
    block = Block(8, 16, 2).eval()
    inputs = torch.randn(4, 8, 10, 10)
    small = greedyprune.prune(block, greedyprune.select(block, [inputs], size=5))
    assert small.conv1.out_channels == small.bn1.num_features == small.conv2.in_channels == 5
    assert small.conv2.out_channels == 16
    assert small(inputs).shape == block(inputs).shape
