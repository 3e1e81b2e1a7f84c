"""Running a model leaves it as it was; outputs of any structure are compared."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization

import greedyprune
from greedyprune.data.batches import Batch
from greedyprune.data.forward import evaluating, is_separate, same_outputs
from greedyprune.surgery.cut import masked

X, Y = torch.randn(32, 6), torch.randint(3, (32,))


class Restless(nn.Module):
    """Its forward changes everything that a forward can change."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(6, 16), nn.Linear(16, 3), nn.BatchNorm1d(6)
        self.fails, self.seen, self.losses, self.table = fails, 0, [], {"a": 1}
        self.kept = self.fc1(torch.ones(6))  # no leaf
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("grown", torch.zeros(2), persistent=False)
        self.register_buffer("resized", torch.zeros(2))
        self.handle = self.register_forward_hook(lambda *_: self.handle.remove())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x).relu()
        self.seen += 1
        self.losses.append(hidden.mean())
        self.table["b"] = hidden
        self.kept, self.new = hidden, 1
        self.steps += 1
        self.register_buffer("grown", torch.zeros(len(x)), persistent=False)
        self.register_buffer("late", torch.zeros(len(x)))
        self.resized.resize_(5).fill_(1)
        self.fc1.weight.requires_grad_(False)
        self.norm.eval()
        self.fc2.register_forward_hook(lambda *_: None)
        self.extra = nn.Linear(1, 1)
        torch.randn(3)
        if self.fails:
            raise RuntimeError("it fails")
        return self.fc2(hidden)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that the model holds; tensors by their identity, shape and numbers."""

    def plain(value: object) -> object:
        if isinstance(value, Tensor):
            return id(value), value.requires_grad, value.detach().tolist()
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        return value if isinstance(value, (int, str)) else id(value)

    return {name: plain(vars(module)) for name, module in model.named_modules()} | {
        "random state": torch.get_rng_state().tolist()
    }


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_left_as_it_was(fails: bool) -> None:
    model = Restless(fails).train()
    model.fc2.eval()
    before = state_of(model)
    expected = pytest.raises(RuntimeError, match=r"^it fails$") if fails else nullcontext()
    with expected, evaluating(model):  # restoring raises nothing of its own
        model(X)
        model(X[:3])
    assert state_of(model) == before


class Grows(nn.Module):
    """Two layers and a table that grows with the batch, as tables of positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.size = nn.Linear(6, 16), nn.Linear(16, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.size:
            self.size = len(x)
            self.register_buffer("table", torch.zeros(len(x), 1), persistent=False)
        return self.fc2(self.fc1(x).relu()) + self.table[: len(x)]


def test_whole_calls_leave_the_model_as_it_was() -> None:
    model = Grows().train()
    before = state_of(model)
    assert set(greedyprune.layers(model, X)) == {"fc1"}
    selection = greedyprune.select(model, (X, Y), size=4, objective="imitation")
    small = greedyprune.prune(model, selection)
    refitted = greedyprune.refit(model, selection, (X, Y), epochs=1)
    after = state_of(model)
    assert {**after, "random state": 0} == {**before, "random state": 0}
    plain = nn.Sequential(model.fc1, nn.ReLU(), model.fc2)
    expected = greedyprune.select(plain, (X, Y), size=4, objective="imitation")
    assert selection.kept.equal(expected.kept)
    torch.testing.assert_close(small(X), greedyprune.prune(plain, expected)(X))
    assert refitted(X).shape == (32, 3)
    with pytest.raises(ValueError, match="layers: found 'nothing'"):
        greedyprune.select(model, (X, Y), layers="nothing")
    assert {**state_of(model), "random state": 0} == {**before, "random state": 0}


class MixedPrecision(nn.Module):
    """Two layers under autocast, one of them by a decorator."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    @torch.autocast("cpu", torch.bfloat16)
    def hidden(self, x: Tensor) -> Tensor:
        return self.fc1(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.fc2(self.hidden(x)).relu()
            with torch.autocast("cpu", enabled=False):
                return self.fc3(hidden.float())


def test_autocast_inside_the_forward() -> None:
    """Units are judged in the model's own precision; the pruned model still has its autocast."""
    torch.manual_seed(0)
    model = MixedPrecision()
    inputs, targets = torch.randn(90, 8), torch.randint(3, (90,))
    plain = nn.Sequential(model.fc1, nn.ReLU(), model.fc2, nn.ReLU(), model.fc3)
    assert list(greedyprune.layers(model, inputs)) == ["fc1", "fc2"]
    selection = greedyprune.select(model, (inputs, targets), size=0.5)
    expected = greedyprune.select(plain, (inputs, targets), size=0.5)
    for one, other in zip(selection.layers.values(), expected.layers.values(), strict=True):
        assert one.order.equal(other.order)
        torch.testing.assert_close(one.losses, other.losses)
    for call in (greedyprune.prune, lambda m, s: greedyprune.refit(m, s, (inputs, targets))):
        small, in_float32 = call(model, selection), call(plain, expected)
        torch.testing.assert_close(small.fc3.weight, in_float32[4].weight)
        assert small.hidden(inputs).dtype == torch.bfloat16
        outputs = small(inputs)
        assert not outputs.equal(in_float32(inputs))
        torch.testing.assert_close(outputs, in_float32(inputs), rtol=0.05, atol=0.05)


def test_threads_may_leave_in_the_order_in_which_they_came() -> None:
    """Autocast, compiled code and attention's fast path work again, whoever was the last."""
    model, entered, leave, types = nn.Linear(6, 3), threading.Event(), threading.Event(), []
    compiled_calls = list[object]()

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        return lambda *args: compiled_calls.append(args) or graph(*args)

    compiled = torch.compile(lambda x: x.sin(), backend=backend)

    def other() -> None:
        with evaluating(model):
            entered.set()
            leave.wait(10)
        with torch.autocast("cpu", torch.bfloat16):
            types.append(model(X).dtype)

    thread = threading.Thread(target=other)
    with evaluating(model):
        thread.start()
        entered.wait(10)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == torch.bfloat16  # while the other thread is still inside
    compiled(X)
    assert not compiled_calls
    leave.set()
    thread.join()
    compiled(X)
    assert compiled_calls
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == torch.bfloat16
    assert types == [torch.bfloat16]


@pytest.mark.parametrize("mixing", [False, True])
def test_separate_samples_in_outputs_of_any_structure(mixing: bool) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            rows = x - x.mean(0) if mixing else x
            return {"hidden": [x, rows.flatten()], "loss": x.sum()}

    assert is_separate(Net(), Batch((X,), {}, None)) is not mixing


def test_autocast_works_in_other_threads_and_afterwards() -> None:
    methods = torch.autocast.__enter__, torch.autocast.__exit__
    found = dict[str, bool]()

    def inside(name: str) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            found[name] = torch.is_autocast_enabled("cpu")

    def fails() -> None:
        with evaluating(nn.Linear(2, 2)), evaluating(nn.Linear(2, 2)):
            inside("here")
            other = threading.Thread(target=inside, args=["there"])
            other.start()
            other.join()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    inside("after")
    assert found == {"here": False, "there": True, "after": True}
    assert methods == (torch.autocast.__enter__, torch.autocast.__exit__)
    assert not torch.is_autocast_enabled("cpu")


class Quantised(nn.Module):
    """A network in quantisation-aware training: an observer sees the hidden layer's outputs."""

    def __init__(self, each_channel: bool) -> None:
        super().__init__()
        kind, scheme = quantization.MovingAverageMinMaxObserver, torch.per_tensor_affine
        options = {}
        if each_channel:
            kind = quantization.MovingAveragePerChannelMinMaxObserver
            scheme, options = torch.per_channel_affine, {"ch_axis": 1}
        self.fc1, self.relu, self.fc2 = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)
        self.fake = quantization.FakeQuantize(
            kind, quant_min=0, quant_max=255, dtype=torch.quint8, qscheme=scheme, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fake(self.relu(self.fc1(x))))


