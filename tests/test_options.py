"""Every option either changes what `select` does or is refused with one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_problems import Problem, accuracy, both, images, inner, one_layer, same
from torch import Tensor, nn

import greedyprune
from greedyprune import Budget, Fisher, Imitation, Loss, Selection

pytestmark = pytest.mark.usefixtures("one_thread")
ACTS: dict[str, tuple[Callable[..., Problem], dict[str, Any], dict[str, Any]]] = {
    "swaps, inner layer": (
        inner, {"objective": Imitation(swaps=0)}, {"objective": Imitation(swaps=1)}
    ),
    "swaps, None is as many as help": (
        inner, {"objective": Imitation(swaps=0)}, {"objective": Imitation()}
    ),
    "swaps, output layer": (
        one_layer, {"objective": Imitation(swaps=0)}, {"objective": Imitation()}
    ),
    "swaps, convolutions": (
        images, {"objective": Imitation(swaps=0)}, {"objective": Imitation()}
    ),
    "damping, imitation": (
        inner, {"objective": Imitation()}, {"objective": Imitation(damping=0.1)}
    ),
    "damping, imitation with a tolerance": (
        inner,
        {"objective": Imitation(), "size": None, "tolerance": 0.05},
        {"objective": Imitation(damping=0.1), "size": None, "tolerance": 0.05},
    ),
    "damping, gates": (inner, {"objective": Fisher()}, {"objective": Fisher(damping=0.1)}),
    "damping, gates of the output layer": (
        one_layer, {"objective": "fisher"}, {"objective": Fisher(damping=0.1)}
    ),
    "metric of imitation, inner layer": (
        inner, {"objective": "imitation"}, {"objective": Imitation(metric="fisher")}
    ),
    "metric of imitation, output layer": (
        one_layer, {"objective": "imitation"}, {"objective": Imitation(metric="fisher")}
    ),
    "metric of imitation, counts": (
        inner,
        {"objective": "imitation", "weights": "counts"},
        {"objective": Imitation(metric="fisher"), "weights": "counts"},
    ),
    "sequential, imitation": (
        both, {"objective": Imitation()}, {"objective": Imitation(sequential=False)}
    ),
    "sequential, loss": (both, {"objective": Loss()}, {"objective": Loss(sequential=False)}),
    "candidates, output layer": (
        one_layer, {"objective": "loss"}, {"objective": Loss(candidates=3)}
    ),
    "candidates, squared error": (
        lambda **options: one_layer("numbers", **options),
        {"objective": "loss"}, {"objective": Loss(candidates=3)},
    ),
    "candidates, inner layer": (
        inner, {"objective": "loss"}, {"objective": Loss(candidates=3)}
    ),
    "by the gradient, output layer": (
        one_layer, {"objective": "loss"}, {"objective": Loss(candidates=2, draw="gradient")}
    ),
    "by the gradient, not at random, output layer": (
        one_layer,
        {"objective": Loss(candidates=3)}, {"objective": Loss(candidates=3, draw="gradient")},
    ),
    "by the gradient, inner layer": (
        inner, {"objective": "loss"}, {"objective": Loss(candidates=2, draw="gradient")}
    ),
    "by the gradient, not at random, inner layer": (
        inner,
        {"objective": Loss(candidates=3)}, {"objective": Loss(candidates=3, draw="gradient")},
    ),
    "batch_size, output layer": (
        one_layer, {"objective": "loss"}, {"objective": Loss(batch_size=8)}
    ),
    "batch_size, inner layer": (inner, {"objective": "loss"}, {"objective": Loss(batch_size=8)}),
    "shortlist, output layer": (
        one_layer,
        {"objective": Loss(batch_size=8)}, {"objective": Loss(batch_size=8, shortlist=6)},
    ),
    "shortlist, inner layer": (
        inner,
        {"objective": Loss(batch_size=8)}, {"objective": Loss(batch_size=8, shortlist=6)},
    ),
    "metric of one's own, output layer": (
        one_layer,
        {"objective": "loss", "size": None, "tolerance": 0.2},
        {"objective": Loss(metric=accuracy), "size": None, "tolerance": 0.2},
    ),
    "metric of one's own, inner layer": (
        inner,
        {"objective": "loss", "size": None, "tolerance": 0.2},
        {"objective": Loss(metric=accuracy), "size": None, "tolerance": 0.2},
    ),
    "objective, imitation and loss": (inner, {"objective": "imitation"}, {"objective": "loss"}),
    "objective, imitation and gates": (inner, {"objective": "imitation"}, {"objective": "fisher"}),
    "weights, uniform": (inner, {"weights": "counts", "steps": 9, "size": None},
                         {"weights": "uniform", "steps": 9, "size": None}),
    "weights, none": (one_layer, {"weights": "counts"}, {"weights": "none"}),
    "weights, refit": (one_layer, {"weights": "counts"}, {"weights": "refit"}),
    "loss": (one_layer, {}, {"loss": nn.CrossEntropyLoss(label_smoothing=0.3)}),
    "replacement": (one_layer, {}, {"replacement": True}),
    "round_to": (one_layer, {"size": 5}, {"size": 5, "round_to": 4}),
    "seed": (
        one_layer,
        {"objective": Loss(candidates=3)}, {"objective": Loss(candidates=3), "seed": 1},
    ),
    "steps": (one_layer, {"size": None, "steps": 5}, {"size": None, "steps": 6}),
    "tolerance": (
        one_layer, {"size": None, "tolerance": 0.2}, {"size": None, "tolerance": 0.1}
    ),
}  # fmt: skip


@pytest.mark.usefixtures("least_ridge")  # with a large one no exchange helps here
@pytest.mark.parametrize("name", ACTS)
def test_an_option_acts(name: str) -> None:
    make, before, after = ACTS[name]
    problem = make()
    first = problem.select(**before)
    assert same(first, problem.select(**before))  # nothing else differs between two calls
    assert not same(first, problem.select(**after))


def test_a_loss_that_imitation_does_not_use_is_said() -> None:
    """Labels drawn from the predictions of metric="fisher" depend on the loss: no warning then."""
    for problem in (inner(), one_layer()):
        with pytest.warns(UserWarning, match=r"^loss: not used, because objective='imitation'"):
            named = problem.select(objective="imitation", loss="cross_entropy")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(named, problem.select(objective="imitation"))
            problem.select(objective=Imitation(metric="fisher"), loss="cross_entropy")


NAMES = {"imitation": Imitation, "loss": Loss, "fisher": Fisher}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_its_object_without_options(name: str) -> None:
    problem = both()
    assert same(problem.select(objective=name), problem.select(objective=NAMES[name]()))


@pytest.mark.usefixtures("least_ridge")
def test_exchanges_lower_the_error() -> None:
    """And no more are made than were asked for."""
    problem = inner()
    none, one, most = (
        problem.select(objective=Imitation(swaps=swaps)).layers["0"] for swaps in (0, 1, None)
    )
    assert float(one.losses[-1]) < float(none.losses[-1])
    assert float(most.losses[-1]) <= float(one.losses[-1])
    assert len({*one.kept.tolist()} & {*none.kept.tolist()}) == len(none.kept) - 1


def test_damping_shrinks_the_weights() -> None:
    problem = inner()
    for kind in (Imitation, Fisher):
        sizes = [
            float(problem.select(objective=kind(damping=d), layers="0").weights.square().sum())
            for d in (1e-6, 0.1, 10.0)
        ]
        assert sizes[0] > sizes[1] > sizes[2], kind


def test_a_metric_decides_when_a_layer_is_done() -> None:
    """Its own value with one unit fewer is too low: of the output layer, too."""
    for problem, producer in ((one_layer(size=None), "0"), (inner(size=None), "0")):
        layer = problem.select(objective=Loss(metric=accuracy), tolerance=0.1).layers[producer]
        enough = 0.9 * accuracy(problem.model(problem.data[0]), problem.data[1])
        reached = []
        for k in (len(layer.order) - 1, len(layer.order)):
            small = greedyprune.prune(problem.model, Selection({producer: layer.at(k)}))
            reached.append(accuracy(small(problem.data[0]), problem.data[1]))
        assert reached[0] < enough <= reached[1]


def test_candidates_of_the_output_layer_are_drawn_by_the_gradient() -> None:
    """With one candidate, each pick has the lowest derivative of the loss."""
    problem = one_layer(weights="none", size=5)
    selection = problem.select(objective=Loss(candidates=1, draw="gradient"))
    model, (inputs, targets) = problem.model.double(), problem.data
    hidden = model[:2](inputs.double()).detach()
    order: list[int] = []
    for _ in range(5):
        gates = torch.zeros(24).double()
        gates[order] = 1
        gates.requires_grad_()
        loss = nn.functional.cross_entropy(model[2](hidden * gates), targets)
        [slopes] = torch.autograd.grad(loss, gates)
        slopes[order] = torch.inf
        order.append(int(slopes.argmin()))
    assert selection.order.tolist() == order


BUDGETS: dict[str, tuple[Budget, Budget]] = {
    "flops": (Budget(flops=0.8), Budget(flops=0.4)),
    "params": (Budget(params=0.8), Budget(params=0.4)),
    "uniform": (Budget(params=0.6), Budget(params=0.6, uniform=True)),
    "trials": (Budget(params=0.6), Budget(params=0.6, trials=30)),
    "score": (
        Budget(params=0.6, trials=30),
        Budget(params=0.6, trials=30, score=lambda model: float(model.up[1].weight.shape[0])),
    ),
}


class Blocks(nn.Module):
    """Two layers of one kind, of which the second counts less."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(6, 16) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(16, 6) for _ in range(2))
        self.last = nn.Linear(6, 3)
        with torch.no_grad():
            self.up[1].weight[4:] = 0
            self.up[1].bias[4:] = 0

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return self.last(x)


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("objective", ["imitation", "fisher"])
def test_a_budget_acts(name: str, objective: str) -> None:
    torch.manual_seed(0)
    problem = Problem(Blocks(), "classes", objective=objective)
    selections = [problem.select(size=budget) for budget in BUDGETS[name]]
    sizes = [[len(layer.kept) for layer in selection.layers.values()] for selection in selections]
    if name == "trials":  # they may come to the same sizes
        curves = [selection.curves.as_json() for selection in selections if selection.curves]
        assert len(curves) == 2 and curves[0] != curves[1]
    else:
        assert sizes[0] != sizes[1]
    if name == "uniform":
        assert sizes[0][0] != sizes[0][1] and sizes[1][0] == sizes[1][1]
    elif name in ("flops", "params"):
        assert sum(sizes[0]) > sum(sizes[1])
        before, after = problem.select(size=BUDGETS[name][1]).change(name)
        assert after <= 0.4 * before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "swaps with a tolerance": (
        {"objective": Imitation(swaps=3), "tolerance": 0.1},
        "swaps: found 3 with a tolerance",
    ),
    "swaps with counts": (
        {"objective": Imitation(swaps=3), "weights": "counts"},
        "swaps: found 3 with weights='counts', expected weights='refit'",
    ),
    "swaps with none": (
        {"objective": Imitation(swaps=3), "weights": "none"},
        "swaps: found 3 with weights='none', expected weights='refit'",
    ),
    "swaps with replacement": (
        {"objective": Imitation(swaps=3), "replacement": True},
        "swaps: found 3 with replacement, expected none",
    ),
    "swaps with steps": (
        {"objective": Imitation(swaps=3), "steps": 3},
        "swaps: found 3 with replacement",
    ),
    "damping with counts": (
        {"objective": Imitation(damping=0.1), "weights": "counts"},
        "damping: found 0.1 with weights='counts', expected weights='refit'",
    ),
    "damping of gates with uniform": (
        {"objective": Fisher(damping=0.1), "weights": "uniform"},
        "damping: found 0.1 with weights='uniform', expected weights='refit'",
    ),
    "a metric without a tolerance": (
        {"objective": Loss(metric=accuracy)},
        "metric: found a function without a tolerance",
    ),
    "round_to with steps": (
        {"round_to": 4, "steps": 5},
        "round_to: found 4 with steps, expected a size",
    ),
    "round_to with a tolerance": (
        {"round_to": 4, "tolerance": 0.1},
        "round_to: found 4 with tolerance, expected a size",
    ),
    "a budget with a tolerance": (
        {"size": Budget(flops=0.5), "tolerance": 0.1},
        "size: found a Budget and tolerance",
    ),
    "a budget with steps": (
        {"size": Budget(flops=0.5), "steps": 5},
        r"steps: found size=Budget\(.*\) and steps=5",
    ),
    "a size with steps": ({"size": 3, "steps": 5}, "steps: found size=3 and steps=5"),
    "more candidates than units": (
        {"objective": Loss(candidates=25)},
        "candidates: found 25, but layer '0' has 24 units; expected at most 24",
    ),
    "a metric of errors with a loss of one's own": (
        {"objective": Imitation(metric="fisher"), "loss": lambda out, y: out.square().mean()},
        "metric: found 'fisher' with a loss of your own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_could_not_act_are_refused(name: str) -> None:
    options, message = REFUSED[name]
    for problem in (one_layer(size=None), both(size=None)):
        with pytest.raises(ValueError, match=f"^{message}") as caught:
            problem.select(**options)
        assert len(str(caught.value).splitlines()) == 1


def test_exchanges_of_wide_units_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 9), nn.Flatten(), nn.Linear(3, 3)
    )
    data = [torch.randn(20, 1, 11, 11)]
    greedyprune.select(model, data, size=2, objective=Imitation(swaps=0))
    left_out = greedyprune.select(model, data, size=2, objective="imitation")
    assert len(left_out.layers["0"].kept) == 2
    message = "swaps: found 3, but a unit of layer '0' has 81 features in '2'; expected at most 64"
    with pytest.raises(ValueError, match=message):
        greedyprune.select(model, data, size=2, objective=Imitation(swaps=3))


