"""`prune` proves that the pruned model computes what the masked one does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune.data.batches import Batch
from greedyprune.surgery.proof import example_of, prove

X, Y = torch.randn(64, 6), torch.randint(3, (64,))
WRONG = "model: pruned, it does not compute what it does with the units masked"


class Model(nn.Module):
    """A hidden layer; `helper` is an object that may hold whatever it likes."""

    def __init__(self, helper: object = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 3)
        self.helper = helper

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.fc1(x))
        return self.fc2(hidden) if self.helper is None else self.helper.run(self, hidden)


class Shared:
    """An object that copies do not copy, as a registry or a singleton, and that runs a module."""

    def __init__(self) -> None:
        self.module: nn.Module | None = None

    def __deepcopy__(self, memo: object) -> Shared:
        return self

    def run(self, model: Model, hidden: Tensor) -> Tensor:
        assert self.module is not None
        weight = self.module.weight[:, : hidden.shape[1]]  # of any number of units
        return functional.linear(hidden, weight, self.module.bias)


def with_shared_helper() -> Model:
    helper = Shared()
    model = Model(helper).eval()
    helper.module = model.fc2
    return model


def test_a_module_that_runs_from_elsewhere_is_found() -> None:
    """The pruned model runs the dense layer, with the first of its weights: no error of its own."""
    model = with_shared_helper()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    selection = greedyprune.select(Model(), (X, Y), size=4)
    with pytest.raises(ValueError, match=WRONG):
        greedyprune.prune(model, selection)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_only_an_example_can_prove(tmp_path: Path) -> None:
    model = with_shared_helper()
    selection = greedyprune.select(Model(), (X, Y), size=4)
    selection.save(tmp_path / "selection.safetensors")
    loaded = greedyprune.Selection.load(tmp_path / "selection.safetensors")
    assert loaded.example is None
    greedyprune.prune(model, loaded)  # nothing to prove it on
    for example in (X, (X,), {"x": X.double()}):  # in the model's dtype
        with pytest.raises(ValueError, match=WRONG):
            greedyprune.prune(model, loaded, example)
        right = greedyprune.prune(Model(), loaded, example)
        assert right.fc1.out_features == 4
    with pytest.raises(TypeError, match="example: found int"):
        greedyprune.prune(model, loaded, 3)


def test_a_selection_keeps_two_samples() -> None:
    selection = greedyprune.select(Model(), (X, Y), size=4)
    [kept] = selection.example.args
    assert kept.equal(X[:2])
    assert kept.untyped_storage().nbytes() == 2 * 6 * 4  # not the whole batch
    assert selection.at(2).example is selection.example
    assert copy.deepcopy(selection).example is None
    assert "example" not in repr(selection)


class WholeBatch(Model):
    """It runs on 64 samples only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(64, 6))


def test_a_model_of_one_batch_size_keeps_the_batch() -> None:
    model = WholeBatch()
    batch = Batch((X,), {}, Y)
    assert example_of(model, batch).args[0] is X
    assert example_of(Model(), batch).args[0].equal(X[:2])
    assert greedyprune.prune(model, greedyprune.select(model, (X, Y), size=4)).fc1.out_features == 4


def changed_model(change: str) -> tuple[Model, nn.Module]:
    model = Model().eval()
    small = copy.deepcopy(model)
    with torch.no_grad():
        if change == "bias":
            small.fc2.bias[1] += 0.01
        elif change == "shape":
            small.fc2 = nn.Linear(16, 2)
        elif change == "fails":
            small.fc2 = nn.Linear(5, 3)
    return model, small


@pytest.mark.parametrize("change", ["bias", "shape", "fails"])
def test_differences_are_found(change: str) -> None:
    model, small = changed_model(change)
    with pytest.raises(ValueError, match="it fails: " if change == "fails" else "outputs differ"):
        prove(model, {}, small, Batch((X,), {}, None), {})
    if change == "bias":
        prove(model, {"fc2.bias": small.fc2.bias.data}, small, Batch((X,), {}, None), {})


def test_proving_changes_nothing() -> None:
    model, small = changed_model("nothing")
    loss = model.train()(X).square().sum()
    state = torch.get_rng_state()
    data = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    prove(model, {"fc2.weight": torch.zeros(3, 16)}, zeroed(small), Batch((X,), {}, None), {})
    assert data == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert torch.get_rng_state().equal(state)
    assert model.training
    loss.backward()  # the graph of a training step that is under way is intact
    assert model.fc2.weight.grad.abs().sum() > 0


def zeroed(small: nn.Module) -> nn.Module:
    with torch.no_grad():
        small.fc2.weight.zero_()
    return small


class Cancelling(Model):
    """A difference of large numbers, of which float32 leaves only rounding errors."""

    def forward(self, x: Tensor) -> Tensor:
        big = 1e6 * super().forward(x)
        return big + 1e-2 * torch.sin(big) - big


class Sampling(Model):
    """Noise on the units, which does not fit the pruned model's shape; and on the output."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.fc1(x))
        return self.fc2(hidden + torch.randn_like(hidden))


@pytest.mark.parametrize("kind", [Cancelling, Sampling])
def test_rounding_and_noise_are_no_differences(kind: type[Model]) -> None:
    model = kind()
    selection = greedyprune.select(Model(), (1000 * X, Y), size=4)
    assert greedyprune.prune(model, selection).fc1.out_features == 4


def test_models_in_inference_mode() -> None:
    with torch.inference_mode():
        model = Model()
        model.register_buffer("offset", torch.zeros(3))
        data = X * 1, Y * 1
    plain = Model()
    with torch.no_grad():
        for mine, its in zip(plain.parameters(), model.parameters(), strict=True):
            mine.copy_(its)
    for options in ({}, {"objective": "fisher"}, {"objective": "imitation"}):
        expected = greedyprune.select(plain, (X, Y), size=4, **options)
        selection = greedyprune.select(model, data, size=4, **options)
        assert selection.kept.equal(expected.kept)
        with torch.inference_mode():
            assert greedyprune.select(model, data, size=4, **options).kept.equal(expected.kept)
            small = greedyprune.prune(model, selection)
            refitted = greedyprune.refit(model, selection, data, epochs=1)
        small(X).sum().backward()  # its parameters are ordinary ones
        torch.testing.assert_close(small(X), greedyprune.prune(plain, expected)(X))
        torch.testing.assert_close(
            refitted(X), greedyprune.refit(plain, expected, (X, Y), epochs=1)(X)
        )
    assert all(parameter.is_inference() for parameter in model.parameters())
