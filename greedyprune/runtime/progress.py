"""What a user sees while it runs: progress bars and warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

PACKAGE = __name__.partition(".")[0]
BAR_DELAY = 2.0  # seconds before a progress bar shows

# bar(source, description) passes on what it iterates over; bar(total=, desc=) has an `update`.
Bar = Callable[..., Any]


def bars(progress: bool | None) -> Bar:
    """A function that makes progress bars; they stay hidden with progress=False.

    TypeError for anything but True, False and None.
    """
    if progress not in (None, True, False):
        raise TypeError(f"progress: found {progress!r}, expected True, False or None")

    def bar(source: Iterable[Any] | None = None, desc: str = "", total: int | None = None) -> Any:
        if total is None and source is not None:
            total = len(source) or None  # type: ignore[arg-type]
        return tqdm(
            source, desc=desc, total=total, delay=BAR_DELAY, leave=False,
            disable=progress is False,
        )  # fmt: skip

    return bar


def warn(message: str) -> None:
    """A UserWarning at the line that called this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
