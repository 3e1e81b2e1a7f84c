"""The kernels on a GPU, for `ops`, which has checked the tensors: all of them are on one device.

Launches go into the current stream, and nothing waits for them except a greedy path: it reads its
progress once in some steps, and whenever a column of the Gram matrix is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..data.losses import Target
from .backend import extension
from .path import Moments, Path, Rule, Step
from .structs import Extent, Run, Structs

# Steps between two looks at the path. They double from FIRST_STEPS on: a short path launches few
# steps that it does not need, and a long path waits seldom. With a callback they stay below
# WATCHED_STEPS, so that Ctrl-C and a progress bar are served.
FIRST_STEPS, MOST_STEPS, WATCHED_STEPS = 32, 512, 64
COPIED_ENTRIES = 2**26  # the most entries of features that are copied to float64 at a time


@contextmanager
def stream_of(device: torch.device) -> Iterator[int]:
    """The current stream of `device`, which is the current device inside."""
    if device.type != "cuda":  # the tests' emulation
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def check_device(device: torch.device, **tensors: Tensor | Target | Moments | None) -> None:
    """Raises ValueError unless all tensors are on the device, which a kernel cannot check."""
    for name, value in tensors.items():
        parts = [value] if isinstance(value, Tensor) else vars(value).values() if value else []
        for part in parts:
            if isinstance(part, Tensor) and part.device != device:
                raise ValueError(f"{name}: found a tensor on {part.device}, expected {device}")


def _largest(features: Tensor) -> Tensor:
    lowest, highest = torch.aminmax(features, dim=1)
    return torch.maximum(lowest.abs(), highest.abs()).double()


def measure_features(features: Tensor) -> Extent:
    """How large each unit's features are; features: (N, m) of any floating type"""
    blocks = features.split(max(1, COPIED_ENTRIES // features.shape[1]))
    norms = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in blocks]
    return Extent(torch.cat(norms).square(), _largest(features))


def candidate_loss(
    features: Tensor, outgoing: Tensor, base: Tensor, target: Target, shrink: float, units: Tensor,
    extent: Extent | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """base (C, m): the outputs relative to the target, in `dtype`, as outgoing (N, C) is."""
    structs, device = Structs(), features.device
    check_device(device, outgoing=outgoing, outputs=base, target=target)
    losses, partial = _scratch(units, features)
    reach = None
    if target.kind == "cross_entropy":
        largest = _largest(features) if extent is None else extent.largest
        reach = largest * outgoing.abs().amax(1)
    _C = extension()
    launch = _C.cuda_candidate_loss_f64 if dtype == torch.float64 else _C.cuda_candidate_loss_f32
    with stream_of(device) as stream:
        launch(
            losses.data_ptr(), partial.data_ptr(), units.data_ptr(), len(units),
            structs.features(features), 0 if reach is None else reach.data_ptr(),
            outgoing.data_ptr(), shrink, base.data_ptr(),
            structs.target(target, dtype, scale=1.0), stream,
        )  # fmt: skip
    return losses


def candidate_slope(features: Tensor, outgoing: Tensor, gradient: Tensor, units: Tensor) -> Tensor:
    """gradient: (C, m); <gradient, phi_j> for each unit j"""
    check_device(features.device, outgoing=outgoing, gradient=gradient)
    slopes, partial = _scratch(units, features)
    with stream_of(features.device) as stream:
        extension().cuda_candidate_slope_f64(
            slopes.data_ptr(), partial.data_ptr(), units.data_ptr(), len(units),
            Structs().features(features), outgoing.data_ptr(), gradient.data_ptr(),
            outgoing.shape[1], stream,
        )  # fmt: skip
    return slopes


def _scratch(units: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for one number of each unit, and for the partial sums of that number."""
    pieces, device = extension().cuda_candidate_pieces(features.shape[1]), features.device
    return (
        torch.empty(len(units), dtype=torch.float64, device=device),
        torch.empty(len(units), pieces, dtype=torch.float64, device=device),
    )


class CudaRun(Run):
    """A path on the device, made in several launches."""

    def __init__(self, rule: Rule, units: int, with_gap: bool, device: torch.device) -> None:
        super().__init__(rule, units, with_gap, device)
        size = extension().cuda_progress_size // 8
        self.progress = torch.zeros(size, dtype=torch.int64, device=device)
        self.length = 0
        self._steps = rule.steps

    def advance(
        self,
        launch: Callable[[int, int], None],
        step: Step | None,
        fetch: Callable[[int], None] | None = None,
    ) -> Path:
        """Calls launch(first, last) until the path is at its end.

        fetch: called with a unit whose column of the Gram matrix is missing, to bring it
        """
        places: dict[str, int] = extension().cuda_progress_places
        reported, last, steps = 0, 0, FIRST_STEPS
        while True:
            if last == self.length:  # else a column was missing, and the launch ended before `last`
                last = min(self._steps, last + steps)
                steps = min(2 * steps, MOST_STEPS if step is None else WATCHED_STEPS)
            launch(self.length + 1, last)
            numbers = self.progress.tolist()
            progress = {name: numbers[place] for name, place in places.items()}
            self.length = progress["length"]
            if step is not None:
                new = slice(reported, self.length)
                picks = zip(self._order[new].tolist(), self._losses[new].tolist(), strict=True)
                for pick, loss in picks:
                    reported += 1
                    if step(reported, pick, loss):
                        return self._path(reported, progress)
            if progress["missing"] and fetch is not None:
                fetch(progress["missing"] - 1)
            elif progress["done"] or self.length == self._steps:
                return self._path(self.length, progress)

    def _path(self, length: int, progress: dict[str, int]) -> Path:
        gap = None if self._gap is None else self._gap[:length].cpu()
        order, losses = self._order[:length].cpu(), self._losses[:length].cpu()
        return Path(order, losses, gap, progress["scored"], progress["rescored"])


def greedy_gram(
    gram: Tensor, moments: Moments, rule: Rule, with_gap: bool, step: Step | None, rounding: float
) -> Path:
    """rounding: bound on the error of an entry of the Gram matrix, relative to |phi_i| |phi_j|"""
    check_device(gram.device, moments=moments)
    run = CudaRun(rule, len(moments.norm), with_gap, gram.device)
    quadratic = run.quadratic(moments, rounding)

    def launch(first: int, last: int) -> None:
        with stream_of(gram.device) as stream:
            extension().cuda_greedy_gram(
                run.progress.data_ptr(), run.path, gram.data_ptr(), quadratic, run.rule,
                run.workspace, last, stream,
            )  # fmt: skip

    return run.advance(launch, step)


def greedy_columns(
    columns: Callable[[Tensor, Tensor], None], moments: Moments, rule: Rule, block: int,
    capacity: int, with_gap: bool, step: Step | None, rounding: float,
) -> Path:  # fmt: skip
    """A missing column is fetched together with those of the units that score best just then."""
    device, units = moments.norm.device, len(moments.norm)
    run = CudaRun(rule, units, with_gap, device)
    state = torch.zeros(units, dtype=torch.float64, device=device)
    quadratic = run.quadratic(moments, rounding, state)
    cache = torch.empty(capacity, units, dtype=torch.float64, device=device)
    slot_of = torch.full((units,), -1, device=device)
    unit_in = torch.full((capacity,), -1, device=device)
    begin = 0  # the slot that the next column goes to

    def launch(first: int, last: int) -> None:
        with stream_of(device) as stream:
            extension().cuda_greedy_columns(
                run.progress.data_ptr(), run.path, cache.data_ptr(), slot_of.data_ptr(), quadratic,
                run.rule, run.workspace, last, stream,
            )  # fmt: skip

    def fetch(unit: int) -> None:
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
        replaced = unit_in[slots]  # the oldest columns
        slot_of[replaced[replaced >= 0]] = -1
        columns(wanted, cache[begin : begin + len(wanted)])
        slot_of[wanted], unit_in[slots] = slots, wanted
        begin += len(wanted)

    return run.advance(launch, step, fetch)


def greedy_pointwise(
    features: Tensor, outgoing: Tensor, bias: Tensor, target: Target, rule: Rule,
    extent: Extent | None, starts: Tensor | None, batch: int, with_gap: bool, step: Step | None,
) -> Path:  # fmt: skip
    """outgoing: (N, C) float64; bias: (C,) float64"""
    (units, samples), outputs = features.shape, outgoing.shape[1]
    device = features.device
    check_device(device, outgoing=outgoing, bias=bias, target=target)
    run = CudaRun(rule, units, with_gap, device)
    extent = extent or measure_features(features)
    magnitudes = outgoing.abs()
    w_largest = magnitudes.amax(1)

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    linear = None if target.linear is None else (target.linear / target.mass).contiguous()
    linear_unit = linear_bias = None
    if linear is not None:
        every_unit = torch.arange(units, device=device)
        linear_unit = candidate_slope(features, outgoing, linear, every_unit)
        linear_bias = (bias[:, None] * linear).sum().reshape(1)
    single = run.target(target, torch.float32, scale=1.0)
    pointwise = run.make(
        extension().CudaPointwise,
        features=run.features(features, extent),
        outgoing=outgoing,
        outgoing32=outgoing.float(),
        w_largest=w_largest,
        w_sum=magnitudes.sum(1),
        w_squares=outgoing.square().sum(1),
        reach=extent.largest * w_largest,
        bias=bias,
        target=run.target(target, torch.float64, scale=1 / target.mass),
        weight32=single.weight,
        value32=single.value,
        weights_norm=_weights_norm(target),
        linear=linear,
        linear_unit=linear_unit,
        linear_bias=linear_bias,
        linear_norm=0.0 if linear is None else float(torch.linalg.vector_norm(linear)),
        sum=torch.zeros(outputs, samples, dtype=torch.float64, device=device),
        starts=None if starts is None else starts.cpu().contiguous(),
        batch=batch,
        outputs64=empty(outputs, samples),
        outputs32=empty(outputs, samples, dtype=torch.float32),
        partial=empty(units, extension().cuda_candidate_pieces(samples)),
        slopes=empty(units),
        bounds=empty(units),
        sums=empty(extension().cuda_sums, 4),
        counts=torch.zeros(4, dtype=torch.int64, device=device),
    )

    def launch(first: int, last: int) -> None:
        with stream_of(device) as stream:
            extension().cuda_greedy_pointwise(
                run.progress.data_ptr(), run.path, pointwise, run.rule, run.workspace, first, last,
                stream,
            )  # fmt: skip

    return run.advance(launch, step)


def _weights_norm(target: Target) -> float:
    """The norm of the loss's weights over samples and outputs."""
    weight = target.weight
    repeats = 1 if weight is not None and len(weight.shape) > 1 else target.outputs
    if weight is None:
        return float((target.samples * repeats) ** 0.5)
    return float(weight.double().square().sum()) ** 0.5 * repeats**0.5
