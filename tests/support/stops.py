"""In the place of kills: a call that stops at one of its writes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from greedyprune.runtime import checkpoint, resume


class StopError(Exception):
    """In the place of a kill."""


def stopped(at: int, call: Callable[[], object], *, after: bool = True) -> bool:
    """Does the call come to its n-th write, and stop there, right after it or in its place?"""
    left = at

    def counting(write: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                raise StopError
            write(*args)
            if left == 0:
                raise StopError

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint, resume, sys.modules["greedyprune.surgery.selection"]):
            for name in ("write_tensors", "write_json"):
                if hasattr(module, name):
                    patch.setattr(module, name, counting(getattr(module, name)))
        try:
            call()
        except StopError:
            return True
    return False
