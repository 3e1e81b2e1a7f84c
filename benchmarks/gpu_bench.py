"""Benchmarks on a GPU: kernels and whole selections, compared with torch and the device's limits.

    python benchmarks/gpu_bench.py --out RESULTS     # gpu.json and gpu.md
    python benchmarks/gpu_bench.py --small           # every kernel once, for compute-sanitizer

Each case checks its answer before it is timed. Times are medians, measured with CUDA events.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines import (
    CHUNKS,
    LARGEST,
    LAYOUTS,
    Candidates,
    Form,
    in_chunks,
    part_of,
    vectorised,
)
from torch import Tensor, nn

import greedyprune
from greedyprune import Loss
from greedyprune.data.losses import Criterion
from greedyprune.kernels import cuda as _cuda
from greedyprune.kernels import ops, reference
from greedyprune.kernels.backend import extension
from greedyprune.kernels.path import Moments, Rule
from greedyprune.kernels.products import add_upper_product
from greedyprune.kernels.structs import Structs

DEVICE = torch.device("cuda")
CANDIDATES = ((1024, 8192, 10, 45e-6), (4096, 16384, 100, None))  # m, N, C and a goal in seconds
UNITS, SAMPLES = 10000, {"mse": 60000, "cross_entropy": 10000}
GRAM = 8192, 16384  # units and samples
SPECIAL = """template <typename T> T chain(T x) {
  T a = x, b = x * 0.5f, c = x * 0.25f, d = x * 0.125f;
  for (int i = 0; i < 256; ++i) {
    asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(a));
    asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(b));
    asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(c));
    asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(d));
  }
  return a + b + c + d;
}"""


@dataclass(frozen=True)
class Row:
    """One timing, in seconds.

    goal:  the time to reach
    limit: a lower bound on the time of every method; why: what limits it
    """

    case: str
    how: str
    seconds: float
    goal: float | None = None
    limit: float | None = None
    why: str = ""


def timed(work: Callable[[], object], seconds: float = 1.0) -> float:
    """The median time of one call, in seconds."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    together = max(1, int(1e-3 / once))  # enough to keep the device busy
    times = []
    for _ in range(max(3, min(50, int(seconds / once / together)))):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(together):
            work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / together)
    return sorted(times)[len(times) // 2]


def limits() -> dict[str, float]:
    """The device's measured rates. A multiply-add counts as two operations."""
    source = torch.ones(2**28, device=DEVICE)
    target = torch.empty_like(source)
    found = {"copy, bytes/s": 2 * source.nbytes / timed(lambda: target.copy_(source))}
    chain = torch.cuda.jiterator._create_jit_fn(SPECIAL)
    x = torch.rand(2**22, device=DEVICE)
    found["exponentials/s"] = 1024 * x.numel() / timed(lambda: chain(x))
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32),
                        ("float64", torch.float64)):  # fmt: skip
        a = torch.rand(8192, 8192, device=DEVICE).to(dtype)
        found[f"{name} products, operations/s"] = 2 * 8192**3 / timed(partial(torch.mm, a, a))
    return found


def candidates(kind: str, m: int, n: int, c: int) -> Candidates:
    rng = torch.Generator(DEVICE).manual_seed(m + n + c)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=DEVICE)

    targets = torch.randint(c, (m,), generator=rng, device=DEVICE)
    if kind != "cross_entropy":
        targets = normal(m, c).sigmoid()
    return Candidates(kind, normal(n, m).relu_(), normal(n, c) / 4, normal(m, c), targets)


def prepared(p: Candidates, dtype: torch.dtype) -> tuple[Callable[[], None], Tensor]:
    """A function that calls the float32 kernel and nothing else, and the losses it writes."""
    structs, n = Structs(), len(p.features)
    features = p.features.to(dtype)
    m, c = p.base.shape
    target = Criterion(p.kind).target(p.targets, (m, c))
    base = target.relative(p.base.T.double()).float().contiguous()
    extent = _cuda.measure_features(features)
    reach = extent.largest * p.outgoing.double().abs().amax(1)
    losses = torch.empty(n, dtype=torch.float64, device=DEVICE)
    pieces = extension().cuda_candidate_pieces(m)
    partial = torch.empty(n, pieces, dtype=torch.float64, device=DEVICE)
    units = torch.arange(n, device=DEVICE)
    with _cuda.stream_of(DEVICE) as current:
        stream = current
    arguments = (
        losses.data_ptr(), partial.data_ptr(), units.data_ptr(), n, structs.features(features),
        reach.data_ptr(), p.outgoing.data_ptr(), 1.0, base.data_ptr(),
        structs.target(target, torch.float32, 1 / target.mass),
        stream,
    )  # fmt: skip
    held = (structs, reach, base, partial, units, p)

    def call(held: object = held) -> None:
        extension().cuda_candidate_loss_f32(*arguments)

    return call, losses


