"""The monitor's stopping rules, its share of the time, resuming, and bad input."""

import copy
import io
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from monitored import NAMED, Augmented, problem
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from greedyprune import Check, PretrainingMonitor
from greedyprune.pretraining.evaluate import ACCURACY
from greedyprune.pretraining.history import LayerCheck
from greedyprune.pretraining.stopping import stopping_rule
from greedyprune.selector import select_on

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- stopping rules


def history(losses: list[float], **fields: list) -> list[Check]:
    """Checks every 250 iterations with these losses; fields: a list of values for another field."""
    layer = LayerCheck("0", "loss", 9, 3, (0, 1, 2), (3.0, 2.0, 1.0), 0.5, 0.1, 2.0)
    checks = []
    for i, loss in enumerate(losses):
        values = {"dense_loss": 0.5, "dense_metric": 0.9, "metric": 0.8}
        values |= {name: column[i] for name, column in fields.items()}
        checks.append(Check(250 * (i + 1), 1.0, 9.0, loss=loss, layers=(layer,), **values))
    return checks


def stops_at(stop: object, checks: list[Check], **options) -> int | None:
    """The index of the check after which the rule stops; None: it never stops."""
    rule = stopping_rule(stop, **({"patience": 3, "min_delta": 0.01, "metric": ACCURACY} | options))
    return next((i for i in range(len(checks)) if rule(checks[: i + 1])), None)


@pytest.mark.parametrize(
    ("losses", "options", "expected"),
    [
        ([9, 8, 7, 6, 5], {}, None),
        ([9, 8, 8, 8, 8], {}, 4),
        ([9, 8, 8, 8, 7, 7, 7, 7], {}, 7),  # a new lowest loss starts the count again
        ([9, 8, 8.5, 7.95, 8.2], {}, 4),  # 7.95 is lower, but not by 1 %
        ([9, 8, 8.5, 7.95, 8.2], {"min_delta": 0.005}, None),
        ([1.0, 0.995, 0.99, 0.985, 0.98], {}, None),  # slow, but by 1 % within three checks
        ([9, 8, 8], {"patience": 1}, 2),
        ([-1, -2, -2, -2, -2], {}, 4),
        ([-1, -2, -2.1, -2.2, -2.3], {}, None),
    ],
)
def test_a_plateau(losses: list[float], options: dict, expected: int | None) -> None:
    assert stops_at("plateau", history(losses), **options) == expected


def test_goals() -> None:
    checks = history([3, 2, 1], metric=[0.5, 0.7, 0.9], dense_metric=[0.4, 0.9, 0.91])
    assert stops_at({"loss": 2}, checks) == 1
    assert stops_at({"loss": 0.9}, checks) is None
    assert stops_at({"metric": 0.9}, checks) == 2
    assert stops_at({"share": 0.98}, checks) == 0  # ahead of the dense network early on
    assert stops_at({"share": 0.98, "metric": 0.6}, checks) == 2
    assert stops_at({"share": 0.98, "metric": 0.6, "loss": 0.5}, checks) is None
    assert stops_at("never", checks) is None
    assert stops_at(lambda h: len(h) == 2, checks) == 1


def test_the_reason_is_one_sentence() -> None:
    checks = history([3, 2, 2, 2, 2])
    for stop, patterns in (
        ("plateau", ["iteration 500", "3 checks", r"\b2\b"]),
        ({"loss": 2.5, "share": 0.5}, ["iteration 1250", r"2\.5", r"0\.5", "0.45"]),
        (lambda h: "the disk is full", ["^the disk is full$"]),
        (always, ["always", "iteration 1250"]),
    ):
        reason = stopping_rule(stop, 3, 0.01, ACCURACY)(checks)
        for pattern in patterns:
            assert re.search(pattern, reason), reason
        assert len(reason.splitlines()) == 1


@pytest.mark.parametrize(
    "stop", [{"metric": 95}, {"metric": -1}, {"share": 1.2}, {"share": 95}, {"share": 0}]
)
def test_goals_in_percent_are_refused(stop: dict) -> None:
    with pytest.raises(ValueError, match=r"stop: found '(metric|share)' .*expected a share in"):
        stopping_rule(stop, 3, 0.01, ACCURACY)


def test_the_users_metric_may_be_any_number() -> None:
    checks = history([3, 2], metric=[90.0, 96.0], dense_metric=[99.0, 99.0])
    assert stops_at({"metric": 95}, checks, metric=lambda outputs, targets: 0.0) == 1


def always(checks: list[Check]) -> bool:
    return True


