"""Networks of many kinds with half of everything removed: streams, concatenations, attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS, of_kind
from oracle import close
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune.data.batches import Batch
from greedyprune.data.forward import leaves_of
from greedyprune.graph.executor import GraphExecutor
from greedyprune.graph.names import slice_of, weight_of
from greedyprune.graph.networks import tensors_of
from greedyprune.surgery.cut import masked
from greedyprune.surgery.remaining import entries_left

each_kind = pytest.mark.parametrize("name", KINDS)
HALF: dict[str, Any] = {"size": 0.5, "layers": "all", "objective": "imitation"}


def doubled(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


def joined(outputs: object) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in leaves_of(outputs) if isinstance(leaf, Tensor)])


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        outputs = copy.deepcopy(model).double()(doubled(inputs))
    return joined(outputs)


def without_units(
    model: nn.Module, selection: greedyprune.Selection, inputs: Tensor, missing: str = ""
) -> Tensor:
    """The outputs of the masked model, with norms over the units that are left.

    missing: a layer all of whose units are masked
    """
    full = masked(model, selection).double()
    for consumer in selection.layers[missing].outputs if missing else ():
        at = slice_of(selection.layers[missing].slices, consumer)
        with torch.no_grad():
            weight_of(full, consumer).index_fill_(at.dim, at.places.flatten(), 0)
    executor = GraphExecutor(full, Batch((doubled(inputs),), {}, None))
    values = executor.inputs(Batch((doubled(inputs),), {}, None))
    left = entries_left(selection.layers.values())
    with torch.no_grad():
        outputs = executor.outputs(values, tensors_of(full), 0, left)
    return joined(outputs)


@each_kind
def test_the_groups(name: str) -> None:
    model, inputs = of_kind(name)
    table = greedyprune.layers(model, inputs)
    streams = sum(layer.stream for layer in table.values())
    assert (len(table), streams) == KINDS[name][2:]
    whys = {"its units are the model's output", "it is a grouped convolution, so its units are"}
    if name == "state space":  # the convolution by a view of its weight; sizes in the code
        whys |= {
            "its weight is computed, by its module",
            "with fewer units the model fails: aten.s",
        }
    if name == "gates":
        whys |= {"its one channel goes over the units of another layer"}
    assert all(any(reason.startswith(why) for why in whys) for reason in table.refused.values())


@each_kind
@pytest.mark.parametrize("weights", ["refit", "none"])
def test_the_pruned_model_computes_what_the_masked_one_does(name: str, weights: Any) -> None:
    model, inputs = of_kind(name)
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    selection = greedyprune.select(model, inputs, weights=weights, **HALF)
    small = greedyprune.prune(model, selection)
    expected = without_units(model, selection, inputs)
    scale = float(expected.abs().max())
    assert float((outputs_of(small, inputs) - expected).abs().max()) < 1e-9 * scale
    assert all(value.equal(dense[key]) for key, value in model.state_dict().items())
    for layer in selection.layers:  # the comparison would see missing units
        other = without_units(model, selection, inputs, layer)
        assert float((other - expected).abs().max()) > 1e-6 * scale


@each_kind
def test_backends_agree(name: str) -> None:
    model, inputs = of_kind(name)
    first, second = (
        greedyprune.select(model, inputs, backend=backend, **HALF)
        for backend in ("cpu", "reference")
    )
    for layer, selected in first.layers.items():
        assert selected.order.equal(second.layers[layer].order)
        assert close(selected.losses, second.layers[layer].losses)


@each_kind
def test_refit_brings_the_outputs_nearer(name: str) -> None:
    model, inputs = of_kind(name, 120)
    selection = greedyprune.select(model, inputs, weights="none", **HALF)
    dense = outputs_of(model, inputs)
    errors = [
        (outputs_of(pruned, inputs) - dense).square().sum()
        for pruned in (
            greedyprune.prune(model, selection), greedyprune.refit(model, selection, inputs)
        )
    ]  # fmt: skip
    assert errors[1] < errors[0]


@each_kind
def test_files(name: str, tmp_path: Path) -> None:
    model, inputs = of_kind(name)
    selection = greedyprune.select(model, inputs, **HALF)
    selection.save(tmp_path / "selection.safetensors")
    loaded = greedyprune.Selection.load(tmp_path / "selection.safetensors")
    small = greedyprune.prune(model, loaded, example=inputs)
    assert outputs_of(small, inputs).equal(outputs_of(greedyprune.prune(model, selection), inputs))
    greedyprune.save_pruned(small, tmp_path / "small.safetensors")
    again = greedyprune.load_pruned(tmp_path / "small.safetensors", lambda: of_kind(name)[0])
    assert outputs_of(again, inputs).equal(outputs_of(small, inputs))


def centred(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    return (x - mean) * (variance + 1e-5).rsqrt()


class Between(nn.Module):
    """Two layers and a function, or an embedding of bags of words and a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor], *, bags: bool = False) -> None:
        super().__init__()
        self.a = nn.EmbeddingBag(30, 12) if bags else nn.Linear(4, 12)
        self.b, self.function = nn.Linear(12, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


SMALL = {
    "var_mean": (Between(centred), ("aten.var_mean.correction (test_kinds.py line",)),
    "std": (Between(lambda x: x / x.std(1, keepdim=True)), ("aten.std.dim (test_kinds.py line",)),
    "normalize": (
        Between(lambda x: functional.normalize(x, dim=1)), ("aten.linalg_vector_norm.default",)
    ),
    "bags": (Between(torch.relu, bags=True), ()),
}  # fmt: skip


@pytest.mark.parametrize(("model", "norms"), SMALL.values(), ids=SMALL)
def test_norms_that_are_written_out_and_bags(model: Between, norms: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(60, 4) if norms else torch.randint(30, (60, 4))
    [row] = greedyprune.layers(model, inputs).values()
    assert len(row.norms) == len(norms)
    assert all(at.startswith(norm) for at, norm in zip(row.norms, norms, strict=True))
    selection = greedyprune.select(model, inputs, **HALF)
    small, expected = greedyprune.prune(model, selection), without_units(model, selection, inputs)
    assert close(outputs_of(small, inputs), expected, 1e-9)
    missing = without_units(model, selection, inputs, "a")
    assert not close(missing, expected, 1e-3)


class Joined(nn.Module):
    """A layer that takes the units of two others side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(5, 10)
        self.c, self.d = nn.Linear(22, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x).relu(), self.b(x).tanh()], 1)
        return self.d(functional.gelu(self.c(y)))


def test_a_layer_that_two_groups_feed() -> None:
    """The second one's loss is the error that both leave; so is that of its least squares."""
    torch.manual_seed(0)
    model, x = Joined().eval(), torch.randn(200, 5)
    selection = greedyprune.select(model, x, layers=["a", "b"], size=0.5, objective="imitation")
    small = greedyprune.prune(model, selection)

    def c_of(net: Joined) -> Tensor:
        return net.c(torch.cat([net.a(x).relu(), net.b(x).tanh()], 1))

    with torch.no_grad():
        error = (c_of(small) - c_of(model)).square().mean()
    assert float(selection.layers["b"].losses[-1]) == pytest.approx(float(error), rel=1e-5)
    assert selection.layers["b"].losses[-1] < selection.layers["a"].losses[-1] * 20


def test_a_stream_s_loss_is_the_mean_share_of_its_readers() -> None:
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 4)
            self.wide, self.narrow = nn.Linear(12, 20), nn.Linear(20, 12)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + self.narrow(self.wide(x).relu())).tanh()

    model, x = Residual().eval(), torch.randn(300, 6)
    selection = greedyprune.select(
        model, x, layers="first", size=5, objective=greedyprune.Imitation(sequential=False)
    )
    kept, shares = selection.kept, []
    with torch.no_grad():
        first = model.first(x)
        last = first + model.narrow(model.wide(first).relu())
        for name, taken in (("wide", first), ("last", last)):
            weight = model.get_parameter(f"{name}.weight")
            new = selection.layers["first"].new_weights(name)
            assert new is not None
            target = taken @ weight.T
            error = target - taken[:, kept] @ new[..., 0].to(weight).reshape(len(weight), -1).T
            shares.append(float(error.square().sum() / target.square().sum()))
    assert float(selection.losses[-1]) == pytest.approx(sum(shares) / 2, rel=1e-4)


class Positions(nn.Module):
    """Embeddings of rows and columns are added to a map, and a strided convolution follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, 2)
        self.rows, self.head = nn.Parameter(torch.randn(1, 1, 7, 1)), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.first(x) + self.rows).relu())


def test_a_window_mixes_positions_that_have_parameters() -> None:
    torch.manual_seed(0)
    model, x = Positions(), torch.randn(30, 3, 7, 7)
    selection = greedyprune.select(model, x, size=0.5, objective="imitation", progress=False)
    assert list(selection.layers) == ["first", "last"]
    small = greedyprune.prune(model, selection)
    assert close(outputs_of(small, x), outputs_of(masked(model, selection), x), 1e-9)
