"""The public contract, part 1: picks, losses, the pruned model, edges."""

import copy
from collections.abc import Callable

import pytest
import torch
from oracle import (
    WEIGHTS,
    Dense,
    Net,
    check_pruned,
    close,
    each_backend,
    each_loss,
    fingerprint,
    near,
    problem,
    same,
    select,
    targets_for,
)
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune import Loss
from greedyprune.kernels import least_squares

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- picks, losses, the pruned model


@each_backend
@each_loss
@pytest.mark.parametrize("c", [1, 4])
@pytest.mark.parametrize("replacement", [True, False])
def test_every_step_is_equation_1(backend: str, loss: str, c: int, replacement: bool) -> None:
    model, x, y = problem(loss, c=c)
    how = {"loss": loss, "backend": backend, "replacement": replacement}
    selection = select(model, (x, y), steps=12, **how)
    compared = Dense(model, x, y, loss).follow(selection.order, replacement)
    assert compared == (0 if loss == "cross_entropy" and c == 1 else 12)  # one class: all tie
    check_pruned(model, x, y, loss, selection)


@each_backend
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(ignore_index=2),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 3.0, 1.0])),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 4.0]), ignore_index=1, label_smoothing=0.1),
        nn.BCEWithLogitsLoss(),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 1.0, 6.0])),
        nn.MSELoss(),
    ],
    ids=repr,
)
def test_loss_modules_over_ragged_batches(backend: str, loss: nn.Module) -> None:
    """The mean is over all the data, as torch defines it, and not a mean of batch means."""
    kinds = {nn.MSELoss: "mse", nn.CrossEntropyLoss: "cross_entropy"}
    model, x, y = problem(kinds.get(type(loss), "bce_with_logits"), seed=3)
    rows = y.argsort() if y.dim() == 1 else y[:, 0].argsort()  # so that batches differ
    x, y = x[rows], y[rows]
    batches = [(x[:7], y[:7]), (x[7:50], y[7:50]), (x[50:], y[50:])]
    selection = select(model, batches, steps=8, loss=loss, backend=backend)
    assert Dense(model, x, y, loss).follow(selection.order) == 8
    check_pruned(model, x, y, loss, selection)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_auto_loss_is_read_off_the_targets(loss: str) -> None:
    model, x, y = problem(loss)
    assert same(select(model, (x, y), steps=5), select(model, (x, y), steps=5, loss=loss))


@each_backend
def test_any_callable_is_a_loss_and_slow(backend: str) -> None:
    model, x, y = problem(n=10)
    with pytest.warns(UserWarning, match="slow"):
        selection = select(model, (x, y), steps=5, loss=functional.l1_loss, backend=backend)
    assert Dense(model, x, y, functional.l1_loss).follow(selection.order) == 5
    check_pruned(model, x, y, functional.l1_loss, selection)
    assert selection.bound is None
    assert selection.gap is None


class Untraceable(Net):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features if features.sum() > 0 else -features)


def batchnorm_dropout() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.4), nn.Linear(16, 3)
    )
    model(torch.randn(64, 5))  # running statistics worth the name
    nn.init.uniform_(model[1].weight, 0.5, 2.0)
    nn.init.normal_(model[1].bias)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "functional": (Net, "fc1", "fc2"),
    "tanh": (lambda: Net(torch.tanh), "fc1", "fc2"),
    "softplus": (lambda: Net(nn.Softplus()), "fc1", "fc2"),
    "swish": (lambda: Net(lambda h: h * torch.sigmoid(h)), "fc1", "fc2"),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 16), nn.Linear(16, 3)), "0", "1"),
    "no_bias": (lambda: problem(bias=False)[0], "0", "2"),
    "batchnorm_dropout": (batchnorm_dropout, "0", "4"),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 16), nn.SiLU()), nn.Linear(16, 3)),
        "0.0",
        "1",
    ),
}


@each_backend
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("name", MODELS)
def test_models(backend: str, loss: str, name: str) -> None:
    build, producer, consumer = MODELS[name]
    torch.manual_seed(1)
    model, x = build(), torch.randn(60, 5)
    y = targets_for(model, x, loss)
    selection = select(model, (x, y), steps=8, backend=backend)
    assert list(selection.layers) == [producer]
    dense = Dense(model, x, y, loss, consumer)
    assert dense.follow(selection.order, margin=1e-5) >= 4  # activations are rounded here
    check_pruned(model, x, y, loss, selection, consumer)
    for layers in (producer, [producer], {producer: consumer}):
        assert same(select(model, (x, y), steps=8, backend=backend, layers=layers), selection)


