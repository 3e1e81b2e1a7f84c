"""Training is the same with a monitor and without; what it records and shows; many processes."""

import doctest
import io
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
import torch
from processes import Team
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import greedyprune
from greedyprune import Check, PretrainingMonitor

pytestmark = pytest.mark.usefixtures("one_thread")
NAMED = {"0": "2"}  # of `problem`; spares the search


class Augmented(Dataset):
    """Images that every access changes, by torch's, Python's and NumPy's random numbers."""

    def __init__(self, samples: int = 48) -> None:
        sampler = torch.Generator().manual_seed(3)
        self.images = torch.randn(samples, 1, 8, 8, generator=sampler)
        self.labels = torch.randint(3, (samples,), generator=sampler)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = self.images[i] + 0.1 * torch.randn(1, 8, 8)
        if random.random() < 0.5:
            image = image.flip(-1)
        return image.roll(int(np.random.randint(-1, 2)), -1), self.labels[i]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 3)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2),
        nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


OPTIMIZERS: dict[str, Callable] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
}


DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
])]  # fmt: skip


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, own: torch.Generator) -> list:
    """All that training leaves behind, to be compared exactly."""
    found = [(n, v.tolist()) for n, v in model.state_dict().items()]
    found += [(n, None if p.grad is None else p.grad.tolist()) for n, p in model.named_parameters()]
    found += [(n, m.training, len(m._forward_pre_hooks), sorted(vars(m))) for n, m in
              model.named_modules()]  # fmt: skip
    state = optimizer.state_dict()["state"]
    found += [(i, name, torch.as_tensor(v).tolist()) for i, e in state.items()
              for name, v in e.items()]  # fmt: skip
    numpy = np.random.get_state()
    if torch.cuda.is_initialized():
        found += [state.tolist() for state in torch.cuda.get_rng_state_all()]
    found += [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]]
    return [*found, own.get_state().tolist()]


def train(
    network: Callable[[], nn.Module], optimizer: str, watched: str | None, own: bool, device: str
) -> tuple[list, PretrainingMonitor | None]:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    model, monitor = network().to(device), None
    generator = torch.Generator().manual_seed(5)
    data = Augmented()
    loader = DataLoader(data, 16, shuffle=True, generator=generator if own else None)
    optimize = OPTIMIZERS[optimizer](model.parameters())
    if watched is not None:
        given = {"loader": loader, "dataset": data, "other": DataLoader(data, 20, shuffle=True)}
        how = {"steps": 6} if network is mlp else {"size": 0.5}
        held_out = loader if watched == "other" else None
        monitor = PretrainingMonitor(
            model, given[watched], every=2, held_out=held_out, stop="never", max_overhead=None,
            **how,
        )  # fmt: skip
    model.train()
    for _ in range(2):
        for images, labels in loader:
            optimize.zero_grad()
            functional.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimize.step()
            if monitor is not None:
                assert not monitor.step()
    return everything(model, optimize, generator), monitor


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("own", [False, True], ids=["global", "own"])
@pytest.mark.parametrize(
    ("network", "optimizer", "watched"),
    [(mlp, "adam", "loader"), (mlp, "momentum", "other"), (cnn, "momentum", "loader"),
     (cnn, "adam", "dataset")],
)  # fmt: skip
def test_training_is_the_same(
    network: Callable, optimizer: str, watched: str, own: bool, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Bit for bit: weights, gradients, optimiser, buffers, modes, every source of randomness."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    expected, _ = train(network, optimizer, None, own, device)
    found, monitor = train(network, optimizer, watched, own, device)
    assert [check.iteration for check in monitor.history] == [2, 4, 6]
    assert found == expected


def test_every_pass_sees_the_same_samples() -> None:
    """Though they are augmented: a model that does not change is found to be the same."""
    monitor = PretrainingMonitor(mlp(), DataLoader(Augmented(), 16, shuffle=True), steps=6)
    first, second = monitor.check(), monitor.check()
    assert replace(second, seconds=0) == replace(first, seconds=0)
    # And one check's passes agree: select's loss is that of the pruned network, measured after it.
    assert first.loss == pytest.approx(first.layers[0].losses[-1], rel=1e-5)
    assert first.dense_loss == pytest.approx(first.layers[0].dense_loss, rel=1e-5)


# ---------------------------------------------------------------- what is recorded


def problem(loss: str = "cross_entropy", units: int = 16) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, units), nn.ReLU(), nn.Linear(units, 3))
        x = torch.randn(80, 5)
        y = {
            "cross_entropy": torch.randint(3, (80,)),
            "mse": torch.randn(80, 3),
            "bce_with_logits": torch.randint(2, (80, 3)).float(),
        }[loss]
        return model, x, y


