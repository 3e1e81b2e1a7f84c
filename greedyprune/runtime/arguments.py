"""Checks of simple arguments. An error names the argument, what was found and what was expected."""

from __future__ import annotations

import math
from numbers import Real
from typing import TypeGuard, TypeVar

import numpy as np

V = TypeVar("V")


def positive_int(name: str, value: object) -> int | None:
    if value is None:
        return None
    whole = isinstance(value, float) and value.is_integer()
    if not (is_int(value) or whole):
        raise TypeError(f"{name}: found {value!r}, expected an int")
    checked = int(value)  # type: ignore[call-overload]
    if checked < 1:
        raise ValueError(f"{name}: found {value!r}, expected at least 1")
    return int(checked)


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{name}: found {value!r}, expected one of {', '.join(map(repr, allowed))}"
        )


def is_int(value: object) -> TypeGuard[int]:
    """An int, Python's or NumPy's, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """A finite real number, Python's or NumPy's, and no bool."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


class ByName(dict[str, V]):
    """A dict by the names of layers. The KeyError for another name lists the names that it has."""

    def __missing__(self, name: object) -> V:
        known = ", ".join(map(repr, self)) or "none: it is empty"
        raise KeyError(f"layer: found {name!r}, expected one of {known}")
