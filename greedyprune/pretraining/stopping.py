"""When pre-training no longer pays: rules from a monitor's history to a reason, or None."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..runtime.arguments import is_int, is_number
from .history import Check

History = Sequence[Check]
Rule = Callable[[History], "str | None"]
GOALS = ("loss", "metric", "share")


def rule_of(stop: object, patience: int, min_delta: float, has_metric: bool) -> Rule:
    """The rule that `PretrainingMonitor`'s arguments mean; ValueError or TypeError for others."""
    if not is_int(patience) or patience < 1:
        raise ValueError(f"patience: found {patience!r}, expected an int of at least 1 (checks)")
    if not (is_number(min_delta) and 0 <= min_delta < 1):
        raise ValueError(f"min_delta: found {min_delta!r}, expected a share in [0, 1)")
    if stop == "plateau":
        return partial(_plateau, patience=patience, min_delta=min_delta)
    if stop == "never":
        return lambda history: None
    if isinstance(stop, Mapping):
        goals = _goals(stop, has_metric)
        return lambda history: _reached(history[-1], goals)
    if callable(stop):
        return lambda history: _own(history, stop)
    raise ValueError(
        f"stop: found {stop!r}, expected 'plateau', 'never', a mapping from {', '.join(GOALS)} to "
        "a number, or a function of the history"
    )


def _plateau(history: History, patience: int, min_delta: float) -> str | None:
    best = history[0]
    since = 0
    for check in history[1:]:
        if check.loss < best.loss - min_delta * abs(best.loss):
            best, since = check, 0
        else:
            since += 1
    if since < patience:
        return None
    last = history[-1]
    return (
        f"the pruned loss, {last.loss:.4g} at iteration {last.iteration}, has been no more than "
        f"{100 * min_delta:.3g} % below the {best.loss:.4g} of iteration {best.iteration} for "
        f"{since} checks"
    )


def _goals(stop: Mapping[object, object], has_metric: bool) -> dict[str, float]:
    goals = {}
    for name, value in stop.items():
        if name not in GOALS:
            raise ValueError(f"stop: found {name!r}, expected one of {', '.join(GOALS)}")
        if not is_number(value):
            raise ValueError(f"stop: found {name!r} {value!r}, expected a number")
        if name != "loss" and not has_metric:
            raise ValueError(
                f"stop: found {name!r} without a metric, expected metric=a function of outputs and "
                "targets"
            )
        goals[str(name)] = float(value)
    if not goals:
        raise ValueError(f"stop: found no goal, expected one of {', '.join(GOALS)}")
    return goals


def _reached(check: Check, goals: Mapping[str, float]) -> str | None:
    """Are all goals reached?"""
    reasons = []
    for name, goal in goals.items():
        if name == "loss":
            if not check.loss <= goal:
                return None
            reasons.append(f"loss is {check.loss:.4g}, at most {goal:.4g}")
            continue
        assert check.metric is not None and check.dense_metric is not None
        aim = goal if name == "metric" else goal * check.dense_metric
        if not check.metric >= aim:
            return None
        of = "" if name == "metric" else f", {goal:.4g} of the dense network's"
        reasons.append(f"metric is {check.metric:.4g}, at least {aim:.4g}{of}")
    return f"at iteration {check.iteration} the pruned network's " + ", and its ".join(reasons)


def _own(history: History, stop: Callable[..., object]) -> str | None:
    answer = stop(list(history))
    if isinstance(answer, str):
        return answer or None
    if answer is None or isinstance(answer, bool):
        name = getattr(stop, "__name__", type(stop).__name__)
        return f"{name} said so at iteration {history[-1].iteration}" if answer else None
    raise TypeError(f"stop: your function returned {answer!r}, expected a bool or a reason (str)")
