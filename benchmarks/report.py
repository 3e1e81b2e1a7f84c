"""Writes benchmarks/RESULTS.md and scaling.png from the JSON of one run of the benchmarks.

    python benchmarks/report.py RESULTS.json ... [--out FOLDER]

Every number in the report is computed here from the JSON. Results of --quick say nothing about
speed, so they have to go to another folder.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from goals import allowed, goals, loss_ratio, stochastic
from results import OURS, Results, Row, ratio, read
from scaling import Point, picture

HERE = Path(__file__).parent
Table = list[list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("results", type=Path, nargs="+", help="what --benchmark-json wrote")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for RESULTS.md, scaling.png")
    args = parser.parse_args()
    results = read(args.results)
    if results.quick and args.out.resolve() == HERE:
        raise SystemExit("--out: results of --quick are not for benchmarks/, name another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    points = scaling_points(results)
    if points:
        picture(points).savefig(args.out / "scaling.png", dpi=120)
    (args.out / "RESULTS.md").write_text("\n".join(report(results, bool(points))) + "\n")
    print(args.out / "RESULTS.md")


def report(results: Results, scaling: bool) -> list[str]:
    lines = ["# Results", ""]
    if results.quick:
        lines += ["**Tiny sizes, one round each (`--quick`): no number here says anything.**", ""]
    lines += [
        "Written by `make bench`. Times are medians; `3.1x` means 3.1 times greedyprune's time in"
        " the same run, and a share of the limit is the least time that the machine's measured rate"
        " allows, over the time taken.",
        "",
        *machine(results),
        *figures(results),
        *candidates(results),
        *comparison(
            results, "gram", "The Gram matrix", ["N", "m"],
            "With the sums that squared error needs, from features in memory. The limit is half the"
            " square's multiplications at the GEMM rate.",
        ),
        *comparison(
            results, "loop on the Gram matrix", "Greedy steps on a Gram matrix",
            ["N", "steps", "repeats"], "Without the time to compute the matrix, in float64.",
        ),
        *comparison(
            results, "loop on the losses", "Greedy steps on the candidates' losses",
            ["kind", "m", "N", "C", "steps"],
            "Features at hand; the certificate's gap included. \\* extrapolated.",
        ),
        *comparison(
            results, "network", "Candidates by the loss of a whole network",
            ["layer", "images", "candidates"],
            "A ResNet-20's blocks, half of the channels picked; the plain loop runs the whole"
            " masked network for each candidate.",
        ),
        *select(results),
        *phases(results),
        *stochastic_forms(results),
        *memory(results),
        *overhead(results),
    ]  # fmt: skip
    if scaling:
        lines += ["## Scaling", "", "![time against sizes](scaling.png)", "", *slopes(results)]
    return lines + left_out(results)


def machine(results: Results) -> list[str]:
    table = [["", ""], *([name, value] for name, value in results.machine.items())]
    source = {row.info["data"] for row in results.rows if "data" in row.info}
    if source:
        table.append(["images", ", ".join(sorted(source))])
    limits = results.limits
    if limits:
        table += [
            ["exponentials", f"{giga(limits['exponentials'])}/s, by {limits['exponentials_by']}"],
            ["copy bandwidth", f"{giga(limits['bandwidth'])}B/s, read and written"],
            ["GEMM, float32", f"{giga(limits['gemm'])}FLOP/s"],
        ]
    return ["## Machine, versions, limits", "", *markdown(table), ""]


def figures(results: Results) -> list[str]:
    said = {True: "reached", False: "**not reached**", None: "not measured"}
    table = [["work", "goal", "found", ""]]
    table += [[g.work, g.wanted, g.found, said[g.reached]] for g in goals(results)]
    return ["## Figures to reach", "", *markdown(table), ""]


def candidates(results: Results) -> list[str]:
    text = (
        "All N candidates' losses on m samples with C outputs. `outputs last` is the model's own"
        " layout, (units, samples, outputs); `samples last` is (units, outputs, samples), which"
        " torch is faster at for few outputs. Chunks are those found fastest. The limit is the"
        " slower of reading the features once and, but for mse, an exponential for each output."
    )
    return comparison(
        results, "candidates", "One greedy step's candidates", ["kind", "m", "N", "C"], text
    )


def select(results: Results) -> list[str]:
    text = (
        "From a model and its inputs to the Selection; 784 -> N -> 1 with binarised labels (mse) or"
        " -> 10 (cross_entropy). The dense forward pass is over the same data in batches of 1024."
        " All baselines begin with the inputs too. \\* extrapolated."
    )
    hide = [row.how for hows in results.cases("select") for row in stochastic(hows)]
    return comparison(
        results, "select", "`select`, end to end", ["kind", "N", "m", "steps"], text, hide
    )


def phases(results: Results) -> list[str]:
    table = [
        ["select", "by", "features", "sums, Gram", "steps", "scored", "scored again", "kept",
         "dense loss", "loss"],
    ]  # fmt: skip
    for row in (hows[OURS] for hows in results.goal("select")):
        info = row.info
        rest = row.seconds - info["preparing"] - info["looping"]
        table.append([
            row.name, info["by"], duration(rest), duration(info["preparing"]),
            duration(info["looping"]), *scored(info), f"{info['kept']}",
            f"{info['dense_loss']:.4g}", f"{info['final_loss']:.4g}",
        ])  # fmt: skip
    for row in (hows[OURS] for hows in results.goal("loop on the losses")):
        table.append([f"loop, {row.name}", "losses", *["-"] * 3, *scored(row.info), *["-"] * 3])
    text = (
        "Where the time goes; how many candidates were scored, of all in all steps (the others'"
        " loss is known to be above another's); and how many of them again in float64 because"
        " float32 rounding could have decided between them."
    )
    return section("Phases and exact rescoring", text, table)


def scored(info: dict[str, Any]) -> list[str]:
    again = f"{info['rescored']} ({info['rescored'] / info['scored']:.2g})"
    return [f"{info['scored'] / info['possible']:.0%} of {info['possible']}", again]


def stochastic_forms(results: Results) -> list[str]:
    table = [["select", "form", "time", "of the full time", "final loss", "against the full one"]]
    for hows in results.goal("select"):
        full = hows[OURS]
        for row in [full, *stochastic(hows)] if stochastic(hows) else []:
            table.append([
                row.name, "full" if row is full else row.how, duration(row.seconds),
                f"{row.seconds / full.seconds:.2f}", f"{row.info['final_loss']:.4g}",
                f"{loss_ratio(row, full) - 1:+.2%}",
            ])  # fmt: skip
    text = "Steps scored on mini-batches or random candidates; the loss is that of all samples."
    return section("Stochastic forms", text, table)


def memory(results: Results) -> list[str]:
    table = [
        ["select", "grown by", "features", "Gram", "memory_limit", "allowed", "grown / allowed",
         "uncertain"],
    ]  # fmt: skip
    for row in (hows[OURS] for hows in results.goal("memory")):
        info = row.info
        sizes = [
            info["grown"], info["features"], info["gram"], info["limit_bytes"], allowed(row)
        ]  # fmt: skip
        table.append([
            row.name, *(f"{size / 2**20:.1f}" for size in sizes),
            f"{info['grown'] / allowed(row):.2f}", f"{info['uncertain'] / 2**20:.1f}",
        ])  # fmt: skip
    text = (
        "MiB: by how much the peak of the resident memory of a fresh process lies above what was"
        " resident just before `select`, with model, data and libraries loaded. Features are 4 N m"
        " bytes, the Gram matrix 8 N^2 (squared error). Allowed is the smaller of their sum + 10 %"
        " and memory_limit. Growth is overestimated by at most what is uncertain."
    )
    return section("Memory", text, table)


def overhead(results: Results) -> list[str]:
    return comparison(
        results, "overhead", "A small layer", ["kind", "N", "m", "steps"],
        "From the second `select` on one model on. The first one took "
        + ", ".join(duration(hows[OURS].info["first"]) for hows in results.goal("overhead"))
        + ".",
    )  # fmt: skip


def scaling_points(results: Results) -> list[Point]:
    return [
        Point(row.case["sweep"], row.case["line"], row.info["fixed"], row.info["x"], row.seconds)
        for row in results.rows
        if row.table == "scaling"
    ]


def slopes(results: Results) -> list[str]:
    """The exponent of each line of the scaling figure, from its first to its last point."""
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in scaling_points(results):
        lines.setdefault((point.sweep, point.line), []).append(point)
    table = [["over", "of", "from", "to", "exponent"]]
    for (sweep, line), points in lines.items():
        first, last = min(points, key=lambda p: p.x), max(points, key=lambda p: p.x)
        if last.x > first.x:
            slope = math.log(last.seconds / first.seconds) / math.log(last.x / first.x)
            ends = [f"{p.x:g}: {duration(p.seconds)}" for p in (first, last)]
            table.append([sweep, line, *ends, f"{slope:.2f}"])
    return [*markdown(table), ""] if len(table) > 1 else []


def left_out(results: Results) -> list[str]:
    if not results.skipped:
        return []
    table = [["table", "case", "left out", "reason"]]
    table += [[s["table"], s["name"], s["how"], s["reason"]] for s in results.skipped]
    return section("Left out", "", table)


def comparison(
    results: Results,
    table: str,
    title: str,
    fields: list[str],
    text: str,
    hide: Sequence[str] = (),
) -> list[str]:
    """A table with a row for each case: our time, its share of the limit, the others' times."""
    cases = results.cases(table)
    hows = list(dict.fromkeys(how for case in cases for how in case if how not in [OURS, *hide]))
    limited = any(row.share is not None for case in cases for row in case.values())
    rows = [[*fields, OURS, *(["of the limit"] if limited else []), *hows]]
    for case in cases:
        values = next(iter(case.values())).case
        row = [field_text(field, values[field]) for field in fields]
        row.append(duration(case[OURS].seconds) if OURS in case else "-")
        if limited:
            row.append(share_text(case.get(OURS)))
        rows.append([*row, *(cell(case, how) for how in hows)])
    return section(title, text, rows)


