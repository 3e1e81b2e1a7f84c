"""The kernels: every tensor is checked here, once, and handed to the compiled extension.

Shapes: N units, m samples, C outputs. features (N, m) float32 or float64, each row contiguous;
outgoing (N, C) float64, the consumer's weights times N, so that phi_j = features[j] * outgoing[j].
`reference` says the same in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.losses import Target
from ..runtime.distributed import ALONE, Ranks
from . import cuda as _cuda
from . import reference
from .backend import extension
from .checks import check, check_features, check_target, checked_units
from .path import Moments, Path, Refit, Rule, Step
from .structs import Extent, Run, Struct, features_struct, quadratic_struct, target_struct

RANK = 128  # of the approximation by which coming picks are foreseen


@dataclass(frozen=True)
class Exact:
    """What decides between units that a rough Gram matrix can't tell apart: the features.

    rounding: how well the Gram matrix is known, as a share of |phi_i| |phi_j|
    features: (N, m); outgoing: (N, C); target: (C, m) float64, the target less the bias
    """

    rounding: float
    features: Tensor
    outgoing: Tensor
    target: Tensor


def collect_features(
    features: Tensor, hidden: Tensor, at: int, extent: Extent | None = None
) -> Extent:
    """Writes a layer's activations hidden (b, N) into features[:, at : at + b], features (N, m).

    Args:
        features: (N, m) float32 or float64, each row contiguous
        hidden: (b, N) of the same type
        extent: of what is in `features` already, and gets what is added; None: nothing is

    Returns:
        the extent, its `largest` NaN or inf for a unit with such an activation

    Raises:
        ValueError, TypeError: shapes or types that do not fit
    """
    check_features(features)
    check("hidden", hidden, (len(hidden), len(features)), features.dtype)
    if not 0 <= at <= features.shape[1] - len(hidden):
        raise ValueError(
            f"at: found {at} for {len(hidden)} samples, expected room in {features.shape[1]}"
        )
    extent = Extent.zeros(len(features)) if extent is None else extent
    hidden = hidden.contiguous()
    extension().collect_features(
        features_struct(Struct(), features), extent.squares.data_ptr(), extent.largest.data_ptr(),
        hidden.data_ptr(), len(hidden), at, torch.get_num_threads(),
    )  # fmt: skip
    return extent


def measure_features(features: Tensor) -> Extent:
    """The extent of features (N, m) float32 or float64, each row contiguous."""
    check_features(features)
    extent = Extent.zeros(len(features))
    extension().measure_features(
        extent.squares.data_ptr(), extent.largest.data_ptr(),
        features_struct(Struct(), features), torch.get_num_threads(),
    )  # fmt: skip
    return extent


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
        features: (N, m) float32 or float64
        outgoing: (N, C)
        outputs: (C, m) float64, what the units add to
        target: what the outputs are compared with
        units: (n,) int64, which units; None: all
        extent: of the features, as `measure_features` gives it; None: measured here
        dtype: what the kernel computes in, float32 or float64; sums are float64
        errors: (n,) float64, gets by how much rounding can have moved each at most; "cpu" only
        backend: "cpu", "cuda" (also for features in bfloat16 and float16) or "reference"

    Returns:
        (n,) float64: sums, to be divided by `target.mass`

    Raises:
        ValueError, TypeError: shapes or types that do not fit

    Source: README eq. 1.
    """
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
        losses = _cuda.candidate_loss(features, weights, base, target, shrink, units, extent, dtype)
    else:
        keep = Struct()
        losses = torch.empty(len(units), dtype=torch.float64)
        if errors is not None:
            check("errors", errors, (len(units),), torch.float64)
        _C = extension()
        launch = _C.candidate_loss_f64 if dtype == torch.float64 else _C.candidate_loss_f32
        launch(
            losses.data_ptr(), 0 if errors is None else errors.data_ptr(),
            units.data_ptr(), len(units),
            features_struct(keep, features, extent or measure_features(features)),
            weights.data_ptr(), shrink, base.data_ptr(),
            target_struct(keep, target, dtype, scale=1.0), torch.get_num_threads(),
        )  # fmt: skip
    if target.linear is not None:
        losses += (target.linear * outputs).sum()
        losses += shrink * candidate_slope(
            features, outgoing, target.linear, units=units, backend=backend
        )
    return losses


