"""`Fisher`: units are judged by the loss in gates on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, Inputs, network, outputs_of
from torch import Tensor, nn

import greedyprune
from greedyprune import Budget
from greedyprune.surgery.cut import masked


def gates_of(
    model: nn.Module, layer: greedyprune.LayerSelection, inputs: Inputs, targets: Tensor, loss: Any
) -> Tensor:
    """u (m, N): each sample's loss, derived in gates on the consumers' weights by torch itself."""
    rows = []
    for i in range(len(targets)):
        one = slice(i, i + 1)
        sample = {n: t[one] for n, t in inputs.items()} if isinstance(inputs, dict) else inputs[one]
        gate = torch.ones(len(layer.counts), requires_grad=True)
        weights = {}
        for name in layer.outputs:
            at = layer.slices[f"{name}.weight"]
            weight = model.get_parameter(f"{name}.weight")
            every = gate.new_ones(at.size).index_put((at.places,), gate[:, None])
            shape = [1] * weight.dim()
            shape[at.dim] = -1
            weights[f"{name}.weight"] = weight.detach() * every.view(shape)
        args, kwargs = ((), sample) if isinstance(sample, dict) else ((sample,), {})
        out = torch.func.functional_call(model, weights, args, kwargs)
        out = out if isinstance(out, Tensor) else out.logits
        rows.append(torch.autograd.grad(loss(out, targets[one]), gate)[0])
    return torch.stack(rows).double()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("weights", ["counts", "uniform", "none", "refit"])
def test_gates_losses_are_those_of_torchs_derivatives(name: str, weights: str) -> None:
    """Half the mean of (sum_j (1 - a_j) u_j)^2, a the gates that the selection puts."""
    model, inputs = network(name)
    torch.manual_seed(5)
    targets = torch.randn(outputs_of(model, inputs).shape)
    data = [inputs | {"y": targets}] if isinstance(inputs, dict) else [(inputs, targets)]
    selection = greedyprune.select(
        model, data, objective="fisher", weights=weights, loss="mse", size=0.5
    )
    for producer, layer in selection.layers.items():
        assert layer.objective == "fisher" and layer.fitted is None
        u = gates_of(model, layer, inputs, targets, nn.functional.mse_loss)
        scale = float(u.sum(1).square().mean())
        for k in (1, len(layer.order)):
            part = layer.at(k)
            off = torch.ones(len(layer.counts)).double()
            off[part.kept] -= part.weights
            expected = float((u @ off).square().mean() / 2)
            assert float(layer.losses[k - 1]) == pytest.approx(expected, rel=1e-4, abs=1e-7 * scale)
        small = greedyprune.prune(model, greedyprune.Selection({producer: layer}))
        other = masked(model, greedyprune.Selection({producer: layer}))
        torch.testing.assert_close(
            outputs_of(small, inputs), outputs_of(other, inputs), rtol=1e-4, atol=1e-4
        )


def test_gates_of_every_loss() -> None:
    model, inputs = network("vgg")
    assert isinstance(inputs, Tensor)
    model.append(nn.Flatten())
    torch.manual_seed(2)
    count, classes = outputs_of(model, inputs).shape
    labels, soft = torch.randint(classes, (count,)), torch.rand(count, classes)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    for loss, plain, targets in (
        ("cross_entropy", nn.functional.cross_entropy, labels),
        ("bce_with_logits", nn.functional.binary_cross_entropy_with_logits, soft),
        (smooth, smooth, labels),
        (lambda out, y: nn.functional.l1_loss(out, y), nn.functional.l1_loss, soft),
    ):
        data = [(inputs[:7], targets[:7]), (inputs[7:], targets[7:])]
        selection = greedyprune.select(
            model, data, objective="fisher", loss=loss, layers="0", steps=9, weights="counts"
        )
        (layer,) = selection.layers.values()
        u = gates_of(model, layer, inputs, targets, plain)
        off = 1 - layer.counts.double() * len(layer.counts) / 9
        expected = float((u @ off).square().mean() / 2)
        assert float(layer.losses[-1]) == pytest.approx(expected, rel=1e-4)
        assert layer.bound is not None and bool((layer.losses <= layer.bound).all())


def test_gates_are_kept_in_files(tmp_path: Path) -> None:
    model, inputs = network("resnet")
    assert isinstance(inputs, Tensor)
    data = [(inputs, torch.zeros_like(outputs_of(model, inputs)))]
    selection = greedyprune.select(model, data, objective="fisher")
    selection.save(tmp_path / "selection")
    again = greedyprune.Selection.load(tmp_path / "selection")
    for name, layer in selection.layers.items():
        assert again.layers[name].objective == "fisher"
        assert again.layers[name].at(3).weights.equal(layer.at(3).weights)


class Branches(nn.Module):
    """What the second one gives hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.to_a = nn.Linear(6, 32), nn.Linear(32, 4)
        self.b, self.to_b = nn.Linear(6, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_a(self.a(x).relu()) + 1e-3 * self.to_b(self.b(x).relu())


def test_a_budget_by_what_the_loss_rises_by() -> None:
    """Not by shares of each layer's own outputs, which all count alike."""
    torch.manual_seed(0)
    model, data = Branches(), (torch.randn(300, 6), torch.randint(4, (300,)))
    selection = greedyprune.select(model, data, objective="fisher", size=Budget(params=0.5))
    assert len(selection.layers["a"].kept) > 4 * len(selection.layers["b"].kept)
    selection = greedyprune.select(model, data, size=Budget(params=0.5))
    assert len(selection.layers["a"].kept) < 2 * len(selection.layers["b"].kept)


def test_what_gates_refuse() -> None:
    model, inputs = network("vgg")
    with pytest.raises(ValueError, match="data: found inputs without targets"):
        greedyprune.select(model, [inputs], objective="fisher")
    pair = [(inputs, torch.zeros_like(outputs_of(model, inputs)))]
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer '0': NaN or inf"):
        greedyprune.select(model, pair, objective="fisher", loss="mse")


def test_gates_do_not_depend_on_batches() -> None:
    """Every sample counts as it does in the loss of all of them, ignored ones too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3))
    inputs, labels = torch.randn(40, 4), torch.randint(3, (40,))
    labels[:7] = -100
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]), label_smoothing=0.1)
    options = {"objective": "fisher", "loss": loss, "layers": "0", "weights": "counts"}
    whole = greedyprune.select(model, (inputs, labels), **options)
    parts = zip(inputs.split(5), labels.split(5), strict=True)
    selection = greedyprune.select(model, parts, **options)  # one pass, so an iterator will do
    torch.testing.assert_close(selection.losses, whole.losses, rtol=1e-5, atol=1e-12)
    with pytest.raises(ValueError, match="data: every label is ignored"):
        greedyprune.select(model, (inputs[:7], labels[:7]), **options)
    both = iter([(inputs, labels)])
    assert len(greedyprune.select(model, both, objective="fisher").layers) == 2


class Overwritten(nn.Module):
    """The units' activations change in place once the first consumer has had them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor, in_place: bool = True) -> Tensor:
        hidden = self.a(x).tanh()
        first = self.b(hidden)
        hidden = hidden.mul_(2) if in_place else hidden * 2
        return first + self.c(hidden)


def test_gates_are_of_what_the_consumers_took() -> None:
    torch.manual_seed(0)
    model, data = Overwritten(), {"x": torch.randn(30, 5), "targets": torch.randn(30, 3)}
    selections = [
        greedyprune.select(
            model, data | {"in_place": in_place}, objective="fisher", weights="counts"
        )
        for in_place in (True, False)
    ]
    assert selections[0].order.equal(selections[1].order)
    torch.testing.assert_close(selections[0].losses, selections[1].losses, rtol=1e-6, atol=0)
