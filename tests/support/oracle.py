"""Equation (1) computed as it is written, on the dense model in float64; problems and checks.

This file does not use what the package computes with. Most networks are on a grid: inputs and
weights of the first layer are quarters, and the consumer's weights fit bfloat16. Activations are
then exact in every dtype, so that only the selection can be wrong.
"""

import copy
from collections.abc import Callable

import hypothesis
import pytest
import torch
from backends import BACKENDS
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import greedyprune

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
NAMED = {"0": "2"}  # layers=NAMED skips the search for layers
each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
each_loss = pytest.mark.parametrize("loss", LOSSES)
modest = hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture
    ],  # `backend` has no state
)
Problem = tuple[nn.Module, Tensor, Tensor]


def grid(*shape: int) -> Tensor:
    """Random quarters between -1 and 1, which no dtype rounds."""
    return torch.randint(-4, 5, shape) / 4


def targets_for(model: nn.Module, x: Tensor, loss: str) -> Tensor:
    """Targets that the dense model fits, but not perfectly."""
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


class Net(nn.Module):
    """A module with its own forward: functional activation, inputs flattened and scaled."""

    def __init__(
        self, activation: Callable[[Tensor], Tensor] = functional.relu, n: int = 16
    ) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(5, n), nn.Linear(n, 3), activation

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(2 * features.flatten(1))))


class Dense:
    """The dense model in float64, with factors for its units' outgoing weights."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, loss, consumer: str = "2") -> None:
        self.net = copy.deepcopy(model).double().eval().requires_grad_(False)
        self.x, self.y = x.double(), y.double() if y.is_floating_point() else y
        self.loss = copy.deepcopy(LOSSES.get(loss, loss) if isinstance(loss, str) else loss)
        if isinstance(self.loss, nn.Module):
            self.loss.double()
        head, inputs = self.net.get_submodule(consumer), []
        with head.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
            self.net(self.x)
        self.name, self.weight = f"{consumer}.weight", head.weight
        self.n = head.in_features
        self.phi = self.n * torch.einsum("sj,cj->jsc", inputs[0], head.weight)  # (N, m, C)
        flat = self.phi.flatten(1) + 0.0  # makes -0.0 equal to 0.0
        self.twins = torch.unique(flat, dim=0, return_inverse=True)[1]  # equal units share a number

    def outputs(self, weight: Tensor) -> Tensor:
        return functional_call(self.net, {self.name: weight}, (self.x,))

    def value(self, factors: Tensor) -> Tensor:
        """The loss with unit j's outgoing weights multiplied by factors[j]."""
        return self.loss(self.outputs(self.weight * factors), self.y)

    def masked(self, layer: greedyprune.LayerSelection) -> Tensor:
        """The dense model's outputs with the layer's kept units alone, weighted as it says."""
        weight, new = torch.zeros_like(self.weight), layer.weights.double()
        refit = new.dim() == 2
        weight[:, layer.kept] = new if refit else self.weight[:, layer.kept] * new
        return self.outputs(weight)

    def follow(self, order: Tensor, replacement: bool = True, margin: float = 1e-6) -> int:
        """Checks the picks against (1), up to the first near tie; returns the steps compared."""
        counts = torch.zeros(self.n, dtype=torch.float64)
        for k, pick in enumerate(order.tolist(), 1):
            trials = (counts + torch.eye(self.n)) * (self.n / k)  # row j: one more of unit j
            scores = torch.stack([self.value(factors) for factors in trials])
            if not replacement:
                scores[counts > 0] = torch.inf
            best = scores.argmin()
            twin = self.twins == self.twins[best]
            least = margin * max(scores[best].item(), 1e-9)
            if (scores[~twin] - scores[best] < least).any():
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


def close(actual: Tensor, expected: Tensor, rel: float = 1e-5) -> bool:
    """Do they differ by at most `rel` of the largest entry?"""
    return bool((actual.double() - expected).abs().max() <= rel * expected.abs().max() + 1e-9)


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
    """Everything about a model, and about torch, that select must leave as it is."""
    hooks = [name for name in vars(nn.Module()) if "hooks" in name]
    parts: list = [torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_num_threads()]
    for name, module in model.named_modules():
        parts.append((name, module.training, sorted(vars(module)), type(module).__mro__))
        parts.append([list(getattr(module, hook) or ()) for hook in hooks])
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        grad = p.grad.tolist() if p.grad is not None else None
        parts.append((name, id(p), p.dtype, p.requires_grad, p.tolist(), grad))
    return [repr(part) for part in parts]
