"""Forms of data, random forms of the loop, threads: the same picks. Bound and gap."""

from collections.abc import Callable

import pytest
import torch
from oracle import (
    SMOOTHNESS,
    Dense,
    Net,
    check_pruned,
    each_backend,
    each_loss,
    near,
    problem,
    same,
    select,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from greedyprune import Loss

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "list": lambda x, y: [(x[:25], y[:25]), (x[25:], y[25:])],
    "generator": lambda x, y: ((x[i : i + 9], y[i : i + 9]) for i in range(0, len(x), 9)),
    "dataset": TensorDataset,
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7),
    "shuffled": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True),
    "dicts": lambda x, y: [
        {"features": x[:40], "labels": y[:40]},
        {"labels": y[40:], "features": x[40:]},
    ],
}


@each_backend
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_one_answer(backend: str, loss: str, form: str) -> None:
    sequential, x, y = problem(loss)
    model = Net()
    model.fc1, model.fc2 = sequential[0], sequential[2]
    expected = select(model, (x, y), steps=8, backend=backend)
    selection = select(model, FORMS[form](x, y), steps=8, backend=backend)
    assert torch.equal(selection.order, expected.order)
    assert torch.allclose(selection.losses, expected.losses, rtol=1e-9)


@each_backend
@each_loss
def test_streaming_picks_the_same_units(backend: str, loss: str) -> None:
    model, x, y = problem(loss, n=40, m=120)
    options = {"steps": 8, "loss": loss, "backend": backend}
    expected = select(model, (x, y), **options)
    streamed = select(model, (x, y), memory_limit=8192, **options)
    assert torch.equal(streamed.order, expected.order)
    assert torch.allclose(streamed.losses, expected.losses, rtol=1e-9)
    assert torch.allclose(streamed.gap, expected.gap, rtol=1e-6, atol=1e-9)


@each_backend
@each_loss
@pytest.mark.parametrize("option", ["candidates", "batch_size"])
def test_random_forms_are_seeded_and_report_the_whole_loss(
    backend: str, loss: str, option: str
) -> None:
    model, x, y = problem(loss, n=20, m=100)
    options = {"steps": 10, "loss": loss, "backend": backend, "objective": Loss(**{option: 3})}
    first = select(model, (x, y), seed=1, **options)
    torch.manual_seed(99)  # torch's own random state does not matter
    assert same(first, select(model, (x, y), seed=1, **options))
    assert not torch.equal(first.order, select(model, (x, y), seed=2, **options).order)
    check_pruned(model, x, y, loss, first)
    assert first.bound is None
    assert first.gap is None


@each_backend
@each_loss
def test_random_forms_agree_with_the_full_one_where_every_draw_is_alike(
    backend: str, loss: str
) -> None:
    model, x, y = problem(loss, n=12, c=5)
    options = {"steps": 8, "loss": loss, "backend": backend}
    all_drawn = select(model, (x, y), objective=Loss(candidates=12), **options)
    assert torch.equal(all_drawn.order, select(model, (x, y), **options).order)
    row = int((model[:2](x) > 0).sum(1).argmax())  # one sample, repeated: mini-batches are alike
    x, y = x[row].repeat(30, 1), y[row : row + 1].repeat_interleave(30, 0)
    batched = select(model, (x, y), objective=Loss(batch_size=4), **options)
    assert Dense(model, x, y, loss).follow(batched.order) >= 2


@each_backend
@each_loss
def test_the_number_of_threads_does_not_matter(backend: str, loss: str) -> None:
    model, x, y = problem(loss, n=48, m=2000)
    threads, selections = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            selections.append(select(model, (x, y), steps=20, loss=loss, backend=backend))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    one, two = selections
    assert torch.equal(one.order, two.order)
    assert torch.allclose(one.losses, two.losses, rtol=1e-9)


@each_backend
@each_loss
def test_bound_and_gap_are_their_formulas(backend: str, loss: str) -> None:
    model, x, y = problem(loss, c=4)
    selection = select(model, (x, y), steps=12, loss=loss, backend=backend)
    dense = Dense(model, x, y, loss)
    spread = float((dense.phi - dense.phi.mean(0)).square().sum(2).mean())  # V
    for k in range(1, 13):
        harmonic = sum(1 / i for i in range(1, k + 1))
        excess = SMOOTHNESS[loss](4) / 2 * spread * harmonic / k
        assert float(selection.bound[k - 1]) == near(float(selection.dense_loss) + excess)
        factors = 16 * selection.order[:k].bincount(minlength=16).double() / k
        slope = torch.autograd.functional.jacobian(dense.value, factors)
        gap = float(slope @ factors - 16 * slope.min())
        assert float(selection.gap[k - 1]) == pytest.approx(gap, rel=1e-4, abs=1e-5)


@each_backend
@pytest.mark.parametrize(
    ("options", "bound", "gap"),
    [
        ({}, True, True),
        ({"replacement": False}, False, True),
        ({"weights": "uniform", "replacement": False}, False, True),
        ({"weights": "uniform"}, False, False),
        ({"weights": "none"}, False, False),
        ({"weights": "refit"}, False, False),
        ({"objective": Loss(candidates=6)}, False, False),
        ({"objective": Loss(batch_size=20)}, False, False),
    ],
    ids=str,
)
def test_bound_and_gap_are_given_where_they_hold(
    backend: str, options: dict, bound: bool, gap: bool
) -> None:
    model, x, y = problem(n=6)
    selection = select(model, (x, y), steps=6, backend=backend, **options)
    assert (selection.bound is not None) == bound
    assert (selection.gap is not None) == gap
