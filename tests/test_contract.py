"""The public contract: what select, prune and Selection promise, against plain torch in float64.

Nothing here knows how the package computes. The oracle is equation (1) as it is written: every
candidate network is run. Most networks live on a grid (inputs and first-layer weights are quarters,
consumer weights fit bfloat16), so that activations are exact in every dtype and only the selection
can be wrong.
"""

import copy
import io
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path

import hypothesis
import matplotlib
import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import greedyprune

matplotlib.use("Agg")

BACKENDS = ["cpu", "reference"] + (["cuda"] if torch.cuda.is_available() else [])
WEIGHTS = ["counts", "uniform", "none", "refit"]
LOSSES = {
    "mse": nn.MSELoss(),
    "cross_entropy": nn.CrossEntropyLoss(),
    "bce_with_logits": nn.BCEWithLogitsLoss(),
}
FIELDS = ("order", "counts", "kept", "weights", "losses", "dense_loss", "bound", "gap", "distinct")
SMOOTHNESS: dict[str, Callable[[int], float]] = {  # B of equation (3), by number of outputs
    "mse": lambda c: 2 / c,
    "cross_entropy": lambda c: 1 / 2,
    "bce_with_logits": lambda c: 1 / (4 * c),
}
NAMED = {"0": "2"}  # spares the search
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_loss = pytest.mark.parametrize("loss", LOSSES)
modest = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
Problem = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The problems are tiny: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def grid(*shape: int) -> Tensor:
    """Quarters between -1 and 1, which no dtype rounds."""
    return torch.randint(-4, 5, shape) / 4


def targets_for(model: nn.Module, x: Tensor, loss: str) -> Tensor:
    """Targets that the dense model fits, not perfectly."""
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval()(x)
    noisy = outputs + 0.5 * torch.randn_like(outputs)
    if loss == "cross_entropy":
        return noisy.argmax(1)
    return noisy if loss == "mse" else (noisy > 0).to(x.dtype)


def problem(
    loss: str = "mse", n: int = 16, m: int = 60, c: int = 3, seed: int = 2, bias: bool = True
) -> Problem:
    """A Sequential on the grid with n hidden units ("0" feeds "2"), m inputs and their targets."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, n, bias), nn.ReLU(), nn.Linear(n, c, bias))
        with torch.no_grad():
            for p in model[0].parameters():
                p.copy_(grid(*p.shape))
            for p in model[2].parameters():
                p.copy_((2 * torch.randn(p.shape) * n**-0.5).bfloat16())
        x = grid(m, 5)
        return model, x, targets_for(model, x, loss)


class Dense:
    """The dense model in float64, its units weighted at will."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, loss, consumer: str = "2") -> None:
        self.net = copy.deepcopy(model).double().eval().requires_grad_(False)
        self.x, self.y = x.double(), y.double() if y.is_floating_point() else y
        self.loss = copy.deepcopy(LOSSES.get(loss, loss) if isinstance(loss, str) else loss)
        if isinstance(self.loss, nn.Module):
            self.loss.double()
        head, seen = self.net.get_submodule(consumer), []
        with head.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
            self.net(self.x)
        self.name, self.weight = f"{consumer}.weight", head.weight
        self.n = head.in_features
        self.phi = self.n * torch.einsum("sj,cj->jsc", seen[0], head.weight)  # (N, m, C)
        flat = self.phi.flatten(1) + 0.0  # -0.0 is 0.0
        self.twins = torch.unique(flat, dim=0, return_inverse=True)[1]  # equal units share a number

    def outputs(self, weight: Tensor) -> Tensor:
        return functional_call(self.net, {self.name: weight}, (self.x,))

    def value(self, factors: Tensor) -> Tensor:
        """The loss with unit j's outgoing weights multiplied by factors[j]."""
        return self.loss(self.outputs(self.weight * factors), self.y)

    def masked(self, layer: greedyprune.LayerSelection) -> Tensor:
        """What the dense model gives with the layer's kept units weighted as it says."""
        weight, carried = torch.zeros_like(self.weight), layer.weights.double()
        refit = carried.dim() == 2
        weight[:, layer.kept] = carried if refit else self.weight[:, layer.kept] * carried
        return self.outputs(weight)

    def follow(self, order: Tensor, replacement: bool = True, margin: float = 1e-6) -> int:
        """Check the picks against (1) while its margin is clear; the number of steps compared."""
        counts = torch.zeros(self.n, dtype=torch.float64)
        for k, pick in enumerate(order.tolist(), 1):
            trials = (counts + torch.eye(self.n)) * (self.n / k)  # row j: one more of unit j
            scores = torch.stack([self.value(factors) for factors in trials])
            if not replacement:
                scores[counts > 0] = torch.inf
            best = scores.argmin()
            twin = self.twins == self.twins[best]
            clear = margin * max(scores[best].item(), 1e-9)
            if (scores[~twin] - scores[best] < clear).any():
                return k - 1
            first = int((twin & scores.isfinite()).nonzero()[0])
            assert pick == first, f"step {k}: picked {pick}, equation (1) says {first}"
            counts[pick] += 1
        return len(order)


