"""Which public architectures greedyprune prunes, beside Torch-Pruning: writes docs/coverage.md.

    python benchmarks/coverage.py [--models PATTERN | --dozen] [--every] [--again NAME] [--report]

Each model has random weights and runs in a process of its own with a time limit, so that a crash is
a row of the table. Rows go to benchmarks/coverage.jsonl, with their day; a row that is there is not
measured again, since the whole table takes hours. Every number on the page is computed from the
rows. Needs the extra `coverage`.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import math
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import coverage_models
import torch
from coverage_page import TOLERANCE, Row, general, page
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import greedyprune
from greedyprune.data.batches import example_batch
from greedyprune.data.forward import leaves_of
from greedyprune.graph.costs import count_flops
from greedyprune.graph.executor import GraphExecutor
from greedyprune.graph.export import without_cache
from greedyprune.graph.names import slice_of, weight_of
from greedyprune.graph.networks import tensors_of
from greedyprune.graph.tracing import LAYER_TYPES
from greedyprune.surgery.cut import masked
from greedyprune.surgery.proof import example_of
from greedyprune.surgery.remaining import entries_left

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "coverage.jsonl"
SIZES = ROOT / "out" / "coverage_models.json"  # which models of a family are the smallest
PAGE = ROOT / "docs" / "coverage.md"
THEIR_SECONDS = 30  # the limit for Torch-Pruning; on language models it may not end
MEMORY = 16 * 2**30  # bytes that `select` may take, whatever is free
# What is reached does not depend on how units are judged: in one pass, without exchanges.
PLAIN = greedyprune.Imitation(sequential=False, swaps=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="*", help="a pattern of names: 'timm/vit*'")
    parser.add_argument("--dozen", action="store_true", help="a dozen small models")
    parser.add_argument("--every", action="store_true", help="all sizes, not only the smallest")
    parser.add_argument("--again", action="append", default=[], help="measure this model again")
    parser.add_argument("--seconds", type=int, default=180, help="limit for one model")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file of rows")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--report", action="store_true", help="only write the page from the rows")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what the script calls itself with
    args = parser.parse_args()
    if args.one:
        return measure(args.one, args.seconds)
    rows = read(args.rows)
    if not args.report:
        chosen = coverage_models.DOZEN if args.dozen else coverage_models.names(args.every, SIZES)
        chosen = [name for name in chosen if fnmatch.fnmatch(name, args.models)]
        chosen = [name for name in chosen if name not in rows] + args.again
        args.rows.parent.mkdir(parents=True, exist_ok=True)
        for name in dict.fromkeys(chosen):
            rows[name] = in_process(name, args.seconds)
            with args.rows.open("a") as file:
                file.write(json.dumps(rows[name]) + "\n")
            print(name, rows[name].get("verdict"), rows[name].get("error", ""), flush=True)
    in_all = len(coverage_models.DOZEN)
    if not args.dozen:
        in_all = len(coverage_models.names(args.every, SIZES))
    args.page.write_text("\n".join(page(list(rows.values()), in_all)) + "\n")
    print(args.page)


def read(path: Path) -> dict[str, Row]:
    """The rows of a file by model; the last one of a model counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


# ---------------------------------------------------------------- one model


def in_process(name: str, seconds: int) -> Row:
    """The row of one model. A process that dies leaves what it had printed."""
    command = [sys.executable, __file__, "--one", name, "--seconds", str(seconds)]
    start, problem = time.perf_counter(), ""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        text, errors = process.communicate(timeout=seconds)
        if process.returncode:
            problem = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        problem = f"not done after {seconds} s"
    printed = [line for line in text.splitlines() if line.startswith('{"name"')]
    row: Row = json.loads(printed[-1]) if printed else {"name": name, "stage": "build"}
    if problem and row["stage"] not in ("Torch-Pruning", "done"):
        row |= {"verdict": "stopped", "error": problem}
    elif problem:
        row["theirs"] = {"error": problem}
    return row | {"seconds": time.perf_counter() - start, "day": date.today().isoformat()}


