"""A layer's features, in memory and streamed, the sums over them, and mini-batches."""

from collections.abc import Iterator

import pytest
import torch
from jobs import job_of
from torch import Tensor, nn

import greedyprune
from greedyprune import Loss
from greedyprune.data.batches import Batch
from greedyprune.graph.structure import analyse, find_groups
from greedyprune.objectives import features as features_module
from greedyprune.objectives.features import InMemory, Streamed, layer_features
from greedyprune.objectives.minibatches import mini_batches
from greedyprune.objectives.moments import moments

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 3)).eval()
X = torch.randn(2500, 6)
Y = torch.randint(3, (2500,))
T = torch.randn(2500, 3)


def features_of(
    data: object, loss: object, limit: int = 2**30, backend: str = "cpu"
) -> InMemory | Streamed:
    group = find_groups(MODEL, analyse(MODEL, Batch((X[:4],), {}, None)), None)[0]
    job = job_of(MODEL, data, [group], loss=loss, backend=backend, memory_limit=limit)
    return layer_features(job, group, imitation=False, limit=limit)


class Unsized:
    """Batches, nobody knows how many."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)


# Of one sample: features; with squared error targets, and three arrays like them; else a label
# and its weight.
BYTES = {"mse": 30 * 4 + 4 * 3 * 8, "cross_entropy": 30 * 4 + 4 + 8}


@torch.no_grad()
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("room", [2**20, 3000, 1500, 0])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("loss", ["mse", nn.CrossEntropyLoss(torch.tensor([1.0, 0.2, 3.0]))])
def test_moments_are_their_definitions(sized: bool, room: int, loss: object, backend: str) -> None:
    """room: for so many samples, in memory_limit"""
    targets, bytes_a_sample = (T, BYTES["mse"]) if loss == "mse" else (Y, BYTES["cross_entropy"])
    limit = max(1, room * bytes_a_sample)
    batches = [(X[i : i + 700], targets[i : i + 700]) for i in range(0, 2500, 700)]
    features = features_of(batches if sized else Unsized(batches), loss, limit, backend)
    gram_too = 0 if sized or loss != "mse" else 30 * 30 * 8
    assert isinstance(features, Streamed) == (limit < bytes_a_sample * 2500 + gram_too)
    assert features.bytes_held <= limit or limit == 1
    gram = torch.zeros(30, 30, dtype=torch.float64)
    sums = moments(features, backend, gram)
    hidden = MODEL[:2](X).double().T
    phi = hidden[:, None, :] * (30 * MODEL[2].weight.double().T)[:, :, None]
    bias = MODEL[2].bias.double()[:, None]
    in_float32 = isinstance(features, InMemory) and backend == "cpu"
    expected = torch.einsum("ics,jcs->ij", phi, phi)
    size = expected.diagonal().sqrt()
    error = (gram - expected).abs() / (size * size[:, None])
    assert error.max() < (1e-6 if in_float32 else 1e-14)
    torch.testing.assert_close(sums.norm, expected.diagonal())
    assert sums.samples == 2500
    weight = torch.ones(2500).double()
    if loss == "mse":
        t = T.double().T - bias
        torch.testing.assert_close(sums.beta, torch.einsum("ics,cs->i", phi, t))
        assert sums.target_norm == pytest.approx(float(t.square().sum()))
        dense = nn.functional.mse_loss(MODEL(X).double(), T.double())
        factor, mass = 1.0, 7500.0
    else:
        weight = loss.weight.double()[Y]
        dense = nn.functional.cross_entropy(MODEL(X).double(), Y, loss.weight.double())
        factor, mass = 0.25, float(weight.sum())
    assert sums.dense_loss == pytest.approx(float(dense), rel=1e-6)
    variance = (phi - phi.mean(0)).square().mean(0).sum(0)
    assert sums.spread == pytest.approx(factor * float((variance * weight).sum()) / mass)
    assert sums.mass == pytest.approx(mass)


def test_squared_error_needs_one_pass_even_streamed() -> None:
    generator = ((X[i : i + 100], T[i : i + 100]) for i in range(0, 2500, 100))
    selection = greedyprune.select(MODEL, generator, steps=20, memory_limit=30 * 30 * 8)
    expected = greedyprune.select(MODEL, (X, T), steps=20)
    assert selection.order.equal(expected.order)
    assert not MODEL[2]._forward_pre_hooks


@pytest.mark.parametrize("weights", ["counts", "uniform", "none", "refit"])
@pytest.mark.parametrize("targets", [T, Y], ids=["mse", "cross_entropy"])
def test_streamed_columns_and_weights(weights: str, targets: Tensor) -> None:
    """No room for features or Gram matrix: columns by passes over the data."""
    selection = greedyprune.select(MODEL, (X, targets), steps=9, weights=weights, memory_limit=100)
    expected = greedyprune.select(MODEL, (X, targets), steps=9, weights=weights)
    assert selection.order.equal(expected.order)
    torch.testing.assert_close(selection.losses, expected.losses, rtol=1e-9, atol=0)


def test_mini_batches_see_every_sample_once_a_pass() -> None:
    job = job_of(MODEL, (X, Y), steps=9, seed=3, objective=Loss(batch_size=30))
    batches = mini_batches(job, 9, 100)
    assert batches is not None
    assert batches.order.sort().values.equal(torch.arange(100))
    assert len(batches.starts) == 9 and batches.size == 30
    seen = [batches.order[start : start + 30] for start in batches.starts]
    for i in (0, 3, 6):
        assert len(torch.cat(seen[i : i + 3]).unique()) == 90
    assert not seen[0].equal(seen[3])


@torch.no_grad()
def test_shuffling_keeps_samples_together() -> None:
    features = features_of((X, T), "mse")
    assert isinstance(features, InMemory)
    before, target = features.features.clone(), features.target
    order = torch.randperm(2500)
    features.shuffle(order)
    assert features.features.equal(before[:, order])
    assert features.target.value.equal(target.value[:, order])


def test_passes_that_differ_are_noticed() -> None:
    class Shrinking(list):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            batches = list(super().__iter__())
            self.pop()
            return iter(batches)

    data = Shrinking((X[i : i + 100], Y[i : i + 100]) for i in range(0, 2500, 100))
    with pytest.raises(ValueError, match=r"data: a pass gave .* samples and the first .* expected"):
        greedyprune.select(MODEL, data, steps=5, memory_limit=100)


def test_a_loss_that_is_not_finite() -> None:
    with (
        pytest.warns(UserWarning, match="slow path"),
        pytest.raises(ValueError, match="loss: your function returned nan"),
    ):
        greedyprune.select(MODEL, (X, Y), steps=5, loss=lambda o, t: (o * torch.nan).sum())


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


@pytest.mark.filterwarnings("ignore:loss. a function of your own")
@pytest.mark.parametrize("shortlist", [None, 3])
def test_a_loss_of_ones_own_scores_on_mini_batches(shortlist: int | None) -> None:
    data, objective = (X[:300], T[:300]), Loss(batch_size=20, shortlist=shortlist)
    expected = greedyprune.select(MODEL, data, steps=8, objective=objective)
    selection = greedyprune.select(MODEL, data, steps=8, objective=objective, loss=squared)
    on_all = greedyprune.select(MODEL, data, steps=8)
    assert selection.order.equal(expected.order) and not selection.order.equal(on_all.order)
    torch.testing.assert_close(selection.losses, expected.losses, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:loss. a function of your own")
def test_mini_batches_for_a_loss_of_ones_own_need_a_target_for_each_sample() -> None:
    model = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 3))
    data = X[:40].view(10, 4, 6), T[:40].view(10, 4, 3)  # a unit has four samples a row
    with pytest.raises(ValueError, match=r"^batch_size: found 10 targets for 40 .* expected one"):
        greedyprune.select(
            model, data, layers={"0": "2"}, steps=3, loss=squared, objective=Loss(batch_size=5)
        )


@pytest.mark.filterwarnings("ignore:loss. a function of your own")
@pytest.mark.parametrize("loss", ["mse", squared])
def test_the_memory_that_an_error_asks_for_is_enough(loss: object) -> None:
    """Also where the first batch is the largest: later ones are taken to be like it."""
    data = [(X[i:j], T[i:j]) for i, j in ((0, 200), (200, 220), (220, 240))]
    options = {"steps": 3, "loss": loss, "objective": Loss(batch_size=10)}
    with pytest.raises(ValueError, match=r"^memory_limit: found 1000 bytes,") as caught:
        greedyprune.select(MODEL, data, memory_limit=1000, **options)
    enough = int(str(caught.value).rpartition("at least ")[2].split()[0])
    assert len(greedyprune.select(MODEL, data, memory_limit=enough, **options).order) == 3
    with pytest.raises(ValueError, match=r"^memory_limit: found"):
        greedyprune.select(MODEL, data, memory_limit=enough - 1, **options)


def test_no_hook_stays_after_an_error_on_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: object) -> None:
        raise ValueError("rank 1: lost")

    monkeypatch.setattr(features_module, "_agree", lost)
    with pytest.raises(ValueError, match="lost") as error:  # it holds the frames of the call
        greedyprune.select(MODEL, (X, Y), steps=5, memory_limit=100)
    assert error.tb is not None
    assert not MODEL[2]._forward_pre_hooks
