"""Errors that torch or the user's code raises, told apart from the package's own."""

from __future__ import annotations

from .progress import PACKAGE


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def raised_here(error: BaseException) -> bool:
    """Did a line of this package raise the error? Not the line that caught it, which only calls."""
    traceback = error.__traceback__ and error.__traceback__.tb_next
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = "" if traceback is None else traceback.tb_frame.f_globals.get("__name__", "")
    return str(module).partition(".")[0] == PACKAGE
