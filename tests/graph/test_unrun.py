"""Modules that no batch runs: those that may need the units that are cut, and harmless ones."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import greedyprune
from greedyprune.surgery.cut import masked

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not run"),
]
Forward = Callable[["Model", Tensor, str], Tensor]


class Model(nn.Module):
    """Modules by name, and the forward pass as a function of them, the input and the task."""

    def __init__(self, forward: Forward, **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor, task: str = "a") -> Tensor:
        return self.function(self, x, task)


def block(*sizes: int) -> nn.Sequential:
    """Linears with ReLUs between them."""
    layers: list[nn.Module] = []
    for one, other in pairwise(sizes):
        layers += [nn.Linear(one, other), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def tasks(*sizes: int) -> nn.ModuleDict:
    return nn.ModuleDict({task: block(*sizes) for task in "ab"})


def pooled(model: Model, x: Tensor, task: str) -> Tensor:
    maps = torch.relu(model.conv(x.reshape(-1, 1, 2, 3)))
    return getattr(model, task)(maps.flatten(1))


# The model, which module may fail, and because of which units.
NEEDED: dict[str, tuple[Model, str, str]] = {
    "after a recurrent module": (
        Model(
            lambda m, x, t: getattr(m, t)(m.body(x[:, None])[1][-1]),
            body=nn.GRU(6, 24, batch_first=True), a=nn.Linear(24, 3), b=nn.Linear(24, 3),
        ),
        "b", "body.weight_ih_l0",
    ),
    "heads": (
        Model(lambda m, x, t: m.heads[t](m.body(x).relu()), body=block(6, 24), heads=tasks(24, 3)),
        "heads.b", "body.0",
    ),
    "deep heads": (
        Model(
            lambda m, x, t: m.heads[t](m.body(x).relu()),
            body=block(6, 24), heads=tasks(24, 7, 3),
        ), "heads.b", "body.0",
    ),
    "heads as attributes": (
        Model(
            lambda m, x, t: getattr(m, t)(m.body(x).relu()),
            body=block(6, 24), a=block(24, 3), b=block(24, 5, 3),
        ), "b", "body.0",
    ),
    "heads of flattened maps": (
        Model(pooled, conv=nn.Conv2d(1, 8, 1), a=block(48, 3), b=block(48, 3)), "b", "conv",
    ),
    "first layers": (
        Model(lambda m, x, t: m.top(m.stems[t](x).relu()), stems=tasks(6, 24), top=block(24, 3)),
        "stems.b", "stems.a.0",
    ),
    "a width that other layers have, but a head beside": (
        Model(
            lambda m, x, t: m.heads[t](m.last((h := m.stem(x)) + m.out(m.body(h).relu())).relu()),
            stem=block(6, 24), body=block(24, 9), out=block(9, 24), last=block(24, 24),
            heads=tasks(24, 3),
        ), "heads.b", "last.0",
    ),
    "a norm": (
        Model(
            lambda m, x, t: m.top(m.norms[t](m.body(x)).relu()), body=block(6, 24),
            norms=nn.ModuleDict({t: nn.BatchNorm1d(24) for t in "ab"}), top=block(24, 3),
        ), "norms.b", "body.0",
    ),
}  # fmt: skip


def attend(model: Model, x: Tensor, _: str) -> Tensor:
    hidden = model.norm(model.attention(*[x.reshape(-1, 1, 6)] * 3)[0])
    return model.top(model.body(hidden.flatten(1)))


HARMLESS: dict[str, Model] = {
    "a pooler as wide as the stream that is not cut": Model(
        lambda m, x, t: m.head((h := m.stem(x)) + m.body(h)),
        stem=block(6, 24), body=block(24, 24, 24), head=block(24, 3),
        pool=nn.Sequential(nn.Dropout(), nn.Linear(24, 24)),
    ),
    "heads that are as wide inside as the stream": Model(
        lambda m, x, t: m.heads[t]((h := m.stem(x)) + m.out(m.body(h).relu())),
        stem=block(6, 24), body=block(24, 9), out=block(9, 24), heads=tasks(24, 24, 3),
    ),
    "a copy for momentum": Model(lambda m, x, t: m.q(x), q=block(6, 24, 3), k=block(6, 24, 3)),
    "another width": Model(lambda m, x, t: m.q(x), q=block(6, 24, 3), spare=block(12, 3)),
    "experts inside": Model(
        lambda m, x, t: m.top(m.stem(x) + m.experts[t](m.stem(x))),
        stem=block(6, 12), experts=tasks(12, 24, 12), top=block(12, 3),
    ),
    "weights that another module uses": Model(
        attend, attention=nn.MultiheadAttention(6, 2), norm=nn.LayerNorm(6), body=block(6, 6, 6),
        top=block(6, 3),
    ),
}  # fmt: skip
INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
DATA = INPUTS, torch.arange(40) % 3


def messages(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "does not run" in str(w.message)]


@pytest.mark.parametrize("kind", NEEDED)
def test_a_module_that_may_need_the_units_is_named(kind: str) -> None:
    model, module, units = NEEDED[kind]
    sentence = f"does not run {module!r}, which may need the units of {units!r}. "
    calls = {
        "example: it": lambda: greedyprune.layers(model, INPUTS),
        "data: the first batch": lambda: greedyprune.select(model, DATA),
    }
    for beginning, call in calls.items():
        [message] = messages(call)
        assert message.startswith(f"{beginning} {sentence}")
        assert message.endswith(f"or `layers` without {units!r}")


@pytest.mark.parametrize("kind", ["heads", "heads as attributes", "first layers"])
def test_the_warning_is_true_and_its_advice_helps(kind: str) -> None:
    """The module fails in the pruned model; without these layers it gives what it gave."""
    model, _, units = NEEDED[kind]
    model.eval()
    small = greedyprune.prune(model, greedyprune.select(model, DATA))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        small(INPUTS, "b")
    extended = Model(
        lambda m, x, t: m.whole(m.last(m.first(x).relu()), t), whole=model, first=nn.Linear(6, 9),
        last=nn.Linear(9, 6),
    )  # fmt: skip
    assert f"whole.{units}" in greedyprune.layers(extended, INPUTS)
    selection = greedyprune.select(extended, DATA, layers=["first"])
    assert not messages(lambda: greedyprune.select(extended, DATA, layers=["first"]))
    small = greedyprune.prune(extended, selection)
    for task in "ab":
        expected = masked(extended, selection)(INPUTS, task)
        assert torch.allclose(small(INPUTS, task), expected, atol=1e-6)


@pytest.mark.parametrize("kind", HARMLESS)
def test_modules_that_are_harmless_are_not_named(kind: str) -> None:
    model = HARMLESS[kind].eval()
    assert list(greedyprune.layers(model, INPUTS))
    assert not messages(lambda: greedyprune.layers(model, INPUTS))
    assert not messages(lambda: greedyprune.select(model, DATA))


def test_many_modules_are_one_short_warning() -> None:
    heads = nn.ModuleDict({str(i): nn.Linear(24, 3) for i in range(9)})
    model = Model(lambda m, x, t: m.heads["0"](m.body(x).relu()), body=block(6, 24), heads=heads)
    [message] = messages(lambda: greedyprune.layers(model, INPUTS))
    assert "'heads.1', 'heads.2', 'heads.3' and 5 more, which may" in message


def test_batches_that_run_other_layers_are_named() -> None:
    model = NEEDED["deep heads"][0].eval()
    batches = [{"x": INPUTS, "task": task, "labels": DATA[1]} for task in "ab"]
    selection = greedyprune.select(model, batches[:1], layers="body.0")
    sentence = re.escape("data: a batch does not run 'heads.a.0', as the first batch does")
    with pytest.raises(ValueError, match=sentence):
        greedyprune.refit(model, selection, batches)
    options: list[Any] = ["imitation", "fisher", greedyprune.Imitation(metric="fisher")]
    for objective in options:
        with pytest.raises(ValueError, match=sentence):
            greedyprune.select(model, batches, objective=objective)
