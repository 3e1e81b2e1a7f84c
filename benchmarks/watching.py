"""Measures the phases inside `select`, and how often candidates are scored again.

No other file of the benchmarks depends on the internals of `select`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from harness import clocked
from torch import Tensor, nn

import greedyprune
from greedyprune import Selection
from greedyprune.kernels.path import Path
from greedyprune.objectives import output_loss
from greedyprune.objectives.output_loss import Solver


@dataclass
class Watched:
    """One call of `select` for one layer.

    by: what the candidates were scored with: "Gram matrix", "columns" or "losses"
    scored: the number of candidates whose loss was computed; bounds ruled out the others
    rescored: the number that was scored again because rounding could have decided
    preparing: seconds for the sums over samples, the Gram matrix included
    looping: seconds for the greedy steps
    """

    selection: Selection
    by: str
    scored: int
    rescored: int
    preparing: float
    looping: float


def watched_select(model: nn.Module, data: object, **options: Any) -> Watched:
    """`greedyprune.select`, with the measurements."""
    seen: dict[str, Any] = {}

    class Watching(Solver):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            _, seen["preparing"] = clocked(lambda: Solver.__init__(self, *args, **kwargs))
            seen["by"] = "losses"
            if self.features.criterion.kind == "mse" and self.features.backend == "cpu":
                seen["by"] = "columns" if _gram_of(self) is None else "Gram matrix"

        def run(self, *args: Any, **kwargs: Any) -> Path:
            path, seen["looping"] = clocked(lambda: Solver.run(self, *args, **kwargs))
            seen.update(scored=path.scored, rescored=path.rescored)
            return path

    with patch.object(output_loss, "Solver", Watching):
        selection = greedyprune.select(model, data, progress=False, **options)
    return Watched(selection, **seen)


def gram_builder(model: nn.Module, data: object) -> Callable[[], Tensor]:
    """A function that computes the Gram matrix from features in memory, as `select` does."""
    build: list[Callable[[], Solver]] = []

    class Kept(Solver):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            build.append(lambda: Solver(*args, **kwargs))

    with patch.object(output_loss, "Solver", Kept):
        greedyprune.select(model, data, size=0.5, progress=False)

    def gram() -> Tensor:
        matrix = _gram_of(build[0]())
        assert matrix is not None, "select chose columns where this benchmark wants the matrix"
        return matrix

    return gram


def _gram_of(solver: Solver) -> Tensor | None:
    return solver._gram
