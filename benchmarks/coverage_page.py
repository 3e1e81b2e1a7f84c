"""The page that coverage.py writes: every number on it is computed from the rows."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

# Between the pruned model and the masked one, of the largest output. With random weights a whole
# unit may change the output by 1e-4 only, so that the usual 1e-3 would see nothing.
TOLERANCE = {"float64": 1e-8, "float32": 1e-5}
SLOW = 15.0  # seconds of `layers` that are listed
Row = dict[str, Any]


def page(every: Sequence[Row], chosen: int) -> list[str]:
    """The lines of the page.

    chosen: how many models the script measures in all
    """
    rows = [row for row in every if row.get("stage") != "build"]
    lines = [
        "# Coverage", "",
        "Public architectures with random weights: `layers`, `select` (half of everything that can"
        " be cut, on 8 samples, by imitation in one pass, without exchanges, with"
        " `weights=\"none\"` and 16 GiB of memory), `prune`, and a run"
        " of two samples whose outputs must be those of the masked dense model, with norms over the"
        " units that are left ([what can be cut](guides/what-can-be-cut.md#norms-over-units)), up"
        " to"
        f" {TOLERANCE['float64']:g} of the largest in float64 (`gap`), or {TOLERANCE['float32']:g}"
        " in float32 for a model that does not run in float64. A model is *untested* where this"
        " can't fail: half of some layer's picks can be missing, too. Torch-Pruning's MetaPruner,"
        " by magnitude, with its default options and half of the channels, runs on the same model;"
        " it counts if the pruned model runs and is smaller. Models that could not be built or run"
        " themselves are listed at the end and do not count. Older rows compared all"
        " samples, with half of the free memory. Written by `make coverage`.", "",
        f"{len(every)} of {chosen} models have been measured so far{when(every)}.",
        "",
        *summary(rows),
    ]  # fmt: skip
    for library in dict.fromkeys(library_of(row) for row in rows):
        of_it = [row for row in rows if library_of(row) == library]
        lines += [f"## {library}", "", *table(TITLES, map(cells, of_it)), ""]
    return [*lines, *reasons(rows), *problems(every)]


def when(rows: Sequence[Row]) -> str:
    """The days on which rows were measured."""
    days = sorted({str(row["day"]) for row in rows if "day" in row})
    return f", from {days[0]} to {days[-1]}" if len(days) > 1 else f", on {days[0]}" if days else ""


def summary(rows: Sequence[Row]) -> list[str]:
    ours = [row for row in rows if row.get("verdict") == "passes"]
    theirs = [row for row in rows if their_left(row) is not None]
    both = [row for row in ours if row in theirs]
    lines: list[Sequence[str]] = [
        ("models", f"{len(rows)}", f"{len(rows)}"),
        ("select, prune, run and pass", share(len(ours), len(rows)), share(len(theirs), len(rows))),
        (
            f"parameters left, geometric mean over the {len(both)} models that both handle",
            mean([row["left"] for row in both]), mean([their_left(row) or 1.0 for row in both]),
        ),
        (
            "parameters left, over all models (1 where one fails)",
            mean([row["left"] if row in ours else 1.0 for row in rows]),
            mean([their_left(row) or 1.0 for row in rows]),
        ),
    ]  # fmt: skip
    text = table(("", "greedyprune", "Torch-Pruning"), lines)
    timed = [row for row in rows if "layers_seconds" in row]
    if timed:
        slowest = max(timed, key=lambda row: row["layers_seconds"])
        text += ["", f"The slowest `layers`: {slowest['layers_seconds']:.1f} s, {slowest['name']}."]
    return [*text, ""]


TITLES = (
    "model", "parameters", "`layers`, s", "groups", "layers in them", "verdict", "gap",
    "parameters left", "FLOPs left", "`select`, s", "Torch-Pruning: left", "FLOPs left", "s",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    theirs = row.get("theirs", {})
    in_groups = share(row["in_groups"], row["layers"]) if "layers" in row else "-"
    return [
        row["name"].partition("/")[2], number(row.get("parameters"), ",d"),
        number(row.get("layers_seconds"), ".1f"), number(row.get("groups"), "d"), in_groups,
        row.get("verdict", "-"), number(row.get("gap"), ".0e"), number(row.get("left"), ".2f"),
        number(row.get("flops_left"), ".2f"), number(row.get("select_seconds"), ".1f"),
        number(their_left(row), ".2f") if their_left(row) else "fails",
        number(theirs.get("flops_left"), ".2f"), number(theirs.get("seconds"), ".1f"),
    ]  # fmt: skip


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why layers are refused, the most frequent reason first."""
    counts, models, examples = Counter[str](), Counter[str](), dict[str, str]()
    for row in rows:
        for why, count, example in row.get("refused", []):
            counts[why] += count
            models[why] += 1
            examples.setdefault(why, f"{row['name']}, {example}")
    lines = [(f"{n}", f"{models[why]}", why, examples[why]) for why, n in counts.most_common()]
    return [
        "## Why layers are refused",
        "",
        *table(("layers", "models", "reason", "example"), lines),
    ]


def problems(rows: Sequence[Row]) -> list[str]:
    """What did not pass, with the error, and what is slow."""
    lines = [
        (
            row["name"], "not built" if row.get("stage") == "build" else row.get("verdict", "-"),
            row.get("stage", ""), row.get("error", ""),
        )
        for row in rows if row.get("verdict") != "passes"
    ]  # fmt: skip
    lines += [
        (row["name"], "slow", "find_layers", f"{row['layers_seconds']:.1f} s")
        for row in rows if row.get("layers_seconds", 0) > SLOW
    ]  # fmt: skip
    return ["", "## What does not pass", "", *table(("model", "verdict", "stage", "error"), lines)]


def library_of(row: Row) -> str:
    return str(row["name"]).partition("/")[0]


def their_left(row: Row) -> float | None:
    """Torch-Pruning's share of the parameters; None where it failed or removed nothing."""
    left = row.get("theirs", {}).get("left")
    return left if left is not None and left < 1 else None


def share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.0%})" if whole else "-"


def mean(values: Sequence[float]) -> str:
    return f"{math.exp(sum(map(math.log, values)) / len(values)):.3f}" if values else "-"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(head: Sequence[str], rows: Any) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    escaped = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in escaped]


def general(reason: str) -> str:
    """A reason without the names and numbers of one model."""
    return re.sub(r"\d+", "n", re.sub(r"'[^']*'", "'...'", reason))
