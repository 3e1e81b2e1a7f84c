"""Which operations carry units, which tensors are cut with them, and what is refused."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from two_linears import Between, Net

import greedyprune
from greedyprune.data.batches import Batch
from greedyprune.graph.groups import Group
from greedyprune.graph.slices import NotPrunableError, Slice
from greedyprune.graph.structure import analyse, find_groups


def group_of(model: nn.Module, name: str = "first", x: Tensor | None = None) -> Group:
    """The group of a layer, from a trace on inputs x."""
    x = torch.randn(4, 5) if x is None else x
    return find_groups(model, analyse(model.eval(), Batch((x,), {}, None)), [name])[0]


BASE = {
    "first.weight": Slice.regular(0, 8),
    "first.bias": Slice.regular(0, 8),
    "last.weight": Slice.regular(1, 8),
}
ORDER = torch.tensor([[1], [0], [3], [2]])


def overwritten(h: Tensor) -> Tensor:
    """The first two samples are negated, in place."""
    h = h.clone()
    h[:2] *= -1
    return h


NORM = ("weight", "bias", "running_mean", "running_var")
ACCEPTED = {
    "nothing": (lambda s, h, x: h, {}),
    "functional": (lambda s, h, x: functional.gelu(h) * torch.sigmoid(1.7 * h) / 2 + 1, {}),
    "in place": (lambda s, h, x: functional.relu_(h).mul_(2.0), {}),
    "hardswish": (lambda s, h, x: functional.hardswish(functional.logsigmoid(h)), {}),
    "dropout": (lambda s, h, x: functional.dropout(h, 0.5, s.training), {}),
    "branches that meet": (lambda s, h, x: torch.where(h > 0, h, 0.1 * h) + h.abs().clone(), {}),
    "a sample's own factor": (lambda s, h, x: h * x[:, :1], {}),
    "transposed": (lambda s, h, x: h.T.t().transpose(0, 1).T, {}),
    "by its second names": (
        lambda s, h, x: h.mT.adjoint().mH.moveaxis(0, 1).moveaxis((0,), (1,)).swapdims(0, 1),
        {},
    ),
    "as another tensor": (lambda s, h, x: h.flatten().reshape_as(h).type_as(x), {}),
    "other samples": (lambda s, h, x: h.index_select(0, torch.tensor([1, 0, 3, 2])), {}),
    "gathered": (lambda s, h, x: h.gather(0, ORDER.expand(-1, h.shape[1])), {}),
    "repeated factor": (lambda s, h, x: h * x[:, :1].repeat(1, h.shape[1]), {}),
    "written in part": (lambda s, h, x: overwritten(h), {}),
    "flipped": (lambda s, h, x: h.flip(1).flip(1), {}),
    "reshaped": (lambda s, h, x: h.unsqueeze(1).reshape(2, 2, -1).flatten(0, 1), {}),
    "parameter": (lambda s, h, x: h * s.scale + s.scale, {"scale": Slice.regular(0, 8)}),
    "prelu": (lambda s, h, x: s.prelu(h), {}),
    "prelu8": (lambda s, h, x: s.prelu8(h), {"prelu8.weight": Slice.regular(0, 8)}),
    "each entry again": (
        lambda s, h, x: h.repeat_interleave(2, 1)[:, ::2] + h.repeat_interleave(3, dim=0)[::3],
        {},
    ),
    "entries by places": (lambda s, h, x: h[torch.repeat_interleave(torch.ones(4).long())], {}),
    "second names": (
        lambda s, h, x: torch.multiply(
            torch.divide(torch.subtract(h, 1), 2).absolute(), torch.special.expit(h)
        ),
        {},
    ),
    "batch norm": (
        lambda s, h, x: s.norm(h),
        {f"norm.{name}": Slice.regular(0, 8) for name in NORM},
    ),
    "plain norm": (
        lambda s, h, x: s.plain_norm(h),
        {f"plain_norm.{n}": Slice.regular(0, 8) for n in NORM[2:]},
    ),
}


@pytest.mark.parametrize(("between", "slices"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepts_and_cuts(between: Between, slices: dict[str, Slice]) -> None:
    """The pruned model computes what the dense one does with the removed units masked."""
    model = Net(between).eval()
    group = group_of(model)
    assert (group.producer, group.consumer, group.units) == ("first", "last", 8)
    assert group.output
    assert group.slices == BASE | slices
    x = torch.randn(4, 5)
    selection = greedyprune.select(model, (x, model(x).detach()), size=5, weights="none")
    small = greedyprune.prune(model, selection)
    masked = torch.zeros(8).index_fill(0, selection.kept, 1.0)
    handle = model.last.register_forward_pre_hook(lambda _, args: (args[0] * masked,))
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)
    handle.remove()


REFUSED = {
    "softmax": (lambda s, h, x: h.softmax(-1), "aten.softmax.int"),
    "matmul": (lambda s, h, x: h @ torch.eye(8), "aten.matmul.default"),
    "foreign linear": (
        lambda s, h, x: functional.linear(h, torch.eye(8)),
        "its weight is no parameter",
    ),
    "sum": (lambda s, h, x: h - h.sum(1, keepdim=True), "aten.sum"),
}


@pytest.mark.parametrize(("between", "why"), REFUSED.values(), ids=REFUSED)
def test_refuses_and_says_why(between: Between, why: str) -> None:
    prefix = "^layers: found 'first', which can't be pruned"
    with pytest.raises(NotPrunableError, match=f"{prefix} .*({why})"):
        group_of(Net(between))
    x = torch.randn(4, 5)
    with pytest.raises(ValueError, match=f"model: no layer can be pruned: .*({why})"):
        greedyprune.select(Net(between), (x, torch.randn(4, 3)))


HELD = {
    "layer norm": (lambda s, h, x: functional.layer_norm(h, (8,)), "aten.layer_norm.default"),
    "concatenation": (lambda s, h, x: torch.cat([h, h], 1)[:, :8], "aten.slice.Tensor"),
    "slice": (lambda s, h, x: functional.pad(h[:, :6], (0, 2)), "aten.pad.default mixes"),
}


@pytest.mark.parametrize(("between", "why"), HELD.values(), ids=HELD)
def test_a_trial_cut_shows_that_the_code_holds_the_size(between: Between, why: str) -> None:
    with pytest.raises(ValueError, match=f"model: no layer can be pruned: .*({why})"):
        greedyprune.select(Net(between), (torch.randn(4, 5), torch.randn(4, 3)))


def test_units_that_are_also_the_output() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.first(x)
            return self.last(hidden), hidden

    with pytest.raises(NotPrunableError, match="its units are the model's output"):
        group_of(Both())


def test_reshaping_after_the_consumer_is_still_the_output() -> None:
    assert group_of(Net(after=lambda s, y: functional.dropout(y, 0.1, False))).output
    assert group_of(Net(after=lambda s, y: y.unsqueeze(-1).flatten(1))).output
    group = group_of(Net(after=lambda s, y: y.log_softmax(-1)))
    assert not group.output
    assert "log_softmax" in group.not_output


def test_a_changed_model_is_traced_again() -> None:
    """What is known of a model is kept as long as the model does not change, and no longer."""

    class Switch(Net):
        soft = False

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.last(hidden.softmax(-1) if self.soft else hidden)

    model = Switch()
    assert group_of(model) is group_of(model)
    model.soft = True
    with pytest.raises(NotPrunableError, match="softmax"):
        group_of(model)
    model.soft = False
    model.last = nn.Linear(8, 2)
    assert group_of(model).slices == BASE
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_tied_weights_are_not_cut() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.other = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(3, 8)
            self.other.weight = nn.Parameter(torch.randn(8, 3))
            self.scale = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.last(self.first(x) * self.scale)
            return self.last(self.other(y) * self.scale)

    assert group_of(Tied()).producers == ("first", "other")  # one scale, for the units of both
    model = Net()
    model.side.weight = model.first.weight
    with pytest.raises(ValueError, match=r"weight' is shared with another layer"):
        greedyprune.select(model, (torch.randn(4, 5), torch.randn(4, 3)))


def test_reasons_name_what_a_user_sees() -> None:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.first)
    data = torch.randn(10, 5), torch.randn(10, 3)
    with pytest.raises(ValueError, match=r"layers: found 'first'.*its weight is computed"):
        greedyprune.select(model, data, layers="first")