def check_candidates(p: Candidates, found: Tensor) -> None:
    some = slice(0, 8)
    m, c = p.base.shape
    target = Criterion(p.kind).target(p.targets, (m, c))
    expected = reference.candidate_loss(
        p.features[some], p.outgoing[some].double(), p.base.T.double(), target
    )
    torch.testing.assert_close(found[some], expected / target.mass, rtol=2e-5, atol=2e-6)


def bench_candidates(rows: list[Row], rates: dict[str, float]) -> None:
    for m, n, c, goal in CANDIDATES:
        p = candidates("cross_entropy", m, n, c)
        case = f"cross-entropy candidates, m={m} N={n} C={c}"
        limit = m * n * c / rates["exponentials/s"]
        for dtype in (torch.float32, torch.bfloat16):
            call, losses = prepared(p, dtype)
            call()
            if dtype == torch.float32:
                check_candidates(p, losses)
            name = f"greedyprune, {str(dtype).removeprefix('torch.')} features"
            rows.append(Row(case, name, timed(call), goal or limit / 0.6, limit, "exponentials"))
        rows.append(reference_candidates(p, case))
        rows.append(torch_candidates(p, case))
        rows.append(compiled_candidates(p, case))
    for kind in ("mse", "bce_with_logits"):
        m, n, c, _ = CANDIDATES[0]
        p = candidates(kind, m, n, c)
        call, losses = prepared(p, torch.float32)
        call()
        check_candidates(p, losses)
        rows.append(Row(f"{kind} candidates, m={m} N={n} C={c}", "greedyprune", timed(call)))


def reference_candidates(p: Candidates, case: str) -> Row:
    m, c = p.base.shape
    target = Criterion(p.kind).target(p.targets, (m, c))
    some = min(256, len(p.features))
    seconds = timed(
        partial(
            reference.candidate_loss, p.features[:some], p.outgoing[:some].double(),
            p.base.T.double(), target,
        )
    )  # fmt: skip
    return Row(case, f"float64 reference, from {some} units", seconds * len(p.features) / some)


def torch_candidates(p: Candidates, case: str) -> Row:
    """Eager torch, in the fastest layout and chunk size."""
    one = 4 * p.base.numel()  # bytes of one candidate's outputs
    chunks = [chunk for chunk in CHUNKS if chunk * one <= LARGEST]
    chunks = [
        chunk for chunk in chunks if chunk * one >= 2**22
    ] or chunks  # smaller ones would time the launches
    forms = [Form(layout, chunk) for layout in LAYOUTS for chunk in chunks]
    times = [(timed(partial(vectorised, p, form), 0.3), form) for form in forms]
    seconds, form = min(times, key=lambda each: each[0])
    return Row(case, f"torch, eager, {form.layout}, {form.chunk} units", seconds)


def compiled_candidates(p: Candidates, case: str) -> Row:
    chunk = 1  # has to divide the number of units
    while 2 * chunk <= len(p.features) and 8 * chunk * p.base.numel() <= LARGEST:
        chunk *= 2
    part = torch.compile(part_of(p, "samples last"), dynamic=False)
    return Row(case, f"torch.compile, {chunk} units", timed(partial(in_chunks, p, part, chunk)))


def layer_sums(n: int, m: int) -> tuple[Tensor, Moments]:
    """The Gram matrix of a random layer with one output."""
    h = torch.randn(n, m, device=DEVICE, dtype=torch.float64).relu_()
    t = torch.randn(m, device=DEVICE, dtype=torch.float64)
    gram = h @ h.T
    norm = gram.diagonal().clone()
    return gram, Moments(m, float(m), norm, h @ t, float(t.square().sum()), 0.0, 0.0, 0.0)


def bench_gram(rows: list[Row]) -> None:
    gram, moments = layer_sums(UNITS, 4096)
    rule = Rule(200, UNITS + 1, True)
    found = ops.greedy_gram(gram, moments, rule, backend="cuda")
    assert found.order.equal(reference.greedy_gram(gram, moments, rule).order)
    case = f"greedy on a Gram matrix, N={UNITS}, 200 steps"
    rows.append(Row(case, "greedyprune", timed(
        lambda: ops.greedy_gram(gram, moments, rule, backend="cuda")), 1e-3))  # fmt: skip
    plain = timed(lambda: reference.greedy_gram(gram, moments, rule), 0.1)
    rows.append(Row(case, "torch, a loop in Python", plain))


