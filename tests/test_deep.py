"""Deep networks, with convolutions and attention: their groups, their selection, their cutting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from io import StringIO

import pytest
import torch
from networks import NETWORKS, TOTALS, Block, Inputs, network, outputs_of
from rich.console import Console
from torch import Tensor, nn

import greedyprune
from greedyprune import Imitation
from greedyprune.data.batches import Batch
from greedyprune.graph.groups import Group, analyse, find_groups
from greedyprune.graph.propagate import NotPrunableError
from greedyprune.graph.replay import Replay
from greedyprune.graph.tracing import LAYER_TYPES
from greedyprune.objectives import imitation
from greedyprune.surgery.cut import masked

each_network = pytest.mark.parametrize("name", NETWORKS)
each_weights = pytest.mark.parametrize("weights", ["counts", "uniform", "none", "refit"])


def data_of(inputs: Inputs) -> object:
    """One batch, as `select` takes it."""
    return inputs if isinstance(inputs, dict) else [inputs]


def groups_of(model: nn.Module, inputs: Inputs) -> list[Group]:
    batch = Batch((), inputs, None) if isinstance(inputs, dict) else Batch((inputs,), {}, None)
    return find_groups(model, analyse(model, batch), None)


@each_network
def test_groups(name: str) -> None:
    groups = {
        group.producer: (group.units, group.producers[1:], group.consumers)
        for group in groups_of(*network(name))
    }
    assert groups == NETWORKS[name][1]


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


def consumer_errors(
    model: nn.Module, inputs: Inputs, consumers: list[str], other: nn.Module
) -> Tensor:
    """How the consumers' outputs differ with another model's weights, on the dense inputs."""
    errors: list[Tensor] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            consumer = copy.deepcopy(other.get_submodule(name))
            errors.append((consumer(*args) - output).double().flatten())

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in consumers]
    outputs_of(model, inputs)
    for handle in handles:
        handle.remove()
    return torch.cat(errors)


@each_network
@each_weights
def test_losses_are_those_of_the_consumers(name: str, weights: str) -> None:
    """Invariant 1: the mean squared error of the consumers' outputs, after the first step and the
    last."""
    model, inputs = network(name)
    selection = greedyprune.select(
        model, data_of(inputs), objective=Imitation(sequential=False), weights=weights
    )
    for producer, layer in selection.layers.items():
        for k in {1, len(layer.order)}:
            cut = layer.at(k)
            other = masked(model, greedyprune.Selection({producer: cut}))
            errors = consumer_errors(model, inputs, list(cut.outputs), other)
            expected = errors.square().mean()
            torch.testing.assert_close(cut.losses[-1], expected, rtol=1e-5, atol=1e-9)


@torch.no_grad()
def test_unchanged_weights_give_the_plain_greedy_path() -> None:
    """With weights="none" each pick leaves the least error of all, the weights being unchanged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4), nn.Softmax(1))
    inputs = torch.randn(50, 6)
    hidden, outgoing = model[:2](inputs).double(), model[2].weight.double()
    dense, candidates, order, losses = hidden @ outgoing.T, list(range(10)), [], []
    while candidates:
        errors = [
            (hidden[:, [*order, j]] @ outgoing[:, [*order, j]].T - dense).square().mean()
            for j in candidates
        ]
        losses.append(min(errors))
        order.append(candidates.pop(errors.index(min(errors))))
    for backend in ("cpu", "reference"):
        layer = greedyprune.select(model, [inputs], size=1.0, weights="none", backend=backend)
        assert layer.order.tolist() == order
        torch.testing.assert_close(layer.losses, torch.stack(losses), rtol=1e-5, atol=1e-9)
    smaller = greedyprune.select(model, [inputs], size=4, weights="none")
    assert smaller.order.tolist() == order[:4]


def recorded(
    model: nn.Module, inputs: Inputs, consumer: str, total: tuple[str, str | None] | None
) -> Tensor:
    """A consumer's output, or its sum with the shortcut, in the scale of the consumer's output.

    total: the module that takes the sum, and the normalisation before the sum (see TOTALS)
    """
    values: list[Tensor] = []
    if total is None:
        handle = model.get_submodule(consumer).register_forward_hook(
            lambda module, args, output: values.append(output.double())
        )
    else:
        handle = model.get_submodule(total[0]).register_forward_pre_hook(
            lambda module, args: values.append(args[0].double())
        )
    outputs_of(model, inputs)
    handle.remove()
    if total is None or total[1] is None:
        return values[0]
    norm = model.get_submodule(total[1])
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return values[0] / scale[:, None, None]


