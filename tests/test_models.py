"""`select` on models of many kinds: named by hand, with other outputs, dtypes and scales."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from two_linears import Between, Net

import greedyprune
from greedyprune import Loss
from greedyprune.graph.slices import NotPrunableError


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


MIXED = {
    "softmax": lambda s, h, x: h.softmax(-1),
    "flip": lambda s, h, x: h.relu().flip(-1),
    "sum": lambda s, h, x: h + h.sum(-1, keepdim=True),
    "layer norm": lambda s, h, x: functional.layer_norm(h, (8,)),
}


@pytest.mark.parametrize("between", MIXED.values(), ids=MIXED)
def test_layers_named_by_hand_are_cut_on_trial(between: Between) -> None:
    """Operations between them that mix the units are found by cutting and masking them."""
    model = Net(between)
    data = torch.randn(50, 5), torch.randn(50, 3)
    failure = "cutting units gives other outputs|with fewer units the model fails: Given normalized"
    with pytest.raises(NotPrunableError, match=failure):
        greedyprune.select(model, data, layers={"first": "last"})
    assert not model.last._forward_pre_hooks


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
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).double()
    data = torch.randn(100, 5).double(), torch.randn(100, 3).double()
    selection = greedyprune.select(model, data, layers=layers, weights="refit")
    small = greedyprune.prune(model, selection)
    masked = copy.deepcopy(model)
    for layer in selection.layers.values():
        (consumer,) = layer.outputs
        weight = masked.get_submodule(consumer).weight
        with torch.no_grad():
            weight.copy_(torch.zeros_like(weight).index_copy(1, layer.kept, layer.weights))
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
