"""The stopping rules: when does more pre-training no longer help?

A rule is a function from a monitor's history to a reason to stop (one sentence), or to None while
training should go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..runtime.arguments import is_int, is_number
from .evaluate import ACCURACY
from .history import Check

History = Sequence[Check]
StoppingRule = Callable[[History], "str | None"]
GOALS = ("loss", "metric", "share")


def stopping_rule(
    stop: object, patience: int, min_delta: float, metric: object
) -> StoppingRule:  # fmt: skip
    """The rule that these arguments of `PretrainingMonitor` mean.

    metric: ACCURACY, the user's function, or None: there is none

    ValueError or TypeError, in one sentence, for arguments that mean no rule.
    """
    if not is_int(patience) or patience < 1:
        raise ValueError(f"patience: found {patience!r}, expected an int of at least 1 (checks)")
    if not (is_number(min_delta) and 0 <= min_delta < 1):
        raise ValueError(f"min_delta: found {min_delta!r}, expected a share in [0, 1)")
    if stop == "plateau":
        return partial(_plateau, patience=patience, min_delta=min_delta)
    if stop == "never":
        return lambda history: None
    if isinstance(stop, Mapping):
        goals = _checked_goals(stop, metric)
        return lambda history: _all_reached(history[-1], goals)
    if callable(stop):
        return lambda history: _ask_user(history, stop)
    raise ValueError(
        f"stop: found {stop!r}, expected 'plateau', 'never', a mapping from {', '.join(GOALS)} to "
        "a number, or a function of the history"
    )


def _plateau(history: History, patience: int, min_delta: float) -> str | None:
    """Stops after `patience` checks in a row without a new lowest loss.

    A loss counts as a new lowest if it is below the old one by more than the share `min_delta`.
    """
    best = history[0]
    checks_since = 0
    for check in history[1:]:
        if check.loss < best.loss - min_delta * abs(best.loss):
            best, checks_since = check, 0
        else:
            checks_since += 1
    if checks_since < patience:
        return None
    last = history[-1]
    return (
        f"the pruned loss is {last.loss:.4g} at iteration {last.iteration}; none of the "
        f"{checks_since} checks since iteration {best.iteration} ({best.loss:.4g}) was lower by "
        f"more than {100 * min_delta:.3g} %"
    )


def _checked_goals(stop: Mapping[object, object], metric: object) -> dict[str, float]:
    """The goals in `stop`, from their name to a number; ValueError for anything else."""
    goals = {}
    for name, value in stop.items():
        if name not in GOALS:
            raise ValueError(f"stop: found {name!r}, expected one of {', '.join(GOALS)}")
        if not is_number(value):
            raise ValueError(f"stop: found {name!r} {value!r}, expected a number")
        if name != "loss" and metric is None:
            raise ValueError(
                f"stop: found {name!r} without a metric, expected metric=a function of outputs and "
                "targets"
            )
        if name == "share" and not 0 < value <= 1:
            raise ValueError(f"stop: found 'share' {value!r}, expected a share in (0, 1]")
        if name == "metric" and metric == ACCURACY and not 0 <= value <= 1:
            raise ValueError(
                f"stop: found 'metric' {value!r}, expected a share in [0, 1]: the metric is the "
                "accuracy"
            )
        goals[str(name)] = float(value)
    if not goals:
        raise ValueError(f"stop: found no goal, expected one of {', '.join(GOALS)}")
    return goals


def _all_reached(check: Check, goals: Mapping[str, float]) -> str | None:
    """Stops once the check reaches every goal."""
    reasons = []
    for name, goal in goals.items():
        if name == "loss":
            if not check.loss <= goal:
                return None
            reasons.append(f"loss is {check.loss:.4g}, at most {goal:.4g}")
            continue
        assert check.metric is not None and check.dense_metric is not None
        least = goal if name == "metric" else goal * check.dense_metric
        if not check.metric >= least:
            return None
        source = "" if name == "metric" else f", {goal:.4g} of the dense network's"
        reasons.append(f"metric is {check.metric:.4g}, at least {least:.4g}{source}")
    return f"at iteration {check.iteration} the pruned network's " + ", and its ".join(reasons)


def _ask_user(history: History, stop: Callable[..., object]) -> str | None:
    """Stops when the user's function returns True or a reason."""
    answer = stop(list(history))
    if isinstance(answer, str):
        return answer or None
    if answer is None or isinstance(answer, bool):
        name = getattr(stop, "__name__", type(stop).__name__)
        return f"{name} returned True at iteration {history[-1].iteration}" if answer else None
    raise TypeError(f"stop: your function returned {answer!r}, expected a bool or a reason (str)")
