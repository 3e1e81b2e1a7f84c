"""The record: its fields, nested paths, files, summary and plot."""

import copy
import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from oracle import (
    FIELDS,
    WEIGHTS,
    Net,
    each_backend,
    only,
    problem,
    same,
    select,
    targets_for,
)
from rich.console import Console

import greedyprune

pytestmark = pytest.mark.usefixtures("one_thread")


@each_backend
@pytest.mark.parametrize("replacement", [True, False])
def test_record(backend: str, replacement: bool) -> None:
    model, x, y = problem()
    selection = select(model, (x, y), steps=10, replacement=replacement, backend=backend)
    assert isinstance(selection, greedyprune.Selection)
    assert list(selection.layers) == ["0"]
    assert isinstance(only(selection), greedyprune.LayerSelection)
    for record in (selection, only(selection)):
        order = record.order
        assert order.dtype == record.counts.dtype == record.kept.dtype == torch.int64
        assert record.losses.dtype == record.dense_loss.dtype == torch.float64
        assert order.shape == record.losses.shape == record.gap.shape == (10,)
        assert record.dense_loss.shape == ()
        assert torch.equal(record.counts, order.bincount(minlength=16))
        assert torch.equal(record.kept, order.unique())
        assert record.distinct.tolist() == [len(set(order[:k].tolist())) for k in range(1, 11)]
        fields = [getattr(record, f) for f in FIELDS]
        assert {str(t.device) for t in fields if t is not None} == {"cpu"}
    assert replacement or record.counts.max() == 1
    for record, names in ((selection, ("layers", "order")), (only(selection), FIELDS)):
        for name in names:
            with pytest.raises(FrozenInstanceError):
                setattr(record, name, None)


