"""The performance goals, each judged by the results of one run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from results import OURS, Results, Row, ratio

AT_THE_LIMIT = 0.7  # the share of a limit that counts as reaching it
FORWARD = "dense forward pass"


@dataclass(frozen=True)
class Goal:
    """One goal. reached: None where the run did not measure it."""

    work: str
    wanted: str
    found: str
    reached: bool | None


def goals(results: Results) -> list[Goal]:
    return [
        *_candidates(results),
        *_few(results),
        *_half(results),
        *_cross_entropy(results),
        *_memory(results),
        *_overhead(results),
    ]


def _candidates(results: Results) -> Iterator[Goal]:
    for hows in results.goal("candidates", goal=True):
        ours = hows[OURS]
        entropy = ours.case["kind"] == "cross_entropy"
        least = 60 if entropy else 20
        for layout in ("outputs last", "samples last"):
            found = ratio(hows, f"vectorised, {layout}")
            yield _at_least(ours.name, found, least, f"eager at its best chunk, {layout}")
        if entropy:
            found = ratio(hows, "torch.compile")
            yield _at_least(ours.name, found, 8, "torch.compile, the better layout")
        share, limit = ours.share, ours.info.get("limit", "limit")
        yield Goal(
            ours.name,
            f">= {AT_THE_LIMIT:.0%} of the measured {limit}",
            "not measured" if share is None else f"{share:.0%}",
            None if share is None else share >= AT_THE_LIMIT,
        )


def _few(results: Results) -> Iterator[Goal]:
    for hows in results.goal("select", goal="few"):
        ours = hows[OURS]
        if FORWARD in hows:
            found = ours.seconds / hows[FORWARD].seconds
            yield _at_most(f"select, {ours.name}", found, 2, "x a dense forward pass")
        found_ratio = ratio(hows, "vectorised")
        yield _at_least(f"select, {ours.name}", found_ratio, 100, "the vectorised baseline", hows)


def _half(results: Results) -> Iterator[Goal]:
    for hows in results.goal("select", goal="half"):
        ours = hows[OURS]
        if FORWARD in hows:
            floor = ours.info["floor"] + hows[FORWARD].seconds
            what = "x (symmetric Gram at the GEMM rate + a forward pass)"
            yield _at_most(f"select, {ours.name}", ours.seconds / floor, 1.3, what)


def _cross_entropy(results: Results) -> Iterator[Goal]:
    for hows in results.goal("select", goal="cross_entropy"):
        ours = hows[OURS]
        work = f"select, {ours.name}"
        yield _at_least(work, ratio(hows, "vectorised"), 50, "the vectorised baseline", hows)
        forms = stochastic(hows)
        near = [row for row in forms if loss_ratio(row, ours) <= 1.01]
        wanted = "a stochastic form within 1 % of the loss at <= 0.1x the time"
        if not forms:
            yield Goal(work, wanted, "not measured", None)
            continue
        best = min(near or forms, key=lambda row: row.seconds if near else loss_ratio(row, ours))
        time = best.seconds / ours.seconds
        text = f"{best.how}: loss {loss_ratio(best, ours) - 1:+.1%}, time {time:.2g}x"
        yield Goal(work, wanted, text, bool(near) and time <= 0.1)


def _memory(results: Results) -> Iterator[Goal]:
    rows = [hows[OURS] for hows in results.goal("memory")]
    if rows:
        worst = max(rows, key=lambda row: row.info["grown"] / allowed(row))
        held = sum(row.info["grown"] <= allowed(row) for row in rows)
        text = (
            f"{held} of {len(rows)} cases; the worst is {worst.info['grown'] / allowed(worst):.2f}x"
            f" of that: {worst.name}"
        )
        wanted = "<= features + Gram + 10 % or memory_limit, the smaller"
        yield Goal("peak memory of select", wanted, text, held == len(rows))


def _overhead(results: Results) -> Iterator[Goal]:
    for hows in results.goal("overhead"):
        ours = hows[OURS]
        found = 1e3 * ours.seconds
        yield _at_most(f"select again, {ours.name}", found, 2, " ms")


def stochastic(hows: dict[str, Row]) -> list[Row]:
    return [row for how, row in hows.items() if how != OURS and "final_loss" in row.info]


def loss_ratio(row: Row, full: Row) -> float:
    return float(row.info["final_loss"] / full.info["final_loss"])


def allowed(row: Row) -> float:
    """The bytes by which one select may increase the memory of its process."""
    return float(min(1.1 * (row.info["features"] + row.info["gram"]), row.info["limit_bytes"]))


def _at_least(
    work: str, found: float | None, least: float, what: str, hows: dict[str, Row] | None = None
) -> Goal:
    if found is None:
        return Goal(work, f">= {least}x {what}", "not measured", None)
    text = f"{found:.3g}x"
    if hows is not None and hows["vectorised"].extrapolated:
        text += f", extrapolated from {hows['vectorised'].extrapolated}"
    return Goal(work, f">= {least}x {what}", text, found >= least)


def _at_most(work: str, found: float, most: float, what: str) -> Goal:
    unit = " ms" if what == " ms" else "x"
    return Goal(work, f"<= {most}{what}", f"{found:.3g}{unit}", found <= most)
