"""Layers of any class: what their operation in the graph computes decides, not their class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import OwnLinear, ProductLinear, SameConv2d
from oracle import close
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune import Fisher, Imitation, Loss
from greedyprune.surgery.cut import masked


class MyLinear(nn.Linear):
    """Only its initial weights differ."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.4)
        nn.init.zeros_(self.bias)


class Strided(nn.Conv2d):
    """Its attributes do not say how it goes over its input."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, self.bias, (2, 1), (0, 1), (1, 2))


class Sums(nn.Linear):
    """Takes its input as its second argument, and adds the first to its output."""

    def forward(self, shortcut: Tensor, x: Tensor) -> Tensor:
        return shortcut + functional.linear(x, self.weight, self.bias)


class Squared(nn.Linear):
    """Another operation stands between its input and its linear map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.square())


class Around(nn.Module):
    """Uses the weight of a module that is never called."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inside = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.inside.weight, self.inside.bias)


def same_weights(model: nn.Module, other: nn.Module) -> None:
    """Gives the model the other's weights, in their order."""
    with torch.no_grad():
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(its)


LINEARS: dict[str, Callable[[int, int], nn.Module]] = {
    "inherited": MyLinear, "a product": ProductLinear, "no Linear": OwnLinear, "around": Around,
    "quantizable": nn.modules.linear.NonDynamicallyQuantizableLinear,
}  # fmt: skip
OBJECTIVES = {
    "imitation": Imitation(), "dense": Imitation(sequential=False), "loss": Loss(),
    "fisher": Fisher(), "metric": Imitation(metric="fisher"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("by", OBJECTIVES)
def test_linears_of_any_class_are_those_of_torch(kind: str, by: str) -> None:
    """The same selection and the same pruned outputs as for nn.Linear."""
    torch.manual_seed(0)
    make, x = LINEARS[kind], torch.randn(60, 5)
    plain = nn.Sequential(
        nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3), nn.Softplus()
    )
    model = nn.Sequential(make(5, 12), nn.ReLU(), make(12, 9), nn.Tanh(), make(9, 3), nn.Softplus())
    same_weights(model, plain)
    data: Any = x, plain(x).detach() + torch.randn(60, 3)
    options: dict[str, Any] = {"objective": OBJECTIVES[by], "size": 0.5, "loss": "mse"}
    if kind == "around" and by in ("fisher", "metric"):
        with pytest.raises(ValueError, match=r"found 'fisher', but '2.inside', which takes the un"):
            greedyprune.select(model, data, **options)
        return
    selection = greedyprune.select(model, data, **options)
    expected = greedyprune.select(plain, data, **options)
    suffix = ".inside" if kind == "around" else ""
    assert list(selection.layers) == [name + suffix for name in expected.layers]
    for layer, other in zip(selection.layers.values(), expected.layers.values(), strict=True):
        assert layer.order.equal(other.order)
        assert close(layer.weights, other.weights)
    small, small_plain = greedyprune.prune(model, selection), greedyprune.prune(plain, expected)
    refitted = greedyprune.refit(model, selection, x), greedyprune.refit(plain, expected, x)
    with torch.no_grad():
        assert close(small(x), small_plain(x).double())
        assert close(refitted[0](x), refitted[1](x).double(), 1e-4)


def same_convolutions() -> tuple[nn.Module, nn.Module]:
    """Convolutions that pad by themselves, and modules of torch that do the same for 12 pixels."""
    model = nn.Sequential(SameConv2d(3, 8, 3, 2), nn.ReLU(), SameConv2d(8, 6, 3, 2), nn.ReLU())
    plain = nn.Sequential(
        nn.ZeroPad2d([0, 1, 0, 1]), nn.Conv2d(3, 8, 3, 2), nn.ReLU(),
        nn.ZeroPad2d([0, 1, 0, 1]), nn.Conv2d(8, 6, 3, 2), nn.ReLU(),
    )  # fmt: skip
    same_weights(model, plain)
    return model, plain


@pytest.mark.parametrize("by", OBJECTIVES)
def test_padding_inside_a_module(by: str) -> None:
    """The inputs of the convolution count, not those of its module."""
    torch.manual_seed(0)
    model, plain = same_convolutions()
    x = torch.randn(20, 3, 12, 12)
    data: Any = x, model(x).detach() + torch.randn(20, 6, 3, 3)
    options: dict[str, Any] = {"objective": OBJECTIVES[by], "size": 4, "loss": "mse"}
    selection = greedyprune.select(model, data, **options)
    expected = greedyprune.select(plain, data, **options)
    assert list(selection.layers) == ["0"] and list(expected.layers) == ["1"]
    assert selection.layers["0"].order.equal(expected.layers["1"].order)
    assert close(selection.layers["0"].weights, expected.layers["1"].weights)
    refitted = greedyprune.refit(model, selection, x), greedyprune.refit(plain, expected, x)
    with torch.no_grad():
        assert close(refitted[0](x), refitted[1](x).double(), 1e-4)


def test_images_of_several_sizes_are_padded_each_for_itself() -> None:
    torch.manual_seed(0)
    model, _ = same_convolutions()
    images = [torch.randn(4, 3, size, size) for size in (12, 11)]
    objective = Imitation(sequential=False)
    layer = greedyprune.select(model, images, objective=objective, size=4).layers["0"]
    error, count = 0.0, 0
    with torch.no_grad():
        pruned = masked(model, greedyprune.Selection({"0": layer}))
        for x in images:
            difference = pruned[:3](x) - model[:3](x)
            error += float(difference.double().square().sum())
            count += difference.numel()
    assert float(layer.losses[-1]) == pytest.approx(error / count, rel=1e-4)


def test_the_node_says_how_a_kernel_moves() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Strided(8, 5, 3))
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, (2, 1), (0, 1), (1, 2)))
    same_weights(model, plain)
    x = torch.randn(10, 3, 9, 9)
    selection, expected = greedyprune.select(model, x), greedyprune.select(plain, x)
    assert selection.layers["0"].order.equal(expected.layers["0"].order)
    assert close(selection.layers["0"].weights, expected.layers["0"].weights)