INF, NAN = float("inf"), float("nan")
BAD: list[tuple[type, dict[str, Any], str]] = [
    (Imitation, {"swaps": -1}, "swaps: found -1, expected an int of at least 0"),
    (Imitation, {"swaps": 1.5}, "swaps: found 1.5, expected an int of at least 0"),
    (Imitation, {"swaps": True}, "swaps: found True, expected an int of at least 0"),
    (Imitation, {"damping": 0.0}, "damping: found 0.0, expected a number above 0"),
    (Imitation, {"damping": INF}, "damping: found inf, expected a number above 0"),
    (Imitation, {"damping": NAN}, "damping: found nan, expected a number above 0"),
    (Imitation, {"damping": "small"}, "damping: found 'small', expected a number above 0"),
    (Imitation, {"metric": "mse"}, "metric: found 'mse', expected one of 'none', 'fisher'"),
    (Imitation, {"metric": accuracy}, "metric: found <function.* expected one of 'none', 'fi"),
    (Imitation, {"sequential": 1}, "sequential: found 1, expected True or False"),
    (Fisher, {"damping": -1e-4}, "damping: found -0.0001, expected a number above 0"),
    (Loss, {"candidates": 0}, "candidates: found 0, expected at least 1"),
    (Loss, {"candidates": -3}, "candidates: found -3, expected at least 1"),
    (Loss, {"candidates": 1.5}, "candidates: found 1.5, expected an int"),
    (Loss, {"batch_size": 0}, "batch_size: found 0, expected at least 1"),
    (Loss, {"batch_size": -1}, "batch_size: found -1, expected at least 1"),
    (Loss, {"batch_size": 2.5}, "batch_size: found 2.5, expected an int"),
    (Loss, {"shortlist": 0, "batch_size": 4}, "shortlist: found 0, expected at least 1"),
    (Loss, {"shortlist": 4}, "shortlist: found 4 without batch_size, expected batch_size too"),
    (Loss, {"draw": "gradient"}, "draw: found 'gradient' without candidates, expected candidat"),
    (Loss, {"draw": "best"}, "draw: found 'best', expected one of 'random', 'gradient'"),
    (Loss, {"metric": "accuracy"}, "metric: found 'accuracy', expected a function or None"),
    (Loss, {"sequential": None}, "sequential: found None, expected True or False"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD)
def test_bad_options(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{message}") as caught:
        kind(**options)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Imitation, "candidates"), (Imitation, "batch_size"), (Imitation, "shortlist"),
     (Imitation, "draw"), (Loss, "swaps"), (Loss, "damping"), (Fisher, "swaps"),
     (Fisher, "metric"), (Fisher, "sequential"), (Fisher, "candidates")],
)  # fmt: skip
def test_an_option_belongs_to_the_objective_that_reads_it(kind: type, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        kind(**{name: 3})
    with pytest.raises(TypeError, match=name):
        one_layer().select(**{name: 3})
