"""The public contract, part 3: the invariants on random problems, by hypothesis."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from oracle import (
    LOSSES,
    NAMED,
    WEIGHTS,
    Dense,
    Problem,
    check_pruned,
    each_backend,
    modest,
    problem,
    select,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def draws(draw: st.DrawFn) -> tuple[str, Problem, int]:
    loss = draw(st.sampled_from(sorted(LOSSES)))
    size = [draw(st.integers(1, top)) for top in (12, 20, 5)]
    seed = draw(st.integers(0, 2**20))
    return loss, problem(loss, *size, seed), draw(st.integers(1, 8))


@each_backend
@modest
@hypothesis.given(draw=draws(), replacement=st.booleans())
def test_picks_are_brute_force(backend: str, draw, replacement: bool) -> None:
    loss, (model, x, y), steps = draw
    steps = steps if replacement else min(steps, model[0].out_features)
    how = {"loss": loss, "backend": backend, "replacement": replacement, "layers": NAMED}
    selection = select(model, (x, y), steps=steps, **how)
    assert len(selection.order) == steps
    hypothesis.assume(Dense(model, x, y, loss).follow(selection.order, replacement) > 0)


@each_backend
@modest
@hypothesis.given(draw=draws(), weights=st.sampled_from(WEIGHTS[:3]))
def test_losses_are_those_of_the_pruned_model(backend: str, draw, weights: str) -> None:
    loss, (model, x, y), steps = draw
    how = {"loss": loss, "backend": backend, "weights": weights, "layers": NAMED}
    selection = select(model, (x, y), steps=steps, **how)
    check_pruned(model, x, y, loss, selection)


@each_backend
@modest
@hypothesis.given(draw=draws(), seed=st.integers(0, 2**20))
def test_certificates_hold(backend: str, draw, seed: int) -> None:
    loss, (model, x, y), steps = draw
    how = {"loss": loss, "backend": backend, "layers": NAMED}
    selection = select(model, (x, y), steps=steps, **how)
    slack = 1e-6 * (1 + selection.losses.abs())
    assert (selection.losses <= selection.bound + slack).all()
    dense = Dense(model, x, y, loss)
    sampler = torch.Generator().manual_seed(seed)
    sharp = torch.rand(20, dense.n, generator=sampler, dtype=torch.float64) ** 6 + 1e-12
    hull = torch.cat([torch.eye(dense.n), sharp / sharp.sum(1, keepdim=True)])
    lowest = min(float(dense.value(dense.n * point)) for point in hull)
    assert (selection.losses - selection.gap <= lowest + slack).all()
    assert (selection.gap >= -slack).all()
