"""Mixtures of experts that hold all experts in one weight, and multiply sorted rows by them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import close
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune.data.batches import Batch
from greedyprune.graph.executor import GraphExecutor
from greedyprune.graph.names import weight_of
from greedyprune.graph.networks import tensors_of
from greedyprune.surgery.cut import masked

pytest.importorskip("transformers.integrations.moe")  # which registers the product
grouped_mm = torch.ops.transformers.grouped_mm_fallback
EXPERTS, SIZE, HIDDEN = 4, 8, 12


class Experts(nn.Module):
    """Mixtral's block: a router chooses two experts for each row; gated units."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(SIZE, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, SIZE) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, SIZE, HIDDEN) / 3)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.gate(x).softmax(-1).topk(2)
        order = chosen.flatten().argsort()
        counts = functional.one_hot(chosen.flatten(), EXPERTS).sum(0)
        ends = counts.cumsum(0).int()
        rows = x[order // 2]
        gate, up = grouped_mm(rows, self.gate_up.transpose(1, 2), ends).chunk(2, -1)
        given = grouped_mm(functional.silu(gate) * up, self.down.transpose(1, 2), ends)
        given = (given * share.flatten()[order, None])[order.argsort()]
        return given.unflatten(0, (-1, 2)).sum(1)


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, SIZE), Experts(), nn.Linear(SIZE, 3)).eval()
    return model.double(), torch.randn(96, 6).double()


def test_the_graph_computes_what_the_model_does() -> None:
    model, x = network()
    batch = Batch((x,), {}, None)
    executor = GraphExecutor(model, batch)
    outputs = executor.outputs(executor.inputs(batch), tensors_of(model), 0)
    assert close(outputs, model(x), 1e-12)


def test_a_unit_is_one_of_every_expert() -> None:
    model, x = network()
    table = greedyprune.layers(model, x)
    assert {name: (found.units, found.features) for name, found in table.items()} == {
        "0": (SIZE, 1), "1.gate_up": (HIDDEN, EXPERTS), "1.down": (SIZE, 1),
    }  # fmt: skip
    assert table["1.gate_up"].consumers == ("1.down",)
    assert set(table["0"].consumers) == {"1.gate", "1.gate_up"}
    # Each row runs through two of the experts.
    flops = 2 * 2 * len(x) * SIZE * HIDDEN
    assert table["1.gate_up"].flops == 3 * flops


@pytest.mark.parametrize("weights", ["none", "refit"])
def test_pruned_equals_masked(weights: str, tmp_path: Path) -> None:
    model, x = network()
    selection = greedyprune.select(
        model, [x], size=0.5, weights=weights, objective="imitation", progress=False
    )
    small = greedyprune.prune(model, selection)
    assert small[1].gate_up.shape == (EXPERTS, HIDDEN, SIZE // 2)
    assert small[1].down.shape == (EXPERTS, SIZE // 2, HIDDEN // 2)
    full = masked(model, selection)
    assert close(small(x), full(x), 1e-12)
    for expert in range(EXPERTS):  # a unit that is missing in one expert is seen
        other = masked(model, selection)
        unit = selection.layers["1.gate_up"].kept[0]
        with torch.no_grad():
            weight_of(other, "1.down")[expert, :, unit] = 0
        assert not close(small(x), other(x), 1e-12)
    greedyprune.save_pruned(small, tmp_path / "small.safetensors")
    loaded = greedyprune.load_pruned(tmp_path / "small.safetensors", lambda: copy.deepcopy(model))
    assert torch.equal(loaded(x), small(x))


def test_the_units_that_give_something_are_kept() -> None:
    model, x = network()
    given = torch.tensor([1, 4, 5, 10])
    with torch.no_grad():
        rest = torch.ones(HIDDEN, dtype=torch.bool).index_fill(0, given, False)
        model[1].down[:, :, rest] = 0
    selection = greedyprune.select(
        model, [x], layers="1.gate_up", size=4, objective="imitation", progress=False
    )
    assert selection.layers["1.gate_up"].kept.tolist() == given.tolist()
    assert close(greedyprune.prune(model, selection)(x), model(x), 1e-12)


def test_refit_brings_the_outputs_nearer() -> None:
    model, _ = network()
    x = torch.randn(2048, 6).double()
    data = list(x.split(256))
    selection = greedyprune.select(
        model, data, size=0.5, layers=["1.gate_up"], weights="none", objective="imitation",
        progress=False,
    )  # fmt: skip
    small, refitted = greedyprune.prune(model, selection), greedyprune.refit(model, selection, data)
    assert (refitted(x) - model(x)).norm() < 0.9 * (small(x) - model(x)).norm()


class Sequences(nn.Module):
    """Experts on the tokens of sequences with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(6, SIZE), Experts(), nn.Linear(SIZE, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        rows = self.experts(self.first(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.last(rows) * attention_mask[..., None]


@pytest.mark.parametrize("sequential", [True, False])
def test_padding_is_refused(sequential: bool) -> None:
    torch.manual_seed(0)
    mask = torch.ones(12, 8, dtype=torch.long)
    mask[::2, 5:] = 0
    model, data = Sequences().double().eval(), {"x": torch.randn(12, 8, 6).double()}
    options: dict[str, Any] = {
        "size": 0.5,
        "objective": greedyprune.Imitation(sequential=sequential),
        "progress": False,
    }
    why = "mask: found hidden positions, but the rows of 'experts.*' are sorted by expert"
    with pytest.raises(ValueError, match=why):
        greedyprune.select(model, data | {"attention_mask": mask}, **options)
    selection = greedyprune.select(model, data | {"attention_mask": mask}, mask=None, **options)
    assert "experts.gate_up" in selection.layers
    with pytest.raises(ValueError, match=why):
        greedyprune.refit(model, selection, data | {"attention_mask": mask}, progress=False)