# Not "excited": one of its consumers feeds another one, whose inputs change with it.
SEVERAL = [n for n, (_, groups) in NETWORKS.items() if len(groups) > 1 and n != "excited"]


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("weights", ["counts", "refit"])
@pytest.mark.parametrize("fits", [True, False])
def test_layers_compensate_for_those_before_them(
    name: str, weights: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's loss is how far the network, pruned up to this layer, is from the dense one there.

    Where the layer's output is added to a shortcut, the sums are compared.

    fits: do the values between two layers fit in memory?
    """
    model, inputs = network(name)
    batches = [inputs] if isinstance(inputs, dict) else list(inputs.split(4))
    if not fits:
        monkeypatch.setattr(imitation, "Replay", lambda model, data, _: Replay(model, data, 0))
    sequential = greedyprune.select(model, batches, objective="imitation", weights=weights)
    apart = greedyprune.select(
        model, batches, objective=Imitation(sequential=False), weights=weights
    )
    first = next(iter(NETWORKS[name][1]))
    assert sequential.layers[first].order.equal(apart.layers[first].order)
    done: dict[str, greedyprune.selection.LayerSelection] = {}
    for producer in NETWORKS[name][1]:
        layer = sequential.layers[producer]
        done[producer] = layer
        [consumer] = layer.outputs
        place = consumer, TOTALS.get(name, {}).get(consumer)
        small = masked(model, greedyprune.Selection(done))
        error = recorded(small, inputs, *place) - recorded(model, inputs, *place)
        torch.testing.assert_close(layer.losses[-1], error.square().mean(), rtol=1e-4, atol=1e-9)
        if len(done) > 1 and weights == "refit":
            other = masked(model, greedyprune.Selection({**done, producer: apart.layers[producer]}))
            worse = recorded(other, inputs, *place) - recorded(model, inputs, *place)
            assert error.square().mean() <= worse.square().mean() * 1.05


def test_dead_layers_and_odd_shortcuts() -> None:
    """Units that are always 0, a sum of a tensor with itself, and a parameter that is added."""

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
        assert all(2 * len(s.kept) == len(s.counts) for s in selection.layers.values())
        assert selection.layers["c"].losses.eq(0).all()
        assert selection.layers["c"].weights.eq(0).all()
        small, inputs = greedyprune.prune(model, selection), torch.cat(batches)
        torch.testing.assert_close(small(inputs), masked(model, selection)(inputs))


def test_batches_of_many_shapes() -> None:
    model, inputs = network("resnet")
    batches = [inputs[:n] for n in (1, 2, 3)]
    few = greedyprune.select(model, batches)
    assert set(few.layers) == {"3.conv1", "4.conv1"}
    sizes = [torch.randn(1, 3, n, 12) for n in range(6, 25)]
    with pytest.raises(ValueError, match=r"data: found batches of more than 16 shapes"):
        greedyprune.select(model, sizes)
    apart = greedyprune.select(model, sizes, objective=Imitation(sequential=False))
    assert set(apart.layers) == set(few.layers)


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
def test_groups_are_those_of_torch_pruning(name: str) -> None:
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
    table = greedyprune.layers(model, inputs)
    rows = {key: (row.units, row.producers[1:], row.consumers) for key, row in table.items()}
    assert rows == NETWORKS[name][1]
    layers = {key for key, module in model.named_modules() if isinstance(module, LAYER_TYPES)}
    producers = {producer for row in table.values() for producer in row.producers}
    assert layers <= producers | set(table.refused)
    assert all(row.flops > 0 for row in table.values())
    console = Console(width=400, file=StringIO())
    console.print(table.summary())
    assert all(text in console.file.getvalue() for text in [*table, *table.refused.values()])


def test_the_numbers_in_the_table_of_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))
    table = greedyprune.layers(model, torch.randn(2, 3, 4, 4))
    assert model.training
    assert table["0"].features == 4
    assert table["0"].parameters == 8 * 27 + 8 + 8 + 8 + 32 * 5
    assert table["0"].flops == 2 * (2 * 4 * 8 * 27 + 2 * 32 * 5)
    assert table.refused == {"3": "its units are the model's output"}
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
    table = greedyprune.layers(model, {"input_ids": ids})
    assert len(table) == 2 * 22
    assert sum(layer.parameters for layer in table.values()) > 9e8
    assert table["model.layers.7.self_attn.q_proj"].units == 4
    assert table["model.layers.7.mlp.gate_proj"].units == 5632


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


def refused(model: nn.Module, inputs: Tensor, layer: str) -> str:
    """The message that refuses a layer."""
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

    assert "aten.cat.default joins its units" in refused(Dense(), torch.randn(2, 3, 4, 4), "a")
    norm = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
    assert "aten.group_norm" in refused(norm, torch.randn(2, 3, 4, 4), "0")


def test_a_model_whose_code_holds_its_sizes_is_refused() -> None:
    class LeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 6, 3), nn.Linear(6 * 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(x).relu().view(-1, 96))

    with pytest.raises(ValueError, match=r"layer 'conv': .* aten.view.default may have their"):
        greedyprune.select(LeNet(), [torch.randn(4, 1, 6, 6)])


def test_a_group_is_found_by_any_of_its_producers() -> None:
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


def test_a_tolerance_stops_each_layer() -> None:
    model, inputs = network("resnet")
    nothing = copy.deepcopy(model)
    for parameter in nothing.parameters():
        nn.init.zeros_(parameter)
    selection = greedyprune.select(
        model, [inputs], tolerance=1e-4, objective=Imitation(sequential=False)
    )
    for layer in selection.layers.values():
        errors = consumer_errors(model, inputs, list(layer.outputs), nothing)
        enough = 1e-4 * float(errors.square().mean())
        assert 1 < len(layer.order) < len(layer.counts)
        assert float(layer.losses[-1]) <= enough
        assert (layer.losses[:-1] > enough).all()


def test_a_block_with_a_convolution_as_shortcut() -> None:
    block = Block(8, 16, 2).eval()
    inputs = torch.randn(4, 8, 10, 10)
    small = greedyprune.prune(block, greedyprune.select(block, [inputs], size=5))
    assert small.conv1.out_channels == small.bn1.num_features == small.conv2.in_channels == 5
    assert small.conv2.out_channels == 16
    assert small(inputs).shape == block(inputs).shape
