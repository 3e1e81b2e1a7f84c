"""Groups that the model's code needs to keep one share of their units."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_kinds import OneShare
from kinds import of_kind
from torch import Tensor, nn

import greedyprune
from greedyprune import Budget

NAMES = "patches", "blocks.0.qkv", "blocks.1.qkv"
PLAIN: dict[str, Any] = {"objective": "imitation", "weights": "none"}


def sizes(selection: greedyprune.Selection) -> dict[str, int]:
    return {name: len(layer.kept) for name, layer in selection.layers.items()}


def test_the_table_says_so() -> None:
    table = greedyprune.layers(*of_kind("one share"))
    assert [group.share for name, group in table.items() if name in NAMES] == [NAMES] * 3
    kinds = ["residual stream in one share", "in one share", "", "in one share", ""]
    assert [group.kind for group in table.values()] == kinds
    assert not table["blocks.0.fc1"].share


def test_they_are_left_out_by_default() -> None:
    model, inputs = of_kind("one share")
    selection = greedyprune.select(model, inputs, **PLAIN)
    assert list(selection.layers) == ["blocks.0.fc1", "blocks.1.fc1"]
    reason = "it has to keep one share of its units with 'patches' and 1 more; layers='all' or a "
    assert selection.refused["blocks.0.qkv"].startswith(reason)


@pytest.mark.parametrize(
    ("size", "heads"), [(0.5, 2), (0.7, 3), (0.3, 1), (1.0, 4), (0.01, 1), (0.625, 3)]
)
def test_a_fraction_is_the_nearest_share(size: float, heads: int) -> None:
    model, inputs = of_kind("one share")
    selection = greedyprune.select(model, inputs, size=size, layers=list(NAMES), **PLAIN)
    assert sizes(selection) == dict(zip(NAMES, (4 * heads, heads, heads), strict=True))
    small = greedyprune.prune(model, selection)
    assert small.blocks[0].num_heads == heads
    assert small(inputs).shape == (24, 5)


def test_numbers_of_units() -> None:
    model, inputs = of_kind("one share")
    given = dict(zip(NAMES, (12, 3, 3), strict=True))
    selection = greedyprune.select(model, inputs, size=given, layers=list(NAMES), **PLAIN)
    assert sizes(selection) == given
    for wrong in (given | {"patches": 11}, given | {"blocks.1.qkv": 2}, 2):
        with pytest.raises(ValueError, match=r"size: found \d+ of the \d+ units of '.*', which"):
            greedyprune.select(model, inputs, size=wrong, layers=list(NAMES), **PLAIN)


def test_all_or_none_of_them() -> None:
    model, inputs = of_kind("one share")
    reason = re.escape(
        "layers: found 'blocks.0.qkv' without 'patches', 'blocks.1.qkv'; the model needs them to "
        "keep one share of their units, expected all of them"
    )
    for chosen in ({"layers": "blocks.0.qkv"}, {"size": {"blocks.0.qkv": 2}}):
        with pytest.raises(ValueError, match=reason):
            greedyprune.select(model, inputs, **chosen, **PLAIN)


@pytest.mark.parametrize("option", [
    {"tolerance": 0.0}, {"tolerance": 0.1, "size": 0.75}, {"steps": 3},
    {"replacement": True, "weights": "counts"},
])  # fmt: skip
def test_a_size_is_needed(option: dict[str, Any]) -> None:
    model, inputs = of_kind("one share")
    reason = f"{next(iter(option))}: found one, but the model needs 'patches' and 'blocks.0.qkv' to"
    with pytest.raises(ValueError, match=reason):
        greedyprune.select(model, inputs, layers="all", **(PLAIN | option))


def test_selections_that_break_the_share(tmp_path: Path) -> None:
    """However it comes about: after fewer steps, from a file, by hand, for `refit`."""
    model, inputs = of_kind("one share")
    selection = greedyprune.select(model, inputs, size=0.75, layers="all", **PLAIN)
    selection.save(tmp_path / "selection")
    loaded = greedyprune.Selection.load(tmp_path / "selection")
    assert [layer.share for layer in loaded.layers.values()][:2] == [NAMES, NAMES]
    reason = "selection: keeps 2 of 16 units of 'patches' and 2 of 4 of 'blocks.0.qkv', but"
    for chosen in (selection, loaded):
        assert greedyprune.prune(model, chosen)(inputs).shape == (24, 5)
        with pytest.raises(ValueError, match=reason):
            greedyprune.prune(model, chosen.at(2))
    fewer = greedyprune.Selection({name: selection.layers[name] for name in NAMES[:2]})
    with pytest.raises(ValueError, match=r"and none of 'blocks\.1\.qkv', but the model needs one"):
        greedyprune.prune(model, fewer)
    with pytest.raises(ValueError, match="but the model needs one share of both"):
        greedyprune.refit(model, {"blocks.0.qkv": [0, 1]}, inputs)


def test_only_what_is_needed_is_set() -> None:
    """The stream's norms have its size, but no code reads it there; `num_heads` is always set."""
    model, inputs = of_kind("one share")
    selection = greedyprune.select(model, inputs, size=0.5, layers="all", **PLAIN)
    assert not any(layer.sizes for layer in selection.layers.values())