FUNCTIONS: dict[str, Callable] = {
    "cross_entropy": functional.cross_entropy, "mse": functional.mse_loss,
    "bce_with_logits": functional.binary_cross_entropy_with_logits,
}  # fmt: skip
RIGHT: dict[str, Callable] = {
    "cross_entropy": lambda f, y: f.argmax(1) == y,
    "bce_with_logits": lambda f, y: (f > 0) == (y == 1),
}


@pytest.mark.parametrize("loss", FUNCTIONS)
@pytest.mark.parametrize("apart", [False, True], ids=["data", "held_out"])
def test_a_check_of_one_hidden_layer(loss: str, apart: bool) -> None:
    model, x, y = problem(loss)
    data, held_out = (x[:50], y[:50]), (x[50:], y[50:])
    monitor = PretrainingMonitor(
        model, data, steps=7, held_out=held_out if apart else None, loss=loss
    )
    assert monitor.selection is None
    check = monitor.check()
    expected = greedyprune.select(model, data, steps=7, loss=loss)
    small = greedyprune.prune(model, expected)
    seen, targets = held_out if apart else data
    with torch.no_grad():
        for network, found, metric in (
            (model, check.dense_loss, check.dense_metric), (small, check.loss, check.metric)
        ):  # fmt: skip
            outputs = network(seen)
            assert found == pytest.approx(float(FUNCTIONS[loss](outputs, targets)), rel=1e-6)
            if loss == "mse":
                assert metric is None
            else:
                assert metric == pytest.approx(float(RIGHT[loss](outputs, targets).double().mean()))
    assert monitor.selection.order.equal(expected.order)
    (layer,) = check.layers
    assert (layer.name, layer.objective, layer.units) == ("0", "loss", 16)
    assert list(layer.order) == expected.order.tolist()
    assert list(layer.losses) == expected.losses.tolist()
    assert check.gap == float(expected.gap[-1])
    assert check.bound == float(expected.bound[-1])
    assert (check.kept, check.units) == (len(expected.kept), 16)


@pytest.mark.parametrize(
    ("options", "objectives"),
    [({}, ["imitation", "loss"]), ({"objective": "fisher"}, ["fisher", "fisher"]),
     ({"objective": "loss", "candidates": 3, "batch_size": 16}, ["loss", "loss"])],
)  # fmt: skip
def test_a_check_of_a_deep_network(options: dict, objectives: list[str]) -> None:
    """Losses of layers are those layers'; the network's is measured by running it."""
    torch.manual_seed(0)
    model = cnn().eval()
    data = Augmented().images, Augmented().labels
    check = PretrainingMonitor(model, data, size=0.5, **options).check()
    selection = greedyprune.select(model, data, size=0.5, **options)
    with torch.no_grad():
        outputs = greedyprune.prune(model, selection)(data[0])
    assert check.loss == pytest.approx(float(functional.cross_entropy(outputs, data[1])), rel=1e-6)
    assert check.metric == pytest.approx(float((outputs.argmax(1) == data[1]).double().mean()))
    assert [layer.name for layer in check.layers] == ["0", "4"]
    assert [layer.objective for layer in check.layers] == objectives
    for layer in check.layers:
        assert list(layer.losses) == selection.layers[layer.name].losses.tolist()
    assert check.gap is None
    assert check.bound is None
    assert (check.kept, check.units) == (7, 14)