def select(model: nn.Module, data: object, **options) -> greedyprune.Selection:
    return greedyprune.select(model, data, progress=False, **options)


def only(selection: greedyprune.Selection) -> greedyprune.LayerSelection:
    (layer,) = selection.layers.values()
    return layer


def near(value: float, rel: float = 1e-5):
    return pytest.approx(value, rel=rel, abs=1e-7)


def close(found: Tensor, expected: Tensor, rel: float = 1e-5) -> bool:
    """Equal to rel of the largest entry."""
    return bool((found.double() - expected).abs().max() <= rel * expected.abs().max() + 1e-9)


def same(a: greedyprune.Selection, b: greedyprune.Selection) -> bool:
    assert list(a.layers) == list(b.layers)
    pairs = [(getattr(only(a), f), getattr(only(b), f)) for f in FIELDS]
    return all(p is q is None or torch.equal(p, q) for p, q in pairs)


def check_pruned(
    model: nn.Module, x: Tensor, y: Tensor, loss, selection, consumer: str = "2"
) -> None:
    """Invariants 1 and 4, at every step of the path."""
    dense = Dense(model, x, y, loss, consumer)
    assert float(selection.dense_loss) == near(float(dense.value(torch.ones(dense.n))))
    for k in range(1, len(selection.order) + 1):
        cut = selection.at(k)
        small = greedyprune.prune(model, cut).eval()
        assert small.get_submodule(consumer).in_features == len(cut.kept)
        with torch.no_grad():
            assert close(small(x), dense.masked(only(cut)))
            value = float(dense.loss(small.double()(dense.x), dense.y))
        assert float(selection.losses[k - 1]) == near(value), f"step {k}"


def fingerprint(model: nn.Module) -> list[str]:
    """Everything about a model, and about torch, that select must leave alone."""
    hooks = [name for name in vars(nn.Module()) if "hooks" in name]
    found: list = [torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_num_threads()]
    for name, module in model.named_modules():
        found.append((name, module.training, sorted(vars(module)), type(module).__mro__))
        found.append([list(getattr(module, hook) or ()) for hook in hooks])
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        grad = p.grad.tolist() if p.grad is not None else None
        found.append((name, id(p), p.dtype, p.requires_grad, p.tolist(), grad))
    return [repr(item) for item in found]


# ---------------------------------------------------------------- picks, losses, the pruned model


@each_backend
@each_loss
@pytest.mark.parametrize("c", [1, 4])
@pytest.mark.parametrize("replacement", [True, False])
def test_every_step_is_equation_1(backend: str, loss: str, c: int, replacement: bool) -> None:
    model, x, y = problem(loss, c=c)
    how = {"loss": loss, "backend": backend, "replacement": replacement}
    selection = select(model, (x, y), steps=12, **how)
    compared = Dense(model, x, y, loss).follow(selection.order, replacement)
    assert compared == (0 if loss == "cross_entropy" and c == 1 else 12)  # one class: all tie
    check_pruned(model, x, y, loss, selection)


