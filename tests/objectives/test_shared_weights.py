"""Layers that run several times in a forward pass: one group, whose sums run over all uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Shared, network
from oracle import Dense, close
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune import Fisher, Imitation, Loss
from greedyprune.surgery.cut import masked


class Siamese(nn.Module):
    """One encoder for both halves of the input; `again` is the same module under another name."""

    def __init__(self, *, aliased: bool = False) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(5, 12), nn.Linear(12, 6)
        self.head, self.last = nn.Linear(6, 9), nn.Linear(9, 3)
        self.norm = nn.BatchNorm1d(12)
        if aliased:
            self.again = self.narrow

    def encode(self, x: Tensor) -> Tensor:
        return self.narrow(functional.relu(self.norm(self.wide(x))))

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.encode(x[:, :5]), self.encode(x[:, 5:])
        return self.last(functional.relu(self.head((one - other).abs())))


def siamese(**options: Any) -> tuple[Siamese, Tensor]:
    torch.manual_seed(0)
    model = Siamese(**options).eval()
    nn.init.normal_(model.norm.running_mean)
    return model, torch.randn(40, 10)


def close_outputs(model: nn.Module, selection: greedyprune.Selection, x: Tensor) -> bool:
    """Does the pruned model compute what the masked one does?"""
    with torch.no_grad():
        small = greedyprune.prune(model, selection)
        return close(small(x), masked(model, selection)(x).double())


@pytest.mark.parametrize("aliased", [False, True])
@pytest.mark.parametrize("weights", ["refit", "counts", "uniform", "none"])
def test_imitation_is_that_of_both_uses_features(weights: Any, aliased: bool) -> None:
    """The same as that of the encoder alone, on the inputs of both uses as samples."""
    model, x = siamese(aliased=aliased)
    encoder = nn.Sequential(model.wide, model.norm, nn.ReLU(), model.narrow)
    options: dict[str, Any] = {"objective": "imitation", "weights": weights, "size": 7}
    selection = greedyprune.select(model, x, layers="wide", **options)
    expected = greedyprune.select(encoder, torch.cat([x[:, :5], x[:, 5:]]), **options).layers["0"]
    layer = selection.layers["wide"]
    assert layer.order.equal(expected.order)
    assert close(layer.weights, expected.weights)
    assert close(layer.losses, expected.losses)
    assert close_outputs(model, selection, x)


@pytest.mark.parametrize("draw", ["random", "gradient"])
@pytest.mark.parametrize("sequential", [True, False])
def test_the_networks_loss_changes_with_every_use(draw: Any, sequential: bool) -> None:
    """Each pick is the one that equation (1) says, for the model with changed weights."""
    model, x = siamese()
    y = model(x).detach() + torch.randn(40, 3)
    candidates = 12 if draw == "gradient" else None
    objective = Loss(sequential=sequential, draw=draw, candidates=candidates)
    selection = greedyprune.select(model, (x, y), layers="wide", objective=objective, steps=6)
    dense = Dense(model, x, y, "mse", "narrow")
    assert dense.follow(selection.order) == 6
    with torch.no_grad():
        value = functional.mse_loss(greedyprune.prune(model, selection)(x), y)
    assert float(selection.losses[-1]) == pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize("objective", [Imitation(), Imitation(sequential=False), Loss(), Fisher()])
def test_a_whole_model_with_a_shared_encoder(objective: Any) -> None:
    model, x = siamese()
    selection = greedyprune.select(model, (x, model(x).detach()), objective=objective)
    assert {name: len(layer.kept) for name, layer in selection.layers.items()} == {
        "wide": 6, "narrow": 3, "head": 4,
    }  # fmt: skip
    assert close_outputs(model, selection, x)
    small = greedyprune.refit(model, selection, x)
    assert small.wide.weight.shape == (6, 5) and small.narrow.weight.shape == (3, 6)
    assert small(x).isfinite().all()


def test_layers_after_a_shared_one_see_it_pruned() -> None:
    """A later layer imitates in the network in which every use of the shared layer is pruned."""
    torch.manual_seed(0)
    shared, x = Shared().eval(), torch.randn(50, 6)
    model = nn.Sequential(shared, nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    options: dict[str, Any] = {"objective": "imitation", "size": 0.5}
    both = greedyprune.select(model, x, layers=["0.wide", "1"], **options)
    alone = greedyprune.select(model, x, layers=["0.wide"], **options)
    assert both.layers["0.wide"].order.equal(alone.layers["0.wide"].order)
    with torch.no_grad():
        pruned = masked(model, alone)
        inputs = [net[1](net[0](x)).relu() for net in (pruned, model)]
        target = model[3](inputs[1])
        layer = both.layers["1"]
        mine = inputs[0][:, layer.kept].double() @ layer.weights.T + model[3].bias
        error = float((mine - target).square().mean())
    assert float(layer.losses[-1]) == pytest.approx(error, rel=1e-4)


def test_albert_shares_its_block() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=50, embedding_size=16, hidden_size=24, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=20, num_labels=3,
    )  # fmt: skip
    model = transformers.AlbertForSequenceClassification(config).eval()
    data = [{"input_ids": torch.randint(50, (8, 12)), "labels": torch.randint(3, (8,))}]
    selection = greedyprune.select(model, data)
    block = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    kept = {name: len(layer.kept) for name, layer in selection.layers.items()}
    assert kept == {f"{block}.attention.query": 2, f"{block}.ffn": 10, "albert.pooler": 12}
    assert "a norm goes over its units" in selection.refused["albert.embeddings.word_embeddings"]
    small = greedyprune.prune(model, selection)
    ids = data[0]["input_ids"]
    with torch.no_grad():
        assert close(small(ids).logits, masked(model, selection)(ids).logits.double())
    assert small.get_submodule(f"{block}.ffn_output").weight.shape == (24, 10)


class Model(nn.Module):
    """Linears by name, with any forward."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def tied() -> dict[str, nn.Module]:
    layers = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 5), "c": nn.Linear(5, 8)}
    layers["c"].weight = layers["a"].weight
    return layers


