"""Reads pytest-benchmark's JSON files into rows for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "greedyprune"


@dataclass(frozen=True)
class Row:
    """One benchmark: a case that was computed in one way (`how`).

    median: seconds of one round; info: what else the benchmark recorded
    """

    table: str
    name: str
    case: dict[str, Any]
    how: str
    median: float
    rounds: int
    info: dict[str, Any]

    @property
    def extrapolated(self) -> str:
        """How much of the work was timed, where that was not all of it; else empty."""
        timed, steps = self.info.get("timed", 0), self.info.get("steps", 0)
        return f"{timed} of {steps} steps" if timed < steps else ""

    @property
    def seconds(self) -> float:
        """The seconds of all of the work: the median, extrapolated where necessary."""
        if "timed" not in self.info:
            return self.median
        return self.info["before"] + self.median * self.info["steps"] / self.info["timed"]

    @property
    def share(self) -> float | None:
        """The lower bound on any method's time, over the time taken; None without a bound."""
        return self.info["floor"] / self.seconds if "floor" in self.info else None


@dataclass(frozen=True)
class Results:
    """All results of one or more runs.

    limits:  the fields of limits.Limits
    skipped: the benchmarks that did not run, and why
    """

    quick: bool
    machine: dict[str, str]
    limits: dict[str, Any]
    skipped: list[dict[str, Any]]
    rows: list[Row]

    def cases(self, table: str) -> list[dict[str, Row]]:
        """The rows of a table: for each case a dict from `how` to the row."""
        found: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            if row.table == table:
                found.setdefault(row.name, {})[row.how] = row
        return list(found.values())

    def goal(self, table: str, **case: Any) -> list[dict[str, Row]]:
        """The cases of a table that have these entries and for which our time is known."""
        return [
            hows
            for hows in self.cases(table)
            if OURS in hows and case.items() <= hows[OURS].case.items()
        ]


def read(paths: list[Path]) -> Results:
    """The results of one or more runs. The limits and the machine are those of the first run."""
    contents = [json.loads(path.read_text()) for path in paths]
    rows, skipped = [], []
    for content in contents:
        skipped += content["greedyprune"]["skipped"]
        for each in content["benchmarks"]:
            info = dict(each["extra_info"])
            named = {key: info.pop(key) for key in ("table", "name", "case", "how")}
            stats = each["stats"]
            rows.append(Row(**named, median=stats["median"], rounds=stats["rounds"], info=info))
    about = [content["greedyprune"] for content in contents]
    limits: dict[str, Any] = next((each["limits"] for each in about if each["limits"]), {})
    quick = any(each["quick"] for each in about)
    return Results(quick, about[0]["machine"], limits, skipped, rows)


def ratio(hows: dict[str, Row], how: str) -> float | None:
    """Another way's time as a multiple of ours; None where one of them is not known."""
    if OURS not in hows or how not in hows:
        return None
    return hows[how].seconds / hows[OURS].seconds
