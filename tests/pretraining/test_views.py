"""The monitor's curves, summary and plot."""

import io
import re
import sys
from pathlib import Path

import pytest
import rich.console
from monitored import Augmented, cnn, problem

from greedyprune import PretrainingMonitor

pytestmark = pytest.mark.usefixtures("one_thread")


class RecordingWriter:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.append((tag, scalar_value, global_step))


def test_the_curves_are_written() -> None:
    model, x, y = problem()
    writer = RecordingWriter()
    monitor = PretrainingMonitor(model, (x, y), steps=4, every=3, writer=writer, max_overhead=None)
    for _ in range(6):
        monitor.step()
    assert {tag.removeprefix("greedyprune/") for tag, _, _ in writer.scalars} == {
        "dense_loss", "loss", "dense_metric", "metric", "gap", "bound", "kept", "seconds",
    }  # fmt: skip
    losses = [(value, step) for tag, value, step in writer.scalars if tag == "greedyprune/loss"]
    assert losses == [(check.loss, check.iteration) for check in monitor.history]


def test_tensorboard_shows_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, x, y = problem()
    with SummaryWriter(tmp_path) as writer:
        check = PretrainingMonitor(model, (x, y), steps=4, writer=writer).check()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("greedyprune/loss")
    assert (event.step, event.value) == (0, pytest.approx(check.loss))


def printed_summary(monitor: PretrainingMonitor) -> str:
    console = rich.console.Console(width=200, file=io.StringIO())
    console.print(monitor.summary())
    return console.file.getvalue()


def test_summary() -> None:
    model, x, y = problem()
    monitor = PretrainingMonitor(model, (x, y), steps=4, every=1, max_overhead=None)
    assert "checks: 0, left out: 0" in printed_summary(monitor)
    while not monitor.step():
        pass
    text = printed_summary(monitor)
    last = monitor.history[-1]
    for part in ("whole networks on data", f"{last.loss:.4g}", f"{last.gap:.4g}", "kept of 16",
                 "pruned accuracy", monitor.reason, "checks: 4, left out: 0"):  # fmt: skip
        assert part in re.sub(r"\s+", " ", text)
    deep = PretrainingMonitor(cnn(), (Augmented().images, Augmented().labels), size=0.5)
    deep.check()
    assert "gap" not in printed_summary(deep)
    assert "monitor.selection.summary()" in printed_summary(deep)
    assert "kept of 14" in printed_summary(deep)


def test_plot(tmp_path: Path) -> None:
    model, x, y = problem()
    monitor = PretrainingMonitor(model, (x, y), steps=4, every=1, max_overhead=None)
    monitor.plot()  # a history without checks
    while not monitor.step():
        pass
    figure = monitor.plot()
    losses, metrics = figure.axes
    assert losses.get_lines()[0].get_ydata().tolist() == [c.dense_loss for c in monitor.history]
    assert losses.get_lines()[1].get_ydata().tolist() == [c.loss for c in monitor.history]
    assert metrics.get_lines()[1].get_ydata().tolist() == [c.metric for c in monitor.history]
    assert metrics.get_lines()[1].get_xdata().tolist() == [1, 2, 3, 4]
    figure.savefig(tmp_path / "monitor.png")
    without_metric = PretrainingMonitor(*problem("mse")[:1], problem("mse")[1:], steps=4)
    without_metric.check()
    assert len(without_metric.plot().axes) == 1


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = problem()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[plot\]' in the checkout"):
        PretrainingMonitor(model, (x, y)).plot()
