"""What theory says of greedy forward selection, computed: the bound, and fits to what was measured.

Proved, and checked in the tests: README eq. 3. Let L be the mean over samples of a loss that is
convex and B-smooth in the outputs, all N units candidates, repeats allowed. Then, after k steps,

    L_k <= L_N + (B/2) V H_k / k,                                                              (3)

L_N the dense loss, V = mean_j |phi_j - mean phi|^2 (a mean over samples), H_k the harmonic number.
Proof: the best unit is at least as good as one drawn at random. With u = z / (k - 1) and p the mean
of all phi_j, the outputs (z + phi_j) / k have the mean ((k - 1) u + p) / k over j. Smoothness puts
their mean loss at most (B/2) V / k^2 above the loss of that mean, which convexity puts at most at
((k - 1) L_{k-1} + L_N) / k. So k L_k <= (k - 1) L_{k-1} + L_N + (B/2) V / k; sum over k.

Proved for any picks: L_k - gap_k is below the loss of any convex reweighting of all N units, since
a convex function lies above its tangent (Frank and Wolfe 1956; Jaggi 2013).

Proved by others, under their conditions, and not computed here: Ye et al. (2020, arXiv:2003.01794)
have the rate 1/k, and 1/k^2 where the targets lie inside the hull of the units' outputs.
Wolfe et al. (2021, arXiv:2108.00259) put a bound on the dense loss under (stochastic) gradient
descent into such a rate: for two-layer networks, wide beside the data set, some number of
iterations is enough for the pruned network to be good.

Only the paper's claim: that this number grows like the logarithm of the size m of the data set.
`growth` fits a + b log m to iterations that were measured, with a power law beside it; a good fit
proves neither. `decay`, too, is a fit: a dense loss need not fall exponentially.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..data.losses import KINDS, bound
from ..kernels.path import Moments, Rule
from ..kernels.reference import greedy_gram
from ..surgery.selection import LayerSelection, Selection

FITTING_STEPS = 200  # of Gauss and Newton, which take some ten


@dataclass(frozen=True, eq=False)
class Certificate:
    """README eq. 3 and the Frank-Wolfe gap along a greedy path of k steps, all float64.

    losses:     (k,) the loss after each step
    dense_loss: L_N
    smoothness: B
    variance:   V, with the samples (and outputs) weighted as the loss weights them
    gap:        (k,) the Frank-Wolfe gap
    """

    losses: Tensor
    dense_loss: float
    smoothness: float
    variance: float
    gap: Tensor

    @property
    def selection_term(self) -> Tensor:
        """(k,): (B/2) V H_k / k, what (3) allows the selection to add to the dense loss."""
        return self.bound - self.dense_loss

    @property
    def bound(self) -> Tensor:
        """(k,): the right side of (3)."""
        return bound(self.dense_loss, self.smoothness / 2 * self.variance, len(self.losses))

    @property
    def excess(self) -> Tensor:
        """(k,): L_k - L_N, what the selection did add; below zero where it improved the network."""
        return self.losses - self.dense_loss

    @property
    def lowest(self) -> Tensor:
        """(k,): no convex reweighting of all units has a loss below this, L_k - gap_k."""
        return self.losses - self.gap


def smoothness(loss: str, outputs: int) -> float:
    """B of (3) for torch's mean of a loss over samples with `outputs` outputs each.

    1/2 for "cross_entropy", 2 / outputs for "mse", 1 / (4 outputs) for "bce_with_logits" (torch
    takes the mean over outputs, too). ValueError for any other loss.
    """
    if loss not in KINDS:
        raise ValueError(f"loss: found {loss!r}, expected one of {list(KINDS)}")
    _, each = KINDS[loss]
    return each if loss == "cross_entropy" else each / outputs


def certificate(selection: Selection | LayerSelection) -> Certificate:
    """Equation (3), term by term, and the gap, of a selection of one layer.

    ValueError where (3) does not hold: it takes `steps` (repeats), all units as candidates on all
    data, weights="counts" and a convex loss; TypeError for no selection.
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
            "selection: found one without a bound, expected one by steps=, with all candidates, "
            "weights='counts' and a loss that is known to be convex"
        )
    dense_loss = float(selection.dense_loss)
    smooth = smoothness(selection.loss, sum(selection.outputs.values()))
    variance = 2 / smooth * (float(selection.bound[0]) - dense_loss)
    return Certificate(selection.losses, dense_loss, smooth, variance, selection.gap)


