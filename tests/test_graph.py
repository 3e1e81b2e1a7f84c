"""Which units can be removed, which tensors are then cut, and what a refusal says."""

import copy
import doctest
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune import Loss
from greedyprune.data.batches import Batch
from greedyprune.graph import layers as layers_module
from greedyprune.graph.groups import Group, analyse, find_groups
from greedyprune.graph.propagate import NotPrunableError, Slice

Between = Callable[["Net", Tensor, Tensor], Tensor]  # of the hidden units and the inputs
After = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two Linears, with `between` applied to the hidden units and `after` to the output."""

    def __init__(self, between: Between | None = None, after: After | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(8))
        self.norm = nn.BatchNorm1d(8)
        self.plain_norm = nn.BatchNorm1d(8, affine=False)
        self.prelu, self.prelu8 = nn.PReLU(), nn.PReLU(8)
        self.side = nn.Linear(5, 8)
        self.between, self.after = between or (lambda s, h, x: h), after or (lambda s, y: y)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self, self.last(self.between(self, self.first(x), x)))


def group_of(model: nn.Module, name: str = "first", x: Tensor | None = None) -> Group:
    """The group of a layer, from a trace on inputs x."""
    x = torch.randn(4, 5) if x is None else x
    return find_groups(model, analyse(model.eval(), Batch((x,), {}, None)), [name])[0]


BASE = {"first.weight": Slice(0), "first.bias": Slice(0), "last.weight": Slice(1)}
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
    "reshaped": (lambda s, h, x: h.unsqueeze(1).reshape(2, 2, -1).flatten(0, 1), {}),
    "parameter": (lambda s, h, x: h * s.scale + s.scale, {"scale": Slice(0)}),
    "prelu": (lambda s, h, x: s.prelu(h), {}),
    "prelu8": (lambda s, h, x: s.prelu8(h), {"prelu8.weight": Slice(0)}),
    "batch norm": (lambda s, h, x: s.norm(h), {f"norm.{name}": Slice(0) for name in NORM}),
    "plain norm": (
        lambda s, h, x: s.plain_norm(h),
        {f"plain_norm.{n}": Slice(0) for n in NORM[2:]},
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
    "layer norm": (lambda s, h, x: functional.layer_norm(h, (8,)), "aten.layer_norm.default"),
    "sum": (lambda s, h, x: h + s.side(x), "aten.add.Tensor combines"),
    "concatenation": (lambda s, h, x: torch.cat([h, h], 1)[:, :8], "aten.cat.default"),
    "matmul": (lambda s, h, x: h @ torch.eye(8), "aten.matmul.default"),
    "foreign linear": (lambda s, h, x: functional.linear(h, torch.eye(8)), "no module's own"),
    "mean": (lambda s, h, x: h - h.mean(1, keepdim=True), "aten.mean"),
}


@pytest.mark.parametrize(("between", "why"), REFUSED.values(), ids=REFUSED)
def test_refuses_and_says_why(between: Between, why: str) -> None:
    prefix = "^layers: found 'first', which can't be pruned"
    with pytest.raises(NotPrunableError, match=f"{prefix} .*({why})"):
        group_of(Net(between))
    x = torch.randn(4, 5)
    with pytest.raises(ValueError, match=f"model: no layer can be pruned: .*({why})"):
        greedyprune.select(Net(between), (x, torch.randn(4, 3)))


def test_units_that_are_also_the_output() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.first(x)
            return self.last(hidden), hidden

    with pytest.raises(NotPrunableError, match="its units are the model's output"):
        group_of(Both())


def test_a_layer_used_twice() -> None:
    def twice(s: Net, h: Tensor, x: Tensor) -> Tensor:
        return h.relu() + s.first(2 * x)

    with pytest.raises(NotPrunableError, match="its weights are used 2 times"):
        group_of(Net(twice))


def test_a_consumer_used_twice() -> None:
    """The refusal names the consumer that is used twice, not one that is used once."""

    class Fork(Net):
        def __init__(self) -> None:
            super().__init__()
            self.another = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.last(hidden) + self.another(hidden) + self.last(hidden.relu())

    with pytest.raises(NotPrunableError, match="its units feed 'last' more than once"):
        group_of(Fork())


def test_reshaping_after_the_consumer_is_still_the_output() -> None:
    assert group_of(Net(after=lambda s, y: functional.dropout(y, 0.1, False))).output
    assert group_of(Net(after=lambda s, y: y.unsqueeze(-1).flatten(1))).output
    group = group_of(Net(after=lambda s, y: y.log_softmax(-1)))
    assert not group.output
    assert "log_softmax" in group.not_output


def test_inner_layers_imitate() -> None:
    """A layer inside the model is judged by its consumer's output, the last one by the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3)
    )
    x, y = torch.randn(200, 5), torch.randint(3, (200,))
    selection = greedyprune.select(model, (x, y), size={"0": 10, "2": 0.5})
    judged = {name: (layer.objective, layer.weighting) for name, layer in selection.layers.items()}
    assert judged == {
        "0": ("imitation", "refit"),
        "2": ("loss", "counts"),
    }
    small = greedyprune.prune(model, selection)
    assert [m.out_features for m in small if isinstance(m, nn.Linear)] == [10, 6, 3]
    only = greedyprune.select(model, (x, y), layers="0", size=10)
    part = greedyprune.prune(model, only)
    error = functional.mse_loss(part[:3](x), model[:3](x))  # of the consumer's output
    torch.testing.assert_close(error.double(), only.losses[-1], rtol=1e-5, atol=0)
    with pytest.raises(AttributeError, match=r"expected selection\.layers\[name\]\.kept"):
        _ = selection.kept