def test_losses_and_metrics_of_ones_own() -> None:
    model, x, y = problem("mse")

    def signs(outputs: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(outputs))
        return (outputs.sign() == targets.sign()).double().mean()

    batches, sizes = list(zip(x.split(30), y.split(30), strict=True)), []
    check = PretrainingMonitor(model, batches, steps=4, metric=signs).check()
    with torch.no_grad():
        assert check.dense_metric == float(signs(model(x), y))
    assert sizes == [30, 80, 80, 80]  # the first batch, at once; then all batches, joined
    with pytest.warns(UserWarning, match="slow path"):
        check = PretrainingMonitor(model, batches, steps=4, loss=functional.l1_loss).check()
    with torch.no_grad():
        assert check.dense_loss == pytest.approx(float(functional.l1_loss(model(x), y)))
    assert check.metric is None
    assert check.bound is None
    for metric in (lambda f, y: "high", lambda f, y: f):
        with pytest.raises(TypeError, match="metric: your function returned"):
            PretrainingMonitor(model, batches, steps=4, metric=metric)


def test_ignored_labels_count_for_nothing() -> None:
    model, x, y = problem()
    y[::3] = -100
    check = PretrainingMonitor(model, (x, y), steps=4).check()
    known = y >= 0
    with torch.no_grad():
        outputs = model(x)[known]
    assert check.dense_metric == pytest.approx(
        float((outputs.argmax(1) == y[known]).double().mean())
    )
    expected = functional.cross_entropy(outputs, y[known])
    assert check.dense_loss == pytest.approx(float(expected), rel=1e-6)


def test_a_loss_is_measured_where_layers_imitate() -> None:
    """Without select's warning that it does not use it."""
    model = cnn()
    data = Augmented().images, functional.one_hot(Augmented().labels, 3).float()
    check = PretrainingMonitor(model, data, size=0.5, loss="bce_with_logits", layers="0").check()
    with torch.no_grad():
        expected = functional.binary_cross_entropy_with_logits(model.eval()(data[0]), data[1])
    assert check.dense_loss == pytest.approx(float(expected), rel=1e-6)


# ---------------------------------------------------------------- wrapped models, processes


def test_a_wrapped_model_is_the_one_inside() -> None:
    model, x, y = problem()
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    check = PretrainingMonitor(wrapped, (x, y), steps=5).check()
    expected = PretrainingMonitor(model, (x, y), steps=5).check()
    assert check.layers == expected.layers


def _one_process(rank: int) -> tuple[dict[str, Any], Tensor]:
    model, x, y = problem()
    wrapped = nn.parallel.DistributedDataParallel(model)
    part = x[rank::2], y[rank::2]
    calls = []

    def stop(history: list[Check]) -> bool:
        calls.append(rank)
        return len(history) == 2

    # The second process's clock stands still: alone, it would leave out the second check.
    limit = 1e9 if rank == 0 else 1e-9
    monitor = PretrainingMonitor(
        wrapped, part, steps=5, every=2, max_overhead=limit, stop=stop, held_out=(x, y),
        layers=NAMED,
    )  # fmt: skip
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(9):
        optimizer.zero_grad()
        functional.cross_entropy(wrapped(part[0]), part[1]).backward()
        optimizer.step()
        if monitor.step():
            break
    assert calls == [0, 0] * (1 - rank)
    state = {**monitor.state_dict(), "training_seconds": 0.0}
    assert monitor.selection is not None
    return state, monitor.selection.order


def test_processes_agree() -> None:
    team = Team(2)
    try:
        found = team.results(2, _one_process)
    finally:
        team.close()
    assert found[0][0] == found[1][0]
    assert found[0][0]["iteration"] == 4
    assert found[0][1].equal(found[1][1])


