"""The theory of greedy forward selection: its bound, computed, and fits to measurements.

Proved, and checked in the tests: the bound, eq. (3). Let L be the mean over samples of a loss
that is convex and B-smooth in the outputs. Let all N units be candidates in every step, and let
repeats be allowed. Then, after k steps,

    L_k <= L_N + (B/2) V H_k / k,                                                              (3)

where L_N is the dense loss, V = mean_j |phi_j - mean phi|^2 (a mean over samples), and H_k is the
k-th harmonic number. Proof: the best unit is at least as good as one drawn at random. Write the sum
of the k - 1 picks so far as z = (k - 1) u, and the mean of all phi_j as p. Over all j, the outputs
(z + phi_j) / k have the mean ((k - 1) u + p) / k. By smoothness, the mean of their losses is at
most (B/2) V / k^2 above the loss of that mean. By convexity, the loss of that mean is at most
((k - 1) L_{k-1} + L_N) / k. So k L_k <= (k - 1) L_{k-1} + L_N + (B/2) V / k. Sum this over k.

Proved for any picks: no convex reweighting of the N units has a loss below L_k - gap_k, because a
convex function lies above its tangent (Frank and Wolfe 1956; Jaggi 2013).

Proved by others, under their conditions, and not computed here. Ye et al. (2020, arXiv:2003.01794):
the rate is 1/k, and 1/k^2 if the targets lie inside the convex hull of the units' outputs. Wolfe et
al. (2021, arXiv:2108.00259) combine such a rate with a bound on the dense loss under (stochastic)
gradient descent. For a two-layer network that is wide in comparison with the data set, they give a
number of iterations after which the pruned network is good.

Only claimed, by the same paper: this number of iterations grows like the logarithm of the size m of
the data set. `growth` fits a + b log m to measured iterations, and a power law for comparison. A
good fit does not prove the claim. `decay` is a fit, too: nothing says that a dense loss falls
exponentially.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..data.losses import SMOOTHNESS, bound
from ..kernels import backend as backends
from ..kernels import ops
from ..kernels.path import Moments, Rule
from ..surgery.layer_selection import LayerSelection
from ..surgery.selection import Selection

Numbers = NDArray[np.float64]

FITTING_STEPS = 200  # at most; the Gauss-Newton method takes about ten
HALVINGS = 40  # of a Gauss-Newton step that does not lower the sum of squares


@dataclass(frozen=True, eq=False)
class Certificate:
    """eq. (3) and the Frank-Wolfe gap along a greedy path of k steps. All tensors are float64.

    losses:     (k,) the loss after each step
    dense_loss: L_N
    smoothness: B
    variance:   V, where samples and outputs have the weights that they have in the loss
    gap:        (k,) the Frank-Wolfe gap after each step
    """

    losses: Tensor
    dense_loss: float
    smoothness: float
    variance: float
    gap: Tensor

    @property
    def selection_term(self) -> Tensor:
        """(k,): (B/2) V H_k / k, the most that the selection may add to the dense loss by (3)."""
        return self.bound - self.dense_loss

    @property
    def bound(self) -> Tensor:
        """(k,): the right side of (3)."""
        return bound(self.dense_loss, self.smoothness / 2 * self.variance, len(self.losses))

    @property
    def excess(self) -> Tensor:
        """(k,): L_k - L_N, what the selection added; negative where it improved the network."""
        return self.losses - self.dense_loss

    @property
    def lowest(self) -> Tensor:
        """(k,): L_k - gap_k, a lower bound on the loss of every convex reweighting of all units."""
        return self.losses - self.gap


def smoothness(loss: str, outputs: int) -> float:
    """B of (3) for one of torch's losses, a mean over samples with `outputs` outputs each.

    B is 1/2 for "cross_entropy", 2 / outputs for "mse", and 1 / (4 outputs) for "bce_with_logits";
    torch takes the mean over the outputs, too, for the last two. ValueError for any other loss.

    Example:
        >>> smoothness("mse", 4)
        0.5
    """
    if loss not in SMOOTHNESS:
        raise ValueError(f"loss: found {loss!r}, expected one of {list(SMOOTHNESS)}")
    sample_smoothness = SMOOTHNESS[loss]
    return sample_smoothness if loss == "cross_entropy" else sample_smoothness / outputs


def certificate(selection: Selection | LayerSelection) -> Certificate:
    """The terms of (3) and the Frank-Wolfe gap of a selection of one layer.

    The conditions of (3) have to hold. Select with `steps` (so with repeats), with all units as
    candidates on all data, with weights="counts" and a convex loss.

    Raises:
        TypeError: the argument is not a Selection
        ValueError: the selection has several layers, or no bound

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
        >>> data = torch.randn(100, 4), torch.randn(100, 1)
        >>> terms = certificate(greedyprune.select(model, data, steps=10))
        >>> bool((terms.excess <= terms.selection_term).all())
        True
    """
    if isinstance(selection, Selection):
        if len(selection.layers) != 1:
            raise ValueError(
                f"selection: found {len(selection.layers)} layers, expected one: selection.layers["
                "name]"
            )
        (selection,) = selection.layers.values()
    if not isinstance(selection, LayerSelection):
        raise TypeError(f"selection: found {type(selection).__name__}, expected a Selection")
    if selection.bound is None or selection.gap is None:
        raise ValueError(
            "selection: found one without a bound, expected one from select(steps=...) with all "
            "candidates, weights='counts' and a loss that is known to be convex"
        )
    dense_loss = float(selection.dense_loss)
    smooth = smoothness(selection.loss, sum(selection.outputs.values()))
    variance = 2 / smooth * (float(selection.bound[0]) - dense_loss)  # (3) at k = 1, where H_1 = 1
    return Certificate(selection.losses, dense_loss, smooth, variance, selection.gap)


def certificate_of_gram(
    gram: Tensor, beta: Tensor, target_norm: float, *, samples: int, outputs: int, steps: int
) -> Certificate:
    """The same for squared error, from `steps` greedy steps on a Gram matrix (eq. (2)).

    Args:
        gram: (N, N), `G_ij = <phi_i, phi_j>` with phi_j = N w_j h_j, summed over m and C
        beta: (N,), `<phi_j, t>`, where t is the target less the bias
        target_norm: `<t, t>`
        samples: m, the number of samples; torch's mse is the mean over samples and outputs
        outputs: C, the number of outputs
        steps: the number of greedy steps; a unit may be picked again

    Raises:
        ValueError: shapes that do not match, NaN or inf, or counts below 1

    Example:
        >>> gram, beta = torch.eye(2), torch.ones(2)
        >>> certificate_of_gram(gram, beta, 2.0, samples=1, outputs=1, steps=2).losses.tolist()
        [1.0, 0.5]
    """
    if gram.dim() != 2 or gram.shape != (len(gram), len(gram)) or beta.shape != (len(gram),):
        raise ValueError(
            f"gram: found shapes {tuple(gram.shape)} and {tuple(beta.shape)} of beta, expected "
            "(N, N) and (N,)"
        )
    if not (gram.isfinite().all() and beta.isfinite().all() and math.isfinite(target_norm)):
        raise ValueError(
            "gram: found NaN or inf in gram, beta or target_norm, expected finite numbers"
        )
    if min(samples, outputs, steps) < 1:
        raise ValueError(
            f"steps: found samples={samples}, outputs={outputs}, steps={steps}, expected at least 1"
        )
    gram, beta, mass = gram.double().cpu(), beta.double().cpu(), float(samples * outputs)
    dense_loss = float(target_norm - 2 * beta.mean() + gram.mean()) / mass
    variance = float(gram.diagonal().mean() - gram.mean()) / samples
    moments = Moments(
        samples, mass, gram.diagonal(), beta, target_norm, dense_loss,
        spread=variance / outputs, empty_loss=target_norm / mass,
    )  # fmt: skip
    rule = Rule(steps, size=len(gram) + 1, replacement=True)
    backend = backends.resolve("auto", on_gpu=False)
    path = ops.greedy_gram(gram, moments, rule, backend=backend)
    assert path.gap is not None
    return Certificate(path.losses, dense_loss, smoothness("mse", outputs), variance, path.gap)


@dataclass(frozen=True)
class Fit:
    """A law with two parameters, fitted by least squares: `a` and `b`, and their standard errors.

    form:     the law
    a:        the constant of `form`, or its factor if `form` is a power law
    b:        the slope of `form`, or its exponent if `form` is a power law
    a_error:  the standard error of `a`. It holds if the residuals are independent and have one
              variance; this is not tested
    b_error:  the standard error of `b`, under the same condition
    residual: the standard deviation of the residuals, over n - 2 degrees of freedom, in the units
              of the left side of `form`
    """

    form: str
    a: float
    b: float
    a_error: float
    b_error: float
    residual: float

    def __str__(self) -> str:
        return (
            f"{self.form}: a = {self.a:.4g} +- {self.a_error:.2g}, "
            f"b = {self.b:.4g} +- {self.b_error:.2g}, residual {self.residual:.3g}"
        )


@dataclass(frozen=True)
class Growth:
    """Two laws fitted to the same iterations: `log`, a + b log m (the paper's); `power`, a m^b."""

    log: Fit
    power: Fit

    @property
    def better(self) -> str:
        """The law with the smaller residual, "log" or "power". Both laws have two parameters."""
        return "log" if self.log.residual <= self.power.residual else "power"


def growth(samples: Iterable[float], iterations: Iterable[float]) -> Growth:
    """How the iterations that pre-training takes grow with the size m of the data set.

    Both laws are fitted by least squares to the iterations themselves (the power law not to their
    logarithms), so that their residuals can be compared.

    Args:
        samples: (n,), the sizes m, at least three distinct ones; repeat a size for another seed
        iterations: (n,), the iterations for each size, for example from `crossing`. Leave out the
            networks that never reached the goal, and report that: the fit holds for the others.

    Raises:
        ValueError, TypeError: too few sizes, different lengths, anything but positive numbers

    Example:
        >>> growth([100, 1000, 10000], [200, 300, 400]).better
        'log'
    """
    m, t = _columns("samples", samples, "iterations", iterations)
    distinct = len(np.unique(m))
    if distinct < 3:
        raise ValueError(
            f"samples: found {distinct} distinct sizes, expected at least three: two fit any law"
        )
    if m.min() <= 0 or t.min() <= 0:
        raise ValueError("samples: found numbers of 0 or less, expected positive ones")
    log_m = np.log(m)
    return Growth(_fit_line("t = a + b log(m)", log_m, t), _fit_power("t = a m^b", log_m, t))


def decay(iterations: Iterable[float], losses: Iterable[float]) -> Fit:
    """The rate at which a dense loss fell, by a least-squares line through its logarithm.

    The law is log(loss) = a - b t, so `b` is the rate per iteration, and each iteration multiplies
    the loss by exp(-b). Over a whole training the loss hardly ever falls at one rate. Pass only the
    iterations of interest, and look at the residual.

    Args:
        iterations: (n,), at least three distinct ones
        losses: (n,), the dense loss at each. For a monitor's history:
            decay([c.iteration for c in history], [c.dense_loss for c in history])

    Raises:
        ValueError, TypeError: too few iterations, different lengths, losses that are not positive

    Example:
        >>> round(decay([0, 1, 2], [1.0, 0.5, 0.25]).b, 6)
        0.693147
    """
    t, loss = _columns("iterations", iterations, "losses", losses)
    distinct = len(np.unique(t))
    if distinct < 3:
        raise ValueError(f"iterations: found {distinct} distinct ones, expected at least three")
    if loss.min() <= 0:
        raise ValueError(f"losses: found {loss.min():g}, expected positive numbers")
    return _fit_line("log(loss) = a - b t", -t, np.log(loss))


def crossing(
    iterations: Iterable[float], values: Iterable[float], goal: float | Iterable[float],
    *, rising: bool = True,
) -> float | None:  # fmt: skip
    """The first iteration at which a curve reaches a goal, interpolated linearly; None if never.

    Args:
        iterations: (n,), ascending
        values: (n,), the curve, for example the pruned network's accuracy
        goal: a number, or another curve (n,) at the same iterations, for example the dense
            network's accuracy
        rising: does the curve start below the goal, as an accuracy does, or above, as a loss?

    Raises:
        ValueError, TypeError: values that are not finite numbers, different lengths, or iterations
            that do not ascend

    Example:
        >>> crossing([0, 100, 200], [0.5, 0.8, 1.0], 0.9)
        150.0
    """
    t, curve = _columns("iterations", iterations, "values", values)
    if (np.diff(t) <= 0).any():
        raise ValueError("iterations: found numbers that do not ascend, expected ascending ones")
    goals = goal if isinstance(goal, Iterable) else np.full(len(t), goal)
    _, goal_curve = _columns("iterations", iterations, "goal", goals)
    ahead = (curve - goal_curve) * (1 if rising else -1)
    reached = np.flatnonzero(ahead >= 0)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(t[0])
    return float(t[i] - (t[i] - t[i - 1]) * ahead[i] / (ahead[i] - ahead[i - 1]))


def _columns(
    first_name: str, first: Iterable[float], second_name: str, second: Iterable[float]
) -> tuple[Numbers, Numbers]:
    """Two arguments as arrays of finite float64 numbers of the same length (n,)."""
    columns = []
    for name, argument in ((first_name, first), (second_name, second)):
        try:
            column = np.asarray(list(argument), dtype=np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"{name}: found {argument!r}, expected numbers") from None
        if column.ndim != 1 or not len(column) or not np.isfinite(column).all():
            raise ValueError(f"{name}: found {argument!r}, expected one or more finite numbers")
        columns.append(column)
    if len(columns[0]) != len(columns[1]):
        raise ValueError(
            f"{second_name}: found {len(columns[1])} numbers, expected {len(columns[0])}, one for "
            f"each of {first_name}"
        )
    return columns[0], columns[1]


def _with_errors(form: str, a: float, b: float, jacobian: Numbers, residuals: Numbers) -> Fit:
    """Adds the standard errors: the square roots of the diagonal of s^2 (J^T J)^-1.

    jacobian: (n, 2), J, the derivatives of the law in a and b; residuals: (n,)
    """
    variance = float(residuals @ residuals) / (len(residuals) - 2)  # s^2
    _, triangle = np.linalg.qr(jacobian)
    inverse = np.linalg.inv(triangle)
    errors = np.sqrt(variance * np.square(inverse).sum(1))
    return Fit(form, a, b, float(errors[0]), float(errors[1]), math.sqrt(variance))


def _fit_line(form: str, x: Numbers, y: Numbers) -> Fit:
    """y = a + b x."""
    jacobian = np.stack([np.ones_like(x), x], axis=1)
    a, b = np.linalg.lstsq(jacobian, y)[0]
    return _with_errors(form, float(a), float(b), jacobian, y - jacobian @ [a, b])


def _fit_power(form: str, x: Numbers, y: Numbers) -> Fit:
    """y = a exp(b x), by the Gauss-Newton method with step halving.

    It starts from the line through log(y). While fitting, x is centred; otherwise a change of a and
    a change of b would do almost the same.
    """
    mean = float(x.mean())
    x = x - mean
    start = _fit_line(form, x, np.log(y))
    parameters = np.array([math.exp(start.a), start.b])

    def jacobian_at(p: Numbers) -> Numbers:
        power = np.exp(p[1] * x)
        return np.stack([power, p[0] * x * power], axis=1)

    def residuals_at(p: Numbers) -> Numbers:
        return y - p[0] * np.exp(p[1] * x)

    def sum_of_squares(p: Numbers) -> float:
        return float(np.square(residuals_at(p)).sum())

    for _ in range(FITTING_STEPS):
        move = np.linalg.lstsq(jacobian_at(parameters), residuals_at(parameters))[0]
        shorter_moves = (parameters + move / 2**i for i in range(HALVINGS))
        lowest = sum_of_squares(parameters)
        better = next((p for p in shorter_moves if sum_of_squares(p) < lowest), None)
        if better is None:
            break
        parameters = better
    b = float(parameters[1])
    a = float(parameters[0]) * math.exp(-b * mean)  # back to x that is not centred
    power = np.exp(b * (x + mean))
    jacobian = np.stack([power, a * (x + mean) * power], axis=1)
    return _with_errors(form, a, b, jacobian, residuals_at(parameters))