def two_layers() -> greedyprune.Selection:
    """A selection of two layers, "0" and "2"."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6), torch.nn.ReLU(),
        torch.nn.Linear(6, 3),
    )  # fmt: skip
    return select(model, [torch.randn(40, 5)], size=3, objective="imitation")


def test_a_selection_of_several_layers_says_what_to_write() -> None:
    selection = two_layers()
    for name in FIELDS:
        assert not hasattr(selection, name)
        message = (
            f"{name}: found a Selection of 2 layers, expected selection.layers[name].{name}, with "
            "a name among '0', '2'"
        )
        with pytest.raises(AttributeError) as raised:
            getattr(selection, name)
        assert str(raised.value) == message


def test_other_attributes_belong_to_the_layer() -> None:
    model, x, y = problem()
    selection = select(model, (x, y), size=4)
    assert all(hasattr(selection, name) for name in FIELDS)
    for name in ("weighting", "objective", "loss", "outputs", "slices", "fitted", "ordre"):
        assert not hasattr(selection, name)
    with pytest.raises(AttributeError, match="'Selection' object has no attribute 'weighting'"):
        selection.weighting  # noqa: B018


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))],
    ids=["copy", "deepcopy", "pickle"],
)  # fmt: skip
def test_copies_and_pickles(copied: Callable[..., greedyprune.Selection]) -> None:
    model, x, y = problem()
    selection = select(model, (x, y), size=4)
    again = copied(selection)
    assert type(again) is greedyprune.Selection
    assert again is not selection
    assert same(again, selection)
    assert again.change("params") == selection.change("params") is not None
    assert again.at(2).order.equal(selection.at(2).order)
    several = copied(two_layers())
    assert [len(layer.kept) for layer in several.layers.values()] == [3, 3]


def test_only_known_costs_change() -> None:
    selection = two_layers()
    before = 5 * 8 + 8 + 8 * 6 + 6 + 6 * 3 + 3
    assert selection.change("params") == (before, 5 * 3 + 3 + 3 * 3 + 3 + 3 * 3 + 3)
    assert selection.at(2).change("params") == (before, 5 * 2 + 2 + 2 * 2 + 2 + 2 * 3 + 3)
    with pytest.raises(
        ValueError, match=r"^what: found 'bytes', expected one of 'params', 'flops'$"
    ):
        selection.change("bytes")
    assert greedyprune.Selection(selection.layers).change("flops") is None


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("replacement", [True, False])
def test_at_cuts_the_path_and_a_file_brings_it_back(
    tmp_path: Path, weights: str, replacement: bool
) -> None:
    model, x, y = problem()
    options = {"weights": weights, "replacement": replacement}
    selection = select(model, (x, y), steps=10, **options)
    path = tmp_path / "selection.safetensors"
    selection.save(path)
    loaded = greedyprune.Selection.load(path)
    assert same(loaded, selection)
    assert same(selection.at(10), selection)
    for k in (1, 4, 9):
        cut, alone = selection.at(k), select(model, (x, y), steps=k, **options)
        assert same(loaded.at(k), cut)
        assert torch.equal(cut.order, alone.order)
        assert torch.equal(cut.kept, alone.kept)
        assert torch.allclose(cut.losses, alone.losses, rtol=1e-9)
        assert torch.allclose(cut.weights, alone.weights, rtol=1e-6)
        assert same(selection.at(9).at(k), cut)
    small = greedyprune.prune(model, loaded)
    assert torch.equal(small(x), greedyprune.prune(model, selection)(x))


def test_one_path_serves_every_size_and_the_file_holds_no_pickle(tmp_path: Path) -> None:
    model, x, y = problem()
    selection = select(model, (x, y), size=10)
    assert torch.equal(selection.at(4).order, select(model, (x, y), size=4).order)
    selection.save(str(tmp_path / "s.safetensors"))
    (path,) = tmp_path.iterdir()
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    assert blob[8:9] == b"{"
    assert length < len(blob)
    assert safetensors.torch.load_file(path)


def test_summary_and_plot_show_the_layer() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(30, 5)
    selection = select(model, (x, targets_for(model, x, "mse")), steps=7)
    console = Console(file=io.StringIO(), width=200)
    console.print(selection.summary())
    text = console.file.getvalue()
    numbers = selection.losses[-1], selection.dense_loss, selection.gap[-1], selection.bound[-1]
    cells = ["fc1", f"{len(selection.kept)} of 16", "7", "counts"]
    cells += [f"{float(number):.4g}" for number in numbers]
    (row,) = [line for line in text.splitlines() if "fc1" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == cells
    assert "loss: mse" in text
    dense, pruned = selection.change("params")
    assert f"{dense:,} parameters before, {pruned:,} after ({pruned / dense:.1%})" in text
    (panel,) = selection.plot().axes
    assert panel.get_title() == f"layer fc1\n{len(selection.kept)} of 16 units kept"
    heights = {
        line.get_label(): [float(height) for height in line.get_ydata()]
        for line in panel.get_lines()
    }
    assert heights == {
        "pruned": selection.losses.tolist(),
        "proved bound (eq. 3)": selection.bound.tolist(),
        "dense network's loss": [float(selection.dense_loss)] * 2,
    }
    layer = only(selection)
    high = greedyprune.Selection({"fc1": replace(layer, bound=100 * layer.bound)})
    assert [s.plot().axes[0].get_yscale() for s in (selection, high)] == ["linear", "log"]


def test_summary_keeps_layers_of_different_objectives_apart() -> None:
    """The column says what each loss is; without bounds and gaps nothing explains these."""
    layers, model, x = two_layers().layers, Net(), torch.randn(30, 5)
    by_loss = only(select(model, (x, targets_for(model, x, "mse")), steps=7))
    columns = {}
    for name, layer in (("alone", layers["0"]), ("both", by_loss)):
        table = greedyprune.Selection({"0": layer, "2": layers["2"]}).summary()
        columns[name] = {c.header: list(c.cells) for c in table.columns}
        explained = "loss - gap: no convex reweighting" in str(table.caption)
        assert explained == ("bound: the loss is proved" in str(table.caption)) == (name == "both")
    assert "objective" not in columns["alone"]
    assert columns["both"]["objective"] == ["loss", "imitation"]


def test_plot_has_a_panel_for_each_layer() -> None:
    """Imitation has no bound, and its dense loss is 0: only the losses are drawn."""
    selection = two_layers()
    panels = selection.plot().axes
    for panel, (name, layer) in zip(panels, selection.layers.items(), strict=True):
        (line,) = panel.get_lines()
        assert torch.as_tensor(line.get_ydata()).equal(layer.losses)
        assert panel.get_title().startswith(f"layer {name}\n")