@each_backend
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(ignore_index=2),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 3.0, 1.0])),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 4.0]), ignore_index=1, label_smoothing=0.1),
        nn.BCEWithLogitsLoss(),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 1.0, 6.0])),
        nn.MSELoss(),
    ],
    ids=repr,
)
def test_loss_modules_over_ragged_batches(backend: str, loss: nn.Module) -> None:
    """The mean is over all the data, as torch defines it, and not a mean of batch means."""
    kinds = {nn.MSELoss: "mse", nn.CrossEntropyLoss: "cross_entropy"}
    model, x, y = problem(kinds.get(type(loss), "bce_with_logits"), seed=3)
    rows = y.argsort() if y.dim() == 1 else y[:, 0].argsort()  # so that batches differ
    x, y = x[rows], y[rows]
    batches = [(x[:7], y[:7]), (x[7:50], y[7:50]), (x[50:], y[50:])]
    selection = select(model, batches, steps=8, loss=loss, backend=backend)
    assert Dense(model, x, y, loss).follow(selection.order) == 8
    check_pruned(model, x, y, loss, selection)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_auto_loss_is_read_off_the_targets(loss: str) -> None:
    model, x, y = problem(loss)
    assert same(select(model, (x, y), steps=5), select(model, (x, y), steps=5, loss=loss))


@each_backend
def test_any_callable_is_a_loss_and_slow(backend: str) -> None:
    model, x, y = problem(n=10)
    with pytest.warns(UserWarning, match="slow"):
        selection = select(model, (x, y), steps=5, loss=functional.l1_loss, backend=backend)
    assert Dense(model, x, y, functional.l1_loss).follow(selection.order) == 5
    check_pruned(model, x, y, functional.l1_loss, selection)
    assert selection.bound is None
    assert selection.gap is None


class Net(nn.Module):
    """A custom forward: names of its own, functional activation, inputs flattened and scaled."""

    def __init__(
        self, activation: Callable[[Tensor], Tensor] = functional.relu, n: int = 16
    ) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(5, n), nn.Linear(n, 3), activation

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(2 * features.flatten(1))))


class Untraceable(Net):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features if features.sum() > 0 else -features)


def batchnorm_dropout() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.4), nn.Linear(16, 3)
    )
    model(torch.randn(64, 5))  # running statistics worth the name
    nn.init.uniform_(model[1].weight, 0.5, 2.0)
    nn.init.normal_(model[1].bias)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "functional": (Net, "fc1", "fc2"),
    "tanh": (lambda: Net(torch.tanh), "fc1", "fc2"),
    "softplus": (lambda: Net(nn.Softplus()), "fc1", "fc2"),
    "swish": (lambda: Net(lambda h: h * torch.sigmoid(h)), "fc1", "fc2"),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 16), nn.Linear(16, 3)), "0", "1"),
    "no_bias": (lambda: problem(bias=False)[0], "0", "2"),
    "batchnorm_dropout": (batchnorm_dropout, "0", "4"),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 16), nn.SiLU()), nn.Linear(16, 3)),
        "0.0",
        "1",
    ),
}


@each_backend
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("name", MODELS)
def test_models(backend: str, loss: str, name: str) -> None:
    build, producer, consumer = MODELS[name]
    torch.manual_seed(1)
    model, x = build(), torch.randn(60, 5)
    y = targets_for(model, x, loss)
    selection = select(model, (x, y), steps=8, backend=backend)
    assert list(selection.layers) == [producer]
    dense = Dense(model, x, y, loss, consumer)
    assert dense.follow(selection.order, margin=1e-5) >= 4  # activations are rounded here
    check_pruned(model, x, y, loss, selection, consumer)
    for layers in (producer, [producer], {producer: consumer}):
        assert same(select(model, (x, y), steps=8, backend=backend, layers=layers), selection)


def test_mapping_serves_models_that_cannot_be_traced() -> None:
    torch.manual_seed(0)
    model, x = Untraceable(), torch.rand(30, 5)
    y = targets_for(model, x, "mse")
    selection = select(model, (x, y), steps=4, layers={"fc1": "fc2"})
    assert Dense(model, x, y, "mse", "fc2").follow(selection.order, margin=1e-5) >= 2
    assert greedyprune.prune(model, selection).fc1.out_features == len(selection.kept)


@each_backend
@each_loss
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("replacement", [True, False])
def test_weights(backend: str, loss: str, weights: str, replacement: bool) -> None:
    """Picks follow (1) whatever the kept units carry; the losses are those of what they carry."""
    model, x, y = problem(loss, n=12, seed=5)
    how = {"loss": loss, "backend": backend, "replacement": replacement}
    selection = select(model, (x, y), steps=9, weights=weights, **how)
    assert torch.equal(selection.order, select(model, (x, y), steps=9, **how).order)
    check_pruned(model, x, y, loss, selection)
    kept = selection.kept
    if weights == "refit":
        assert selection.weights.shape == (3, len(kept))
        return
    counted = 12 * selection.counts[kept] / 9
    expected = {"counts": counted, "uniform": 12 / len(kept), "none": 1.0}[weights]
    assert close(selection.weights, expected * torch.ones(len(kept)).double(), 1e-6)