# ---------------------------------------------------------------- what is shown


class Record:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.append((tag, scalar_value, global_step))


def test_the_curves_are_written() -> None:
    model, x, y = problem()
    writer = Record()
    monitor = PretrainingMonitor(model, (x, y), steps=4, every=3, writer=writer, max_overhead=None)
    for _ in range(6):
        monitor.step()
    assert {tag.removeprefix("greedyprune/") for tag, _, _ in writer.scalars} == {
        "dense_loss", "loss", "dense_metric", "metric", "gap", "bound", "kept", "seconds",
    }  # fmt: skip
    losses = [(value, at) for tag, value, at in writer.scalars if tag == "greedyprune/loss"]
    assert losses == [(check.loss, check.iteration) for check in monitor.history]


def test_tensorboard_takes_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, x, y = problem()
    with SummaryWriter(tmp_path) as writer:
        check = PretrainingMonitor(model, (x, y), steps=4, writer=writer).check()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("greedyprune/loss")
    assert (event.step, event.value) == (0, pytest.approx(check.loss))


def shown(monitor: PretrainingMonitor) -> str:
    console = rich.console.Console(width=200, file=io.StringIO())
    console.print(monitor.summary())
    return console.file.getvalue()


def test_summary() -> None:
    model, x, y = problem()
    monitor = PretrainingMonitor(model, (x, y), steps=4, every=1, max_overhead=None)
    assert "checks: 0, left out: 0" in shown(monitor)
    while not monitor.step():
        pass
    text = shown(monitor)
    last = monitor.history[-1]
    for part in ("whole networks on data", f"{last.loss:.4g}", f"{last.gap:.4g}", "kept of 16",
                 "pruned accuracy", monitor.reason, "checks: 4, left out: 0"):  # fmt: skip
        assert part in re.sub(r"\s+", " ", text)
    deep = PretrainingMonitor(cnn(), (Augmented().images, Augmented().labels), size=0.5)
    deep.check()
    assert "gap" not in shown(deep)
    assert "monitor.selection.summary()" in shown(deep)
    assert "kept of 14" in shown(deep)


def test_plot(tmp_path: Path) -> None:
    model, x, y = problem()
    monitor = PretrainingMonitor(model, (x, y), steps=4, every=1, max_overhead=None)
    monitor.plot()  # of nothing
    while not monitor.step():
        pass
    figure = monitor.plot()
    losses, metrics = figure.axes
    assert losses.get_lines()[0].get_ydata().tolist() == [c.dense_loss for c in monitor.history]
    assert losses.get_lines()[1].get_ydata().tolist() == [c.loss for c in monitor.history]
    assert metrics.get_lines()[1].get_ydata().tolist() == [c.metric for c in monitor.history]
    assert metrics.get_lines()[1].get_xdata().tolist() == [1, 2, 3, 4]
    figure.savefig(tmp_path / "monitor.png")
    without = PretrainingMonitor(*problem("mse")[:1], problem("mse")[1:], steps=4)
    without.check()
    assert len(without.plot().axes) == 1


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = problem()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'greedyprune\[plot\]'"):
        PretrainingMonitor(model, (x, y)).plot()


def test_docstring_example() -> None:
    names = {"torch": torch, "nn": nn, "greedyprune": greedyprune}
    failed, tried = doctest.testmod(
        sys.modules["greedyprune.pretraining.monitor"], extraglobs=names
    )
    assert tried > 3
    assert not failed


def test_arguments_for_several_processes_are_refused() -> None:
    model, data = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(9, 4)
    for options in ({"parallel": "data"}, {"process_group": None}, {"checkpoint": "a"}):
        with pytest.raises(ValueError, match=r"expected none: the first process checks, by itself"):
            PretrainingMonitor(model, (data, data[:, :1]), **options)  # type: ignore[arg-type]