class Untraceable(Net):
    """Its control flow depends on the data, so that torch.export refuses it."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if float(hidden.sum()) > -1e9:
            hidden = self.between(self, hidden, x)
        return self.last(hidden)


@pytest.mark.parametrize("between", ["plain", "batch norm", "prelu8"])
def test_untraceable_models_by_name(between: str) -> None:
    operations: dict[str, Between] = {
        "plain": lambda s, h, x: h.relu(),
        "batch norm": lambda s, h, x: s.norm(h).relu(),
        "prelu8": lambda s, h, x: s.prelu8(h),
    }
    model = Untraceable(operations[between]).eval()
    x, y = torch.randn(50, 5), torch.randint(3, (50,))
    with pytest.raises(ValueError, match=r"model: torch.export can't trace it .*layers={producer"):
        greedyprune.select(model, (x, y))
    selection = greedyprune.select(model, (x, y), layers={"first": "last"}, size=3)
    small = greedyprune.prune(model, selection)
    loss = functional.cross_entropy(small(x), y)
    torch.testing.assert_close(loss.double(), selection.losses[-1], rtol=1e-5, atol=0)


def test_named_layers_with_a_module_between() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3))
    data = torch.randn(50, 5), torch.randint(3, (50,))
    with pytest.raises(ValueError, match="layer '0': '1' \\(LayerNorm\\) stands between"):
        greedyprune.select(model, data, layers={"0": "2"})
    del model[1]
    with pytest.raises(ValueError, match="layer '0': '1' \\(Linear\\) stands between"):
        greedyprune.select(model, data, layers={"0": "2"})


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
            return y + (self.other(y) * self.scale).sum(-1, keepdim=True)

    with pytest.raises(NotPrunableError, match="'scale' is shared with another layer"):
        group_of(Tied())
    model = Net()
    model.side.weight = model.first.weight
    with pytest.raises(ValueError, match=r"weight' is shared with another layer"):
        greedyprune.select(model, (torch.randn(4, 5), torch.randn(4, 3)))


MIXED = {
    "softmax": lambda s, h, x: h.softmax(-1),
    "flip": lambda s, h, x: h.relu().flip(-1),
    "mean": lambda s, h, x: h + h.mean(-1, keepdim=True),
    "layer norm": lambda s, h, x: functional.layer_norm(h, (8,)),
}


@pytest.mark.parametrize("between", MIXED.values(), ids=MIXED)
def test_layers_named_by_hand_are_cut_on_trial(between: Between) -> None:
    """Operations between them that mix the units are found by cutting and masking them."""
    model = Net(between)
    data = torch.randn(50, 5), torch.randn(50, 3)
    with pytest.raises(NotPrunableError, match="cutting units is not what masking them is"):
        greedyprune.select(model, data, layers={"first": "last"})
    assert not model.last._forward_pre_hooks


def test_reasons_name_what_a_user_sees() -> None:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.first)
    data = torch.randn(10, 5), torch.randn(10, 3)
    with pytest.raises(ValueError, match=r"layers: found 'first' .*its weight is computed"):
        greedyprune.select(model, data, layers="first")
    with pytest.raises(TypeError, match="model: found a compiled Net"):
        greedyprune.select(torch.compile(Net()), data)


def test_a_loss_that_is_not_used_gives_a_warning() -> None:
    model = Net(after=lambda s, y: y.log_softmax(-1))
    data = torch.randn(40, 5), torch.randint(3, (40,))
    message = r"loss: not used, because aten.log_softmax.int follows"
    with pytest.warns(UserWarning, match=message) as warned:
        greedyprune.select(model, data, loss="cross_entropy")
    assert warned[0].filename == __file__


def test_a_tolerance_that_is_not_reached_gives_a_warning() -> None:
    torch.manual_seed(0)
    model, x = Net(lambda s, h, x: h.relu()), torch.randn(40, 5)
    message = r"tolerance: layer 'first' ends at .* after 1 steps"
    with pytest.warns(UserWarning, match=message) as warned:
        greedyprune.select(model, (x, model(x).detach()), size=1, tolerance=0.1)
    assert warned[0].filename == __file__


def test_a_selection_for_other_outputs() -> None:
    data = torch.randn(40, 5), torch.randn(40, 3)
    selection = greedyprune.select(Net(), data, size=2)
    other = Net()
    other.last = nn.Linear(8, 2)
    with pytest.raises(ValueError, match="made for 3 outputs of 'last', but the model's has 2"):
        greedyprune.prune(other, selection)


def test_an_auxiliary_head_is_not_the_output() -> None:
    class Heads(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.side(x).relu()
            return {"logits": self.last(self.first(x).relu()), "aux": self.other(hidden)}

    model = Heads()
    model.other = nn.Linear(8, 3)
    data = torch.randn(40, 5), torch.randint(3, (40,))
    selection = greedyprune.select(model, data, size=3)
    assert selection.layers["first"].objective == "loss"
    assert selection.layers["side"].objective == "imitation"


@pytest.mark.parametrize("after", [functional.logsigmoid, functional.hardswish])
def test_an_operation_behind_the_consumer_makes_it_not_the_output(
    after: Callable[[Tensor], Tensor],
) -> None:
    model = Net(after=lambda s, y: after(y))
    data = torch.randn(40, 5), torch.randn(40, 3)
    selection = greedyprune.select(model, data, size=3)
    assert selection.layers["first"].objective == "imitation"


@pytest.mark.parametrize("layers", [["2", "0"], ["0", "2"]])
def test_refitted_layers_in_any_order(layers: list[str]) -> None:
    """Layers may be named in any order: the masked network has the weights of all of them."""
    sizes = (5, 20), (20, 12), (12, 3)
    first, second, last = (nn.Linear(*size) for size in sizes)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
    data = torch.randn(100, 5), torch.randn(100, 3)
    selection = greedyprune.select(model, data, layers=layers, weights="refit")
    small = greedyprune.prune(model, selection)
    masked = copy.deepcopy(model)
    for layer in selection.layers.values():
        (consumer,) = layer.outputs
        weight = masked.get_submodule(consumer).weight
        with torch.no_grad():
            weight.copy_(torch.zeros_like(weight).index_copy(1, layer.kept, layer.weights.float()))
    torch.testing.assert_close(small(data[0]), masked(data[0]), rtol=1e-5, atol=1e-6)


def test_buffers_and_hooks_are_left_as_before() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                self.calls += 1
            return self.last(self.first(x).relu())

    model = Counting()
    data = torch.randn(40, 5), torch.randn(40, 3)
    greedyprune.select(model, data, size=3)
    assert model.calls == 0
    with pytest.raises(ValueError, match="memory_limit") as caught:
        greedyprune.select(model, data, size=3, loss=lambda o, t: o.sum(), memory_limit=10)
    assert caught.tb is not None  # its frames are alive: no hook may depend on their end
    assert not model.last._forward_pre_hooks


def test_autocast_outside_does_not_reach_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3000), nn.Tanh(), nn.Linear(3000, 1))
    data = torch.randn(200, 5), torch.randn(200, 1)
    expected = greedyprune.select(model, data, steps=60)
    with torch.autocast("cpu", torch.bfloat16):
        selection = greedyprune.select(model, data, steps=60)
    assert selection.order.equal(expected.order)


def test_sixteen_bit_default_dtype() -> None:
    model, data = Net(lambda s, h, x: h.relu()), (torch.randn(40, 5), torch.randint(3, (40,)))
    expected = greedyprune.select(model, data, steps=5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        selection = greedyprune.select(model, data, steps=5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert selection.order.equal(expected.order)


@pytest.mark.parametrize("scale", [1e19, 1e-22])
def test_extreme_scales(scale: float) -> None:
    """Products in float32 would overflow or underflow; the picks are those of float64."""
    torch.manual_seed(0)
    x, y = torch.randn(100, 5), torch.randn(100, 1)
    model = nn.Sequential(nn.Linear(5, 1000), nn.ReLU(), nn.Linear(1000, 1))
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter *= scale
        model[2].weight /= scale
    for options in ({"steps": 30}, {"steps": 30, "objective": Loss(batch_size=50)}):
        selection = greedyprune.select(model, (x, y), backend="cpu", **options)
        expected = greedyprune.select(model, (x, y), backend="reference", **options)
        assert selection.order.equal(expected.order)


def test_docstring_example() -> None:
    failed, tried = doctest.testmod(layers_module)
    assert tried > 4
    assert not failed