@each_backend
@pytest.mark.parametrize("kind", ["plain", "dead", "twins"])  # the last two: a singular Gram
def test_refit_is_least_squares_with_the_bias_kept(backend: str, kind: str) -> None:
    model, x, y = problem(n=12, m=120, seed=6 if kind == "dead" else 2)
    if kind == "twins":
        with torch.no_grad():
            model[0].weight[9], model[0].bias[9] = model[0].weight[2], model[0].bias[2]
    how = {"weights": "refit", "replacement": kind != "twins", "backend": backend}
    selection = select(model, (x, y), steps=12 if kind == "twins" else 5, **how)
    hidden = copy.deepcopy(model[:2]).double()(x.double())[:, selection.kept].detach()
    wanted = y.double() - model[2].bias.detach().double()
    solution = torch.linalg.pinv(hidden) @ wanted
    assert float(selection.losses[-1]) == near(
        float(functional.mse_loss(hidden @ solution, wanted))
    )
    assert (selection.losses.diff() <= 1e-9).all() or kind != "twins"  # the span only grows
    alive = hidden.any(0)
    assert bool(alive.all()) == (kind != "dead")
    if kind != "twins":
        assert close(selection.weights[:, alive], solution[alive].T, 1e-4)
    assert torch.equal(greedyprune.prune(model, selection)[2].bias, model[2].bias)


@each_backend
def test_imitation_approaches_the_dense_output(backend: str) -> None:
    model, x, y = problem("cross_entropy", n=12)
    how = {"objective": "imitation", "weights": "counts", "backend": backend}
    selection = select(model, (x, y), steps=10, **how)
    wanted = model(x).detach()
    assert Dense(model, x, wanted, "mse").follow(selection.order) == 10
    for k in (1, 4, 10):
        value = functional.mse_loss(greedyprune.prune(model, selection.at(k))(x), wanted)
        assert float(selection.losses[k - 1]) == near(value.item())
    assert (selection.losses <= selection.bound).all()


# ---------------------------------------------------------------- how long the path is


def test_default_keeps_half_the_units_once() -> None:
    model, x, y = problem()
    selection = select(model, (x, y))
    assert len(selection.kept) == len(selection.order) == 8
    assert Dense(model, x, y, "mse").follow(selection.order, replacement=False) == 8


@pytest.mark.parametrize(
    ("size", "kept"), [(1, 1), (7, 7), (20, 20), (0.3, 6), (0.01, 1), (1.0, 20), ({"0": 4}, 4)]
)
def test_size_counts_distinct_units(size: object, kept: int) -> None:
    model, x, y = problem(n=20)
    selection = select(model, (x, y), size=size)
    assert len(selection.kept) == len(selection.order) == kept
    if kept == 20:
        assert float(selection.losses[-1]) == near(float(selection.dense_loss))


def test_size_with_replacement_stops_at_that_many_distinct_units() -> None:
    model, x, y = problem(n=20)
    selection = select(model, (x, y), size=4, replacement=True)
    assert selection.distinct.tolist().count(4) == 1
    assert len(selection.kept) == 4
    Dense(model, x, y, "mse").follow(selection.order)


def orthogonal(planted: Iterable[int], n: int = 12) -> Problem:
    """Unit j answers sample j only; the target is the mean of the planted units."""
    model = nn.Sequential(nn.Linear(n, n, bias=False), nn.ReLU(), nn.Linear(n, 2))
    x = torch.eye(n)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(n))
        model[2].weight.fill_(0.5)
        dense = Dense(model, x, torch.zeros(n, 2), "mse")
        return model, x, (model[2].bias + dense.phi[list(planted)].mean(0)).float()


@each_backend
def test_repeats_that_go_on_for_ever_are_stopped_with_a_warning(backend: str) -> None:
    model, x, y = orthogonal([3])
    with pytest.warns(UserWarning, match="size"):
        selection = select(model, (x, y), size=2, replacement=True, backend=backend)
    assert selection.order.tolist() == [3] * 20