def test_observers_that_resize_are_restored() -> None:
    model = Quantised(True).train()
    before = state_of(model)
    with evaluating(model):
        model.fake.enable_observer()
        model(X)
        assert model.fake.activation_post_process.min_val.shape == (16,)
    assert state_of(model) == before
    with pytest.raises(ValueError, match=r"^data: the model can't run on a batch \(dimensions of"):
        greedyprune.select(model, (X, Y), size=4)
    assert {**state_of(model), "random state": 0} == {**before, "random state": 0}
    model(X)
    with pytest.raises(ValueError, match=r"layer 'fc1': .* stands between"):
        greedyprune.select(model, (X, Y), size=4, layers={"fc1": "fc2"})


def test_a_quantisation_aware_network_keeps_its_ranges() -> None:
    model = Quantised(False)
    model(X)
    before = state_of(model.eval())
    selection = greedyprune.select(model, (X, Y), size=4, layers={"fc1": "fc2"})
    small = greedyprune.prune(model, selection)
    after = state_of(model)
    assert {**after, "random state": 0} == {**before, "random state": 0}
    hidden = model.fake.disable_observer() or model.fake(model.fc1(X).relu())
    weight = masked(model, selection).fc2.weight
    small.fake.disable_observer()
    torch.testing.assert_close(small(X), hidden @ weight.T + model.fc2.bias)