@pytest.mark.parametrize("budget", [Budget(flops=0.5), Budget(params=0.4, uniform=True)])
def test_a_budget(budget: Budget) -> None:
    model, inputs = of_kind("one share")
    selection = greedyprune.select(model, inputs, size=budget, layers="all", objective="imitation")
    kept = sizes(selection)
    assert kept["patches"] == 4 * kept["blocks.0.qkv"] == 4 * kept["blocks.1.qkv"]
    assert selection.budget is not None
    assert 0.2 < selection.budget.reached <= budget.share
    small = greedyprune.prune(model, selection)
    left = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    if budget.what == "params":
        assert left == pytest.approx(selection.budget.reached)


def test_round_to() -> None:
    """Heads have 4 channels, so 8 channels are 2 heads."""
    model, inputs = of_kind("one share")
    selection = greedyprune.select(model, inputs, size=0.7, round_to=8, layers=list(NAMES), **PLAIN)
    assert sizes(selection) == dict(zip(NAMES, (8, 2, 2), strict=True))
    given = dict(zip(NAMES, (11, 1, 4), strict=True))
    selection = greedyprune.select(
        model, inputs, size=given, round_to=8, layers=list(NAMES), **PLAIN
    )
    assert sizes(selection) == dict(zip(NAMES, (8, 2, 2), strict=True))


@pytest.mark.parametrize(("width", "heads"), [(18, 6), (15, 5), (10, 2), (16, 4), (6, 2)])
def test_the_share_is_found_for_all_sizes(width: int, heads: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), OneShare.Block(width, heads), nn.Linear(width, 3))
    table = greedyprune.layers(model, torch.randn(8, 7, 5))
    assert table["0"].share == table["1.qkv"].share == ("0", "1.qkv")
    assert not table["1.fc1"].share


class OneAttribute(nn.Module):
    """The width of the stream and that of all heads are read from one attribute."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 3)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.width = heads, width

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        x = self.first(x).view(B, N, self.width)
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)
        return self.last(x + self.proj(y.reshape(B, N, self.width)))


@pytest.mark.parametrize(("width", "heads"), [(16, 4), (8, 8)])
def test_one_attribute_for_two_groups(width: int, heads: int) -> None:
    torch.manual_seed(0)
    model, inputs = OneAttribute(width, heads), torch.randn(64, 7, 5)
    assert greedyprune.layers(model, inputs)["first"].share == ("first", "qkv")
    selection = greedyprune.select(model, inputs, size=0.5, layers="all", **PLAIN)
    small = greedyprune.prune(model, selection)
    assert (small.width, small.heads) == (width // 2, heads // 2)
    assert small(inputs).shape == (64, 7, 3)


class Different(nn.Module):
    """Blocks with 4 and 6 heads: they and the stream can keep one half, but no quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 24), nn.Linear(24, 3)
        self.blocks = nn.Sequential(OneShare.Block(24, 4), OneShare.Block(24, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(x)))


def test_different_numbers_of_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Different(), torch.randn(8, 7, 5)
    selection = greedyprune.select(model, inputs, size=0.25, layers="all", **PLAIN)
    kept = sizes(selection)
    assert (kept["first"], kept["blocks.0.qkv"], kept["blocks.1.qkv"]) == (12, 2, 3)
    small = greedyprune.prune(model, selection)
    assert [block.num_heads for block in small.blocks] == [2, 3]
    greedyprune.save_pruned(small, tmp_path / "small")
    assert greedyprune.load_pruned(tmp_path / "small", Different)(inputs).equal(small(inputs))


def test_no_share_in_common() -> None:
    """With 4 heads and 3 no share is common."""
    model = Different()
    model.blocks[1].num_heads = 3
    table = greedyprune.layers(model, torch.randn(8, 7, 5))
    assert list(table) == ["blocks.0.fc1", "blocks.1.fc1"]
    assert {"first", "blocks.0.qkv", "blocks.1.qkv"} <= table.refused.keys()
