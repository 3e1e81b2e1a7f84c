"""Another budget from the same paths, and what is lost for a range of budgets."""

from __future__ import annotations

import itertools
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import data_of, network
from rich.console import Console
from torch import nn

import greedyprune
from greedyprune import Budget, Imitation, Selection


def sizes(selection: Selection) -> dict[str, int]:
    return {name: len(layer.kept) for name, layer in selection.layers.items()}


BUDGETS = [Budget(flops=0.7), Budget(params=0.85, flops=0.9), Budget(flops=0.8, min_share=0.5)]


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        *itertools.product(["resnet", "vgg"], BUDGETS),
        *itertools.product(["excited", "llama"], BUDGETS[:2]),
    ],
)
def test_whole_paths_serve_every_budget(name: str, budget: Budget) -> None:
    """The sizes are those of `select`.

    So are the picks, without exchanges, where the ridge is the same for all sizes: it is chosen on
    held-out data for the size that is kept.
    """
    model, inputs = network(name)
    objective = Imitation(sequential=False, swaps=0)
    options = {"objective": objective, "data": data_of(inputs)}
    whole = greedyprune.select(model, size=Budget(flops=1.0), **options)
    selected = greedyprune.select(model, size=budget, **options)
    resized = whole.resize(budget)
    assert sizes(resized) == sizes(selected)
    assert resized.budget.objective == pytest.approx(selected.budget.objective)
    assert resized.budget.left == pytest.approx(selected.budget.left)
    for layer, path in resized.layers.items():
        if name in ("resnet", "vgg"):
            assert path.order.equal(selected.layers[layer].order)
            assert path.weights.allclose(selected.layers[layer].weights)
    greedyprune.prune(model, resized)
    units = {layer: len(path.counts) for layer, path in whole.layers.items()}
    assert all(k >= budget.min_share * units[layer] for layer, k in sizes(resized).items())


def test_no_layer_grows() -> None:
    model, inputs = network("vgg")
    selection = greedyprune.select(model, data_of(inputs), size=Budget(flops=0.5))
    by_params = selection.resize(Budget(params=0.3))
    assert all(k <= sizes(selection)[name] for name, k in sizes(by_params).items())
    assert by_params.budget.left["params"] <= 0.3
    assert sizes(selection.resize(Budget(flops=0.5))) == sizes(selection)
    with pytest.raises(ValueError, match=r"flops: found 0\.6, but the paths end at the sizes of"):
        selection.resize(Budget(flops=0.6))
    assert by_params.frontier("params").chosen < selection.frontier("params").chosen


def test_curves_survive_files_copies_and_checkpoints(tmp_path: Path) -> None:
    model, inputs = network("resnet")
    options = {"data": data_of(inputs), "size": Budget(flops=0.7), "checkpoint": tmp_path / "c"}
    selection = greedyprune.select(model, **options)
    selection.save(tmp_path / "selection.safetensors")
    torch.save(selection, tmp_path / "pickled")
    for other in (
        Selection.load(tmp_path / "selection.safetensors"),
        torch.load(tmp_path / "pickled", weights_only=False),
        greedyprune.select(model, **options),
    ):
        assert sizes(other.resize(Budget(flops=0.4))) == sizes(selection.resize(Budget(flops=0.4)))
        assert other.frontier().losses.tolist() == selection.frontier().losses.tolist()
    shorter = selection.at(4).resize(Budget(flops=0.4))
    assert max(sizes(shorter).values()) <= 4


