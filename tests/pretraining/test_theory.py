"""The bound and its terms against their formulas; fits that recover the planted parameters."""

import math

import numpy as np
import pytest
import torch
from oracle import Dense, problem
from torch import nn

import greedyprune
from greedyprune import Loss
from greedyprune.kernels import backend
from greedyprune.pretraining import theory
from greedyprune.pretraining.theory import (
    certificate,
    certificate_of_gram,
    crossing,
    decay,
    growth,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
def test_the_terms_are_their_formulas(loss: str) -> None:
    model, x, y = problem(loss, c=4)
    selection = greedyprune.select(model, (x, y), steps=12, loss=loss)
    terms, dense = certificate(selection), Dense(model, x, y, loss)
    variance = float((dense.phi - dense.phi.mean(0)).square().sum(2).mean())
    assert terms.variance == pytest.approx(variance, rel=1e-5)
    smoothness = {"mse": 2 / 4, "cross_entropy": 1 / 2, "bce_with_logits": 1 / 16}[loss]
    assert terms.smoothness == smoothness
    harmonic = torch.arange(1, 13, dtype=torch.float64).reciprocal().cumsum(0)
    expected = smoothness / 2 * variance * harmonic / torch.arange(1, 13)
    torch.testing.assert_close(terms.selection_term, expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(terms.bound, selection.bound, rtol=1e-12, atol=0)
    assert (terms.excess <= terms.selection_term).all()
    assert terms.lowest.equal(selection.losses - selection.gap)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
def test_b_is_the_smoothness_of_torch_s_loss(loss: str) -> None:
    """B is the largest eigenvalue of the Hessian in one sample's outputs, over all outputs."""
    torch.manual_seed(0)
    functions = {
        "mse": nn.functional.mse_loss, "cross_entropy": nn.functional.cross_entropy,
        "bce_with_logits": nn.functional.binary_cross_entropy_with_logits,
    }  # fmt: skip
    for outputs in (2, 5):
        target = torch.tensor([1]) if loss == "cross_entropy" else torch.ones(1, outputs).double()
        points = [torch.zeros(1, outputs), *(4 * torch.randn(20, 1, outputs))]
        points.append(torch.tensor([[9.0, 9.0] + [-9.0] * (outputs - 2)]))  # between two classes
        largest = 0.0
        for point in points:
            hessian = torch.autograd.functional.hessian(
                lambda f, target=target: functions[loss](f, target), point.double()
            )
            largest = max(largest, float(torch.linalg.eigvalsh(hessian.view(outputs, outputs))[-1]))
        assert largest == pytest.approx(theory.smoothness(loss, outputs), rel=1e-6)


def test_the_certificate_of_a_gram_matrix_is_that_of_the_selection() -> None:
    model, x, y = problem("mse", c=3)
    selection = greedyprune.select(model, (x, y), steps=15, backend="reference")
    dense = Dense(model, x, y, "mse")
    phi = dense.phi.flatten(1)  # (N, m C)
    t = (y - model[2].bias).detach().double().flatten()
    terms = certificate_of_gram(
        phi @ phi.T, phi @ t, float(t @ t), samples=len(x), outputs=3, steps=15
    )
    expected = certificate(selection)
    assert terms.dense_loss == pytest.approx(expected.dense_loss, rel=1e-5)
    assert terms.variance == pytest.approx(expected.variance, rel=1e-5)
    for name in ("losses", "bound", "gap", "selection_term", "lowest"):
        torch.testing.assert_close(
            getattr(terms, name), getattr(expected, name), rtol=1e-4, atol=1e-6
        )


def test_no_certificate_where_the_bound_is_not_proved() -> None:
    model, x, y = problem("mse", c=3)
    for options in (
        {"size": 4},
        {"steps": 4, "objective": Loss(candidates=3)},
        {"steps": 4, "weights": "refit"},
    ):
        selection = greedyprune.select(model, (x, y), **options)
        with pytest.raises(ValueError, match="selection: found one without a bound"):
            certificate(selection)
    both = greedyprune.Selection({"a": selection.layers["0"], "b": selection.layers["0"]})
    with pytest.raises(ValueError, match="found 2 layers"):
        certificate(both)
    with pytest.raises(TypeError, match="selection: found int"):
        certificate(3)  # type: ignore[arg-type]
    for gram, beta, norm, message in (
        (torch.ones(3, 4), torch.ones(3), 1.0, r"gram: found shapes \(3, 4\)"),
        (torch.eye(3), torch.ones(4), 1.0, r"\(4,\) of beta"),
        (torch.eye(3), torch.ones(3), math.nan, "gram: found NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            certificate_of_gram(gram, beta, norm, samples=2, outputs=1, steps=2)
    with pytest.raises(ValueError, match="steps=0"):
        certificate_of_gram(torch.eye(3), torch.ones(3), 1.0, samples=2, outputs=1, steps=0)


def test_the_certificate_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, beta = 2 * torch.eye(3) + 1, torch.tensor([3.0, 2.0, 1.0])

    def losses() -> torch.Tensor:
        return certificate_of_gram(gram, beta, 5.0, samples=4, outputs=1, steps=4).losses

    expected = losses()
    monkeypatch.setattr(backend, "_extension", None)
    torch.testing.assert_close(losses(), expected, rtol=1e-12, atol=0)


SIZES = [1000, *range(5000, 60001, 5000)]


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_growth_recovers_planted_laws(noise: float) -> None:
    sampler = np.random.default_rng(0)
    sizes = np.repeat(SIZES, 3)
    residuals = noise * sampler.normal(0, 20, len(sizes))
    by_log = growth(sizes, -900 + 300 * np.log(sizes) + residuals)
    assert by_log.better == "log"
    by_power = growth(sizes, 2.5 * sizes**0.6 + residuals)
    assert by_power.better == "power"
    for fit, a, b in ((by_log.log, -900, 300), (by_power.power, 2.5, 0.6)):
        if noise:
            assert abs(fit.a - a) < 3 * fit.a_error
            assert abs(fit.b - b) < 3 * fit.b_error
            assert fit.residual == pytest.approx(20, rel=0.3)
        else:
            assert (fit.a, fit.b) == pytest.approx((a, b), rel=1e-7)
            assert fit.residual < 1e-6
    assert "b = 300" in str(growth(sizes, -900 + 300 * np.log(sizes)).log)


def test_the_standard_errors_are_the_spread_over_repetitions() -> None:
    """Over many draws of the noise."""
    sampler, sizes = np.random.default_rng(1), np.array(SIZES, float)
    for name, exact in (("log", -900 + 300 * np.log(sizes)), ("power", 2.5 * sizes**0.6)):
        fits = [getattr(growth(sizes, exact + sampler.normal(0, 20, len(sizes))), name)
                for _ in range(300)]  # fmt: skip
        for parameter in ("a", "b"):
            spread = np.std([getattr(fit, parameter) for fit in fits])
            error = np.sqrt(np.mean([getattr(fit, f"{parameter}_error") ** 2 for fit in fits]))
            assert spread == pytest.approx(error, rel=0.15)


def test_the_power_law_is_a_least_squares_fit() -> None:
    """No a and b nearby have a smaller sum of squares, though the data follow no power law."""
    sampler = np.random.default_rng(2)
    m, t = np.array(SIZES, float), sampler.uniform(100, 3000, len(SIZES))
    fit = growth(m, t).power

    def sum_of_squares(a: float, b: float) -> float:
        return float(np.square(t - a * m**b).sum())

    best = sum_of_squares(fit.a, fit.b)
    assert math.sqrt(best / (len(m) - 2)) == pytest.approx(fit.residual)
    for da in (0.99, 1, 1.01):
        for db in (-0.002, 0, 0.002):
            assert sum_of_squares(fit.a * da, fit.b + db) >= best * (1 - 1e-12)


def test_decay_recovers_a_planted_rate() -> None:
    t = np.arange(0, 2000, 250)
    fit = decay(t, 0.7 * np.exp(-0.003 * t))
    assert (fit.a, fit.b) == pytest.approx((math.log(0.7), 0.003))
    assert decay([0, 1, 2], [1, 2, 4]).b == pytest.approx(-math.log(2))  # a loss that grew


def test_crossing_by_hand() -> None:
    t = [0, 250, 500, 750]
    assert crossing(t, [0.5, 0.7, 0.9, 0.8], 0.8) == pytest.approx(375)  # the first time
    assert crossing(t, [0.5, 0.7, 0.9, 0.8], 0.7) == 250
    assert crossing(t, [0.5, 0.7, 0.9, 0.8], 0.95) is None
    assert crossing(t, [0.5, 0.7, 0.9, 0.8], 0.4) == 0
    assert crossing(t, [4.0, 2.0, 1.0, 0.0], 1.5, rising=False) == 375
    assert crossing(t, [4.0, 2.0, 1.0, 0.0], 5.0, rising=False) == 0
    # Against a second curve: the first is 0.1 below it at iteration 0, and 0.05 above it at 250.
    assert crossing(t, torch.tensor([0.5, 0.7, 0.9, 0.8]), np.array([0.6, 0.65, 0.7, 0.75])) == (
        pytest.approx(250 * 0.1 / 0.15)
    )
    assert crossing(t, [4, 2, 1, 1], [1, 1, 1, 1], rising=False) == 500
    assert crossing([7], [1.0], 1.0) == 7


def test_bad_input() -> None:
    for call, error, message in (
        (lambda: crossing([], [], 1), ValueError, "iterations: found"),
        (lambda: crossing([0, 1], [1], 1), ValueError, "values: found 1 numbers, expected 2"),
        (lambda: crossing([0, 0], [1, 2], 1), ValueError, "iterations: found numbers that do not"),
        (lambda: crossing([0, 1], [1, math.nan], 1), ValueError, "values: found"),
        (lambda: crossing([0, 1], [1, 2], [1, 2, 3]), ValueError, "goal: found 3 numbers"),
        (lambda: crossing([0, 1], [1, 2], "high"), TypeError, "goal: found 'high'"),
        (lambda: crossing(3, [1, 2], 1), TypeError, "iterations: found 3, expected numbers"),
        (lambda: growth([1, 2, 2], [1, 2, 3]), ValueError, "samples: found 2 distinct sizes"),
        (lambda: growth([1, 2, 3], [1, None, 3]), ValueError, "iterations: found"),
        (lambda: growth([0, 2, 3], [1, 2, 3]), ValueError, "samples: found numbers of 0 or less"),
        (lambda: decay([0, 1], [1, 2]), ValueError, "iterations: found 2 distinct ones"),
        (lambda: decay([0, 1, 2], [1, 0, 2]), ValueError, "losses: found 0, expected positive"),
        (lambda: theory.smoothness("hinge", 2), ValueError, "loss: found 'hinge'"),
    ):
        with pytest.raises(error, match=message) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