def bench_accumulation(rows: list[Row], rates: dict[str, float]) -> None:
    """The Gram matrix of float32 features, in float64 and as three products of bfloat16 parts."""
    n, m = GRAM
    h = torch.randn(n, m, device=DEVICE).relu_()
    exact = torch.zeros(n, n, dtype=torch.float64, device=DEVICE)
    case = f"half a Gram matrix, N={n} m={m}"
    limit = n * n * m / rates["float64 products, operations/s"]
    rows.append(Row(case, "float64", timed(
        lambda: add_upper_product(exact, h, torch.float64)), None, limit, "float64"))  # fmt: skip
    high = h.bfloat16()
    low = (h - high).bfloat16()

    def split() -> Tensor:  # computes both halves; using the symmetry would halve the time
        product = torch.mm(high, high.T, out_dtype=torch.float32)
        cross = torch.mm(high, low.T, out_dtype=torch.float32)
        return product + cross + cross.T

    seconds = timed(split)
    own = h.double()
    error = float(((split().double() - own @ own.T).abs() / (own.norm(dim=1)[:, None] *
                                                             own.norm(dim=1))).max())  # fmt: skip
    rows.append(Row(case, f"three bfloat16 products, both halves (error {error:.1e})", seconds))


def bench_select(rows: list[Row]) -> None:
    for loss, goal in (("mse", 0.05), ("cross_entropy", 0.12)):
        torch.manual_seed(0)
        m = SAMPLES[loss]
        model = nn.Sequential(nn.Linear(784, UNITS), nn.ReLU(), nn.Linear(UNITS, 10)).to(DEVICE)
        x = torch.rand(m, 784, device=DEVICE)
        y = torch.randint(10, (m,), device=DEVICE)
        if loss == "mse":
            y = nn.functional.one_hot(y, 10).float()

        def run(data: object = (x, y), model: nn.Module = model) -> greedyprune.Selection:
            return greedyprune.select(
                model, data, steps=200, layers={"0": "2"}, progress=False, backend="cuda"
            )

        found = run()
        small = greedyprune.prune(model, found)
        with torch.no_grad():
            value = getattr(nn.functional, f"{loss}_loss" if loss == "mse" else loss)(small(x), y)
        torch.testing.assert_close(float(value), float(found.losses[-1]), rtol=1e-4, atol=1e-6)
        case = f"select, {loss}, 784 inputs, N={UNITS}, m={m}, 200 steps"
        rows.append(Row(case, "greedyprune", timed(run, 2.0), goal))
        with torch.no_grad():
            rows.append(Row(case, "one dense forward pass", timed(partial(model, x))))


def small() -> None:
    """Runs every kernel once, at sizes that no block or vector length divides."""
    torch.manual_seed(0)
    hows: list[dict[str, Any]] = [
        {"steps": 6},
        {"size": 5},
        {"steps": 6, "objective": Loss(candidates=7)},
        {"steps": 5, "objective": Loss(batch_size=50, shortlist=4)},
    ]
    criteria = (
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.BCEWithLogitsLoss(),
        nn.MSELoss(),
    )
    for criterion in criteria:
        for how in hows:
            _select_small(45, torch.float32, criterion, how)
        # 700 units: selects by columns of the Gram matrix, and rules out candidates by bounds.
        _select_small(700, torch.float32, criterion, {"steps": 2})
        _select_small(45, torch.bfloat16, criterion, {"steps": 3})
    print("every kernel ran")


def _select_small(
    units: int, dtype: torch.dtype, criterion: nn.Module, how: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Linear(7, units), nn.ReLU(), nn.Linear(units, 3)).to(DEVICE, dtype)
    x, y = torch.rand(301, 7, device=DEVICE), torch.rand(301, 3, device=DEVICE)
    if isinstance(criterion, nn.CrossEntropyLoss):
        y = y.argmax(1)
    greedyprune.select(
        model, (x, y), layers={"0": "2"}, loss=criterion, progress=False, backend="cuda", **how
    )


def markdown(rows: list[Row], rates: dict[str, float], machine: str) -> str:
    lines = [f"# {machine}", "", "| limit | reached |", "| --- | --- |"]
    lines += [f"| {name} | {rate:.3g} |" for name, rate in rates.items()]
    lines += ["", "| case | how | time | goal | of the limit |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        goal = "" if row.goal is None else f"{row.goal * 1e3:.4g} ms"
        share = "" if row.limit is None else f"{row.limit / row.seconds:.0%} ({row.why})"
        lines.append(f"| {row.case} | {row.how} | {row.seconds * 1e3:.4g} ms | {goal} | {share} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for gpu.json and gpu.md")
    parser.add_argument("--small", action="store_true", help="every kernel once, nothing timed")
    args = parser.parse_args()
    if args.small:
        return small()
    machine = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    rates = limits()
    rows: list[Row] = []
    benches: list[Callable[[], None]] = [
        partial(bench_gram, rows),
        partial(bench_select, rows),
        partial(bench_candidates, rows, rates),
        partial(bench_accumulation, rows, rates),
    ]
    failed = []
    for bench in benches:
        try:
            bench()
        except Exception:  # the other benchmarks still run
            failed.append(traceback.format_exc())
        text = markdown(rows, rates, machine)
        if args.out:  # after each benchmark, since the run may be interrupted
            (args.out / "gpu.md").write_text(text)
            found = {"machine": machine, "limits": rates, "rows": [asdict(row) for row in rows]}
            (args.out / "gpu.json").write_text(json.dumps(found, indent=1))
    print(text)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