def test_mapping_serves_models_that_cannot_be_traced() -> None:
    torch.manual_seed(0)
    model, x = Untraceable(), torch.rand(30, 5)
    y = targets_for(model, x, "mse")
    selection = select(model, (x, y), steps=4, layers={"fc1": "fc2"})
    assert Dense(model, x, y, "mse", "fc2").follow(selection.order, margin=1e-5) >= 2
    assert greedyprune.prune(model, selection).fc1.out_features == len(selection.kept)


@each_backend
@each_loss
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("replacement", [True, False])
def test_weights(backend: str, loss: str, weights: str, replacement: bool) -> None:
    """Picks follow (1) whatever the kept units carry; the losses are those of what they carry."""
    model, x, y = problem(loss, n=12, seed=5)
    how = {"loss": loss, "backend": backend, "replacement": replacement}
    selection = select(model, (x, y), steps=9, weights=weights, **how)
    assert torch.equal(selection.order, select(model, (x, y), steps=9, **how).order)
    check_pruned(model, x, y, loss, selection)
    kept = selection.kept
    if weights == "refit":
        assert selection.weights.shape == (3, len(kept))
        return
    counted = 12 * selection.counts[kept] / 9
    expected = {"counts": counted, "uniform": 12 / len(kept), "none": 1.0}[weights]
    assert close(selection.weights, expected * torch.ones(len(kept)).double(), 1e-6)


@each_backend
@pytest.mark.parametrize("kind", ["plain", "dead", "twins"])  # the last two: a singular Gram
def test_refit_is_least_squares_with_the_bias_kept(backend: str, kind: str) -> None:
    model, x, y = problem(n=12, m=120, seed=6 if kind == "dead" else 2)
    if kind == "twins":
        with torch.no_grad():
            model[0].weight[9], model[0].bias[9] = model[0].weight[2], model[0].bias[2]
    how = {"weights": "refit", "replacement": kind != "twins", "backend": backend}
    selection = select(model, (x, y), steps=12 if kind == "twins" else 5, **how)
    units = copy.deepcopy(model[:2]).double()(x.double()).detach()
    hidden, wanted = units[:, selection.kept], y.double() - model[2].bias.detach().double()
    gram = hidden.T @ hidden
    ridge = least_squares.ridge(units.square().sum(0), 1e-4)[selection.kept]
    dense = model[2].weight.detach().double()[:, selection.kept]  # which the ridge is towards
    damped = gram + ridge.diag()
    for k in range(1, len(selection.order) + 1):
        kept = torch.isin(selection.kept, selection.order[:k])
        part = hidden[:, kept]
        right = part.T @ wanted + (ridge * dense)[:, kept].T
        solution = torch.linalg.solve(damped[kept][:, kept], right)
        loss = functional.mse_loss(part @ solution, wanted)
        assert float(selection.losses[k - 1]) == near(float(loss))
    assert close(selection.weights, solution.T, 1e-6)
    alive = hidden.any(0)
    assert bool(alive.all()) == (kind != "dead")
    torch.testing.assert_close(selection.weights[:, ~alive], dense[:, ~alive])
    if kind == "twins":
        assert {2, 9} <= set(selection.kept.tolist())
        pair = torch.isin(selection.kept, torch.tensor([2, 9]))
        changes = (selection.weights - dense)[:, pair]
        assert close(changes[:, 0], changes[:, 1], 1e-6)
    assert torch.equal(greedyprune.prune(model, selection)[2].bias, model[2].bias)


@each_backend
def test_imitation_approaches_the_dense_output(backend: str) -> None:
    model, x, y = problem("cross_entropy", n=12)
    how = {"objective": "imitation", "weights": "counts", "backend": backend}
    selection = select(model, (x, y), steps=10, **how)
    wanted = model(x).detach()
    assert Dense(model, x, wanted, "mse").follow(selection.order) == 10
    for k in (1, 4, 10):
        value = functional.mse_loss(greedyprune.prune(model, selection.at(k))(x), wanted)
        assert float(selection.losses[k - 1]) == near(value.item())
    assert (selection.losses <= selection.bound).all()


# ---------------------------------------------------------------- edges


@each_backend
@each_loss
@pytest.mark.parametrize("replacement", [True, False])
def test_twins_go_to_the_lowest_index_and_dead_units_do_no_harm(
    backend: str, loss: str, replacement: bool
) -> None:
    model, x, y = problem(loss, n=14, seed=2)
    with torch.no_grad():
        for copied, original, scale in ((9, 2, 1), (12, 2, 2), (8, 5, 4), (13, 0, 0.5)):
            model[0].weight[copied] = scale * model[0].weight[original]
            model[0].bias[copied] = scale * model[0].bias[original]
            model[2].weight[:, copied] = model[2].weight[:, original] / scale
        model[0].weight[3], model[0].bias[3] = 0, -1  # never active
        model[2].weight[:, 6] = 0  # never heard
    dense = Dense(model, x, y, loss)
    assert dense.twins.unique().numel() == 9
    how = {"loss": loss, "backend": backend, "replacement": replacement}
    selection = select(model, (x, y), steps=14, **how)
    assert dense.follow(selection.order, replacement) >= 10
    check_pruned(model, x, y, loss, selection)


