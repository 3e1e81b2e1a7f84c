"""The monitor: it leaves training alone; its records; several processes."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from monitored import NAMED, Augmented, cnn, mlp, problem
from processes import Team
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import greedyprune
from greedyprune import Check, Loss, PretrainingMonitor

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIMIZERS: dict[str, Callable] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
}
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
])]  # fmt: skip


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> list:
    """All that training leaves behind, to be compared exactly."""
    state: list = [(n, v.tolist()) for n, v in model.state_dict().items()]
    state += [(n, None if p.grad is None else p.grad.tolist()) for n, p in model.named_parameters()]
    state += [(n, m.training, len(m._forward_pre_hooks), sorted(vars(m))) for n, m in
              model.named_modules()]  # fmt: skip
    state += [(i, name, torch.as_tensor(v).tolist())
              for i, buffers in optimizer.state_dict()["state"].items()
              for name, v in buffers.items()]  # fmt: skip
    if torch.cuda.is_initialized():
        state += [gpu_state.tolist() for gpu_state in torch.cuda.get_rng_state_all()]
    numpy_state = np.random.get_state()
    state += [torch.get_rng_state().tolist(), random.getstate()]
    state += [numpy_state[1].tolist(), numpy_state[2], generator.get_state().tolist()]
    return state


def train(
    network: Callable[[], nn.Module], optimizer_name: str, monitored: str | None,
    has_generator: bool, device: str,
) -> tuple[list, PretrainingMonitor | None]:  # fmt: skip
    """Trains for two epochs; returns `training_state` and the monitor.

    monitored: the monitor's data: the training "loader", its "dataset", or an "other" loader; None:
        no monitor
    has_generator: does the training loader shuffle with a generator of its own?
    """
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    model, monitor = network().to(device), None
    generator = torch.Generator().manual_seed(5)
    data = Augmented()
    loader = DataLoader(data, 16, shuffle=True, generator=generator if has_generator else None)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    if monitored is not None:
        sources = {"loader": loader, "dataset": data, "other": DataLoader(data, 20, shuffle=True)}
        options = {"steps": 6} if network is mlp else {"size": 0.5}
        held_out = loader if monitored == "other" else None
        monitor = PretrainingMonitor(
            model, sources[monitored], every=2, held_out=held_out, stop="never",
            max_overhead=None, **options,
        )  # fmt: skip
    model.train()
    for _ in range(2):
        for images, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            if monitor is not None:
                assert not monitor.step()
    return training_state(model, optimizer, generator), monitor


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_generator", [False, True], ids=["global", "generator"])
@pytest.mark.parametrize(
    ("network", "optimizer", "monitored"),
    [(mlp, "adam", "loader"), (mlp, "momentum", "other"), (cnn, "momentum", "loader"),
     (cnn, "adam", "dataset")],
)  # fmt: skip
def test_training_is_the_same(
    network: Callable, optimizer: str, monitored: str, has_generator: bool, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Bit for bit: weights, gradients, optimiser, buffers, modes, every source of randomness."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    expected, _ = train(network, optimizer, None, has_generator, device)
    actual, monitor = train(network, optimizer, monitored, has_generator, device)
    assert [check.iteration for check in monitor.history] == [2, 4, 6]
    assert actual == expected


def test_every_pass_sees_the_same_samples() -> None:
    """Though they are augmented: two checks of the same model give the same numbers."""
    monitor = PretrainingMonitor(mlp(), DataLoader(Augmented(), 16, shuffle=True), steps=6)
    first, second = monitor.check(), monitor.check()
    assert replace(second, seconds=0) == replace(first, seconds=0)
    # The passes of one check agree, too: select's loss is the loss measured on the pruned network.
    assert first.loss == pytest.approx(first.layers[0].losses[-1], rel=1e-5)
    assert first.dense_loss == pytest.approx(first.layers[0].dense_loss, rel=1e-5)


FUNCTIONS: dict[str, Callable] = {
    "cross_entropy": functional.cross_entropy, "mse": functional.mse_loss,
    "bce_with_logits": functional.binary_cross_entropy_with_logits,
}  # fmt: skip
CORRECT: dict[str, Callable] = {
    "cross_entropy": lambda f, y: f.argmax(1) == y,
    "bce_with_logits": lambda f, y: (f > 0) == (y == 1),
}


@pytest.mark.parametrize("loss", FUNCTIONS)
@pytest.mark.parametrize("separate", [False, True], ids=["data", "held_out"])
def test_a_check_of_one_hidden_layer(loss: str, separate: bool) -> None:
    model, x, y = problem(loss)
    data, held_out = (x[:50], y[:50]), (x[50:], y[50:])
    monitor = PretrainingMonitor(
        model, data, steps=7, held_out=held_out if separate else None, loss=loss
    )
    assert monitor.selection is None
    check = monitor.check()
    expected = greedyprune.select(model, data, steps=7, loss=loss)
    small = greedyprune.prune(model, expected)
    inputs, targets = held_out if separate else data
    with torch.no_grad():
        for network, measured, metric in (
            (model, check.dense_loss, check.dense_metric), (small, check.loss, check.metric)
        ):  # fmt: skip
            outputs = network(inputs)
            assert measured == pytest.approx(float(FUNCTIONS[loss](outputs, targets)), rel=1e-6)
            if loss == "mse":
                assert metric is None
            else:
                assert metric == pytest.approx(
                    float(CORRECT[loss](outputs, targets).double().mean())
                )
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
     ({"objective": Loss(candidates=3, batch_size=16)}, ["loss", "loss"])],
)  # fmt: skip
def test_a_check_of_a_deep_network(options: dict, objectives: list[str]) -> None:
    """The layers' losses are those of select; the network's loss is that of the pruned network."""
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


def test_functions_as_loss_and_metric() -> None:
    model, x, y = problem("mse")

    def signs(outputs: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(outputs))
        return (outputs.sign() == targets.sign()).double().mean()

    batches, sizes = list(zip(x.split(30), y.split(30), strict=True)), []
    check = PretrainingMonitor(model, batches, steps=4, metric=signs).check()
    with torch.no_grad():
        assert check.dense_metric == float(signs(model(x), y))
    # The constructor calls it on the first batch; the check, and this test, on all samples at once.
    assert sizes == [30, 80, 80, 80]
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
    labelled = y >= 0
    with torch.no_grad():
        outputs = model(x)[labelled]
    assert check.dense_metric == pytest.approx(
        float((outputs.argmax(1) == y[labelled]).double().mean())
    )
    expected = functional.cross_entropy(outputs, y[labelled])
    assert check.dense_loss == pytest.approx(float(expected), rel=1e-6)


def test_a_loss_is_measured_where_layers_imitate() -> None:
    """And select's warning that imitation does not use the loss is suppressed."""
    model = cnn()
    data = Augmented().images, functional.one_hot(Augmented().labels, 3).float()
    check = PretrainingMonitor(model, data, size=0.5, loss="bce_with_logits", layers="0").check()
    with torch.no_grad():
        expected = functional.binary_cross_entropy_with_logits(model.eval()(data[0]), data[1])
    assert check.dense_loss == pytest.approx(float(expected), rel=1e-6)


