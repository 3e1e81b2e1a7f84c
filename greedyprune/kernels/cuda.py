"""The kernels on a GPU, for `ops`, which has checked the tensors: all of them are on one device.

Launches go into the current stream and nothing waits for them, but for a greedy path's progress:
once in so many steps, and whenever a column of the Gram matrix is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..data.losses import Target
from .backend import extension
from .path import Moments, Path, Rule, Step
from .structs import Extent, Run, Struct, features_struct, quadratic_struct, target_struct

# Steps between two looks at the path: more and more of them, so that a short path has few launches
# for nothing and a long one few waits; but Ctrl-C and a progress bar have to be served.
FEWEST, MOST, WATCHED = 32, 512, 64
DOUBLE = torch.float64
BLOCK = 2**26  # entries of features that are taken to float64 at a time


@contextmanager
def stream_of(device: torch.device) -> Iterator[int]:
    """The current stream of `device`, which is the current one inside."""
    if device.type != "cuda":  # the tests' emulation
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def check_device(device: torch.device, **tensors: Tensor | Target | Moments | None) -> None:
    """ValueError unless all tensors are on the device; a kernel can't say so."""
    for name, value in tensors.items():
        parts = [value] if isinstance(value, Tensor) else vars(value).values() if value else []
        for part in parts:
            if isinstance(part, Tensor) and part.device != device:
                raise ValueError(f"{name}: found a tensor on {part.device}, expected {device}")


def _largest(features: Tensor) -> Tensor:
    lowest, highest = torch.aminmax(features, dim=1)
    return torch.maximum(lowest.abs(), highest.abs()).double()


def measure_features(features: Tensor) -> Extent:
    some = features.split(max(1, BLOCK // features.shape[1]))  # each makes a copy in float64
    squares = torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=DOUBLE) for rows in some])
    return Extent(squares.square(), _largest(features))