@each_backend
@pytest.mark.parametrize("planted", [[3, 7, 11], [5, 9, 5], [0], [0, 1, 2, 3]])
def test_a_planted_mean_is_recovered(backend: str, planted: list[int]) -> None:
    model, x, y = orthogonal(planted)
    selection = select(model, (x, y), steps=len(planted), backend=backend)
    assert selection.order.tolist() == planted
    assert float(selection.losses[-1]) < 1e-10
    assert (selection.losses[:-1] > 1e-3).all()


@each_backend
@each_loss
def test_tolerance_stops_at_the_first_step_within_it(backend: str, loss: str) -> None:
    model, x, y = problem(loss, n=24)
    selection = select(model, (x, y), tolerance=0.1, loss=loss, backend=backend)
    within = selection.losses <= 1.1 * selection.dense_loss
    assert within.tolist() == [False] * (len(within) - 1) + [True]
    assert len(within) > 1


# ---------------------------------------------------------------- edges


@each_backend
@each_loss
@pytest.mark.parametrize("replacement", [True, False])
def test_twins_go_to_the_lowest_index_and_dead_units_do_no_harm(
    backend: str, loss: str, replacement: bool
) -> None:
    model, x, y = problem(loss, n=14, seed=2)
    with torch.no_grad():
        for copied, original, scale in ((9, 2, 1), (12, 2, 2), (8, 5, 4), (13, 0, 0.5)):
            model[0].weight[copied] = scale * model[0].weight[original]
            model[0].bias[copied] = scale * model[0].bias[original]
            model[2].weight[:, copied] = model[2].weight[:, original] / scale
        model[0].weight[3], model[0].bias[3] = 0, -1  # never active
        model[2].weight[:, 6] = 0  # never heard
    dense = Dense(model, x, y, loss)
    assert dense.twins.unique().numel() == 9
    how = {"loss": loss, "backend": backend, "replacement": replacement}
    selection = select(model, (x, y), steps=14, **how)
    assert dense.follow(selection.order, replacement) >= 10
    check_pruned(model, x, y, loss, selection)


@each_backend
@each_loss
@pytest.mark.parametrize(("n", "m"), [(1, 20), (12, 1), (1, 1)])
def test_one_unit_one_sample(backend: str, loss: str, n: int, m: int) -> None:
    model, x, y = problem(loss, n=n, m=m, seed=4)
    selection = select(model, (x, y), steps=3, loss=loss, backend=backend)
    Dense(model, x, y, loss).follow(selection.order)
    check_pruned(model, x, y, loss, selection)
    if n == 1:
        assert selection.order.tolist() == [0, 0, 0]
        assert selection.losses.tolist() == [near(float(selection.dense_loss))] * 3


@each_backend
@each_loss
def test_more_steps_than_units(backend: str, loss: str) -> None:
    model, x, y = problem(loss, n=5)
    selection = select(model, (x, y), steps=40, loss=loss, backend=backend)
    assert int(selection.counts.sum()) == 40
    assert Dense(model, x, y, loss).follow(selection.order) >= 5
    check_pruned(model, x, y, loss, selection)


@each_backend
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(backend: str, loss: str, dtype: torch.dtype) -> None:
    model, x, y = problem(loss)
    model, x, y = model.to(dtype), x.to(dtype), y.to(dtype) if loss == "mse" else y
    selection = select(model, (x, y), steps=8, backend=backend)
    dense = Dense(model, x, y, loss)
    assert dense.follow(selection.order) == 8
    small = greedyprune.prune(model, selection)
    assert {p.dtype for p in small.parameters()} == {dtype}
    rel = 1e-5 if dtype == torch.float64 else 0.02  # weights N c / k are rounded to the dtype
    value = dense.loss(small.double()(dense.x), dense.y).item()
    assert float(selection.losses[-1]) == near(value, rel)


@each_backend
@each_loss
def test_strides_do_not_matter(backend: str, loss: str) -> None:
    model, x, y = problem(loss)
    expected = select(model, (x, y), steps=8, loss=loss, backend=backend)
    strided = torch.full((len(x), 15), torch.nan)
    strided[:, 1::3] = x
    spread = y.repeat_interleave(2, 0)[::2] if y.dim() == 1 else y.T.contiguous().T
    model[2].weight = nn.Parameter(model[2].weight.detach().T.contiguous().T)
    found = select(model, (strided[:, 1::3], spread), steps=8, loss=loss, backend=backend)
    assert torch.equal(found.order, expected.order)
    assert torch.allclose(found.losses, expected.losses, rtol=1e-6)


