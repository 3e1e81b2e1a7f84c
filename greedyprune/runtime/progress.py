"""How a model is left while it is looked at: in eval mode, and then as it was. Bars, warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

PACKAGE = f"{__name__.partition('.')[0]}."
BAR_DELAY = 2.0  # seconds before a progress bar shows


def bars(progress: bool | None) -> Callable[..., Any]:
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
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