def measure(name: str, seconds: int) -> None:
    """Prints the row of a model after each stage."""
    warnings.simplefilter("ignore")
    row: Row = {"name": name, "stage": "build"}

    def tell(stage: str) -> None:
        row["stage"] = stage
        print(json.dumps(row), flush=True)

    tell("build")
    model, inputs = coverage_models.build(name)
    row["parameters"], row["flops"] = parameters_of(model), flops_of(model, inputs)
    outputs = output_layers(model, inputs)
    try:
        for stage in (find_layers, prune):
            tell(stage.__name__)
            stage(row, model, inputs)
    except Exception as error:
        row |= {"verdict": kind_of(error), "error": text_of(error)}
        if row["verdict"] == "crash":
            row["trace"] = traceback.format_exc(limit=-4)
    tell("Torch-Pruning")
    row["theirs"] = with_torch_pruning(model, inputs, outputs, min(seconds, THEIR_SECONDS))
    tell("done")


def find_layers(row: Row, model: nn.Module, inputs: Any) -> None:
    start = time.perf_counter()
    table = greedyprune.layers(model, inputs)
    row["layers_seconds"] = time.perf_counter() - start
    producers = {producer for group in table.values() for producer in group.producers}
    known = {name for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)}
    row |= {"groups": len(table), "in_groups": len(producers), "layers": len(known | producers)}
    counts = Counter(general(reason) for reason in table.refused.values())
    examples = {general(why): f"{layer}: {why}" for layer, why in table.refused.items()}
    row["refused"] = [[why, count, examples[why]] for why, count in counts.most_common()]


def prune(row: Row, model: nn.Module, inputs: Any) -> None:
    """Half of every layer, selected, cut, run and compared with the masked dense model."""
    start = time.perf_counter()
    data = [inputs] if isinstance(inputs, dict) else inputs
    selection = greedyprune.select(
        model, data, size=0.5, layers="all", weights="none", objective=PLAIN,
        memory_limit=MEMORY, progress=False,
    )  # fmt: skip
    row["select_seconds"] = time.perf_counter() - start
    small = greedyprune.prune(model, selection)
    row["left"] = parameters_of(small) / row["parameters"]
    row["flops_left"] = flops_of(small, inputs) / max(row["flops"], 1)
    full = masked(model, selection)
    row["precision"], row["gap"], unseen = compared(full, small, few(model, inputs), selection)
    row["verdict"] = "passes" if row["gap"] <= TOLERANCE[row["precision"]] else "differs"
    if row["verdict"] == "passes" and unseen:
        row |= {"verdict": "untested", "error": f"a missing unit is not seen: {', '.join(unseen)}"}


def with_torch_pruning(model: nn.Module, inputs: Any, outputs: list[nn.Module], limit: int) -> Row:
    """The same with Torch-Pruning's MetaPruner by magnitude; it changes the model."""
    import torch_pruning as tp

    start, before, flops = time.perf_counter(), parameters_of(model), flops_of(model, inputs)
    heads = {
        module.qkv: module.num_heads
        for module in model.modules()
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads")
    }
    found: Row
    try:
        with alarm(limit):
            tp.pruner.MetaPruner(
                model.requires_grad_(True), inputs, tp.importance.MagnitudeImportance(p=2),
                pruning_ratio=0.5, ignored_layers=outputs, num_heads=heads,
            ).step()  # fmt: skip
            run(model, inputs)
            left = parameters_of(model) / before
            found = {"left": left, "flops_left": flops_of(model, inputs) / max(flops, 1)}
    except (Exception, TimeoutError) as error:
        found = {"error": text_of(error)}
    return found | {"seconds": time.perf_counter() - start}


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors in a model's outputs; the same random numbers every time."""
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = model.eval()(**inputs) if isinstance(inputs, dict) else model.eval()(inputs)
    return [leaf for leaf in leaves_of(outputs) if isinstance(leaf, Tensor)]


