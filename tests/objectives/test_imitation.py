"""`Imitation`: the errors of consumers, in the dense network and in the one pruned so far."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from networks import NETWORKS, TOTALS, Inputs, data_of, network, outputs_of, streams_of
from torch import Tensor, nn

import greedyprune
from greedyprune import Imitation
from greedyprune.data.batches import Batches
from greedyprune.data.positions import Draws
from greedyprune.graph.executors import GraphExecutors
from greedyprune.graph.replay import BothInputs, Replay
from greedyprune.objectives import imitation
from greedyprune.runtime.checkpoint import NO_CHECKPOINT
from greedyprune.runtime.progress import bars
from greedyprune.runtime.resume import Pass
from greedyprune.surgery.cut import masked

each_network = pytest.mark.parametrize("name", NETWORKS)
each_weights = pytest.mark.parametrize("weights", ["counts", "uniform", "none", "refit"])


def loss_in_consumers(
    model: nn.Module, inputs: Inputs, consumers: list[str], other: nn.Module, *, stream: bool
) -> Tensor:
    """The mean squared error of consumers' outputs with another model's weights, on the dense
    inputs; for a stream the mean of each consumer's error as a share of that without any input."""
    errors: dict[str, Tensor] = {name: torch.zeros(0).double() for name in consumers}
    empty = dict.fromkeys(consumers, 0.0)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            consumer = copy.deepcopy(other.get_submodule(name))
            error = (consumer(*args) - output).double().flatten()
            errors[name] = torch.cat([errors[name], error])
            nothing = consumer(*map(torch.zeros_like, args)) - output
            empty[name] += float(nothing.double().square().sum())

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in consumers]
    outputs_of(model, inputs)
    for handle in handles:
        handle.remove()
    if stream:
        return torch.stack([errors[name].square().sum() / empty[name] for name in errors]).mean()
    return torch.cat(list(errors.values())).square().mean()


@each_network
@each_weights
def test_losses_are_those_of_the_consumers(name: str, weights: str) -> None:
    """Invariant 1: the mean squared error of the consumers' outputs, after the first step and the
    last."""
    model, inputs = network(name)
    selection = greedyprune.select(
        model, data_of(inputs), objective=Imitation(sequential=False), weights=weights
    )
    streams = streams_of(model, inputs)
    for producer, layer in selection.layers.items():
        for k in {1, len(layer.order)}:
            cut = layer.at(k)
            other = masked(model, greedyprune.Selection({producer: cut}))
            expected = loss_in_consumers(
                model, inputs, list(cut.outputs), other, stream=producer in streams
            )
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


@pytest.mark.usefixtures("least_ridge")  # errors are compared on the samples they are fitted to
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
            assert error.square().mean() <= worse.square().mean() * 1.05 + 1e-12


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
        dense = model.d.weight.detach().double()[:, selection.layers["c"].kept]
        torch.testing.assert_close(selection.layers["c"].weights, dense)  # nothing speaks against
        small, inputs = greedyprune.prune(model, selection), torch.cat(batches)
        torch.testing.assert_close(small(inputs), masked(model, selection)(inputs))


def test_batches_of_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network("resnet")
    batches = [inputs[:n] for n in (1, 2, 3)]
    few = greedyprune.select(model, batches)
    assert set(few.layers) == {"3.conv1", "4.conv1"}
    sizes = [torch.randn(1, 3, n, 12) for n in range(6, 25)]
    assert set(greedyprune.select(model, sizes).layers) == set(few.layers)
    apart = greedyprune.select(model, sizes, objective=Imitation(sequential=False))
    assert set(apart.layers) == set(few.layers)
    # A model whose sizes are written into its graph takes a trace for each shape.
    monkeypatch.setattr(GraphExecutors, "_with_open_sizes", lambda self, form, batch: None)
    with pytest.raises(ValueError, match=r"data: found batches of more than 16 shapes"):
        greedyprune.select(model, sizes)


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
    streams = streams_of(model, inputs)
    for name, layer in selection.layers.items():
        enough = 1e-4 * float(
            loss_in_consumers(model, inputs, list(layer.outputs), nothing, stream=name in streams)
        )
        assert 1 < len(layer.order) < len(layer.counts)
        assert float(layer.losses[-1]) <= enough
        assert (layer.losses[:-1] > enough).all()


@pytest.mark.parametrize("limit", [0, 12_000, 10**9])
def test_as_many_batches_are_held_as_fit(limit: int) -> None:
    """Whichever are held, each pass has every batch once, though their order changes."""
    torch.manual_seed(0)
    middle = nn.Linear(64, 64)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), middle, nn.ReLU(), nn.Linear(64, 3)).eval()
    parts = list(torch.randn(90, 8).split(10))
    read = 0

    class Shuffled:
        def __len__(self) -> int:
            return len(parts)

        def __iter__(self) -> Iterator[Tensor]:
            nonlocal read
            read += 1
            order = parts if read < 3 else parts[3::-1] + parts[4:]
            return iter(order)

    batches = Batches(Shuffled(), model)
    replay = Replay(model, batches, limit)
    halved = {"2.weight": middle.weight.detach() / 2}
    for layer, change in (("2", halved), ("4", {})):
        seen = list[Tensor]()

        def add(
            name: str, inputs: BothInputs, draws: Draws, mask: Tensor | None,
            seen: list[Tensor] = seen,
        ) -> None:  # fmt: skip
            seen.append(torch.cat([inputs.dense, inputs.pruned], 1))

        replay.visit([layer], add, bars(False), Pass(NO_CHECKPOINT, layer))
        dense = model[1](model[0](torch.cat(parts)))
        pruned = dense
        if layer == "4":
            dense, pruned = (
                nn.functional.linear(dense, weight, middle.bias).relu()
                for weight in (middle.weight, halved["2.weight"])
            )
        expected = torch.cat([dense, pruned], 1)
        inputs = torch.cat(seen)
        torch.testing.assert_close(
            inputs[inputs.sum(1).argsort()], expected[expected.sum(1).argsort()]
        )
        held = sum(state is not None for state in replay._states)
        assert {0: held == 0, 12_000: 0 < held < 9, 10**9: held == 9}[limit]
        if change:
            replay.change(layer, change)
