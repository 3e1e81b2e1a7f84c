"""`refit` after another tool's pruning: the units that are left are found, and weights refitted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kinds import KINDS, of_kind
from networks import network
from torch import Tensor, nn

import greedyprune


def error(small: nn.Module, model: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((small(inputs) - model(inputs)).square().mean())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("name", ["resnet", "bottleneck", "vgg", "mobilenet", "excited"])
def test_models_that_torch_pruning_cut(name: str) -> None:
    tp = pytest.importorskip("torch_pruning")
    model, inputs = network(name)
    assert isinstance(inputs, Tensor)
    inputs = torch.randn(64, *inputs.shape[1:])
    refused = greedyprune.layers(model, inputs).refused.items()
    theirs = copy.deepcopy(model)
    ignored = [theirs.get_submodule(layer) for layer, reason in refused if "output" in reason]
    pruner = tp.pruner.BasePruner(
        theirs, inputs[:1], tp.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=ignored,
    )  # fmt: skip
    pruner.step()
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    small = greedyprune.refit(model, theirs, inputs)
    assert all(value.equal(before[key]) for key, value in theirs.state_dict().items())
    shapes = {key: value.shape for key, value in weights_of(small).items()}
    assert shapes == {key: value.shape for key, value in weights_of(theirs).items()}
    assert error(small, model, inputs) < 0.8 * error(theirs, model, inputs)


@pytest.mark.parametrize("name", KINDS)
def test_the_units_are_found(name: str) -> None:
    """The pruned model is taken apart into the same units; refit then gives what it always does."""
    model, inputs = of_kind(name)
    options: dict[str, Any] = {"size": 0.5, "layers": "all", "weights": "none"}
    selection = greedyprune.select(model, inputs, objective="imitation", **options)
    theirs = greedyprune.prune(model, selection)
    kept = {layer: selected.kept.tolist() for layer, selected in selection.layers.items()}
    expected = greedyprune.refit(model, selection, inputs)
    for given in (theirs, kept):
        small = greedyprune.refit(model, given, inputs)
        assert all(
            tensor.equal(weights_of(expected)[key]) for key, tensor in weights_of(small).items()
        )


def test_units_that_are_alike() -> None:
    """Of equal units any may be meant; the weights do not differ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = model[0].weight[1], model[0].bias[1]
    x = torch.randn(50, 5)
    theirs = greedyprune.prune(model, greedyprune.select(model, x, size=8, weights="none"))
    keep = torch.tensor([1, 3, 4, 7])
    theirs[0], theirs[2] = nn.Linear(5, 4), nn.Linear(4, 3)
    with torch.no_grad():
        theirs[0].weight.copy_(model[0].weight[keep])
        theirs[0].bias.copy_(model[0].bias[keep])
    small = greedyprune.refit(model, theirs, x)
    assert small[0].weight.equal(model[0].weight[keep])


def test_what_is_refused() -> None:
    model, inputs = network("vgg")
    assert isinstance(inputs, Tensor)
    smaller = greedyprune.prune(model, greedyprune.select(model, inputs, size=0.5))
    trained = copy.deepcopy(smaller)
    with torch.no_grad():
        trained[0].weight.add_(0.1)
        trained[0].bias.add_(0.1)
    for given, message in (
        (trained, "selection: the units of '0' in the pruned model are not among those of `model`"),
        (nn.Linear(3, 3), "selection: the units of '0' in the pruned model are not among those"),
        ({"1": [0]}, "selection: found '1', expected names among '0'"),
        ({"0": []}, r"selection: found \[\] for '0', expected different units, at least one"),
        ({"0": [0, 0]}, r"selection: found \[0, 0\] for '0', expected different units"),
        ({"0": [0, 99]}, r"selection: found \[0, 99\] for '0', .* each from 0 to "),
    ):
        with pytest.raises(ValueError, match=message):
            greedyprune.refit(model, given, inputs)
    for given in (3, "0", [0, 1]):
        with pytest.raises(
            TypeError, match=r"selection: found .*expected a Selection, a pruned mod"
        ):
            greedyprune.refit(model, given, inputs)  # type: ignore[arg-type]
