"""`refit`: every layer of the pruned network by least squares, in the order in which they run."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from networks import NETWORKS, TOTALS, Inputs, network, outputs_of
from networks import batches_of as data_of
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune.kernels import least_squares
from greedyprune.surgery import refit as refitting
from greedyprune.surgery import weight_change
from greedyprune.surgery.cut import cut
from greedyprune.surgery.weight_change import DAMPING

# Networks of Linears and of convolutions over images, whose patches torch can unfold.
PLAIN = ["resnet", "vgg", "excited", "bert", "gpt2", "llama", "vit"]
# Layers before a ReLU. Their target is not the dense network's output.
RECTIFIED = {
    "resnet": {"3.conv2", "4.conv1", "4.conv2", "4.shortcut"},
    "vgg": {"4", "8"}, "excited": {"squeeze"},
}  # fmt: skip


def inputs_and_outputs(
    model: nn.Module, inputs: Inputs, name: str, total: tuple[str, str | None] | None
) -> tuple[Tensor, Tensor]:
    """A layer's inputs (features, positions) and outputs (C, positions), in float64.

    total: the module that takes the sum of the layer's outputs and a shortcut, and the
        normalisation before that sum: then the sum, divided by the normalisation's factors, is
        returned in the place of the outputs
    """
    recorded: dict[str, Tensor] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        recorded["x"], recorded["y"] = args[0].double(), out.double()

    def record_total(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        recorded["total"] = args[0].double()

    module = model.get_submodule(name)
    handles: list[Any] = [module.register_forward_hook(record)]
    if total is not None:
        handles.append(model.get_submodule(total[0]).register_forward_pre_hook(record_total))
    outputs_of(model, inputs)
    for handle in handles:
        handle.remove()
    x, y = recorded["x"], recorded.get("total", recorded["y"])
    if total is not None and total[1] is not None:
        norm = model.get_submodule(total[1])
        y = y / (norm.weight.double() / (norm.running_var + norm.eps).sqrt())[:, None, None]
    if isinstance(module, nn.Conv2d):
        x = functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return x.transpose(0, 1).flatten(1), y.transpose(0, 1).flatten(1)
    return x.flatten(0, -2).T, y.flatten(0, -2).T


def matrix(module: nn.Module) -> Tensor:
    """A layer's weight as (outputs, features) float64."""
    weight = module.get_parameter("weight").double()
    return (weight.T if type(module).__name__ == "Conv1D" else weight).flatten(1)


@pytest.mark.parametrize(
    ("name", "memory_limit"),
    [*((name, None) for name in PLAIN), ("resnet", 1), ("bert", 1)],  # 1: nothing is held
)
@pytest.mark.usefixtures("least_ridge")
@torch.no_grad()
def test_the_normal_equations(name: str, memory_limit: int | None) -> None:
    """(t - W x) x^T = ridge (W - W dense) in every layer, and no mean error where it has a bias.

    t is the layer's output in the dense network, or what the layer has to add to its shortcut.
    """
    model, inputs = network(name)
    selection = greedyprune.select(model, data_of(inputs), objective="imitation")
    before = cut(copy.deepcopy(model), selection)  # with the dense weights
    small = greedyprune.refit(model, selection, data_of(inputs), memory_limit=memory_limit)
    totals: dict[str, Any] = dict(TOTALS.get(name, {}))
    changed = 0
    for layer, module in small.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.equal(before.get_parameter(f"{layer}.weight")):
            continue
        assert isinstance(module, (nn.Conv2d, nn.Linear)) or type(module).__name__ == "Conv1D"
        changed += 1
        if layer in RECTIFIED.get(name, ()):
            continue
        x, y = inputs_and_outputs(small, inputs, layer, totals.get(layer))
        _, target = inputs_and_outputs(model, inputs, layer, totals.get(layer))
        for selected in selection.layers.values():
            at = selected.slices.get(f"{layer}.weight")
            if at is not None and layer not in selected.outputs:  # the layer's own units were cut
                target = target[at.entries(selected.kept)]
        error = target - y
        ridge = least_squares.ridge(x.square().sum(1), DAMPING)
        change = matrix(module) - matrix(before.get_submodule(layer))
        scale = float(x.norm() * target.norm())
        torch.testing.assert_close(error @ x.T, ridge * change, rtol=0, atol=2e-6 * scale)
        if getattr(module, "bias", None) is not None:
            assert float(error.mean(1).abs().max()) <= 1e-5 * float(target.abs().max())
    assert changed >= 2 and changed > len(RECTIFIED.get(name, ()))  # some were compared


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_only_weights_after_the_first_cut_change(name: str) -> None:
    model, inputs = network(name)
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    selection = greedyprune.select(model, data_of(inputs), objective="imitation")
    pruned = greedyprune.prune(model, selection)
    small = greedyprune.refit(model, selection, data_of(inputs))
    assert all(value.equal(dense[key]) for key, value in model.state_dict().items())
    first = next(iter(selection.layers))
    assert small.get_parameter(f"{first}.weight").equal(pruned.get_parameter(f"{first}.weight"))
    for key, value in small.state_dict().items():
        assert value.shape == pruned.state_dict()[key].shape
        assert value.isfinite().all()
    if name == "gpt2":  # its last layer is its embedding
        assert small.lm_head.weight.equal(model.lm_head.weight)