def certificate_of_gram(
    gram: Tensor, beta: Tensor, target_norm: float, *, samples: int, outputs: int, steps: int
) -> Certificate:
    """The same for squared error, of `steps` greedy steps on a Gram matrix (README eq. 2).

    Args:
        gram: (N, N), G_ij = <phi_i, phi_j>, phi_j = N w_j h_j, sums over samples and outputs
        beta: (N,), <phi_j, t>, t the target less the bias
        target_norm: |t|^2
        samples, outputs: m and C: torch's mse is the mean over their product

    Raises:
        ValueError: other shapes, NaN or inf, steps below 1
    """
    if gram.dim() != 2 or gram.shape != (len(gram), len(gram)) or beta.shape != (len(gram),):
        raise ValueError(
            f"gram: found shapes {tuple(gram.shape)} and {tuple(beta.shape)} of beta, expected "
            "(N, N) and (N,)"
        )
    if not (gram.isfinite().all() and beta.isfinite().all() and math.isfinite(target_norm)):
        raise ValueError("gram: NaN or inf in it, beta or target_norm, expected finite numbers")
    if min(samples, outputs, steps) < 1:
        raise ValueError(
            f"steps: found samples={samples}, outputs={outputs}, steps={steps}, expected at least 1"
        )
    gram, beta, mass = gram.double(), beta.double(), float(samples * outputs)
    dense_loss = float(target_norm - 2 * beta.mean() + gram.mean()) / mass
    variance = float(gram.diagonal().mean() - gram.mean()) / samples
    sums = Moments(
        samples, mass, gram.diagonal(), beta, target_norm, dense_loss,
        spread=variance / outputs, empty_loss=target_norm / mass,
    )  # fmt: skip
    path = greedy_gram(gram, sums, Rule(steps, len(gram) + 1, replacement=True))
    assert path.gap is not None
    return Certificate(path.losses, dense_loss, smoothness("mse", outputs), variance, path.gap)


