"""Several consumers: parts of one least squares problem, and the shares of a stream's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from greedyprune.data.positions import Draws
from greedyprune.graph.groups import Group
from greedyprune.graph.slices import Slice
from greedyprune.kernels import exchange
from greedyprune.kernels.backend import extension
from greedyprune.kernels.path import Path, Rule
from greedyprune.objectives.layer_products import LayerProducts
from greedyprune.objectives.memory import WIDEST
from greedyprune.runtime.distributed import ALONE

UNITS, SAMPLES = 9, 80
OUTPUTS = {"first": 4, "second": 1, "third": 6}
DAMPING = 1e-4


class Consumers(nn.Module):
    """Three layers that take the same units; the third has larger weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(5, UNITS)
        for name, outputs in OUTPUTS.items():
            self.add_module(name, nn.Linear(UNITS, outputs).double())
        with torch.no_grad():
            self.get_submodule("third").weight *= 7


def products_of(*, stream: bool, halves: bool = False, zero: str = "") -> LayerProducts:
    """zero: the consumer whose weights are zero"""
    torch.manual_seed(0)
    model = Consumers()
    if zero:
        nn.init.zeros_(model.get_submodule(zero).weight)
    at = Slice.regular(1, UNITS)
    slices = {f"{name}.weight": at for name in OUTPUTS}
    group = Group(("inside",), tuple(OUTPUTS), UNITS, slices, output=False, stream=stream)
    products = LayerProducts.of_consumers(model, group, {}, halves=halves)
    for consumer in products.consumers:
        inputs = torch.randn(SAMPLES, UNITS).double().relu()
        second = torch.arange(SAMPLES) >= SAMPLES // 2
        consumer.add(inputs, Draws(second, torch.zeros(SAMPLES).double()))
        consumer.finish(ALONE)
    return products


def shares(products: LayerProducts, weights: dict[str, Tensor]) -> Tensor:
    """Each consumer's squared error with other weights (C, N), as a share of that without units."""
    found = []
    for consumer in products.consumers:
        change = weights[consumer.name] - consumer.weight
        error = ((change @ consumer.gram) * change).sum()
        found.append(error / ((consumer.weight @ consumer.gram) * consumer.weight).sum())
    return torch.stack(found)


def refitted(products: LayerProducts, swaps: int = 0) -> tuple[Path, dict[str, Tensor], Tensor]:
    """The path of 4 units, the consumers' weights (C, N) on them, and the units in their order."""
    path, fits = products.refit_path(Rule(4, 4, False), "cpu", None, swaps=swaps, damping=DAMPING)
    weights = {}
    for name, fit in fits.items():
        assert fit.units.equal(path.order)
        weights[name] = torch.zeros(OUTPUTS[name], UNITS).double()
        weights[name][:, fit.units] = fit.outgoing(4)[:, :, 0]
    return path, weights, path.order


def test_a_streams_loss_is_the_mean_of_shares() -> None:
    products = products_of(stream=True)
    path, weights, _ = refitted(products)
    torch.testing.assert_close(path.losses[-1], shares(products, weights).mean())
    dense, empty = products.end_losses()
    assert dense == 0
    assert empty == pytest.approx(1)
    gram, moments = products.moments()
    scaled = {c.name: c.weight.clone() for c in products.consumers}
    for weight in scaled.values():
        weight[:, 1:] = 0
        weight *= UNITS  # the theory's weights of unit 0 alone
    loss = moments.target_norm - 2 * moments.beta[0] + gram[0, 0]
    torch.testing.assert_close(loss / moments.mass, shares(products, scaled).mean())
    assert moments.empty_loss == pytest.approx(1)


@pytest.mark.parametrize("swaps", [0, 9])
def test_a_streams_consumers_count_alike(swaps: int) -> None:
    """However large their outputs are; and each gets its own least squares."""
    products, larger = products_of(stream=True), products_of(stream=True)
    larger.consumers[0].weight *= 1000
    path, weights, order = refitted(products, swaps)
    other_path, other_weights, other_order = refitted(larger, swaps)
    assert other_order.equal(order)
    torch.testing.assert_close(other_path.losses, path.losses)
    torch.testing.assert_close(other_weights["first"], 1000 * weights["first"])
    alone = products.refit_on(order, DAMPING)
    for name, fit in alone.items():
        torch.testing.assert_close(weights[name][:, order], fit.outgoing(4)[:, :, 0])


@pytest.mark.parametrize("swaps", [0, 9])
def test_a_consumer_without_a_target_does_not_count(swaps: int) -> None:
    products = products_of(stream=True, zero="second")
    assert products.factors[1] == 0
    path, weights, _ = refitted(products, swaps)
    assert not weights["second"].any()
    factors = [products.factors[0], products.factors[2]]
    products.consumers.pop(1)
    products.factors = factors
    again = products.refit_path(Rule(4, 4, False), "cpu", None, swaps=swaps, damping=DAMPING)[0]
    assert again.order.equal(path.order)
    mean = shares(products, weights).sum() / 3
    torch.testing.assert_close(path.losses[-1], mean)


def test_a_streams_damping_does_not_depend_on_scale() -> None:
    dampings = []
    for scale in (1, 1000):
        products = products_of(stream=True, halves=True)
        products.consumers[1].weight *= scale
        dampings.append(products.damping(4, DAMPING))
        assert all(len(consumer.sums) == 2 for consumer in products.consumers)
    assert dampings[0] == dampings[1]


@pytest.mark.parametrize("stream", [False, True])
def test_exchanges_take_each_consumer_as_a_part(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many features a unit has in all of them; the losses are those of the weights."""
    monkeypatch.setattr("greedyprune.objectives.layer_products.WIDEST", 1)
    made, best_exchanged = [], exchange.best_exchanged

    def watched(parts: list[exchange.Part], *arguments: Any) -> Tensor:
        made.append([tuple(part.right.shape) for part in parts])
        return best_exchanged(parts, *arguments)

    monkeypatch.setattr(exchange, "best_exchanged", watched)
    before, *_ = refitted(products_of(stream=stream))
    assert not made
    products = products_of(stream=stream)
    path, weights, _ = refitted(products, 9)
    assert made == [[(UNITS, outputs) for outputs in OUTPUTS.values()]]
    assert path.losses[-1] <= before.losses[-1]
    errors = shares(products, weights)
    expected = errors.mean()
    if not stream:
        norms = torch.tensor([c.target_norm() for c in products.consumers]).double()
        expected = (errors * norms).sum() / products.mass
    torch.testing.assert_close(path.losses[-1], expected)


def test_wide_units_have_no_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension().most_swap_width == WIDEST
    monkeypatch.setattr("greedyprune.objectives.layer_products.WIDEST", 0)
    monkeypatch.setattr(exchange, "best_exchanged", None)
    path, *_ = refitted(products_of(stream=True), 9)
    assert path.order.equal(refitted(products_of(stream=True))[0].order)


def test_other_groups_count_errors_as_they_are() -> None:
    """One part for each consumer, with its own sums."""
    products = products_of(stream=False)
    assert products.factors == [1.0, 1.0, 1.0]
    path, weights, _ = refitted(products)
    norms = torch.tensor([c.target_norm() for c in products.consumers]).double()
    expected = (shares(products, weights) * norms).sum() / products.mass
    torch.testing.assert_close(path.losses[-1], expected)