def test_the_first_reason_to_stop_stays() -> None:
    model, x, y = problem()
    monitor = PretrainingMonitor(model, (x, y), steps=4, every=3, max_overhead=None, patience=2)
    answers = [monitor.step() for _ in range(20)]  # the model does not change
    assert answers == [False] * 8 + [True] * 12
    assert [check.iteration for check in monitor.history] == [3, 6, 9]
    reason = monitor.reason
    assert "none of the 2 checks since iteration 3 " in reason
    assert monitor.iteration == 20
    with torch.no_grad():
        model[2].weight.mul_(1.1)  # the next check gives another loss
    assert monitor.check().iteration == 20
    assert monitor.step()
    assert monitor.reason == reason


# ---------------------------------------------------------------- the share of the time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock for the monitor that only this test moves. Each check takes `clock.check` seconds."""
    clock = SimpleNamespace(now=100.0, check=5.0)

    def timed_select(*args, **kwargs):
        clock.now += clock.check
        return select_on(*args, **kwargs)

    monkeypatch.setattr("greedyprune.pretraining.monitor.select_on", timed_select)
    monkeypatch.setattr(
        "greedyprune.pretraining.monitor.time", SimpleNamespace(perf_counter=lambda: clock.now)
    )
    return clock


def train_for(monitor: PretrainingMonitor, clock: SimpleNamespace, iterations: int) -> None:
    """Iterations of one second each."""
    for _ in range(iterations):
        monitor.step()
        clock.now += 1


def test_checks_stay_under_their_share(clock: SimpleNamespace) -> None:
    model, x, y = problem()
    options = {"steps": 4, "every": 10, "stop": "never", "layers": NAMED}
    monitor = PretrainingMonitor(model, (x, y), max_overhead=0.1, **options)
    clock.now += 1000  # before training begins
    train_for(monitor, clock, 251)
    # n checks of 5 s need 50 n s of training. Training begins with the first step.
    assert [check.iteration for check in monitor.history] == [10, 110, 160, 210]
    assert [check.training_seconds for check in monitor.history] == [9, 109, 159, 209]
    assert [check.seconds for check in monitor.history] == [5, 5, 5, 5]
    assert monitor.skipped == 21
    assert monitor.training_seconds == 251
    assert monitor.overhead == 20 / 251
    clock.check = 30.0  # a check that takes longer delays the next one
    train_for(monitor, clock, 600)
    assert [check.iteration for check in monitor.history][4:] == [260, 810]
    unlimited = PretrainingMonitor(model, (x, y), max_overhead=None, **options)
    train_for(unlimited, clock, 50)
    assert [check.iteration for check in unlimited.history] == [10, 20, 30, 40, 50]
    assert unlimited.skipped == 0


# ---------------------------------------------------------------- resuming