@each_backend
@each_loss
@pytest.mark.parametrize(("n", "m"), [(1, 20), (12, 1), (1, 1)])
def test_one_unit_one_sample(backend: str, loss: str, n: int, m: int) -> None:
    model, x, y = problem(loss, n=n, m=m, seed=4)
    selection = select(model, (x, y), steps=3, loss=loss, backend=backend)
    assert Dense(model, x, y, loss).follow(selection.order) == 3
    check_pruned(model, x, y, loss, selection)
    if n == 1:
        assert selection.order.tolist() == [0, 0, 0]
        assert selection.losses.tolist() == [near(float(selection.dense_loss))] * 3


@each_backend
@each_loss
def test_more_steps_than_units(backend: str, loss: str) -> None:
    model, x, y = problem(loss, n=5)
    selection = select(model, (x, y), steps=40, loss=loss, backend=backend)
    assert int(selection.counts.sum()) == 40
    assert Dense(model, x, y, loss).follow(selection.order) >= 5
    check_pruned(model, x, y, loss, selection)


@each_backend
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(backend: str, loss: str, dtype: torch.dtype) -> None:
    model, x, y = problem(loss)
    model, x, y = model.to(dtype), x.to(dtype), y.to(dtype) if loss == "mse" else y
    selection = select(model, (x, y), steps=8, backend=backend)
    dense = Dense(model, x, y, loss)
    assert dense.follow(selection.order) == 8
    small = greedyprune.prune(model, selection)
    assert {p.dtype for p in small.parameters()} == {dtype}
    rel = 1e-5 if dtype == torch.float64 else 0.02  # weights N c / k are rounded to the dtype
    value = dense.loss(small.double()(dense.x), dense.y).item()
    assert float(selection.losses[-1]) == near(value, rel)


@each_backend
@each_loss
def test_strides_do_not_matter(backend: str, loss: str) -> None:
    model, x, y = problem(loss)
    expected = select(model, (x, y), steps=8, loss=loss, backend=backend)
    strided = torch.full((len(x), 15), torch.nan)
    strided[:, 1::3] = x
    spread = y.repeat_interleave(2, 0)[::2] if y.dim() == 1 else y.T.contiguous().T
    model[2].weight = nn.Parameter(model[2].weight.detach().T.contiguous().T)
    selection = select(model, (strided[:, 1::3], spread), steps=8, loss=loss, backend=backend)
    assert torch.equal(selection.order, expected.order)
    assert torch.allclose(selection.losses, expected.losses, rtol=1e-6)


# ---------------------------------------------------------------- invariant 6


@pytest.mark.filterwarnings("ignore:.*slow")
@pytest.mark.parametrize("training", [True, False])
def test_select_and_prune_leave_the_model_as_found(training: bool) -> None:
    torch.manual_seed(0)
    model = batchnorm_dropout().train(training)
    model[3].train(not training)
    model[0].bias.requires_grad_(False)
    x = torch.randn(50, 5)
    y = targets_for(model, x, "mse")
    functional.mse_loss(model(x), y).backward()
    model[2].register_forward_hook(lambda *args: None)
    before = fingerprint(model)
    forms: list[dict] = [{}, {"memory_limit": 8192}]
    forms += [{"objective": objective} for objective in (Loss(candidates=4), Loss(batch_size=9))]
    forms += [{"objective": "imitation"}, {"weights": "refit"}, {"backend": "reference"}]
    for options in forms:
        selection = select(model, (x, y), size=6, **options)
        assert fingerprint(model) == before, options

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError, match="broken"):
        select(model, (x, y), size=6, loss=broken)
    assert fingerprint(model) == before

    small = greedyprune.prune(model, selection)
    assert fingerprint(model) == before
    assert type(small) is type(model)
    assert (small[0].out_features, small[1].num_features, small[4].in_features) == (6, 6, 6)
    assert [p.shape for p in small[1].buffers()] == [(6,), (6,), ()]
    assert [module.training for module in small] == [module.training for module in model]
    addresses = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert addresses.isdisjoint(p.data_ptr() for p in [*small.parameters(), *small.buffers()])
    flags = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in small.parameters()] == flags
    functional.mse_loss(small(x), y).backward()  # ready for fine-tuning
    assert small[4].weight.grad.shape == (3, 6)
