"""The kernels on processors, for `ops`, which has checked the tensors.

Each function allocates what its kernel writes and needs as scratch, and launches it. cuda.py has
the same functions for a GPU; csrc/kernels.h says what each field and argument means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.losses import Target
from ..runtime.distributed import Ranks
from .backend import extension
from .least_squares import feature_rows
from .path import Exact, Moments, NestedFit, Path, Rule, Step, first_picks
from .structs import Extent, Native, Run, Structs, type_number

FORESEEN_RANK = 128  # rank of the approximate Gram matrix that coming picks are foreseen with


def collect_features(features: Tensor, hidden: Tensor, at: int, extent: Extent) -> None:
    extension().collect_features(
        features.data_ptr(), extent.squares.data_ptr(), extent.largest.data_ptr(),
        hidden.data_ptr(), type_number(features.dtype), len(features), len(hidden),
        features.stride(0), at, torch.get_num_threads(),
    )  # fmt: skip


def measure_features(features: Tensor) -> Extent:
    extent = Extent.zeros(len(features))
    extension().measure_features(
        extent.squares.data_ptr(), extent.largest.data_ptr(), Structs().features(features),
        torch.get_num_threads(),
    )  # fmt: skip
    return extent


def candidate_loss(
    features: Tensor, outgoing: Tensor, base: Tensor, target: Target, shrink: float, units: Tensor,
    extent: Extent | None, dtype: torch.dtype, errors: Tensor | None,
) -> Tensor:  # fmt: skip
    """base (C, m): the outputs relative to the target, in `dtype`, as outgoing (N, C) is."""
    structs, losses = Structs(), torch.empty(len(units), dtype=torch.float64)
    _C = extension()
    launch = _C.candidate_loss_f64 if dtype == torch.float64 else _C.candidate_loss_f32
    launch(
        losses.data_ptr(), 0 if errors is None else errors.data_ptr(), units.data_ptr(), len(units),
        structs.features(features, extent or measure_features(features)), outgoing.data_ptr(),
        shrink, base.data_ptr(), structs.target(target, dtype, scale=1.0), torch.get_num_threads(),
    )  # fmt: skip
    return losses


def candidate_slope(features: Tensor, outgoing: Tensor, gradient: Tensor, units: Tensor) -> Tensor:
    slopes = torch.empty(len(units), dtype=torch.float64)
    extension().candidate_slope_f64(
        slopes.data_ptr(), 0, units.data_ptr(), len(units), Structs().features(features),
        outgoing.data_ptr(), gradient.data_ptr(), outgoing.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return slopes


def gram_columns(features: Tensor, outgoing: Tensor, units: Tensor, out: Tensor) -> None:
    extension().gram_columns(
        out.data_ptr(), units.data_ptr(), len(units), Structs().features(features),
        outgoing.data_ptr(), outgoing.shape[1], torch.get_num_threads(),
    )  # fmt: skip


def greedy_gram(
    gram: Tensor, moments: Moments, rule: Rule, exact: Exact | None, with_gap: bool,
    step: Step | None, ranks: Ranks, rounding: float,
) -> Path:  # fmt: skip
    run = Run(rule, len(moments.norm), with_gap, ranks=ranks)
    extension().greedy_gram(
        run.path, gram.data_ptr(), _quadratic(run, moments, exact, rounding), run.rule,
        run.workspace, torch.get_num_threads(), step, run.sum,
    )  # fmt: skip
    return run.result()


def greedy_columns(
    columns: Callable[[Tensor, Tensor], None], moments: Moments, rule: Rule, exact: Exact | None,
    block: int, capacity: int, with_gap: bool, step: Step | None, ranks: Ranks, rounding: float,
) -> Path:  # fmt: skip
    units = len(moments.norm)
    run = Run(rule, units, with_gap, ranks=ranks)
    cache = torch.empty(capacity, units, dtype=torch.float64)
    wanted = torch.zeros(block, dtype=torch.int64)

    def fetch(slot: int, count: int) -> None:
        columns(wanted[:count], cache[slot : slot + count])

    column_cache = run.make(
        extension().ColumnCache,
        columns=cache,
        slot_of=torch.full((units,), -1),
        unit_in=torch.full((capacity,), -1),
        wanted=wanted,
        capacity=capacity,
        block=block,
        factor=torch.empty(FORESEEN_RANK, units),
        rank=FORESEEN_RANK,
        ahead=torch.empty(units, dtype=torch.float64),
        taken=torch.empty(units, dtype=torch.int64),
    )
    extension().greedy_columns(
        run.path, column_cache, _quadratic(run, moments, exact, rounding), run.rule, run.workspace,
        torch.get_num_threads(), step, run.sum, fetch,
    )  # fmt: skip
    return run.result()


def _quadratic(run: Run, moments: Moments, exact: Exact | None, rounding: float) -> Native:
    if exact is None:
        return run.quadratic(moments, rounding)
    shape = exact.target.shape
    return run.quadratic(
        moments,
        rounding,
        features=run.features(exact.features),
        outgoing=exact.outgoing.double().contiguous(),
        target=exact.target.contiguous(),
        sum=torch.zeros(shape, dtype=torch.float64),
        residual=torch.empty(shape, dtype=torch.float64),
        outputs=shape[0],
        all_units=torch.arange(len(exact.features)),
    )


def greedy_pointwise(
    features: Tensor, outgoing: Tensor, bias: Tensor, target: Target, rule: Rule,
    extent: Extent | None, starts: Tensor | None, batch: int, mass: float, with_gap: bool,
    step: Step | None, ranks: Ranks,
) -> Path:  # fmt: skip
    (units, samples), outputs = features.shape, outgoing.shape[1]
    run = Run(rule, units, with_gap, ranks=ranks)

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    single, batched = torch.float32, starts is not None
    pointwise = run.make(
        extension().Pointwise,
        features=run.features(features, extent or measure_features(features)),
        outgoing=outgoing,
        bias=bias,
        target=run.target(target, torch.float64, scale=1 / mass),
        linear=None if target.linear is None else target.linear / mass,
        sum=torch.zeros(outputs, samples, dtype=torch.float64),
        starts=None if starts is None else starts.contiguous(),
        batch=batch if batched else 0,
        outputs64=empty(outputs, samples),
        outputs32=empty(outputs, samples, dtype=single),
        outgoing32=empty(units, outputs, dtype=single),
        weight32=empty(outputs, samples, dtype=single),
        value32=empty(outputs, samples, dtype=single),
        linear_unit=empty(units),
        slopes=empty(units),
        slope_errors=empty(units),
        weight_batch=empty(outputs, batch) if batched else None,
        value_batch=empty(outputs, batch) if batched else None,
        linear_batch=empty(outputs, batch) if batched else None,
    )
    extension().greedy_pointwise(
        run.path, pointwise, run.rule, run.workspace, torch.get_num_threads(), step, run.sum
    )
    return run.result()


def greedy_refit(
    grams: Sequence[Tensor], rights: Sequence[Tensor], target_norm: float, rule: Rule,
    widths: Sequence[int], scale: float, step: Step | None,
) -> tuple[Path, list[NestedFit]]:  # fmt: skip
    units = len(grams[0]) // widths[0]
    run, most = Run(rule, units, False), rule.most(units)
    fits, parts = [], []  # of each part: factor and solved, and the problem with them
    for gram, right, width in zip(grams, rights, widths, strict=True):
        factor = torch.zeros(len(gram), most * width, dtype=torch.float64)
        solved = torch.zeros(most * width, right.shape[1], dtype=torch.float64)
        fits.append((factor, solved))
        part = run.make(
            extension().LeastSquares,
            width=width,
            outputs=right.shape[1],
            gram=gram.contiguous(),
            right=right.clone().contiguous(),
            factor=factor,
            solved=solved,
            rest=torch.empty(units, width, width, dtype=torch.float64),
            root=torch.empty(units, width, width, dtype=torch.float64),
        )
        parts.append(part)
    refit = run.make(
        extension().Refit,
        units=units,
        most=most,
        scale=scale,
        target_norm=target_norm,
        place=torch.empty(units, dtype=torch.int64),
        gain=torch.empty(units, dtype=torch.float64),
    )
    extension().greedy_refit(
        run.path, refit, parts, run.rule, run.workspace, torch.get_num_threads(), step
    )
    path = run.result()
    picked = first_picks(path.order)
    return path, [_nested(picked, width, *fit) for width, fit in zip(widths, fits, strict=True)]


def _nested(picked: Tensor, width: int, factor: Tensor, solved: Tensor) -> NestedFit:
    """The picked units' part of a factor (N w, most w), and of solved (most w, C)."""
    size = len(picked) * width
    root = factor[feature_rows(picked, width), :size].contiguous()
    diagonal = root.diagonal()
    diagonal[diagonal == 0] = 1  # of a dependent feature, as in least_squares.factored
    return NestedFit(picked, root, solved[:size].clone())


def swap_gains(
    swept: Tensor, right: Tensor, norms: Tensor, kept: Tensor, dropped: Tensor, inner: Tensor,
    pull: Tensor, costs: Tensor,
) -> Tensor:  # fmt: skip
    (size, outputs), width = right.shape, inner.shape[-1]
    structs = Structs()
    gains = torch.empty(len(kept), len(dropped), dtype=torch.float64)
    problem = structs.make(
        extension().Swaps,
        units=size // width,
        width=width,
        outputs=outputs,
        kept_count=len(kept),
        dropped_count=len(dropped),
        swept=swept.contiguous(),
        right=right.contiguous(),
        norms=norms.contiguous(),
        kept=kept.contiguous(),
        dropped=dropped.contiguous(),
        inner=inner.contiguous(),
        pull=pull.contiguous(),
        costs=costs.contiguous(),
    )
    extension().swap_gains(gains.data_ptr(), problem, torch.get_num_threads())
    return gains