def test_the_frontier() -> None:
    model, inputs = network("vgg")
    selection = greedyprune.select(
        model, data_of(inputs), objective=Imitation(swaps=0), size=Budget(params=0.5)
    )
    frontier = selection.frontier()
    assert frontier.what == "params"
    assert (np.diff(frontier.shares) > 0).all()
    assert (np.diff(frontier.losses) <= 0).all()
    assert frontier.sizes[frontier.chosen] == sizes(selection)
    assert frontier.losses[frontier.chosen] == pytest.approx(selection.budget.objective)
    assert frontier.shares[frontier.chosen] == pytest.approx(selection.budget.reached)
    share, loss = frontier.shares[3], frontier.losses[3]
    assert selection.resize(Budget(params=share + 1e-9)).budget.objective == pytest.approx(loss)
    text = Console(width=120, file=StringIO())
    text.print(frontier.summary())
    [row] = [line for line in text.file.getvalue().splitlines() if "this selection" in line]
    assert f"{selection.budget.reached:.4f}" in row
    assert len(frontier.plot().axes[0].lines) == 2
    assert repr(frontier).startswith("Frontier(params: ")
    assert selection.frontier("flops").what == "flops"
    with pytest.raises(ValueError, match="what: found 'latency', expected one of"):
        selection.frontier("latency")


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(sum(widths))
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("widths", [(24, 4, 7, 8, 7), (10, 16, 24, 20, 5), (5, 9, 3, 11, 6)])
def test_every_row_of_a_frontier_is_a_budget(widths: tuple[int, ...]) -> None:
    """Exactly the cost of some sizes, as that of the smallest, is enough for them."""
    model = mlp(*widths)
    whole = greedyprune.select(model, torch.randn(60, widths[0]), size=Budget(flops=1.0))
    for what in ("flops", "params"):
        frontier = whole.frontier(what)
        for share, chosen in zip(frontier.shares.tolist(), frontier.sizes, strict=True):
            assert sizes(whole.resize(Budget(**{what: share}))) == chosen
    least = {what: whole.curves.share(what, whole.curves.least()) for what in ("flops", "params")}
    resized, selected = (
        whole.resize(Budget(**least)),
        greedyprune.select(model, torch.randn(60, widths[0]), size=Budget(**least)),
    )
    assert set(sizes(resized).values()) == set(sizes(selected).values()) == {1}


def test_shares_that_are_not_exact_in_floating_point() -> None:
    whole = greedyprune.select(mlp(4, 25, 3), torch.randn(60, 4), size=Budget(params=1.0))
    share = whole.curves.share("params", {"0": 7})
    resized = whole.resize(Budget(params=share, min_share=0.28))  # 0.28 * 25 is 7.000000000000001
    assert sizes(resized) == {"0": 7}
    with pytest.raises(ValueError, match=r"params: found .* with min_share=0\.56 leave 0\.\d"):
        whole.resize(Budget(params=share, min_share=0.56))


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    budget = Budget(flops=np.float32(0.5), min_share=np.float32(0.1))
    selection = greedyprune.select(
        mlp(4, 25, 3), torch.randn(60, 4), size=budget, checkpoint=tmp_path / "c"
    )
    selection.resize(Budget(flops=np.float32(0.3))).save(tmp_path / "s.safetensors")
    assert Selection.load(tmp_path / "s.safetensors").budget.share == pytest.approx(0.3)


def test_sizes_that_the_curves_do_not_have() -> None:
    model = mlp(8, 32, 32, 3)
    selection = greedyprune.select(model, torch.randn(90, 8), size=Budget(flops=0.9), round_to=8)
    shorter = selection.at(5)
    frontier = shorter.frontier()
    assert frontier.chosen is None
    assert "this selection" not in str(frontier.summary().columns[-1]._cells)
    assert len(frontier.plot().axes[0].lines) == 1
    with pytest.raises(ValueError, match="layers: found 5 units of '0', fewer than the smallest"):
        shorter.resize(Budget(flops=0.05))


def test_layers_keep_their_order() -> None:
    model = mlp(8, 32, 16, 32, 16, 3)
    selection = greedyprune.select(model, torch.randn(90, 8), size=Budget(flops=0.9, uniform=True))
    resized = selection.resize(Budget(flops=0.5, uniform=True))
    assert [*resized.layers] == [*selection.layers]
    assert len({*sizes(resized).values()}) <= 3


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(flops=0.001), r"flops: found 0\.001, but the smallest sizes of the layers leave"),
        (Budget(latency=0.3), r"latency: found 0\.3, but it was not measured for this selection"),
        (Budget(flops=0.3, uniform=True), "uniform: found True, which the sizes of this selection"),
        (Budget(flops=0.3, keep="0"), r"keep: found \('0',\), which the sizes of this selection"),
        (Budget(flops=0.3, trials=4), "trials: found 4, which the sizes of this selection were"),
        (
            Budget(flops=0.3, min_share=0.9),
            "min_share: found 0.9, but layer .* has 0.5 of its units",
        ),
        (0.3, "budget: found float, expected a Budget"),
    ],
)
def test_what_can_t_be_had_from_curves(budget: object, message: str) -> None:
    model, inputs = network("vgg")
    selection = greedyprune.select(model, data_of(inputs), size=Budget(flops=0.5))
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        selection.resize(budget)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1


def test_selections_without_a_budget_have_no_curves() -> None:
    model, inputs = network("vgg")
    selection = greedyprune.select(model, data_of(inputs))
    with pytest.raises(ValueError, match="resize: found a selection without a budget"):
        selection.resize(Budget(flops=0.5))
    with pytest.raises(ValueError, match="frontier: found a selection without a budget"):
        selection.frontier()