# ---------------------------------------------------------------- data and the random forms

FORMS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "list": lambda x, y: [(x[:25], y[:25]), (x[25:], y[25:])],
    "generator": lambda x, y: ((x[i : i + 9], y[i : i + 9]) for i in range(0, len(x), 9)),
    "dataset": TensorDataset,
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7),
    "shuffled": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True),
    "dicts": lambda x, y: [
        {"features": x[:40], "labels": y[:40]},
        {"labels": y[40:], "features": x[40:]},
    ],
}


@each_backend
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_one_answer(backend: str, loss: str, form: str) -> None:
    sequential, x, y = problem(loss)
    model = Net()
    model.fc1, model.fc2 = sequential[0], sequential[2]
    expected = select(model, (x, y), steps=8, backend=backend)
    found = select(model, FORMS[form](x, y), steps=8, backend=backend)
    assert torch.equal(found.order, expected.order)
    assert torch.allclose(found.losses, expected.losses, rtol=1e-9)


@each_backend
@each_loss
def test_streaming_picks_the_same_units(backend: str, loss: str) -> None:
    model, x, y = problem(loss, n=40, m=120)
    how = {"steps": 8, "loss": loss, "backend": backend}
    expected, found = select(model, (x, y), **how), select(model, (x, y), memory_limit=8192, **how)
    assert torch.equal(found.order, expected.order)
    assert torch.allclose(found.losses, expected.losses, rtol=1e-9)
    assert torch.allclose(found.gap, expected.gap, rtol=1e-6, atol=1e-9)


@each_backend
@each_loss
@pytest.mark.parametrize("option", ["candidates", "batch_size"])
def test_random_forms_are_seeded_and_report_the_whole_loss(
    backend: str, loss: str, option: str
) -> None:
    model, x, y = problem(loss, n=20, m=100)
    how = {"steps": 10, "loss": loss, "backend": backend, option: 3}
    first = select(model, (x, y), seed=1, **how)
    torch.manual_seed(99)  # not what decides
    assert same(first, select(model, (x, y), seed=1, **how))
    assert not torch.equal(first.order, select(model, (x, y), seed=2, **how).order)
    check_pruned(model, x, y, loss, first)
    assert first.bound is None
    assert first.gap is None


@each_backend
@each_loss
def test_random_forms_agree_with_the_full_one_where_chance_has_no_say(
    backend: str, loss: str
) -> None:
    model, x, y = problem(loss, n=12, c=5)
    how = {"steps": 8, "loss": loss, "backend": backend}
    everyone = select(model, (x, y), candidates=12, **how)
    assert torch.equal(everyone.order, select(model, (x, y), **how).order)
    row = int((model[:2](x) > 0).sum(1).argmax())  # any mini-batch of this one sample is the data
    x, y = x[row].repeat(30, 1), y[row : row + 1].repeat_interleave(30, 0)
    batched = select(model, (x, y), batch_size=4, **how)
    assert Dense(model, x, y, loss).follow(batched.order) >= 2


@each_backend
@each_loss
def test_threads_do_not_decide(backend: str, loss: str) -> None:
    model, x, y = problem(loss, n=48, m=2000)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(select(model, (x, y), steps=20, loss=loss, backend=backend))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].order, found[1].order)
    assert torch.allclose(found[0].losses, found[1].losses, rtol=1e-9)


# ---------------------------------------------------------------- the certificate


@each_backend
@each_loss
def test_bound_and_gap_are_their_formulas(backend: str, loss: str) -> None:
    model, x, y = problem(loss, c=4)
    selection = select(model, (x, y), steps=12, loss=loss, backend=backend)
    dense = Dense(model, x, y, loss)
    spread = float((dense.phi - dense.phi.mean(0)).square().sum(2).mean())  # V
    for k in range(1, 13):
        harmonic = sum(1 / i for i in range(1, k + 1))
        excess = SMOOTHNESS[loss](4) / 2 * spread * harmonic / k
        assert float(selection.bound[k - 1]) == near(float(selection.dense_loss) + excess)
        factors = 16 * selection.order[:k].bincount(minlength=16).double() / k
        slope = torch.autograd.functional.jacobian(dense.value, factors)
        gap = float(slope @ factors - 16 * slope.min())
        assert float(selection.gap[k - 1]) == pytest.approx(gap, rel=1e-4, abs=1e-5)