def test_a_wrapped_model_is_the_one_inside() -> None:
    model, x, y = problem()
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    check = PretrainingMonitor(wrapped, (x, y), steps=5).check()
    expected = PretrainingMonitor(model, (x, y), steps=5).check()
    assert check.layers == expected.layers


def _train_on_one_process(rank: int) -> tuple[dict[str, Any], Tensor]:
    model, x, y = problem()
    wrapped = nn.parallel.DistributedDataParallel(model)
    part = x[rank::2], y[rank::2]
    calls = []

    def stop(history: list[Check]) -> bool:
        calls.append(rank)
        return len(history) == 2

    # By the second process's limit, every check but the first would be left out. Only the first
    # process's limit may count.
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
        (first_state, first_order), (second_state, second_order) = team.results(
            2, _train_on_one_process
        )
    finally:
        team.close()
    assert first_state == second_state
    assert first_state["iteration"] == 4
    assert first_order.equal(second_order)


def test_arguments_for_several_processes_are_refused() -> None:
    model, data = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(9, 4)
    for options in ({"process_group": None}, {"checkpoint": "a"}):
        with pytest.raises(ValueError, match=r"expected none: the first process alone"):
            PretrainingMonitor(model, (data, data[:, :1]), **options)  # type: ignore[arg-type]