def few(model: nn.Module, inputs: Any) -> Any:
    """Two samples of the inputs, or all where the model does not run on two."""
    batch = example_of(model, example_batch(inputs))
    return batch.kwargs if isinstance(inputs, dict) else batch.args[0]


def compared(
    full: nn.Module, small: nn.Module, inputs: Any, selection: greedyprune.Selection
) -> tuple[str, float, list[str]]:
    """The precision, the gap of the masked and the pruned model, and the layers of `unseen_in`.

    Both models become float64, unless they do not run in it.
    """
    doubled = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    try:
        pruned, masked_outputs = run(small.double(), doubled), run(full.double(), doubled)
        precision, inputs = "float64", doubled
    except Exception:  # it makes float32 tensors of its own
        pruned, masked_outputs = run(small.float(), inputs), run(full.float(), inputs)
        precision = "float32"
    found = gap(masked_outputs, pruned)
    if found > TOLERANCE[precision]:
        found = gap(run_without_units(full, selection, inputs) or masked_outputs, pruned)
    return precision, found, unseen_in(full, selection, inputs, TOLERANCE[precision])


def run_without_units(
    full: nn.Module, selection: greedyprune.Selection, inputs: Any
) -> list[Tensor] | None:
    """The masked model's outputs, with norms over the units that are left; None without such."""
    batch, left = example_batch(inputs), entries_left(selection.layers.values())
    executor = GraphExecutor(full, replace(batch, kwargs=without_cache(full, batch.kwargs)))
    if not executor.has_norms(left):
        return None
    with torch.no_grad():
        outputs = executor.outputs(executor.inputs(batch), tensors_of(full), 0, left)
    return [leaf for leaf in leaves_of(outputs) if isinstance(leaf, Tensor)]


def unseen_in(
    full: nn.Module, selection: greedyprune.Selection, inputs: Any, tolerance: float
) -> list[str]:
    """The layers of which half of the picks can be missing without a change of the output."""
    expected, unseen = run(full, inputs), list[str]()
    for name, layer in selection.layers.items():
        weights = {consumer: weight_of(full, consumer).data for consumer in layer.outputs}
        saved = {consumer: weight.clone() for consumer, weight in weights.items()}
        for consumer, weight in weights.items():
            at = slice_of(layer.slices, consumer)
            weight.index_fill_(
                at.dim, at.entries(layer.order[: max(1, len(layer.kept) // 2)].unique()), 0
            )
        if gap(expected, run(full, inputs)) <= tolerance:
            unseen.append(name)
        for consumer, weight in weights.items():
            weight.copy_(saved[consumer])
    return unseen


def gap(expected: list[Tensor], actual: list[Tensor]) -> float:
    """The largest difference of two outputs, each relative to its largest number."""
    if [t.shape for t in expected] != [t.shape for t in actual]:
        return math.inf
    pairs = [(a.double(), b.double()) for a, b in zip(expected, actual, strict=True) if a.numel()]
    gaps = [float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in pairs]
    return max([math.inf if math.isnan(value) else value for value in gaps], default=math.inf)


def output_layers(model: nn.Module, inputs: Any) -> list[nn.Module]:
    """The layers whose outputs are the model's, and the layer that runs last."""
    ran: list[tuple[nn.Module, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, LAYER_TYPES)]
    hooks = [m.register_forward_hook(lambda m, _, out: ran.append((m, out))) for m in layers]
    outputs = {tensor.data_ptr() for tensor in run(model, inputs)}
    for hook in hooks:
        hook.remove()
    return [module for module, out in ran if out.data_ptr() in outputs] + [ran[-1][0]]


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops_of(model: nn.Module, inputs: Any) -> int:
    return count_flops(model, lambda: run(model, inputs))[1]


def kind_of(error: Exception) -> str:
    """ "refused" for the package's own one-sentence errors, "crash" for any other."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    is_own = Path(frame.filename).is_relative_to(Path(greedyprune.__file__).parent)
    is_clear = isinstance(error, (ValueError, TypeError)) and "\n" not in str(error).strip()
    return "refused" if is_own and is_clear else "crash"


def text_of(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


if __name__ == "__main__":
    main()
