"""A copy of a model that is cut, run and restored."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS, network
from torch import Tensor, nn

import greedyprune
from greedyprune.surgery.spare import Spare


class Keeping(nn.Module):
    """A forward that keeps things in attributes, collections and a buffer, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.last = nn.Linear(6, 9, bias=False)
        self.last.weight = self.table.weight
        self.register_buffer("calls", torch.zeros(()))
        self.kept: dict[int, Tensor] = {}
        self.sizes = [6, 9]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = len(x)
        self.kept[len(x)] = x
        self.sizes.append(len(x))
        return self.last(self.table(x))


def same(one: nn.Module, other: nn.Module) -> bool:
    """Modules of the same classes, with the same attributes and the same numbers in tensors."""
    pairs = list(zip(one.modules(), other.modules(), strict=True))
    tensors = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(type(a) is type(b) and vars(a).keys() == vars(b).keys() for a, b in pairs) and all(
        name == other and x.equal(y) for (name, x), (other, y) in tensors
    )


@pytest.mark.parametrize("name", ["tied", *NETWORKS])
def test_what_is_written_to_the_copy_is_gone_when_it_is_restored(name: str) -> None:
    torch.manual_seed(0)
    model = Keeping() if name == "tied" else network(name)[0]
    names = {name for name, _ in model.named_parameters()}  # a tied one under one of its names
    spare = Spare(model)
    for _ in range(2):
        copy = spare.restored(names)
        assert same(copy, model)
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter.fill_(3)
                parameter.data = parameter.data[:1]
        for module in copy.modules():
            module.new, module.training = 5, True
    assert same(spare.restored(()), model)


def test_what_a_forward_keeps_is_gone_when_the_copy_is_restored() -> None:
    model = Keeping()
    spare = Spare(model)
    for _ in range(2):
        copy = spare.restored(())
        assert same(copy, model)
        assert copy.kept == {} and copy.sizes == [6, 9]
        copy(torch.tensor([1, 2]))
        assert copy.calls == 1 and copy.sizes == [6, 9, 2] and copy.seen == 2
    assert model.calls == 0 and model.kept == {}


class Frozen(dict):
    """A dict that allows no changes but what copy.deepcopy needs."""

    def _refuse(self, *_: object) -> None:
        raise TypeError("it is frozen")

    clear = update = _refuse


class State:
    """An object that is no module."""

    last: Tensor | None = None


class Holding(nn.Module):
    """Holds a frozen dict, and keeps an activation in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.state = Frozen(width=7), State()
        self.first, self.last = nn.Linear(4, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.state.last = self.first(x).relu()
        return self.last(self.state.last.view(len(x), self.first.out_features))


@pytest.mark.parametrize("samples", [2, 5])
def test_frozen_dicts_and_activations_in_objects_do_no_harm(samples: int) -> None:
    model = Holding()
    assert list(greedyprune.layers(model, torch.randn(samples, 4))) == ["first"]
    assert model.config == {"width": 7}