def trained(clock: SimpleNamespace, interrupted: int | None, options: dict) -> PretrainingMonitor:
    """The monitor of a training. At iteration `interrupted`, a new one resumes from its state."""
    model, x, y = problem(units=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    options = {"steps": 10, "every": 5, "layers": NAMED, **options}
    monitor = PretrainingMonitor(model, (x, y), **options)
    for i in range(200):
        if i == interrupted:
            saved = io.BytesIO()
            torch.save(monitor.state_dict(), saved)
            monitor = PretrainingMonitor(model, (x, y), **options)
            clock.now += 12345
            saved.seek(0)
            monitor.load_state_dict(torch.load(saved, weights_only=True))
            assert monitor.selection is None
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        clock.now += 1
        if monitor.step():
            break
    return monitor


@pytest.mark.parametrize(
    "options", [{"max_overhead": 0.5}, {"max_overhead": None, "min_delta": 0.05}]
)
def test_resuming_changes_nothing(clock: SimpleNamespace, options: dict) -> None:
    expected = trained(clock, None, options)
    assert len(expected.history) > 4
    assert (expected.skipped > 0) == (options["max_overhead"] is not None)
    assert expected.reason is not None
    for interrupted in (1, 5, 27):
        resumed = trained(clock, interrupted, options)
        assert [replace(c, training_seconds=0) for c in resumed.history] == [
            replace(c, training_seconds=0) for c in expected.history
        ]
        assert resumed.reason == expected.reason
        assert (resumed.iteration, resumed.skipped) == (expected.iteration, expected.skipped)
        assert resumed.selection.order.equal(expected.selection.order)


def test_a_state_that_is_not_a_monitor_s() -> None:
    model, x, y = problem()
    monitor = PretrainingMonitor(model, (x, y))
    with pytest.raises(ValueError, match="state: found no 'history'"):
        monitor.load_state_dict({"iteration": 3})


# ---------------------------------------------------------------- bad input, at once

# Options, and patterns that the error has to contain.
BAD_OPTIONS: list[tuple[dict, list[str]]] = [
    ({"every": 0}, ["every", r"\b0\b"]),
    ({"every": 2.5}, ["every", r"2\.5"]),
    ({"stop": "soon"}, ["stop", "soon", "plateau"]),
    ({"stop": {}}, ["stop", "no goal"]),
    ({"stop": {"accuracy": 0.9}}, ["stop", "accuracy", "metric"]),
    ({"stop": {"loss": "low"}}, ["stop", "loss", "low"]),
    ({"stop": {"metric": 0.9}, "metric": None}, ["stop", "metric="]),
    ({"stop": {"share": 0.9}, "metric": None}, ["stop", "metric="]),
    ({"patience": 0}, ["patience", r"\b0\b"]),
    ({"patience": "long"}, ["patience", "long"]),
    ({"min_delta": -0.1}, ["min_delta", r"-0\.1"]),
    ({"min_delta": float("nan")}, ["min_delta", "nan"]),
    ({"metric": "f1"}, ["metric", "f1", "auto"]),
    ({"max_overhead": 0}, ["max_overhead", r"\b0\b"]),
    ({"max_overhead": "little"}, ["max_overhead", "little"]),
    ({"writer": "runs"}, ["writer", "str", "SummaryWriter"]),
    ({"steps": 0}, ["steps", r"\b0\b"]),
    ({"steps": 3, "size": 4}, ["steps", "size"]),
    ({"size": 17}, ["size", "17", "16"]),
    ({"stepz": 3}, ["stepz"]),
    ({"layers": "nope"}, ["layers", "nope"]),
    ({"loss": "hinge"}, ["loss", "hinge"]),
    ({"loss": "mse"}, ["targets", r"\(80, 3\)"]),
    ({"backend": "tpu"}, ["backend", "tpu"]),
    ({"held_out": iter([])}, ["held_out", "iterator"]),
    ({"held_out": []}, ["held_out", "no samples"]),
    ({"held_out": (torch.ones(4, 5), torch.ones(4, 2))}, ["held_out", "targets"]),
    ({"held_out": (torch.ones(4, 6), torch.ones(4).long())}, ["held_out", "6"]),
]


@pytest.mark.parametrize(("options", "patterns"), BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_bad_options(options: dict, patterns: list[str]) -> None:
    model, x, y = problem()
    check_refused(model, (x, y), *patterns, **options)


@pytest.mark.parametrize(
    ("data", "patterns"),
    [
        (lambda x, y: iter([(x, y)]), ["data", "iterator", "list_iterator"]),
        (lambda x, y: ((x, y) for _ in range(3)), ["data", "generator"]),
        (lambda x, y: [], ["data", "no samples"]),
        (lambda x, y: 3, ["data", "int"]),
        (lambda x, y: [x], ["data", "targets"]),
        (lambda x, y: (x, y + 3), ["data", "labels"]),
        (lambda x, y: DataLoader(Augmented(), num_workers=1, persistent_workers=True),
         ["data", "persistent_workers"]),
    ],
)  # fmt: skip
def test_bad_data(data: Callable, patterns: list[str]) -> None:
    model, x, y = problem()
    check_refused(model, data(x, y), *patterns)


def test_bad_models() -> None:
    _, x, y = problem()
    check_refused(None, (x, y), "model", "NoneType")
    check_refused(nn.Linear(5, 3), (x, y), "model|layer")


def check_refused(model: nn.Module | None, data: object, *patterns: str, **options) -> None:
    """One sentence that contains the patterns; model and random numbers stay as they were."""
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError)) as caught:
        PretrainingMonitor(model, data, **options)
    message = str(caught.value)
    assert len(message.strip().splitlines()) == 1, message
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"
    assert torch.get_rng_state().equal(state)
    if model is not None:
        for parameter, saved in zip(model.parameters(), before.parameters(), strict=True):
            assert parameter.equal(saved)


def test_a_rule_that_returns_a_number() -> None:
    model, x, y = problem()
    monitor = PretrainingMonitor(model, (x, y), steps=4, stop=lambda history: 0.3)
    with pytest.raises(TypeError, match=r"stop: your function returned 0\.3"):
        monitor.check()


def test_weights_that_are_no_longer_finite() -> None:
    model, x, y = problem()
    monitor = PretrainingMonitor(model, (x, y), steps=4, every=1)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '0': NaN or inf in its weights"):
        monitor.step()