REFUSED = {
    "two modules": (
        Model(lambda m, x: m.b(m.a(x)) + m.b(m.c(x)), **tied()), "a", "shares its weight",
    ),
    "a use that is the output": (
        Model(lambda m, x: torch.cat([m.b(m.a(x)), m.a(x)], 1), a=nn.Linear(5, 8),
              b=nn.Linear(8, 3)), "a", "its units are the model's output",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "layer", "why"), REFUSED.values(), ids=REFUSED)
def test_uses_that_do_not_agree(model: nn.Module, layer: str, why: str) -> None:
    refused = greedyprune.layers(model, torch.randn(4, 5)).refused
    assert why in refused[layer]


def test_a_layer_used_twice_before_one_consumer() -> None:
    """The consumer takes the sum of both uses, once."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3)}
    model = Model(lambda m, x: m.b(m.a(x).relu() + m.a(2 * x).tanh()), **layers)
    x = torch.randn(60, 5)
    y = model(x).detach()
    selection = greedyprune.select(model, (x, y), layers="a", objective="loss", steps=5)
    assert Dense(model, x, y, "mse", "b").follow(selection.order) == 5
    assert close_outputs(model, selection, x)


def test_a_layer_that_takes_its_own_units() -> None:
    """Its weight is cut along both dimensions."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 3)}
    model, x = Model(lambda m, x: m.c(m.b(m.b(m.a(x)).relu())), **layers), torch.randn(60, 5)
    row = greedyprune.layers(model, x)["a"]
    assert (row.producers, row.consumers) == (("a", "b"), ("b", "c"))
    assert row.parameters == sum(p.numel() for p in model.parameters()) - 3
    selection = greedyprune.select(model, x, size=3)
    assert greedyprune.prune(model, selection).b.weight.shape == (3, 3)
    assert close_outputs(model, selection, x)
    change = selection.change("params")
    assert change is not None
    assert change[1] == sum(p.numel() for p in greedyprune.prune(model, selection).parameters())


def test_a_consumer_used_for_the_units_of_two_layers() -> None:
    """Its weights are for the units of both, which are therefore removed together."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(5, 8), "d": nn.Linear(5, 8), "b": nn.Linear(8, 4)}
    model = Model(lambda m, x: m.c(m.b(m.a(x)) + m.b(m.d(x))), **layers, c=nn.Linear(4, 3))
    x = torch.randn(60, 5)
    assert greedyprune.layers(model, x)["a"].producers == ("a", "d")
    selection = greedyprune.select(model, x, objective="imitation", layers="a")
    assert close_outputs(model, selection, x)
    with torch.no_grad():
        both = torch.cat([model.a(x), model.d(x)])
        target = model.b(both)
        kept = selection.kept
        small = greedyprune.prune(model, selection)
        error = (small.b(both[:, kept]) - target).square().mean()
    assert selection.losses[-1] == pytest.approx(float(error), rel=1e-5)


def test_a_consumer_used_twice_for_the_same_units() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        hidden = m.a(x)
        return m.b(hidden) + m.b(hidden.relu())

    torch.manual_seed(0)
    model, x = Model(run, a=nn.Linear(5, 8), b=nn.Linear(8, 3)), torch.randn(60, 5)
    y = model(x).detach() + torch.randn(60, 3)
    selection = greedyprune.select(model, (x, y), objective="loss", steps=5)
    assert Dense(model, x, y, "mse", "b").follow(selection.order) == 5
    assert close_outputs(model, selection, x)


def test_the_uses_are_counted_in_the_table() -> None:
    model, inputs = network("shared")
    row = greedyprune.layers(model, inputs)["wide"]
    assert row.flops == 3 * 2 * len(inputs) * 2 * 8 * 10
    assert row.parameters == 2 * 8 * 10 + 10