def candidate_loss(
    features: Tensor, outgoing: Tensor, base: Tensor, target: Target, shrink: float, units: Tensor,
    extent: Extent | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """base (C, m): the outputs relative to the target, in `dtype`, as outgoing (N, C) is."""
    keep, device = Struct(), features.device
    check_device(device, outgoing=outgoing, outputs=base, target=target)
    losses, partial = _scratch(units, features)
    reach = None
    if target.kind == "cross_entropy":
        largest = _largest(features) if extent is None else extent.largest
        reach = largest * outgoing.abs().amax(1)
    launch = (
        extension().cuda_candidate_loss_f64 if dtype == DOUBLE
        else extension().cuda_candidate_loss_f32
    )  # fmt: skip
    with stream_of(device) as stream:
        launch(
            losses.data_ptr(), partial.data_ptr(), units.data_ptr(), len(units),
            features_struct(keep, features), 0 if reach is None else reach.data_ptr(),
            outgoing.data_ptr(), shrink,
            base.data_ptr(), target_struct(keep, target, dtype, scale=1.0), stream,
        )  # fmt: skip
    return losses


def candidate_slope(features: Tensor, outgoing: Tensor, gradient: Tensor, units: Tensor) -> Tensor:
    check_device(features.device, outgoing=outgoing, gradient=gradient)
    slopes, partial = _scratch(units, features)
    with stream_of(features.device) as stream:
        extension().cuda_candidate_slope_f64(
            slopes.data_ptr(), partial.data_ptr(), units.data_ptr(), len(units),
            features_struct(Struct(), features), outgoing.data_ptr(), gradient.data_ptr(),
            outgoing.shape[1], stream,
        )  # fmt: skip
    return slopes


def _scratch(units: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    pieces = extension().cuda_candidate_pieces(features.shape[1])
    return (
        torch.empty(len(units), dtype=DOUBLE, device=features.device),
        torch.empty(len(units), pieces, dtype=DOUBLE, device=features.device),
    )


class CudaRun(Run):
    """A path on the device, made in several launches."""

    def __init__(self, rule: Rule, units: int, with_gap: bool, device: torch.device) -> None:
        super().__init__(rule, units, with_gap, device)
        size = extension().cuda_progress_size // 8
        self.progress = torch.zeros(size, dtype=torch.int64, device=device)
        self.length = 0
        self._steps = rule.steps

    def walk(
        self,
        launch: Callable[[int, int], None],
        step: Step | None,
        missing: Callable[[int], None] | None = None,
    ) -> Path:
        """launch(first, last) until the path is at its end; missing(unit) brings a column."""
        reported, last, some = 0, 0, FEWEST
        while True:
            if last == self.length:  # else that step's column was missing
                last = min(self._steps, last + some)
                some = min(2 * some, MOST if step is None else WATCHED)
            launch(self.length + 1, last)
            self.length, _, unit, done, self._scored, self._rescored = self.progress[:6].tolist()
            if step is not None:
                seen = slice(reported, self.length)
                picks = zip(self._order[seen].tolist(), self._losses[seen].tolist(), strict=True)
                for pick, loss in picks:
                    reported += 1
                    if step(reported, pick, loss):
                        return self._path(reported)
            if unit and missing is not None:
                missing(unit - 1)
            elif done or self.length == self._steps:
                return self._path(self.length)

    def _path(self, length: int) -> Path:
        gap = None if self._gap is None else self._gap[:length].cpu()
        order, losses = self._order[:length].cpu(), self._losses[:length].cpu()
        return Path(order, losses, gap, self._scored, self._rescored)


def greedy_gram(
    gram: Tensor, moments: Moments, rule: Rule, with_gap: bool, step: Step | None, rounding: float
) -> Path:
    check_device(gram.device, moments=moments)
    run = CudaRun(rule, len(moments.norm), with_gap, gram.device)
    quadratic = quadratic_struct(run, moments, rounding)

    def launch(first: int, last: int) -> None:
        with stream_of(gram.device) as stream:
            extension().cuda_greedy_gram(
                run.progress.data_ptr(), run.path, gram.data_ptr(), quadratic, run.rule,
                run.workspace, last, stream,
            )  # fmt: skip

    return run.walk(launch, step)


def greedy_columns(
    columns: Callable[[Tensor, Tensor], None], moments: Moments, rule: Rule, block: int,
    capacity: int, with_gap: bool, step: Step | None, rounding: float,
) -> Path:  # fmt: skip
    """What is missing is fetched with the units that score best at that moment."""
    device, units = moments.norm.device, len(moments.norm)
    run = CudaRun(rule, units, with_gap, device)
    state = torch.zeros(units, dtype=DOUBLE, device=device)
    quadratic = run.fill(quadratic_struct(run, moments, rounding), state=state)
    cache = torch.empty(capacity, units, dtype=DOUBLE, device=device)
    slot_of = torch.full((units,), -1, device=device)
    unit_in = torch.full((capacity,), -1, device=device)
    begin = 0

    def launch(first: int, last: int) -> None:
        with stream_of(device) as stream:
            extension().cuda_greedy_columns(
                run.progress.data_ptr(), run.path, cache.data_ptr(), slot_of.data_ptr(), quadratic,
                run.rule, run.workspace, last, stream,
            )  # fmt: skip

    def missing(unit: int) -> None:
        nonlocal begin
        k = run.length + 1
        scores = moments.norm / 2 + state - k * moments.beta
        scores[slot_of >= 0] = torch.inf
        if not rule.replacement:
            scores[run.picked > 0] = torch.inf
        scores[unit] = -torch.inf
        best = scores.topk(min(block, units), largest=False)
        wanted = best.indices[best.values < torch.inf]
        begin = 0 if begin + len(wanted) > capacity else begin
        slots = torch.arange(begin, begin + len(wanted), device=device)
        old = unit_in[slots]  # the oldest columns make room
        slot_of[old[old >= 0]] = -1
        columns(wanted, cache[begin : begin + len(wanted)])
        slot_of[wanted], unit_in[slots] = slots, wanted
        begin += len(wanted)

    return run.walk(launch, step, missing)


def greedy_pointwise(
    features: Tensor, outgoing: Tensor, bias: Tensor, target: Target, rule: Rule,
    extent: Extent | None, starts: Tensor | None, batch: int, with_gap: bool, step: Step | None,
) -> Path:  # fmt: skip
    (units, samples), outputs = features.shape, outgoing.shape[1]
    device = features.device
    check_device(device, outgoing=outgoing, bias=bias, target=target)
    run = CudaRun(rule, units, with_gap, device)
    extent = extent or measure_features(features)
    magnitudes = outgoing.abs()
    w_largest = magnitudes.amax(1)

    def empty(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    single = target_struct(run, target, torch.float32, scale=1.0)
    weight = target.weight
    repeats = 1 if weight is not None and len(weight.shape) > 1 else outputs
    norm = (samples * repeats) ** 0.5
    if weight is not None:
        norm = float(weight.double().square().sum()) ** 0.5 * repeats**0.5
    linear = None if target.linear is None else (target.linear / target.mass).contiguous()
    along = {} if linear is None else {
        "linear": linear,
        "linear_unit": candidate_slope(
            features, outgoing, linear, torch.arange(units, device=device)
        ),
        "linear_bias": (bias[:, None] * linear).sum().reshape(1),
        "linear_norm": float(torch.linalg.vector_norm(linear)),
    }  # fmt: skip
    pointwise = run.fill(
        extension().CudaPointwise(),
        features=features_struct(run, features, extent),
        outgoing=outgoing,
        outgoing32=outgoing.float(),
        w_largest=w_largest,
        w_sum=magnitudes.sum(1),
        w_squares=outgoing.square().sum(1),
        reach=extent.largest * w_largest,
        bias=bias,
        target=target_struct(run, target, DOUBLE, scale=1 / target.mass),
        weights_norm=norm,
        sum=torch.zeros(outputs, samples, dtype=DOUBLE, device=device),
        starts=None if starts is None else starts.cpu().contiguous(),
        batch=batch,
        outputs64=empty(outputs, samples),
        outputs32=empty(outputs, samples, dtype=torch.float32),
        partial=empty(units, extension().cuda_candidate_pieces(samples)),
        slopes=empty(units),
        bounds=empty(units),
        sums=empty(extension().cuda_sums, 4),
        counts=torch.zeros(4, dtype=torch.int64, device=device),
        **along,
    )
    pointwise.weight32, pointwise.value32 = single.weight, single.value

    def launch(first: int, last: int) -> None:
        with stream_of(device) as stream:
            extension().cuda_greedy_pointwise(
                run.progress.data_ptr(), run.path, pointwise, run.rule, run.workspace, first, last,
                stream,
            )  # fmt: skip

    return run.walk(launch, step)