@each_backend
@pytest.mark.parametrize(
    ("options", "bound", "gap"),
    [
        ({}, True, True),
        ({"replacement": False}, False, True),
        ({"weights": "uniform", "replacement": False}, False, True),
        ({"weights": "uniform"}, False, False),
        ({"weights": "none"}, False, False),
        ({"weights": "refit"}, False, False),
        ({"candidates": 6}, False, False),
        ({"batch_size": 20}, False, False),
    ],
    ids=str,
)
def test_certificates_are_given_where_they_hold(
    backend: str, options: dict, bound: bool, gap: bool
) -> None:
    model, x, y = problem(n=6)
    selection = select(model, (x, y), steps=6, backend=backend, **options)
    assert (selection.bound is not None) == bound
    assert (selection.gap is not None) == gap


# ---------------------------------------------------------------- the record


@each_backend
@pytest.mark.parametrize("replacement", [True, False])
def test_record(backend: str, replacement: bool) -> None:
    model, x, y = problem()
    selection = select(model, (x, y), steps=10, replacement=replacement, backend=backend)
    assert isinstance(selection, greedyprune.Selection)
    assert list(selection.layers) == ["0"]
    assert isinstance(only(selection), greedyprune.LayerSelection)
    for record in (selection, only(selection)):
        order = record.order
        assert order.dtype == record.counts.dtype == record.kept.dtype == torch.int64
        assert record.losses.dtype == record.dense_loss.dtype == torch.float64
        assert order.shape == record.losses.shape == record.gap.shape == (10,)
        assert record.dense_loss.shape == ()
        assert torch.equal(record.counts, order.bincount(minlength=16))
        assert torch.equal(record.kept, order.unique())
        assert record.distinct.tolist() == [len(set(order[:k].tolist())) for k in range(1, 11)]
        fields = [getattr(record, f) for f in FIELDS]
        assert {str(t.device) for t in fields if t is not None} == {"cpu"}
    assert replacement or record.counts.max() == 1
    for record in (selection, only(selection)):
        with pytest.raises((FrozenInstanceError, AttributeError)):
            record.layers = record.order = None


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("replacement", [True, False])
def test_at_cuts_the_path_and_a_file_brings_it_back(
    tmp_path: Path, weights: str, replacement: bool
) -> None:
    model, x, y = problem()
    how = {"weights": weights, "replacement": replacement}
    selection = select(model, (x, y), steps=10, **how)
    path = tmp_path / "selection.safetensors"
    selection.save(path)
    loaded = greedyprune.Selection.load(path)
    assert same(loaded, selection)
    assert same(selection.at(10), selection)
    for k in (1, 4, 9):
        cut, alone = selection.at(k), select(model, (x, y), steps=k, **how)
        assert same(loaded.at(k), cut)
        assert torch.equal(cut.order, alone.order)
        assert torch.equal(cut.kept, alone.kept)
        assert torch.allclose(cut.losses, alone.losses, rtol=1e-9)
        assert torch.allclose(cut.weights, alone.weights, rtol=1e-6)
        assert same(selection.at(9).at(k), cut)
    small = greedyprune.prune(model, loaded)
    assert torch.equal(small(x), greedyprune.prune(model, selection)(x))


def test_one_path_serves_every_size_and_the_file_holds_no_pickle(tmp_path: Path) -> None:
    model, x, y = problem()
    selection = select(model, (x, y), size=10)
    assert torch.equal(selection.at(4).order, select(model, (x, y), size=4).order)
    selection.save(str(tmp_path / "s.safetensors"))
    (path,) = tmp_path.iterdir()
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    assert blob[8:9] == b"{"
    assert length < len(blob)
    assert safetensors.torch.load_file(path)


