"""Errors of torch and of the user's functions, told with the argument that causes them."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import greedyprune
from greedyprune import Fisher, Imitation, Loss

pytestmark = pytest.mark.usefixtures("one_thread")


def one_layer() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    return model, torch.randn(100, 8), torch.randint(3, (100,))


def convolutions() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    return model.eval(), torch.randn(20, 3, 8, 8), torch.randint(3, (20,))


# ---------------------------------------------------------------- data

WRONG_BATCHES: dict[str, Callable[[Tensor], object]] = {
    "width": lambda x: x[:, :-1],
    "integers": lambda x: torch.ones(x.shape, dtype=torch.int64),
    "width, second batch": lambda x: [x, x[:, :-1]],
    "integers, second batch": lambda x: [x, torch.ones(x.shape, dtype=torch.int64)],
}


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("wrong", WRONG_BATCHES)
@pytest.mark.parametrize("problem", [one_layer, convolutions])
def test_refit_names_the_data(problem: Callable, wrong: str, epochs: int) -> None:
    model, inputs, targets = problem()
    selection = greedyprune.select(model, (inputs, targets), size=4)
    with pytest.raises(ValueError, match="data: the model can't run on a batch "):
        greedyprune.refit(model, selection, WRONG_BATCHES[wrong](inputs), epochs=epochs)


@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_tensors_are_named(sparse: Callable[[Tensor], Tensor]) -> None:
    model, inputs, targets = one_layer()
    dense = greedyprune.select(model, (inputs, targets), size=4)
    for data in ((sparse(inputs), targets), (inputs, sparse(torch.randn(100, 3)))):
        with pytest.raises(TypeError, match="data: found a sparse tensor, expected a dense one"):
            greedyprune.select(model, data, size=4)
    as_batch = greedyprune.select(model, [(inputs.to_sparse(), targets)], size=4)
    assert as_batch.order.equal(dense.order)


def test_an_error_of_this_package_is_not_told_as_one_of_the_data() -> None:
    model, inputs, targets = one_layer()
    with pytest.raises(ValueError, match=r"^layer '0': NaN or inf in its activations"):
        greedyprune.select(model, (inputs * float("nan"), targets), size=4)


# ---------------------------------------------------------------- recalibrate


def state_of(model: nn.Module) -> list[object]:
    modules = [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    return [modules, {name: value.tolist() for name, value in model.state_dict().items()}]


@pytest.mark.parametrize("row", [0, 19])
def test_recalibrate_refuses_nan_and_writes_nothing(row: int) -> None:
    model, inputs, _ = convolutions()
    model[1].train()  # its mode is another than the model's
    before = state_of(model)
    inputs[row] = float("nan")
    with pytest.raises(ValueError, match="layer '1': NaN or inf in its inputs"):
        greedyprune.recalibrate(model, list(inputs.split(5)))
    assert state_of(model) == before
    with pytest.raises(ValueError, match=r"data: the model can't run on a batch .*channels"):
        greedyprune.recalibrate(model, [inputs[1:5], inputs[1:5, :2]])
    assert state_of(model) == before


# ---------------------------------------------------------------- functions of the user


def no_targets(outputs: Tensor) -> Tensor:
    return outputs.sum()


@pytest.mark.parametrize(
    ("options", "raised"),
    [
        ({"loss": no_targets}, TypeError),
        ({"loss": nn.BCELoss()}, RuntimeError),
        ({"objective": Loss(metric=no_targets), "tolerance": 0.1}, TypeError),
    ],
    ids=["loss", "BCELoss", "metric"],
)
@pytest.mark.filterwarnings("ignore:loss. a function of your own")
def test_a_function_that_raises_is_named(options: dict, raised: type[Exception]) -> None:
    """Its error keeps its type; a note says which argument it was, and of what shapes."""
    model, inputs, _ = one_layer()
    with pytest.raises(raised) as caught:
        greedyprune.select(model, (inputs, torch.rand(100, 3)), **options)
    if sys.version_info >= (3, 11):
        [note] = caught.value.__notes__
        assert note.startswith("loss: your" if "loss" in options else "metric: your")
        assert note.endswith("outputs of shape (100, 3) and targets of shape (100, 3)")


@pytest.mark.parametrize("argument", ["loss", "metric"])
def test_the_monitor_names_a_function_that_raises(argument: str) -> None:
    model, inputs, targets = one_layer()
    with pytest.raises(TypeError, match="no_targets") as caught:
        greedyprune.PretrainingMonitor(model, (inputs, targets), **{argument: no_targets})
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__[0].startswith(f"{argument}: your function raised this")


# ---------------------------------------------------------------- arguments that mean little


@pytest.mark.parametrize("problem", [one_layer, convolutions])
@pytest.mark.parametrize("options", [{}, {"shortlist": 3}])
def test_a_mini_batch_has_no_more_samples_than_the_data(problem: Callable, options: dict) -> None:
    model, inputs, targets = problem()
    count = len(inputs)
    selections = [
        greedyprune.select(
            model, (inputs, targets), size=4, objective=Loss(batch_size=size, **options)
        )
        for size in (count, count + 1)
    ]
    for one, other in zip(*(s.layers.values() for s in selections), strict=True):
        assert one.order.equal(other.order)


@pytest.mark.parametrize(
    ("problem", "options", "whole"),
    [
        (convolutions, {"objective": "imitation"}, "error without any unit"),
        (one_layer, {"objective": Fisher()}, "error without any unit"),
        (
            one_layer, {"objective": Loss(metric=lambda outputs, targets: 1.0)},
            "dense model's metric",
        ),
    ],
)  # fmt: skip
def test_a_tolerance_that_is_a_share_is_at_most_1(
    problem: Callable, options: dict, whole: str
) -> None:
    model, inputs, targets = problem()
    with pytest.raises(ValueError, match=f"tolerance: found 5, expected at most 1: .*{whole}"):
        greedyprune.select(model, (inputs, targets), tolerance=5, **options)


def test_a_tolerance_of_the_loss_in_percent_is_a_warning() -> None:
    model, inputs, targets = one_layer()
    with pytest.warns(UserWarning, match="tolerance: 5 allows 6 times .* 5 % is tolerance=0.05"):
        greedyprune.select(model, (inputs, targets), tolerance=5)


def test_round_to_says_which_layers_stay_whole() -> None:
    model, inputs, targets = one_layer()
    with pytest.warns(UserWarning, match="round_to: 64 leaves layers whole, .*: '0'"):
        selection = greedyprune.select(model, (inputs, targets), size=4, round_to=64)
    assert len(selection.kept) == 32
    assert len(greedyprune.select(model, (inputs, targets), size=4, round_to=8).kept) == 8


def test_progress_is_a_bool() -> None:
    model, inputs, targets = one_layer()
    selection = greedyprune.select(model, (inputs, targets), size=4)
    for call in (
        lambda: greedyprune.select(model, (inputs, targets), progress="yes"),
        lambda: greedyprune.refit(model, selection, inputs, progress="yes"),
        lambda: greedyprune.PretrainingMonitor(model, (inputs, targets), progress="yes"),
    ):
        with pytest.raises(TypeError, match="progress: found 'yes', expected True, False or None"):
            call()


@pytest.mark.parametrize("objective", [Imitation, Loss, Fisher])
def test_the_class_of_an_objective_is_named(objective: type) -> None:
    model, inputs, targets = one_layer()
    name = objective.__name__
    with pytest.raises(TypeError, match=f"found the class {name}, expected an instance .*{name}"):
        greedyprune.select(model, (inputs, targets), objective=objective)


def test_tolerance_stops_before_the_steps_or_the_size() -> None:
    model, inputs, targets = one_layer()
    for options in ({"steps": 8}, {"size": 8, "replacement": False}):
        whole = greedyprune.select(model, (inputs, targets), **options)
        reached = (whole.losses <= whole.dense_loss * 1.5).nonzero().flatten()
        selection = greedyprune.select(model, (inputs, targets), tolerance=0.5, **options)
        assert len(reached) and reached[0] < 7
        assert selection.order.equal(whole.order[: int(reached[0]) + 1])


# ---------------------------------------------------------------- names of layers, selections


def test_an_unknown_layer_lists_the_known_ones() -> None:
    model, inputs, targets = one_layer()
    selection = greedyprune.select(model, (inputs, targets), size=4)
    for layers in (selection.layers, selection.at(2).layers, greedyprune.layers(model, inputs)):
        with pytest.raises(KeyError, match="found 'x', expected one of '0'"):
            layers["x"]
        assert "x" not in layers and layers.get("x") is None and list(layers) == ["0"]


def test_a_refused_layer_is_named_once() -> None:
    model, inputs, targets = one_layer()
    with pytest.raises(greedyprune.NotPrunableError) as caught:
        greedyprune.select(model, (inputs, targets), layers=["2"])
    assert str(caught.value).startswith(
        "layers: found '2', which can't be pruned (its units are the model's output)"
    )


def test_a_monitor_has_no_selection_before_its_first_check() -> None:
    model, inputs, targets = one_layer()
    monitor = greedyprune.PretrainingMonitor(model, (inputs, targets), steps=4)
    for function in (greedyprune.prune, lambda m, s: greedyprune.refit(m, s, inputs)):
        with pytest.raises(
            TypeError, match="selection: found None, which a PretrainingMonitor has before"
        ):
            function(model, monitor.selection)
    monitor.check()
    assert greedyprune.prune(model, monitor.selection)[0].out_features <= 4