def candidate_slope(
    features: Tensor,
    outgoing: Tensor,
    gradient: Tensor,
    *,
    units: Tensor | None = None,
    backend: str = "cpu",
) -> Tensor:
    """<gradient, phi_j> for each unit j, summed over samples and outputs: (n,) float64.

    Args:
        features: (N, m) float32 or float64; outgoing: (N, C); gradient: (C, m) float64
        units: (n,) int64, which units; None: all

    Raises:
        ValueError, TypeError: shapes or types that do not fit
    """
    check_features(features, outgoing, backend)
    check("gradient", gradient, (outgoing.shape[1], features.shape[1]))
    units = checked_units(units, features)
    if backend == "reference":
        return reference.candidate_slope(features, outgoing, gradient, units=units)
    weights, slope = outgoing.double().contiguous(), gradient.double().contiguous()
    if backend == "cuda":
        return _cuda.candidate_slope(features, weights, slope, units)
    keep = Struct()
    slopes = torch.empty(len(units), dtype=torch.float64)
    extension().candidate_slope_f64(
        slopes.data_ptr(), 0, units.data_ptr(), len(units), features_struct(keep, features),
        weights.data_ptr(), slope.data_ptr(), outgoing.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return slopes


def gram_columns(
    features: Tensor, outgoing: Tensor, units: Tensor, out: Tensor, spread: bool = False
) -> None:
    """Columns of the Gram matrix: out[i, j] = <phi_units[i], phi_j>, README eq. 2.

    Each is off by at most `columns_rounding(features.dtype)` |phi_i| |phi_j|.

    Args:
        features: (N, m) float32 or float64; outgoing: (N, C) float64
        units: (n,) int64; out: (n, N) float64
        spread: are samples on other ranks, too, and perhaps none on this one?

    Raises:
        ValueError, TypeError: shapes or types that do not fit
    """
    check_features(features, outgoing, spread=spread)
    units = checked_units(units, features)
    check("out", out, (len(units), len(features)), torch.float64)
    weights = outgoing.double().contiguous()
    extension().gram_columns(
        out.data_ptr(), units.data_ptr(), len(units), features_struct(Struct(), features),
        weights.data_ptr(), weights.shape[1], torch.get_num_threads(),
    )  # fmt: skip


def columns_rounding(dtype: torch.dtype) -> float:
    """How far `gram_columns` may be off, as a share of |phi_i| |phi_j|."""
    terms = extension().product_tile * dtype.itemsize / 16  # of the longest sum in that type
    return (terms + 4) * torch.finfo(dtype).eps / 2


def greedy_gram(
    gram: Tensor,
    moments: Moments,
    rule: Rule,
    *,
    exact: Exact | None = None,
    with_gap: bool = True,
    step: Step | None = None,
    ranks: Ranks = ALONE,
    backend: str = "cpu",
) -> Path:
    """All greedy steps for squared error on a Gram matrix, O(N) a step.

    Args:
        gram: (N, N) float64, G_ij = <phi_i, phi_j>
        moments: norm and beta (N,), and the sums of the targets
        exact: what makes every pick exact where the Gram matrix is not; not with "cuda"
        ranks: that the samples of `exact` are spread over; Gram matrix and moments are of all

    Raises:
        ValueError, TypeError: shapes or types that do not fit

    Source: README eq. 2.
    """
    units = len(moments.norm)
    check("gram", gram, (units, units), torch.float64)
    gram = gram.contiguous()
    if backend == "reference":
        return reference.greedy_gram(gram, moments, rule, with_gap=with_gap, step=step)
    if backend == "cuda":
        _check_exact(exact)
        return _cuda.greedy_gram(gram, moments, rule, with_gap, step, _rounding(moments, exact))
    run = Run(rule, units, with_gap, ranks=ranks)
    quadratic = _quadratic(run, moments, exact)
    extension().greedy_gram(
        run.path, gram.data_ptr(), quadratic, run.rule, run.workspace,
        torch.get_num_threads(), step, run.sum,
    )  # fmt: skip
    return run.result()


def greedy_columns(
    columns: Callable[[Tensor, Tensor], None],
    moments: Moments,
    rule: Rule,
    *,
    exact: Exact | None = None,
    block: int = 16,
    capacity: int = 2**62,
    with_gap: bool = True,
    step: Step | None = None,
    ranks: Ranks = ALONE,
    backend: str = "cpu",
) -> Path:
    """The same on columns of the Gram matrix, fetched `block` at a time when a pick's is missing.

    Args:
        columns: called with units (n,) int64 and out (n, N) float64, to fill with those columns
        exact, ranks: as for greedy_gram
        capacity: how many columns are kept at a time

    Raises:
        ValueError, TypeError: shapes or types that do not fit

    Source: README eq. 2; which columns are at hand changes no number.
    """
    units = len(moments.norm)
    block = min(block, units)
    capacity = max(block, min(capacity, units + block))  # N: no column is ever dropped
    if backend == "cuda":
        _check_exact(exact)
        return _cuda.greedy_columns(
            columns, moments, rule, block, capacity, with_gap, step, _rounding(moments, exact)
        )
    run = Run(rule, units, with_gap, ranks=ranks)
    cache = torch.empty(capacity, units, dtype=torch.float64)
    wanted = torch.zeros(block, dtype=torch.int64)

    def fetch(slot: int, count: int) -> None:
        columns(wanted[:count], cache[slot : slot + count])

    described = run.fill(
        extension().ColumnCache(),
        columns=cache,
        slot_of=torch.full((units,), -1),
        unit_in=torch.full((capacity,), -1),
        wanted=wanted,
        capacity=capacity,
        block=block,
        factor=torch.empty(RANK, units),
        rank=RANK,
        ahead=torch.empty(units, dtype=torch.float64),
        taken=torch.empty(units, dtype=torch.int64),
    )
    extension().greedy_columns(
        run.path, described, _quadratic(run, moments, exact), run.rule, run.workspace,
        torch.get_num_threads(), step, run.sum, fetch,
    )  # fmt: skip
    return run.result()


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
    """All greedy steps by the candidates' losses themselves.

    Args:
        features: (N, m) float32 or float64; outgoing: (N, C); bias: (C,)
        extent: of the features, as `measure_features` gives it; None: measured here
        starts: (steps,) int64; step k scores on samples [starts[k - 1], starts[k - 1] + batch)
            (Wolfe et al. 2021's stochastic form); the losses reported are always those of all
        mass: what sums over the samples are divided by; None: target.mass
        ranks: that the samples are spread over, none perhaps on this one; not with `starts` or
            "cuda"; mass is that of all

    Raises:
        ValueError, TypeError: shapes or types that do not fit

    Source: README eq. 1.
    """
    check_features(features, outgoing, backend, spread=ranks.size > 1)
    check_target(target, features, outgoing)
    (units, samples), outputs = features.shape, outgoing.shape[1]
    check("bias", bias, (outputs,))
    if ranks.size > 1 and (starts is not None or backend == "cuda"):
        what = "backend='cuda'" if starts is None else "starts"
        raise ValueError(f"ranks: found {ranks.size} with {what}, expected one")
    if ranks.size > 1 and mass is None:
        raise ValueError(f"mass: found None with {ranks.size} ranks, expected that of all samples")
    mass = target.mass if mass is None else mass
    if starts is not None and (
        starts.dtype != torch.int64
        or starts.dim() != 1
        or len(starts) < rule.steps
        or not (int(starts.min()) >= 0 and int(starts.max()) + batch <= samples)
    ):
        raise ValueError(
            f"starts: found {starts.dtype} {tuple(starts.shape)}, expected int64 "
            f"({rule.steps},) in [0, {samples} - {batch}]"
        )
    with_gap = with_gap and starts is None
    if backend == "cuda":
        return _cuda.greedy_pointwise(
            features, outgoing.double().contiguous(), bias.double().contiguous(), target, rule,
            extent, starts, batch, with_gap, step,
        )  # fmt: skip
    run = Run(rule, units, with_gap, ranks=ranks)
    single, double = torch.float32, torch.float64
    scratch = {
        "sum": torch.zeros(outputs, samples, dtype=double),
        "outputs64": torch.empty(outputs, samples, dtype=double),
        "outputs32": torch.empty(outputs, samples, dtype=single),
        "outgoing32": torch.empty(units, outputs, dtype=single),
        "weight32": torch.empty(outputs, samples, dtype=single),
        "value32": torch.empty(outputs, samples, dtype=single),
        "linear_unit": torch.empty(units, dtype=double),
        "slopes": torch.empty(units, dtype=double),
        "slope_errors": torch.empty(units, dtype=double),
    }
    if starts is not None:
        scratch |= {
            "starts": starts.contiguous(),
            "weight_batch": torch.empty(outputs, batch, dtype=double),
            "value_batch": torch.empty(outputs, batch, dtype=double),
            "linear_batch": torch.empty(outputs, batch, dtype=double),
        }
    linear = None if target.linear is None else target.linear / mass
    pointwise = run.fill(
        extension().Pointwise(),
        features=features_struct(run, features, extent or measure_features(features)),
        outgoing=outgoing.double().contiguous(),
        bias=bias.double().contiguous(),
        target=target_struct(run, target, torch.float64, scale=1 / mass),
        linear=linear,
        batch=0 if starts is None else batch,
        **scratch,
    )
    extension().greedy_pointwise(
        run.path, pointwise, run.rule, run.workspace, torch.get_num_threads(), step, run.sum
    )
    return run.result()


def greedy_refit(
    gram: Tensor,
    right: Tensor,
    target_norm: float,
    rule: Rule,
    *,
    width: int = 1,
    scale: float = 1.0,
    step: Step | None = None,
    backend: str = "cpu",
) -> tuple[Path, Refit]:
    """All greedy steps of least squares that is refitted in every step.

    Each step adds the unit with the largest drop of min_B |t - B x_S|^2, a unit being `width`
    features side by side.

    Args:
        gram: (N w, N w) float64, <x_i, x_j>, with any damping on its diagonal
        right: (N w, C) float64, <x_i, t>
        target_norm: |t|^2
        scale: of the losses, which are what is left of |t|^2

    Raises:
        ValueError, TypeError: shapes or types that do not fit

    Source: README, "Refit"; Cholesky, a column when its unit is picked.
    """
    features = len(gram)
    check("gram", gram, (features, features), torch.float64)
    check("right", right, (features, right.shape[-1]), torch.float64)
    if features % width:
        raise ValueError(f"width: found {width} for {features} features, expected a divisor")
    if width > extension().most_width:
        raise ValueError(f"width: found {width}, expected at most {extension().most_width}")
    if backend == "reference":
        return reference.greedy_refit(
            gram, right, target_norm, rule, width=width, scale=scale, step=step
        )
    units, outputs = features // width, right.shape[1]
    run, most = Run(rule, units, False), rule.most(units)
    double = torch.float64
    factor = torch.zeros(features, most * width, dtype=double)
    solved = torch.zeros(most * width, outputs, dtype=double)
    place = torch.empty(units, dtype=torch.int64)
    problem = run.fill(
        extension().LeastSquares(),
        units=units, width=width, outputs=outputs, most=most, scale=scale, target_norm=target_norm,
        gram=gram.contiguous(), right=right.clone().contiguous(), factor=factor, solved=solved,
        place=place, rest=torch.empty(units, width, width, dtype=double),
        root=torch.empty(units, width, width, dtype=double),
        gain=torch.empty(units, dtype=double),
    )  # fmt: skip
    extension().greedy_refit(
        run.path, problem, run.rule, run.workspace, torch.get_num_threads(), step
    )
    path = run.result()
    picked = torch.tensor(list(dict.fromkeys(path.order.tolist())), dtype=torch.int64)
    size = len(picked) * width
    rows = (picked[:, None] * width + torch.arange(width)).flatten()
    root = factor[rows, :size].contiguous()
    diagonal = root.diagonal()
    diagonal[diagonal == 0] = 1  # of a feature that is spanned by others, which is left out
    return path, Refit(picked, root, solved[:size].clone())


def swap_gains(
    swept: Tensor,
    right: Tensor,
    norms: Tensor,
    kept: Tensor,
    dropped: Tensor,
    inner: Tensor,
    pull: Tensor,
    costs: Tensor,
) -> Tensor:
    """By what each exchange of a kept for a dropped unit lowers a squared error: (p, d) float64.

    Args:
        swept: (N w, N w) float64, the Gram matrix swept on all kept units; right: (N w, C) float64,
            the right side swept along; norms: (N w,), the Gram matrix's diagonal
        kept: (p,) int64, which of them are tried; dropped: (d,) int64
        inner: (p, w, w) float64, (-A_pp)^-1; pull: (p, w, C), that times the weights
        costs: (p,) float64, what dropping each costs

    Raises:
        ValueError, TypeError: shapes or types that do not fit

    Source: csrc/cpu/swap_gains.cpp.
    """
    size, outputs = right.shape
    check("swept", swept, (size, size), torch.float64)
    width = inner.shape[-1]
    if width > extension().most_swap_width:
        raise ValueError(
            f"width: found {width}, expected at most {extension().most_swap_width} for exchanges"
        )
    check("inner", inner, (len(kept), width, width), torch.float64)
    check("pull", pull, (len(kept), width, outputs), torch.float64)
    check("costs", costs, (len(kept),), torch.float64)
    check("norms", norms, (size,), torch.float64)
    keep, gains = Struct(), torch.empty(len(kept), len(dropped), dtype=torch.float64)
    problem = keep.fill(
        extension().Swaps(),
        units=size // width, width=width, outputs=outputs, kept_count=len(kept),
        dropped_count=len(dropped), swept=swept.contiguous(), right=right.contiguous(),
        norms=norms.contiguous(), kept=kept.contiguous(), dropped=dropped.contiguous(),
        inner=inner.contiguous(), pull=pull.contiguous(), costs=costs.contiguous(),
    )  # fmt: skip
    extension().swap_gains(gains.data_ptr(), problem, torch.get_num_threads())
    return gains


def _quadratic(run: Run, moments: Moments, exact: Exact | None) -> Any:
    quadratic = quadratic_struct(run, moments, _rounding(moments, exact))
    if exact is None:
        return quadratic
    check_features(exact.features, exact.outgoing, spread=run.ranks.size > 1)
    shape = (exact.outgoing.shape[1], exact.features.shape[1])
    check("target", exact.target, shape, torch.float64)
    return run.fill(
        quadratic,
        features=features_struct(run, exact.features),
        outgoing=exact.outgoing.double().contiguous(),
        target=exact.target.contiguous(),
        sum=torch.zeros(shape, dtype=torch.float64),
        residual=torch.empty(shape, dtype=torch.float64),
        outputs=shape[0],
        all_units=torch.arange(len(exact.features)),
    )


def _check_exact(exact: Exact | None) -> None:
    if exact is not None:
        raise ValueError("exact: found features for backend='cuda', expected None")


def _rounding(moments: Moments, exact: Exact | None) -> float:
    """Without `exact` the sums count as float64's, 1024 at a time."""
    return (1024 + moments.samples / 1024) * 2.0**-53 if exact is None else exact.rounding