def test_the_operand_counts_not_the_modules_first_argument() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), Sums(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x, self.first(x).relu()).sigmoid()

    torch.manual_seed(0)
    model, x = Net(), torch.randn(50, 5)
    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5))
    same_weights(plain, model)
    selection = greedyprune.select(model, x, objective="imitation")
    expected = greedyprune.select(plain, x, objective="imitation")
    assert selection.layers["first"].order.equal(expected.layers["0"].order)
    assert close(selection.layers["first"].weights, expected.layers["0"].weights)
    with pytest.raises(ValueError, match="'last', which takes the units of layer 'first', is no"):
        greedyprune.select(model, (x, x), objective="fisher")


def test_an_operation_before_the_linear_map() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), Squared(8, 4), nn.ReLU()), torch.randn(50, 5)
    selection = greedyprune.select(model, x, objective="imitation", size=5)
    layer = selection.layers["0"]
    with torch.no_grad():
        features = model[0](x).square().double()
        mine = features[:, layer.kept] @ layer.weights.T
        error = float((mine - features @ model[1].weight.double().T).square().mean())
    assert float(layer.losses[-1]) == pytest.approx(error, rel=1e-5)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias)


class Converted(nn.Module):
    """Weights as a converter leaves them: a buffer, a plain tensor, a parameter with its name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("initializer", torch.randn(8, 8))
        self.constant, self.kernel = torch.randn(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.linear(self.first(x), self.initializer)
        hidden = functional.linear(hidden.relu(), self.constant)
        return self.last((functional.linear(hidden.relu(), self.kernel) @ self.constant).relu())


def test_linear_maps_that_are_no_layers_are_listed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Standardised(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    refused = greedyprune.layers(model, torch.randn(2, 3, 5, 5)).refused
    assert refused["1"].startswith("its weight is computed, by its module, a parametrization or")
    assert "takes its units, but its weight is no parameter" in refused["0"]
    table = greedyprune.layers(Converted(), torch.randn(4, 5))
    assert not table
    assert table.refused["initializer"].startswith("its weight is a buffer; expected a parameter")
    assert table.refused["constant"].startswith("its weight is a plain tensor; expected a param")
    assert table.refused["kernel"].startswith("aten.matmul.default sums over its units")
    with pytest.raises(ValueError, match=r"found 'initializer', which can't be pruned \(.*buffer"):
        greedyprune.select(Converted(), torch.randn(4, 5), layers="initializer")