@dataclasses.dataclass
class Output:
    loss: float
    parts: tuple[Tensor, dict[str, Tensor]]


class Record:
    def __init__(self, **fields: object) -> None:
        vars(self).update(fields)


def structures(a: Tensor) -> list[object]:
    return [
        a, (a, 1), [a], {"x": {"y": a}}, Output(0.5, (a, {"z": a})), Record(boxes=[a], other=None),
    ]  # fmt: skip


@pytest.mark.parametrize("i", range(6))
def test_outputs_of_any_structure(i: int) -> None:
    a = torch.tensor([1.0, -2.0, 30.0])
    assert same_outputs(structures(a)[i], structures(a.clone())[i])
    assert same_outputs(structures(a)[i], structures(a + 1e-6)[i])
    assert not same_outputs(structures(a)[i], structures(a + 0.01)[i])
    assert not same_outputs(structures(a)[i], structures(a[:2])[i])
    assert not same_outputs(structures(a)[i], structures(a.double())[i])
    assert not same_outputs(structures(a)[i], structures(a)[i - 1])


def test_numbers_that_are_not_finite() -> None:
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([1.0, inf, -inf, nan])
    assert same_outputs(a, a.clone())
    for i, wrong in ((1, -inf), (1, nan), (2, 0.0), (3, 0.5), (3, inf), (0, inf), (0, nan)):
        other = a.clone()
        other[i] = wrong
        assert not same_outputs(a, other)
        assert not same_outputs(other, a)
    assert same_outputs({"loss": nan}, {"loss": nan})
    assert not same_outputs({"loss": nan}, {"loss": 1.0})
    assert same_outputs(torch.full((3,), inf), torch.full((3,), inf))


def test_other_tensors() -> None:
    empty = torch.zeros(0, 3)
    assert same_outputs(empty, empty)
    whole = torch.arange(1000)
    assert same_outputs(whole, whole.clone())
    flipped = whole.clone()
    flipped[:10] += 1  # one in a hundred
    assert same_outputs(whole, flipped)
    flipped[10] += 1
    assert not same_outputs(whole, flipped)
    assert not same_outputs(torch.tensor([True]), torch.tensor([False]))
    assert not same_outputs(torch.tensor([1j]), torch.tensor([-1j]))
    half = torch.tensor([100.0], dtype=torch.bfloat16)
    assert same_outputs(half, half + 1)
    assert not same_outputs(half, half + 4)
    assert same_outputs(half.to_sparse(), half.to_sparse())
    assert not same_outputs("a", "b")
    assert not same_outputs([1, 2], [1, 3])
    endless = Record()
    endless.myself = endless
    assert same_outputs(endless, endless)