def test_summary_and_plot_show_the_layer(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(30, 5)
    selection = select(model, (x, targets_for(model, x, "mse")), steps=7)
    console = Console(file=io.StringIO(), width=200)
    console.print(selection.summary())
    text = console.file.getvalue() + capsys.readouterr().out
    assert "fc1" in text
    assert str(len(selection.kept)) in text
    lines = [line for axes in selection.plot().figure.axes for line in axes.get_lines()]
    heights = [torch.as_tensor(line.get_ydata(), dtype=torch.float64) for line in lines]
    assert any(torch.equal(height, selection.losses) for height in heights)


def test_show_config_names_versions(capsys: pytest.CaptureFixture[str]) -> None:
    greedyprune.show_config()
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert greedyprune.__version__ in text


# ---------------------------------------------------------------- invariant 6


@pytest.mark.filterwarnings("ignore:.*slow")
@pytest.mark.parametrize("training", [True, False])
def test_select_and_prune_leave_the_model_as_found(training: bool) -> None:
    torch.manual_seed(0)
    model = batchnorm_dropout().train(training)
    model[3].train(not training)
    model[0].bias.requires_grad_(False)
    x = torch.randn(50, 5)
    y = targets_for(model, x, "mse")
    functional.mse_loss(model(x), y).backward()
    model[2].register_forward_hook(lambda *args: None)
    before = fingerprint(model)
    forms: list[dict] = [{}, {"candidates": 4}, {"batch_size": 9}, {"memory_limit": 8192}]
    forms += [{"objective": "imitation"}, {"weights": "refit"}, {"backend": "reference"}]
    for options in forms:
        selection = select(model, (x, y), size=6, **options)
        assert fingerprint(model) == before, options

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError, match="broken"):
        select(model, (x, y), size=6, loss=broken)
    assert fingerprint(model) == before

    small = greedyprune.prune(model, selection)
    assert fingerprint(model) == before
    assert type(small) is type(model)
    assert (small[0].out_features, small[1].num_features, small[4].in_features) == (6, 6, 6)
    assert [p.shape for p in small[1].buffers()] == [(6,), (6,), ()]
    assert [module.training for module in small] == [module.training for module in model]
    addresses = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert addresses.isdisjoint(p.data_ptr() for p in [*small.parameters(), *small.buffers()])
    flags = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in small.parameters()] == flags
    functional.mse_loss(small(x), y).backward()  # ready for fine-tuning
    assert small[4].weight.grad.shape == (3, 6)


# ---------------------------------------------------------------- properties


@st.composite
def draws(draw: st.DrawFn) -> tuple[str, Problem, int]:
    loss = draw(st.sampled_from(sorted(LOSSES)))
    size = [draw(st.integers(1, top)) for top in (12, 20, 5)]
    seed = draw(st.integers(0, 2**20))
    return loss, problem(loss, *size, seed), draw(st.integers(1, 8))


@each_backend
@modest
@hypothesis.given(draw=draws(), replacement=st.booleans())
def test_picks_are_brute_force(backend: str, draw, replacement: bool) -> None:
    loss, (model, x, y), steps = draw
    steps = steps if replacement else min(steps, model[0].out_features)
    how = {"loss": loss, "backend": backend, "replacement": replacement, "layers": NAMED}
    selection = select(model, (x, y), steps=steps, **how)
    assert len(selection.order) == steps
    hypothesis.assume(Dense(model, x, y, loss).follow(selection.order, replacement) > 0)


@each_backend
@modest
@hypothesis.given(draw=draws(), weights=st.sampled_from(WEIGHTS[:3]))
def test_losses_are_those_of_the_pruned_model(backend: str, draw, weights: str) -> None:
    loss, (model, x, y), steps = draw
    how = {"loss": loss, "backend": backend, "weights": weights, "layers": NAMED}
    selection = select(model, (x, y), steps=steps, **how)
    check_pruned(model, x, y, loss, selection)


@each_backend
@modest
@hypothesis.given(draw=draws(), seed=st.integers(0, 2**20))
def test_certificates_hold(backend: str, draw, seed: int) -> None:
    loss, (model, x, y), steps = draw
    how = {"loss": loss, "backend": backend, "layers": NAMED}
    selection = select(model, (x, y), steps=steps, **how)
    slack = 1e-6 * (1 + selection.losses.abs())
    assert (selection.losses <= selection.bound + slack).all()
    dense = Dense(model, x, y, loss)
    sampler = torch.Generator().manual_seed(seed)
    sharp = torch.rand(20, dense.n, generator=sampler, dtype=torch.float64) ** 6 + 1e-12
    hull = torch.cat([torch.eye(dense.n), sharp / sharp.sum(1, keepdim=True)])
    lowest = min(float(dense.value(dense.n * point)) for point in hull)
    assert (selection.losses - selection.gap <= lowest + slack).all()
    assert (selection.gap >= -slack).all()
