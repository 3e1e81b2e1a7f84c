"""The interface of the kernels: checks every argument once and calls the chosen backend.

Backends: "cpu" (cpu.py, the compiled extension), "cuda" (cuda.py, the same on a GPU) and
"reference" (reference.py, plain torch in float64, which judges the other two).

Shapes: N units, m samples, C outputs. features (N, m), each row contiguous; outgoing (N, C), the
consumer's weights times N, so that phi_j = features[j] * outgoing[j]. All functions raise
ValueError or TypeError for shapes, types or backends that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.losses import Target
from ..runtime.distributed import ALONE, Ranks
from . import cpu, cuda, reference
from .backend import extension
from .checks import (
    check,
    check_backend,
    check_features,
    check_parts,
    check_spread,
    check_starts,
    check_target,
    checked_units,
)  # fmt: skip
from .path import Exact, Moments, NestedFit, Path, Rule, Step
from .products import columns_rounding, float64_rounding
from .structs import Extent

__all__ = [
    "Exact", "Extent", "candidate_loss", "candidate_slope", "collect_features", "columns_rounding",
    "gram_columns", "greedy_columns", "greedy_gram", "greedy_pointwise", "greedy_refit",
    "measure_features", "swap_gains",
]  # fmt: skip


def collect_features(
    features: Tensor, hidden: Tensor, at: int, extent: Extent | None = None
) -> Extent:
    """Writes a layer's activations into features[:, at : at + b], unit by unit, and measures them.

    Args:
        features: (N, m) float32 or float64
        hidden: (b, N) of the same type, the activations
        at: the column that the first sample goes to
        extent: that of the samples in `features` so far, changed in place; None: there are none

    Returns:
        the extent with the new samples; `largest` is NaN or inf for a unit with such an activation

    Example:
        >>> import torch
        >>> from greedyprune.kernels import ops
        >>> features = torch.zeros(2, 3)
        >>> ops.collect_features(features, torch.tensor([[1.0, -4.0]]), at=2).largest.tolist()
        [1.0, 4.0]
        >>> features.tolist()
        [[0.0, 0.0, 1.0], [0.0, 0.0, -4.0]]
    """
    check_features(features)
    check("hidden", hidden, (len(hidden), len(features)), features.dtype)
    if not 0 <= at <= features.shape[1] - len(hidden):
        raise ValueError(
            f"at: found {at} for {len(hidden)} samples, expected room in {features.shape[1]}"
        )
    extent = Extent.zeros(len(features)) if extent is None else extent
    cpu.collect_features(features, hidden.contiguous(), at, extent)
    return extent


def measure_features(features: Tensor) -> Extent:
    """The extent of features (N, m) float32 or float64: sum of squares and largest magnitude."""
    check_features(features)
    return cpu.measure_features(features)


def candidate_loss(
    features: Tensor,
    outgoing: Tensor,
    outputs: Tensor,
    target: Target,
    *,
    shrink: float = 1.0,
    units: Tensor | None = None,
    extent: Extent | None = None,
    dtype: torch.dtype = torch.float64,
    errors: Tensor | None = None,
    backend: str = "cpu",
) -> Tensor:
    """mass * L(outputs + shrink * phi_j) for each unit j, without an (N, m, C) temporary.

    Args:
        features: (N, m) float32 or float64, or for "cuda" and "reference" bfloat16 or float16
        outgoing: (N, C)
        outputs: (C, m) float64, to which the units add
        target: what the outputs are compared with
        shrink: factor of phi, 1 / k at step k
        units: (n,) int64, the units to score; None: all
        extent: that of the features, as `measure_features` gives it; None: it is measured here
        dtype: the type that the kernel computes in, float32 or float64; its sums are float64
        errors: (n,) float64, written by "cpu" alone: a bound on the rounding error of each loss

    Returns:
        (n,) float64: sums, to be divided by `target.mass`

    Source: eq. (1).

    Example:
        >>> import torch
        >>> from greedyprune.data.losses import Criterion
        >>> from greedyprune.kernels import ops
        >>> target = Criterion("mse").target(torch.tensor([[3.0]]), (1, 1))
        >>> features, outgoing = torch.tensor([[1.0], [2.0]]), torch.ones(2, 1)
        >>> ops.candidate_loss(features, outgoing, torch.ones(1, 1).double(), target).tolist()
        [1.0, 0.0]
    """
    check_backend(backend, "cpu", "cuda", "reference")
    check_features(features, outgoing, backend)
    check("outputs", outputs, (outgoing.shape[1], features.shape[1]))
    units = checked_units(units, features)
    if backend == "reference":
        return reference.candidate_loss(
            features, outgoing, outputs, target, shrink=shrink, units=units
        )
    check_target(target, features, outgoing)
    base = target.relative(outputs).to(dtype).contiguous()
    weights = outgoing.to(dtype).contiguous()
    if backend == "cuda":
        losses = cuda.candidate_loss(features, weights, base, target, shrink, units, extent, dtype)
    else:
        if errors is not None:
            check("errors", errors, (len(units),), torch.float64)
        losses = cpu.candidate_loss(
            features, weights, base, target, shrink, units, extent, dtype, errors
        )
    if target.linear is not None:
        losses += (target.linear * outputs).sum()
        losses += shrink * candidate_slope(
            features, outgoing, target.linear, units=units, backend=backend
        )
    return losses


def candidate_slope(
    features: Tensor, outgoing: Tensor, gradient: Tensor, *, units: Tensor | None = None,
    backend: str = "cpu",
) -> Tensor:  # fmt: skip
    """<gradient, phi_j> for each unit j, summed over samples and outputs: (n,) float64.

    Args:
        features: (N, m); outgoing: (N, C); gradient: (C, m) float64
        units: (n,) int64, the units to score; None: all
    """
    check_backend(backend, "cpu", "cuda", "reference")
    check_features(features, outgoing, backend)
    check("gradient", gradient, (outgoing.shape[1], features.shape[1]))
    units = checked_units(units, features)
    if backend == "reference":
        return reference.candidate_slope(features, outgoing, gradient, units=units)
    launch = cuda.candidate_slope if backend == "cuda" else cpu.candidate_slope
    weights, slope = outgoing.double().contiguous(), gradient.double().contiguous()
    return launch(features, weights, slope, units)


def gram_columns(
    features: Tensor, outgoing: Tensor, units: Tensor, out: Tensor, spread: bool = False
) -> None:
    """Writes columns of the Gram matrix: out[i, j] = <phi_units[i], phi_j>, eq. (2).

    The error of an entry is at most `columns_rounding(features.dtype)` |phi_i| |phi_j|.

    Args:
        features: (N, m) float32 or float64; outgoing: (N, C)
        units: (n,) int64; out: (n, N) float64
        spread: the samples are spread over processes, so that this one may have none
    """
    check_features(features, outgoing, spread=spread)
    units = checked_units(units, features)
    check("out", out, (len(units), len(features)), torch.float64)
    cpu.gram_columns(features, outgoing.double().contiguous(), units, out)


def greedy_gram(
    gram: Tensor, moments: Moments, rule: Rule, *, exact: Exact | None = None,
    with_gap: bool = True, step: Step | None = None, ranks: Ranks = ALONE, backend: str = "cpu",
) -> Path:  # fmt: skip
    """All greedy steps for squared error on a Gram matrix, O(N) a step.

    Args:
        gram: (N, N) float64, G_ij = <phi_i, phi_j>
        moments: the sums over the samples
        exact: for "cpu": the features, which make every pick exact where the matrix is rounded
        ranks: the processes that the samples of `exact` are spread over; Gram matrix and moments
            are those of all samples

    Source: eq. (2).

    Example:
        >>> import torch
        >>> from greedyprune.kernels import ops
        >>> from greedyprune.kernels.path import Moments, Rule
        >>> phi, target = torch.tensor([1.0, 3.0]).double(), 2.0
        >>> moments = Moments(1, 1.0, phi**2, phi * target, target**2, 0.0, 0.0, 4.0)
        >>> path = ops.greedy_gram(phi[:, None] * phi, moments, Rule(2, 2, replacement=True))
        >>> path.order.tolist(), path.losses.tolist()
        ([0, 1], [1.0, 0.0])
    """
    check_backend(backend, "cpu", "cuda", "reference")
    units = len(moments.norm)
    check("gram", gram, (units, units), torch.float64)
    _check_exact(exact, moments, backend, ranks)
    gram = gram.contiguous()
    if backend == "reference":
        return reference.greedy_gram(gram, moments, rule, with_gap=with_gap, step=step)
    rounding = _rounding(moments, exact)
    if backend == "cuda":
        return cuda.greedy_gram(gram, moments, rule, with_gap, step, rounding)
    return cpu.greedy_gram(gram, moments, rule, exact, with_gap, step, ranks, rounding)


def greedy_columns(
    columns: Callable[[Tensor, Tensor], None], moments: Moments, rule: Rule, *,
    exact: Exact | None = None, block: int = 16, capacity: int = 2**62, with_gap: bool = True,
    step: Step | None = None, ranks: Ranks = ALONE, backend: str = "cpu",
) -> Path:  # fmt: skip
    """`greedy_gram` on columns of the Gram matrix, fetched when the column of a pick is missing.

    Args:
        columns: called with units (n,) int64 and out (n, N) float64, to write their columns there
        exact, ranks: as for `greedy_gram`
        block: the most columns that are fetched at a time
        capacity: the most columns that are kept
        backend: "cpu" or "cuda"

    Source: eq. (2). Which columns are fetched together changes no number.
    """
    check_backend(backend, "cpu", "cuda")
    _check_exact(exact, moments, backend, ranks)
    units, rounding = len(moments.norm), _rounding(moments, exact)
    block = min(block, units)
    # No column is ever dropped where there is room for N, and a block that may lie across the end.
    capacity = max(block, min(capacity, units + block))
    if backend == "cuda":
        return cuda.greedy_columns(
            columns, moments, rule, block, capacity, with_gap, step, rounding
        )
    return cpu.greedy_columns(
        columns, moments, rule, exact, block, capacity, with_gap, step, ranks, rounding
    )


def greedy_pointwise(
    features: Tensor,
    outgoing: Tensor,
    bias: Tensor,
    target: Target,
    rule: Rule,
    *,
    extent: Extent | None = None,
    starts: Tensor | None = None,
    batch: int = 0,
    mass: float | None = None,
    with_gap: bool = True,
    step: Step | None = None,
    ranks: Ranks = ALONE,
    backend: str = "cpu",
) -> Path:
    """All greedy steps for any loss of `Target`, by the candidates' losses themselves.

    Args:
        features: (N, m) float32 or float64, or for "cuda" bfloat16 or float16
        outgoing: (N, C); bias: (C,)
        extent: that of the features, as `measure_features` gives it; None: it is measured here
        starts: (steps,) int64: step k scores on samples [starts[k - 1], starts[k - 1] + batch)
            alone (Wolfe et al. 2021's stochastic form); the reported losses are those of all
        mass: what sums over the samples are divided by; None: target.mass
        ranks: for "cpu" without `starts`: the processes that the samples are spread over, of which
            this one may have none; mass is that of all samples
        backend: "cpu" or "cuda"

    Source: eq. (1).
    """
    check_backend(backend, "cpu", "cuda")
    check_features(features, outgoing, backend, spread=ranks.size > 1)
    check_target(target, features, outgoing)
    check("bias", bias, (outgoing.shape[1],))
    if ranks.size > 1:
        check_spread(ranks.size, starts, mass, backend)
    if starts is not None:
        check_starts(starts, batch, rule.steps, features.shape[1])
    with_gap = with_gap and starts is None
    weights, bias = outgoing.double().contiguous(), bias.double().contiguous()
    if backend == "cuda":
        return cuda.greedy_pointwise(
            features, weights, bias, target, rule, extent, starts, batch, with_gap, step
        )
    return cpu.greedy_pointwise(
        features, weights, bias, target, rule, extent, starts, batch,
        target.mass if mass is None else mass, with_gap, step, ranks,
    )  # fmt: skip


def greedy_refit(
    grams: Sequence[Tensor], rights: Sequence[Tensor], target_norm: float, rule: Rule, *,
    widths: Sequence[int], scale: float = 1.0, step: Step | None = None, backend: str = "cpu",
) -> tuple[Path, list[NestedFit]]:  # fmt: skip
    """All greedy steps of least squares that is refitted in every step.

    Each step adds the unit with the largest drop of the sum, over all parts, of
    min_B |t - B x_S|^2. S are the picked units, the same in all parts; each part has its own
    target t, and w features x of each unit, side by side.

    Args:
        grams: of each part (N w, N w) float64, <x_i, x_j>, with any ridge on its diagonal
        rights: of each part (N w, C) float64, <x_i, t>; w and C may differ between parts
        target_norm: |t|^2, summed over the parts
        widths: w of each part, the features of a unit
        scale: factor of the losses; 1 gives the squared errors
        backend: "cpu" or "reference"

    Returns:
        the path, and each part's least squares

    Source: eq. (4): a Cholesky factor, of which a column is formed when its unit is picked.

    Example:
        >>> import torch
        >>> from greedyprune.kernels import ops
        >>> from greedyprune.kernels.path import Rule
        >>> grams = [torch.eye(2).double(), torch.eye(2).double()]
        >>> rights = [torch.tensor([[2.0], [1.0]]).double(), torch.tensor([[0.0], [3.0]]).double()]
        >>> path, _ = ops.greedy_refit(grams, rights, 14.0, Rule(2, 2, False), widths=[1, 1])
        >>> path.order.tolist(), path.losses.tolist()
        ([1, 0], [4.0, 0.0])
    """
    check_backend(backend, "cpu", "reference")
    check_parts(grams, rights, widths)
    if backend == "reference":
        return reference.greedy_refit(
            grams, rights, target_norm, rule, widths=widths, scale=scale, step=step
        )
    if max(widths) > extension().most_width:
        raise ValueError(
            f"widths: found {max(widths)}, expected at most {extension().most_width} each"
        )
    return cpu.greedy_refit(grams, rights, target_norm, rule, widths, scale, step)


def swap_gains(
    swept: Tensor, right: Tensor, norms: Tensor, kept: Tensor, dropped: Tensor, inner: Tensor,
    pull: Tensor, costs: Tensor, *, backend: str = "cpu",
) -> Tensor:  # fmt: skip
    """The drop of a squared error when a kept unit is exchanged for a dropped one: (p, d) float64.

    exchange.py says what A, B and P are.

    Args:
        swept: (N w, N w) float64, A, the Gram matrix swept on all kept units
        right: (N w, C) float64, B, the right side swept with it
        norms: (N w,) float64, the Gram matrix's diagonal
        kept: (p,) int64, the kept units that are tried; dropped: (d,) int64
        inner: (p, w, w) float64, P = (-A_pp)^-1; pull: (p, w, C) float64, P B_p
        costs: (p,) float64, the growth of the error when each is dropped
        backend: "cpu" or "reference"

    Source: csrc/cpu/swap_gains.cpp has the formula.
    """
    check_backend(backend, "cpu", "reference")
    size, outputs = right.shape
    check("swept", swept, (size, size), torch.float64)
    width = inner.shape[-1]
    check("inner", inner, (len(kept), width, width), torch.float64)
    check("pull", pull, (len(kept), width, outputs), torch.float64)
    check("costs", costs, (len(kept),), torch.float64)
    check("norms", norms, (size,), torch.float64)
    if backend == "reference":
        return reference.swap_gains(swept, right, norms, kept, dropped, inner, pull, costs)
    if width > extension().most_swap_width:
        raise ValueError(
            f"width: found {width}, expected at most {extension().most_swap_width} for exchanges"
        )
    return cpu.swap_gains(swept, right, norms, kept, dropped, inner, pull, costs)


def _check_exact(exact: Exact | None, moments: Moments, backend: str, ranks: Ranks) -> None:
    if exact is None:
        return
    if backend != "cpu":
        raise ValueError(f"exact: found features for backend={backend!r}, expected None")
    check_features(exact.features, exact.outgoing, spread=ranks.size > 1)
    shape = (exact.outgoing.shape[1], exact.features.shape[1])
    check("target", exact.target, shape, torch.float64)


def _rounding(moments: Moments, exact: Exact | None) -> float:
    """A bound on the error of the Gram matrix's entries, relative to |phi_i| |phi_j|."""
    return float64_rounding(moments.samples) if exact is None else exact.rounding
