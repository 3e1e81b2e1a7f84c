"""pytest-benchmark's JSON as the report reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "greedyprune"


@dataclass(frozen=True)
class Row:
    """One benchmark: a case computed in one way (`how`).

    median: seconds of a round; info: what else the benchmark noted
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
        """From how much of the work, where it was not all of it; else empty."""
        timed, steps = self.info.get("timed", 0), self.info.get("steps", 0)
        return f"{timed} of {steps} steps" if timed < steps else ""

    @property
    def seconds(self) -> float:
        """The median, for all of the work."""
        if "timed" not in self.info:
            return self.median
        return self.info["before"] + self.median * self.info["steps"] / self.info["timed"]

    @property
    def share(self) -> float | None:
        """Of what the machine can do: the floor below any way to compute it, over the time."""
        return self.info["floor"] / self.seconds if "floor" in self.info else None


@dataclass(frozen=True)
class Results:
    """limits: as limits.Limits; skipped: what was left out, each with its reason."""

    quick: bool
    machine: dict[str, str]
    limits: dict[str, Any]
    skipped: list[dict[str, Any]]
    rows: list[Row]

    def cases(self, table: str) -> list[dict[str, Row]]:
        """The rows of a table, for each case a dict from `how`."""
        found: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            if row.table == table:
                found.setdefault(row.name, {})[row.how] = row
        return list(found.values())

    def goal(self, table: str, **case: Any) -> list[dict[str, Row]]:
        """The cases of a table with these entries that our time is known of."""
        return [
            hows
            for hows in self.cases(table)
            if OURS in hows and case.items() <= hows[OURS].case.items()
        ]


def read(paths: list[Path]) -> Results:
    """The results of one or more runs, each measured beside limits of its own; the first's show."""
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
    """How many times our time another way takes; None where either is not known."""
    if OURS not in hows or how not in hows:
        return None
    return hows[how].seconds / hows[OURS].seconds
