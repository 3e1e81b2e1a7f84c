"""The project's pictures can be read: no legend and no title covers a line or another text."""

import itertools
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from greedyprune import PretrainingMonitor, Selection, select

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import covered, looks

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "benchmarks")]
import mnist_pretraining  # noqa: E402
import pretraining_figure  # noqa: E402
import results_table  # noqa: E402
import scaling  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def network(*widths: int) -> tuple[nn.Sequential, tuple[torch.Tensor, torch.Tensor]]:
    """Hidden layers of so many units, and data to learn; always the same."""
    torch.manual_seed(0)
    pairs = itertools.pairwise([5, *widths, 3])
    layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())]
    x = torch.randn(60, 5)
    return nn.Sequential(*layers[:-1]), (x, x[:, :3].argmax(1))


def a_selection(name: str) -> Selection:
    if name == "squared error":
        model, (x, _) = network(40)
        return select(model, (x, x[:, :3]), steps=40)
    widths, options = {
        "the bound": ((40,), {"steps": 30}),
        "a single step": ((40,), {"size": 1}),
        "two layers": ((8, 6), {"size": 0.5}),
        "eight layers": ((6,) * 8, {"size": 0.5}),
    }[name]
    return select(*network(*widths), **options)


@pytest.mark.parametrize(
    ("name", "panels"),
    [("the bound", 1), ("a single step", 1), ("squared error", 1), ("two layers", 2),
     ("eight layers", 8)],
)  # fmt: skip
def test_a_selection(name: str, panels: int) -> None:
    figure = a_selection(name).plot()
    assert covered(figure) == []
    assert len(figure.axes) == panels
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels))
    assert {line.get_label() for axes in figure.axes for line in axes.get_lines()} == set(labels)
    assert len(set(looks(figure.axes[0]))) == len(looks(figure.axes[0]))


def test_layers_with_long_names() -> None:
    layer, = select(*network(40), steps=4).layers.values()  # fmt: skip
    names = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(4)]
    for shown in (names, names[:2], names[:1]):
        assert covered(Selection(dict.fromkeys(shown, layer)).plot()) == []


@pytest.mark.parametrize("options", [{}, {"metric": None}], ids=["accuracy", "loss only"])
def test_a_monitor(options: dict[str, None]) -> None:
    monitor = PretrainingMonitor(
        *network(40), steps=10, every=1, max_overhead=None, patience=2, **options
    )
    assert covered(monitor.plot()) == []  # of nothing
    while not monitor.step():
        pass
    figure = monitor.plot()
    assert covered(figure) == []
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "dense", f"pruned, {monitor.history[-1].kept} of 40 units", "stop"
    ]  # fmt: skip
    assert len(set(looks(figure.axes[0]))) == 3


def test_a_notebook_shows_it() -> None:
    """By its own method: pyplot registers figures only once it has made one."""
    figure = a_selection("a single step").plot()
    copied = pickle.loads(pickle.dumps(figure))
    for shown in (figure, copied):
        assert shown._repr_png_()[:4] == b"\x89PNG"


def test_the_mnist_example() -> None:
    """From the results that are here: every network with two seeds, each size beside the other."""
    results = mnist_pretraining.Results(ROOT / "examples/results/mnist_pretraining.csv")
    for units, last, every in ((2048, 1500, 100), (5000, 2000, 250)):
        trainings = [t for t in results.checks if t.units == units and t.seed < 2]
        iterations = range(0, last + 1, every)
        panels = mnist_pretraining.panels_of(results, trainings, iterations, None)
        figure = pretraining_figure.picture(panels, "MNIST " * 20)
        assert covered(figure) == []
        marks = looks(figure.axes[len(panels)])  # of both networks, for some of the sizes
        assert len(set(marks)) == len(marks)
        for panel, axes in zip(panels, figure.axes[2 * len(panels) : 3 * len(panels)], strict=True):
            goals = [f"{line.goal}:" for line in panel.lines if line.points]
            assert [text for text in legend_of(axes) if text.endswith(":")] == goals


def legend_of(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_the_growth_of_goals_that_no_law_fits_has_a_legend() -> None:
    """Two sizes, and marks at iteration 0: whole, and named."""
    curves = [pretraining_figure.Curve(m, [0, 9], [0.8, 0.9], [0.9, 0.95]) for m in (100, 300)]
    figure = pretraining_figure.picture([pretraining_figure.Panel("a network", curves)], "MNIST")
    top, middle, bottom = figure.axes[:3]
    assert legend_of(bottom) == ["reaches 95.0%:", "passes the dense network's best:"]
    assert middle.get_xlim()[0] < 0 and not any(line.get_clip_on() for line in top.get_lines())
    assert not any(line.get_clip_on() for line in bottom.get_lines())


def test_the_title_names_the_seeds() -> None:
    ends = [mnist_pretraining.title_of(9, seeds) for seeds in ([3], [0, 1], [0, 1, 2])]
    assert [end.partition("(")[2] for end in ends] == [
        "seed 3)",
        "seeds 0 and 1)",
        "seeds 0, 1 and 2)",
    ]


def test_the_cifar_example() -> None:
    few = results_table.read_results(ROOT / "examples/results/cifar_cnn_quick.csv")
    many = {
        replace(cell, network=network, images=images): result
        for cell, result in few.items() for network in ("resnet34", "mobilenetv2")
        for images in (10000, 30000, 50000)
    }  # fmt: skip
    for results, panels in ((few, 1), (many, 6)):
        figure = results_table.picture(results)
        assert covered(figure) == []
        assert len(figure.axes) == panels
        assert len(set(looks(figure.axes[0]))) == len(looks(figure.axes[0])) == 4


def test_the_benchmarks_scaling() -> None:
    lines = {
        "m": ["bce_with_logits", "cross_entropy", "mse"],
        "steps": ["bce_with_logits", "cross_entropy", "mse, on the Gram matrix"],
        "select": ["cross_entropy, 50 steps", "mse, 200 steps", "mse, half the units"],
    }
    points = [
        scaling.Point(sweep, line, "m=1024, N=4096, C=8", x, x * (i + 1) * 1e-4)
        for sweep, names in lines.items() for i, line in enumerate(names) for x in (256, 16384)
    ]  # fmt: skip
    figure = scaling.picture(points)
    assert covered(figure) == []
    for axes in figure.axes:
        assert len(set(looks(axes))) == len(looks(axes)) == 4


def test_the_check_sees_what_it_is_for() -> None:
    def picture() -> Figure:
        figure = Figure()
        for axes in figure.subplots(1, 2):
            axes.plot([0, 1], [0, 1], label="up")
        return figure

    assert covered(picture()) == []
    on_the_line = picture()
    on_the_line.axes[0].legend(loc="center")
    assert covered(on_the_line)[0] == "a legend on the line 'up'"
    beside_the_line = picture()
    beside_the_line.axes[0].legend(loc="upper left", fontsize=4)
    assert covered(beside_the_line) == ["legend 0 on panel 0"]
    wide = picture()
    for axes in wide.axes:
        axes.set_title("a long title " * 4)
    assert "panel 0 on panel 1" in covered(wide)
    outside = picture()
    outside.legend(["up"], loc="lower center", bbox_to_anchor=(0.5, -0.1))
    assert "legend 0 over the edge" in covered(outside)
