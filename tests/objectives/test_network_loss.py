"""`objective="loss"` inside a network: candidates by the loss of the whole network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from jobs import job_of
from networks import NETWORKS, Inputs, loss_of, network, outputs_of
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune import Loss
from greedyprune.data.batches import Batch
from greedyprune.graph.structure import analyse, find_groups
from greedyprune.objectives.minibatches import mini_batches
from greedyprune.objectives.network import Network
from greedyprune.surgery.cut import masked, scaled_weight

Pair = tuple[Inputs, Tensor]


def with_targets(name: str) -> tuple[nn.Module, Pair]:
    model, inputs = network(name)
    torch.manual_seed(3)
    return model, (inputs, torch.randn(outputs_of(model, inputs).shape))


def data_of(pair: Pair) -> list[Any]:
    inputs, targets = pair
    return [inputs | {"targets": targets}] if isinstance(inputs, dict) else [(inputs, targets)]


def doubled(model: nn.Module, pair: Pair) -> tuple[nn.Module, Pair]:
    model, (inputs, targets) = copy.deepcopy(model).double(), pair
    if isinstance(inputs, dict):
        return model, (inputs, targets)
    return model, (inputs.double(), targets)


def plain(
    model: nn.Module, layer: greedyprune.LayerSelection, pairs: list[Pair], every: Pair,
    scaled: bool, picks: int, candidates: list[list[int]] | None = None,
) -> tuple[list[int], list[float]]:  # fmt: skip
    """What a user would write: every candidate is a run of the whole masked network."""
    units = len(layer.counts)
    counts, order, losses = torch.zeros(units).double(), [], []

    def at(counts: Tensor, k: int, pair: Pair) -> float:
        other = copy.deepcopy(model)
        factors = counts * units / k if scaled else (counts > 0).double()
        for name in layer.outputs:
            weight = other.get_parameter(f"{name}.weight")
            weight.data.copy_(scaled_weight(weight, layer.slices[f"{name}.weight"], factors))
        return loss_of(other, pair)

    for k in range(1, picks + 1):
        free = candidates[k - 1] if candidates else [j for j in range(units) if j not in order]
        one = torch.eye(units).double()
        scores = torch.tensor([at(counts + one[j], k, pairs[k - 1]) for j in free]).double()
        order.append(free[int(scores.argmin())])
        counts[order[-1]] += 1
        losses.append(at(counts, k, every))
    return order, losses


@pytest.mark.parametrize("name", NETWORKS)
def test_picks_are_those_of_the_plain_loop(name: str) -> None:
    """Layer by layer, each in the network that the layers before it leave."""
    model, pair = with_targets(name)
    selection = greedyprune.select(
        model, data_of(pair), objective="loss", loss="mse", size=3, backend="reference"
    )
    now, wide = doubled(model, pair)
    # A gap has only the layer of the model's output, which the tests of the kernels are for.
    inner = {n: layer for n, layer in selection.layers.items() if layer.gap is None}
    assert inner and len(selection.layers) - len(inner) <= 1
    for producer, layer in inner.items():
        assert layer.objective == "loss" and layer.bound is None
        assert float(layer.dense_loss) == pytest.approx(loss_of(now, wide), rel=1e-9)
        picks = len(layer.order)
        order, losses = plain(now, layer, [wide] * picks, wide, True, picks)
        assert layer.order.tolist() == order
        assert layer.losses.tolist() == pytest.approx(losses, rel=1e-9)
        now = masked(now, greedyprune.Selection({producer: layer}))
        assert float(layer.losses[-1]) == pytest.approx(loss_of(now, wide), rel=1e-9), producer


def test_near_ties_are_decided_in_float64() -> None:
    """Units whose losses float32 can't tell apart."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)
    ).eval()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[:1] + 3e-6 * torch.randn(40, 8))
        model[0].bias.fill_(0.3)
        model[2].weight.copy_(model[2].weight[:, :1].expand(9, 40))
    data = torch.randn(64, 8), torch.randint(3, (64,))
    options = {"layers": "0", "objective": "loss", "size": 12}
    reference = greedyprune.select(model, data, backend="reference", **options)
    assert greedyprune.select(model, data, **options).order.equal(reference.order)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("together", [1, 7])