def field_text(field: str, value: object) -> str:
    if field == "steps" and value is None:
        return "half the units"
    return {True: "with", False: "without"}[value] if isinstance(value, bool) else str(value)


def share_text(row: Row | None) -> str:
    if row is None or row.share is None:
        return "-"
    return f"{row.share:.0%} ({row.info['limit']})"


def cell(case: dict[str, Row], how: str) -> str:
    if how not in case:
        return "-"
    row = case[how]
    text = duration(row.seconds) + ("\\*" if row.extrapolated else "")
    found = ratio(case, how)
    if found is not None:
        text += f", {found:.3g}x"
    notes = [str(row.info[key]) for key in ("layout",) if key in row.info]
    if "chunk" in row.info:
        notes.append(f"chunk {row.info['chunk']}")
    if row.extrapolated:
        notes.append(f"from {row.extrapolated}")
    return f"{text} ({', '.join(notes)})" if notes else text


def giga(rate: float) -> str:
    return f"{rate / 1e9:.3g} G"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def section(title: str, text: str, table: Table) -> list[str]:
    """A section with a text and a table; no lines at all for a table without rows."""
    if len(table) < 2:
        return []
    return [f"## {title}", "", *([text, ""] if text else []), *markdown(table), ""]


def markdown(table: Table) -> list[str]:
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
    main()