@pytest.mark.usefixtures("least_ridge")
@torch.no_grad()
def test_rounds_lower_the_error_behind_a_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rounds of least squares give a lower squared error of the ReLU's outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    ).eval()
    nn.init.normal_(model[3].weight)
    inputs = torch.randn(20, 3, 9, 9)
    selection = greedyprune.select(model, [inputs])
    errors = [(greedyprune.prune(model, selection)(inputs) - model(inputs)).square().sum()]
    for rounds in (1, 2, 4, 8):
        monkeypatch.setattr(refitting, "ROUNDS", rounds)
        small = greedyprune.refit(model, selection, [inputs])
        errors.append((small(inputs) - model(inputs)).square().sum())
    assert all(after < before for before, after in pairwise(errors))


def test_padding_other_than_zeros_is_not_added_twice() -> None:
    """In torch.export's graph such padding is a node, which comes before the convolution's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(), nn.Conv2d(6, 4, 3, padding=(0, 2), padding_mode="circular"),
    )  # fmt: skip
    inputs = torch.randn(10, 3, 6, 6)
    selection = greedyprune.select(model, [inputs])
    small = greedyprune.prune(model, selection)
    error = (outputs_of(small, inputs) - outputs_of(model, inputs)).double().square().mean()
    torch.testing.assert_close(selection.layers["2"].losses[-1], error, rtol=1e-5, atol=0)
    better = outputs_of(greedyprune.refit(model, selection, [inputs]), inputs)
    assert (better - outputs_of(model, inputs)).square().mean() < error


@torch.no_grad()
def test_a_normalisation_s_bias_takes_the_constant() -> None:
    """The outputs' mean becomes the dense network's, and the convolution gets no bias."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)
    ).eval()
    nn.init.normal_(model[3].weight)
    nn.init.uniform_(model[3].running_var, 0.5, 2)
    inputs = torch.randn(20, 3, 9, 9)
    selection = greedyprune.select(model, [inputs])
    pruned, small = (
        greedyprune.prune(model, selection), greedyprune.refit(model, selection, [inputs])
    )  # fmt: skip
    assert small[2].bias is None
    means = [network(inputs).mean((0, 2, 3)) for network in (model, pruned, small)]
    assert float((means[1] - means[0]).abs().max()) > 1e-3
    torch.testing.assert_close(means[2], means[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_nothing_cut_nothing_changes() -> None:
    model, inputs = network("resnet")
    whole = greedyprune.select(
        model, data_of(inputs), size=1.0, objective="imitation", weights="none"
    )
    small = greedyprune.refit(model, whole, data_of(inputs))
    for key, value in small.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("least_ridge")
def test_weights_that_are_used_twice_and_grouped_ones_stay() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
            self.twice, self.tied, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.other = nn.Linear(4, 4)
            self.other.weight = self.tied.weight
            self.grouped = nn.Conv1d(4, 4, 1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(self.b(self.a(x).relu())))
            x = self.grouped(self.other(self.tied(x))[:, :, None])[:, :, 0]
            return self.last(x)

    torch.manual_seed(0)
    model, inputs = Shared(), torch.randn(40, 4)
    selection = greedyprune.select(model, [inputs], layers="a")
    before, small = greedyprune.prune(model, selection), greedyprune.refit(model, selection, inputs)
    unchanged = {
        name for name, value in small.named_parameters(remove_duplicate=False)
        if value.equal(before.get_parameter(name))
    }  # fmt: skip
    expected = {
        f"{layer}.{tensor}" for layer in ("a", "twice", "tied", "other", "grouped")
        for tensor in ("weight", "bias")
    }  # fmt: skip
    assert unchanged == expected


def test_what_refit_refuses() -> None:
    model, inputs = network("vgg")
    selection = greedyprune.select(model, [inputs], objective="imitation")
    with pytest.raises(TypeError, match="selection: found int"):
        greedyprune.refit(model, 3, [inputs])
    with pytest.raises(ValueError, match="memory_limit: found 0, expected at least 1"):
        greedyprune.refit(model, selection, [inputs], memory_limit=0)
    with pytest.raises(TypeError, match="memory_limit: found 'all', expected an int"):
        greedyprune.refit(model, selection, [inputs], memory_limit="all")
    with pytest.raises(ValueError, match="data: found an iterator, but every layer takes a pass"):
        greedyprune.refit(model, selection, iter([inputs]))
    with pytest.raises(ValueError, match=r"selection: made for 8 units in layer '0', but the"):
        greedyprune.refit(network("resnext")[0], selection, [inputs])
    inputs[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '4': NaN or inf in its inputs"):
        greedyprune.refit(model, selection, [inputs])


class Flattened(nn.Module):
    """A Linear with 288 inputs, more than the rows of a small sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3)
        self.up, self.down = nn.Linear(32 * 9, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.conv(x).relu(), 2)
        x = functional.max_pool2d(self.wide(x).relu(), 2)
        return self.down(self.up(x.flatten(1)).relu())


def smooth_images(count: int) -> Tensor:
    return functional.interpolate(torch.randn(count, 3, 5, 5), (18, 18), mode="bicubic")


@pytest.mark.parametrize("samples", [64, 150, 300, 1000])
@torch.no_grad()
def test_neither_select_nor_refit_overfits(samples: int) -> None:
    """On images that they have not seen. Least squares overfits most for 100 to 300 samples."""
    torch.manual_seed(0)
    model, images, held_out = Flattened().eval(), smooth_images(samples), smooth_images(1000)
    errors = []
    for damping in (1e-4, 10.0):  # 10: next to no change of the weights
        objective = greedyprune.Imitation(damping=damping)
        selection = greedyprune.select(model, [images], objective=objective)
        small = greedyprune.prune(model, selection)
        errors.append((small(held_out) - model(held_out)).square().mean())
        if damping == 1e-4:
            again = greedyprune.refit(model, selection, [images])
            refitted = (again(held_out) - model(held_out)).square().mean()
            assert refitted <= (1.1 if samples < 100 else 1.02) * errors[0]
    assert errors[0] <= 0.8 * errors[1]


@torch.no_grad()
def test_layers_that_held_out_samples_speak_against_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, images = Flattened().eval(), smooth_images(40)
    selection = greedyprune.select(model, [images], objective="imitation")

    def never(*args: object) -> tuple[float, float]:
        return 1.0, -1.0

    monkeypatch.setattr(weight_change, "chosen_damping", never)
    with pytest.warns(UserWarning, match=r"layers keep their weights: 'wide', 'up', 'down'\."):
        small = greedyprune.refit(model, selection, [images])
    for key, value in greedyprune.prune(model, selection).state_dict().items():
        assert small.state_dict()[key].equal(value)


class Aside(nn.Module):
    """A head, and a twin of it that runs and whose output nothing uses."""

    def __init__(self, follows: nn.Module | None) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 24), nn.Linear(24, 3)
        self.twin, self.follows = copy.deepcopy(self.head), follows

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x).relu()
        if self.follows is not None:
            self.follows(self.twin(hidden))
        return self.head(hidden)


@pytest.mark.filterwarnings("ignore:data. the first batch does not run 'twin'")
@pytest.mark.parametrize("follows", [nn.Identity(), nn.BatchNorm1d(3), nn.ReLU()], ids=repr)
def test_an_output_that_nothing_uses(follows: nn.Module) -> None:
    """The twin is cut and refitted as the head is, whose weights are those without a twin."""
    torch.manual_seed(0)
    model = Aside(follows).eval()
    alone = copy.deepcopy(model)
    alone.follows = None
    data = torch.randn(300, 6), torch.randn(300, 3)
    options: dict[str, Any] = {"size": 9, "objective": "imitation"}
    selections = [greedyprune.select(net, data, **options) for net in (model, alone)]
    assert selections[0].kept.equal(selections[1].kept)
    small, expected = (
        greedyprune.refit(net, selection, data, epochs=0)
        for net, selection in zip((model, alone), selections, strict=True)
    )
    assert torch.allclose(small.head.weight, expected.head.weight, rtol=1e-4, atol=1e-6)
    dense = model.head.weight[:, selections[0].kept]
    assert not torch.allclose(small.head.weight, dense, atol=1e-3)
    if not isinstance(follows, nn.ReLU):  # before a ReLU, negative values need only stay so
        assert torch.allclose(small.twin.weight, small.head.weight, rtol=1e-3, atol=1e-5)
    greedyprune.refit(model, selections[0], data, epochs=1)