def test_picks_are_the_references(
    name: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where several candidates run at once, as on a GPU."""
    model, pair = with_targets(name)
    monkeypatch.setattr(Network, "_together", lambda *_: together)
    options = {"objective": "loss", "loss": "mse", "size": 3}
    selection = greedyprune.select(model, data_of(pair), **options)
    reference = greedyprune.select(model, data_of(pair), backend="reference", **options)
    for producer, layer in selection.layers.items():
        assert layer.order.equal(reference.layers[producer].order)


@pytest.mark.parametrize("name", ["resnet", "excited", "llama"])
@pytest.mark.parametrize("weights", ["counts", "uniform", "none", "refit"])
def test_losses_are_the_pruned_networks(name: str, weights: str) -> None:
    model, pair = with_targets(name)
    before = copy.deepcopy(model.state_dict())
    selection = greedyprune.select(
        model, data_of(pair), objective=Loss(sequential=False), loss="mse", size=3,
        weights=weights,
    )  # fmt: skip
    for producer, layer in selection.layers.items():
        for k in range(1, len(layer.order) + 1):
            small = greedyprune.prune(model, greedyprune.Selection({producer: layer.at(k)}))
            assert float(layer.losses[k - 1]) == pytest.approx(loss_of(small, pair), rel=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("limit", [None, 1000])
def test_mini_batches_and_random_candidates(limit: int | None) -> None:
    """The plain loop on the same draws; nothing depends on what fits in memory."""
    model, (inputs, targets) = with_targets("vgg")
    assert isinstance(inputs, Tensor)
    data = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    options: dict[str, Any] = {
        "size": 4, "seed": 2, "objective": Loss(candidates=5, batch_size=7)
    }  # fmt: skip
    selection = greedyprune.select(
        model, data, layers="4", loss="mse", weights="none", backend="reference",
        memory_limit=limit, **options,
    )  # fmt: skip
    layer = selection.layers["4"]
    [group] = find_groups(model, analyse(model, Batch((inputs,), {}, None)), ["4"])
    job = job_of(model, data, [group], **options)
    batched = mini_batches(job, 4, len(inputs))
    assert batched is not None
    wide_model, wide = doubled(model, (inputs, targets))
    pairs = []
    for start in batched.starts.tolist():
        at = batched.order[start : start + 7]
        pairs.append((wide[0][at], wide[1][at]))  # type: ignore[index]
    free, drawn = list(range(len(layer.counts))), []
    draws = job.rule(group).draws
    assert draws is not None
    for k in range(4):
        n = len(free)
        for i, uniform in enumerate(draws[k, :n].tolist()):
            other = i + int(uniform * (n - i))
            free[i], free[other] = free[other], free[i]
        drawn.append(free[:5])
        free = [j for j in free if j != int(layer.order[k])]
    order, losses = plain(wide_model, layer, pairs, wide, False, 4, drawn)
    assert layer.order.tolist() == order
    assert layer.losses.tolist() == pytest.approx(losses, rel=1e-9)


def test_repeats_are_weighted_by_their_counts() -> None:
    model, pair = with_targets("conv1d")
    selection = greedyprune.select(model, data_of(pair), objective="loss", loss="mse", steps=12)
    (layer,) = selection.layers.values()
    assert int(layer.counts.sum()) == 12 and int(layer.counts.max()) > 1
    assert float(layer.losses[-1]) == pytest.approx(
        loss_of(greedyprune.prune(model, selection), pair), rel=1e-5
    )


@pytest.mark.parametrize("weights", ["counts", "refit"])
def test_tolerance_is_of_the_loss_with_all_units(weights: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 2))
    inputs = torch.randn(200, 6)
    targets = model(inputs).detach() + 0.03 * torch.randn(200, 2)
    options = {"objective": "loss", "layers": "0", "weights": weights}
    whole = greedyprune.select(model, (inputs, targets), size=24, **options)
    enough = 4 * float(whole.dense_loss)
    with pytest.warns(UserWarning, match="tolerance: 3 allows 4 times the dense loss"):
        selection = greedyprune.select(model, (inputs, targets), tolerance=3.0, **options)
    k = len(selection.order)
    assert 1 < k < 24
    assert float(selection.losses[-1]) <= enough < float(selection.losses[-2])
    assert selection.order.equal(whole.order[:k]) and selection.losses.equal(whole.losses[:k])


@pytest.mark.parametrize("name", ["resnet", "excited", "gpt2"])
def test_candidates_drawn_by_the_gradient(name: str) -> None:
    """Picks are the best of those that torch's own derivative puts first."""
    model, pair = with_targets(name)
    producer = next(iter(greedyprune.select(model, data_of(pair)).layers))
    selection = greedyprune.select(
        model, data_of(pair), layers=producer, objective=Loss(candidates=2, draw="gradient"),
        loss="mse", size=2, weights="none", backend="reference",
    )  # fmt: skip
    layer, (wide_model, wide) = selection.layers[producer], doubled(model, pair)

    def loss_at(factors: Tensor) -> Tensor:
        weights = {
            f"{consumer}.weight": scaled_weight(
                wide_model.get_parameter(f"{consumer}.weight"),
                layer.slices[f"{consumer}.weight"], factors,
            )
            for consumer in layer.outputs
        }  # fmt: skip
        inputs = wide[0]
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
        outputs = torch.func.functional_call(wide_model, weights, args, kwargs)
        outputs = outputs if isinstance(outputs, Tensor) else outputs.logits
        return functional.mse_loss(outputs, wide[1].double())

    order, one = list[int](), torch.eye(len(layer.counts)).double()
    for _ in range(2):
        factors = one[order].sum(0).requires_grad_()
        slopes = torch.autograd.grad(loss_at(factors), factors)[0]
        free = [j for j in range(len(one)) if j not in order]
        first = sorted(free, key=lambda j: float(slopes[j]))[:2]
        order.append(min(first, key=lambda j: float(loss_at(factors + one[j]))))
    assert layer.order.tolist() == order


def test_tolerance_of_a_metric() -> None:
    """Layers end as soon as the accuracy is within a tenth of what it was before them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    inputs = torch.randn(300, 6)
    labels = model(inputs).argmax(1)
    labels[:30] = 0

    def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
        assert len(outputs) == len(targets) == 300
        return (outputs.argmax(1) == targets).double().mean()

    data = [(inputs[:200], labels[:200]), (inputs[200:], labels[200:])]
    selection = greedyprune.select(model, data, objective=Loss(metric=accuracy), tolerance=0.1)
    before = model
    for name, layer in selection.layers.items():
        assert 1 < len(layer.order) < len(layer.counts)
        after = [
            accuracy(masked(before, greedyprune.Selection({name: layer.at(k)}))(inputs), labels)
            for k in (len(layer.order) - 1, len(layer.order))
        ]
        assert after[0] < 0.9 * accuracy(before(inputs), labels) <= after[1]
        before = masked(before, greedyprune.Selection({name: layer}))
    with pytest.raises(ValueError, match="metric: found a function without a tolerance"):
        greedyprune.select(model, data, objective=Loss(metric=accuracy))


def test_a_loss_of_the_users_own_and_layers_named_by_hand() -> None:
    model, (inputs, targets) = with_targets("vgg")
    data = [(inputs[:9], targets[:9]), (inputs[9:], targets[9:])]
    same = [
        greedyprune.select(model, data, layers="4", size=3, objective="loss", loss=loss)
        for loss in ("mse", lambda outputs, targets: (outputs - targets).square().mean())
    ]
    assert same[0].order.equal(same[1].order)
    torch.testing.assert_close(same[0].losses, same[1].losses, rtol=1e-6, atol=0)
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    pair = torch.randn(30, 4), torch.randn(30, 2)
    traced = greedyprune.select(mlp, pair, layers="0", size=3, objective="loss")
    named = greedyprune.select(mlp, pair, layers={"0": "2"}, size=3, objective="loss")
    assert traced.order.equal(named.order)
    torch.testing.assert_close(traced.losses, named.losses, rtol=1e-6, atol=0)


def test_the_output_layer_follows_the_inner_ones() -> None:
    """Inner layers through the network, the last by its kernel, given what those leave."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
    )
    data = torch.randn(60, 4), torch.randint(3, (60,))
    selection = greedyprune.select(model, data, objective="loss", size=0.5)
    outputs = greedyprune.prune(model, selection)(data[0]).detach()
    loss = functional.cross_entropy(outputs, data[1])
    assert float(selection.layers["2"].losses[-1]) == pytest.approx(float(loss), rel=1e-5)


def test_what_is_refused() -> None:
    model, (inputs, targets) = with_targets("vgg")

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield inputs, targets

    options: dict[str, Any] = {"loss": "mse", "layers": "0"}
    whole = options | {"objective": "loss"}
    with pytest.raises(ValueError, match="data: found an iterator for objective='loss' inside"):
        greedyprune.select(model, once(), **whole)
    with pytest.raises(ValueError, match="data: found inputs without targets"):
        greedyprune.select(model, [inputs], **whole)
    with pytest.raises(ValueError, match=r"batch_size: found samples of shapes \(3, 12, 12\) and"):
        greedyprune.select(
            model, [(inputs, targets), (inputs[..., :4], targets)],
            objective=Loss(batch_size=4), **options,
        )  # fmt: skip
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '0': the network's loss is nan"):
        greedyprune.select(model, [(inputs, targets)], **whole)