@dataclass(frozen=True)
class Fit:
    """Two parameters by least squares: `a` and `b`, with their standard errors.

    form:     what was fitted
    residual: the standard deviation of what is left, over n - 2 degrees of freedom, in the units of
              the left side of `form`

    The errors hold for independent residuals of one variance around the form fitted; nothing here
    tests that.
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
    """Two laws for the same iterations: `log`, a + b log m (the paper's), and `power`, a m^b."""

    log: Fit
    power: Fit

    @property
    def better(self) -> str:
        """Which has the smaller residual, in iterations; both have two parameters."""
        return "log" if self.log.residual <= self.power.residual else "power"


def growth(samples: Iterable[float], iterations: Iterable[float]) -> Growth:
    """How the iterations that pre-training takes grow with the size m of the data set.

    Both laws are fitted by least squares to the iterations themselves (the power law not to their
    logarithms), so that their residuals can be compared.

    Args:
        samples: sizes m, at least three distinct ones; the same size again for another seed
        iterations: the iterations of each, `crossing`'s say; where a network never got there, leave
            it out, and say so beside the result: the fit is then of those that did

    Raises:
        ValueError: too few, of different lengths, not positive or not finite
    """
    m, t = _columns("samples", samples, "iterations", iterations)
    if len(np.unique(m)) < 3:
        raise ValueError(
            f"samples: found {len(np.unique(m))} distinct sizes, expected at least three: two "
            "fit any law"
        )
    if m.min() <= 0 or t.min() <= 0:
        raise ValueError("samples: found numbers of 0 or less, expected positive ones")
    x = np.log(m)
    return Growth(_line("t = a + b log(m)", x, t), _power("t = a m^b", x, t))


def decay(iterations: Iterable[float], losses: Iterable[float]) -> Fit:
    """The rate at which a dense loss fell: a least-squares line through its logarithm.

    log(loss) = a - b t: `b` is the rate for each iteration, exp(-b) the factor. For a monitor's
    history: decay([c.iteration for c in history], [c.dense_loss for c in history]). Over all of a
    training the loss hardly ever falls at one rate; give the stretch that is meant, and look at the
    residual.

    Raises:
        ValueError: fewer than three iterations, other lengths, losses not positive or not finite
    """
    t, loss = _columns("iterations", iterations, "losses", losses)
    if len(np.unique(t)) < 3:
        raise ValueError(
            f"iterations: found {len(np.unique(t))} distinct ones, expected at least three"
        )
    if loss.min() <= 0:
        raise ValueError(f"losses: found {loss.min():g}, expected positive numbers")
    return _line("log(loss) = a - b t", -t, np.log(loss))


def crossing(
    iterations: Iterable[float], values: Iterable[float], goal: float | Iterable[float],
    *, rising: bool = True,
) -> float | None:  # fmt: skip
    """The first iteration at which a curve reaches a goal, interpolated linearly; None if never.

    Args:
        iterations: (n,), ascending
        values: (n,), the curve: the pruned network's accuracy, say
        goal: a number, or another curve (n,) at the same iterations: the dense network's
        rising: the goal is reached from below (an accuracy); False: from above (a loss)

    Raises:
        ValueError: nothing, other lengths, not finite, iterations that do not ascend

    Example:
        >>> crossing([0, 100, 200], [0.5, 0.8, 1.0], 0.9)
        150.0
    """
    t, values_at = _columns("iterations", iterations, "values", values)
    if (np.diff(t) <= 0).any():
        raise ValueError("iterations: found ones that do not ascend, expected each above the last")
    goals = goal if isinstance(goal, Iterable) else np.full(len(t), goal)
    _, goal_at = _columns("iterations", iterations, "goal", goals)
    ahead = (values_at - goal_at) * (1 if rising else -1)
    reached = np.flatnonzero(ahead >= 0)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(t[0])
    return float(t[i] - (t[i] - t[i - 1]) * ahead[i] / (ahead[i] - ahead[i - 1]))


def _columns(
    name: str, first: Iterable[float], other_name: str, second: Iterable[float]
) -> tuple[np.ndarray, np.ndarray]:
    columns = []
    for called, given in ((name, first), (other_name, second)):
        try:
            column = np.asarray(list(given), dtype=np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"{called}: found {given!r}, expected numbers") from None
        if column.ndim != 1 or not len(column) or not np.isfinite(column).all():
            raise ValueError(f"{called}: found {given!r}, expected one or more finite numbers")
        columns.append(column)
    if len(columns[0]) != len(columns[1]):
        raise ValueError(
            f"{other_name}: found {len(columns[1])} numbers, expected {len(columns[0])}, one for "
            f"each of {name}"
        )
    return columns[0], columns[1]


def _fit(form: str, a: float, b: float, slopes: np.ndarray, left: np.ndarray) -> Fit:
    """slopes: (n, 2), the derivatives in a and b; left: (n,), the residuals."""
    variance = float(left @ left) / (len(left) - 2)
    _, triangle = np.linalg.qr(slopes)
    inverse = np.linalg.inv(triangle)
    errors = np.sqrt(variance * np.square(inverse).sum(1))
    return Fit(form, a, b, float(errors[0]), float(errors[1]), math.sqrt(variance))


def _line(form: str, x: np.ndarray, y: np.ndarray) -> Fit:
    slopes = np.stack([np.ones_like(x), x], axis=1)
    a, b = np.linalg.lstsq(slopes, y)[0]
    return _fit(form, float(a), float(b), slopes, y - slopes @ [a, b])


def _power(form: str, x: np.ndarray, y: np.ndarray) -> Fit:
    """y = a exp(b x), by Gauss and Newton from the line through log(y).

    x is taken from its mean while fitting, or a and b would be all but the same parameter.
    """
    mean = float(x.mean())
    x = x - mean
    start = _line(form, x, np.log(y))
    parameters = np.array([math.exp(start.a), start.b])

    def slopes_at(p: np.ndarray) -> np.ndarray:
        growing = np.exp(p[1] * x)
        return np.stack([growing, p[0] * x * growing], axis=1)

    def left_at(p: np.ndarray) -> np.ndarray:
        return y - p[0] * np.exp(p[1] * x)

    def loss(p: np.ndarray) -> float:
        return float(np.square(left_at(p)).sum())

    for _ in range(FITTING_STEPS):
        move = np.linalg.lstsq(slopes_at(parameters), left_at(parameters))[0]
        tried = (parameters + move / 2**i for i in range(40))
        better = next((p for p in tried if loss(p) < loss(parameters)), None)
        if better is None:
            break
        parameters = better
    b = float(parameters[1])
    a = float(parameters[0]) * math.exp(-b * mean)
    growing = np.exp(b * (x + mean))
    slopes = np.stack([growing, a * (x + mean) * growing], axis=1)
    return _fit(form, a, b, slopes, left_at(parameters))
