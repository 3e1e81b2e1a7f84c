"""Query-key dimensions are judged by the error of the attention scores, computed here as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_kinds import HEADS, of_kind
from torch import Tensor, nn

import greedyprune
from greedyprune.surgery.layer_selection import LayerSelection

FEW: dict[str, Any] = {"objective": greedyprune.Imitation(swaps=0)}
NAMES = ["blocks.0.qkv[query-key]", "blocks.0.qkv[value]"]


def queries_and_keys(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """(samples, heads, tokens, d), float64, of the first block."""
    block = model.blocks[0]
    x = model.norms[0](model.first(inputs))
    qkv = block.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    return block.q_norm(qkv[0]).detach().double(), block.k_norm(qkv[1]).detach().double()


def kept_of_heads(layer: LayerSelection, picks: Tensor) -> Tensor:
    """The dimensions that each head keeps after these picks: (heads, K)."""
    at = layer.slices["blocks.0.qkv.weight"]
    size = len(at.places)
    return at.entries(picks).view(2, HEADS, -1)[0] - size * torch.arange(HEADS)[:, None]


def loss_of(queries: Tensor, keys: Tensor, kept: Tensor, counted: Tensor | None = None) -> float:
    """The squared error of the scores if head h keeps the dimensions kept[h]: mean, or sum."""
    error = queries @ keys.mT
    for head, dims in enumerate(kept):
        error[:, head] -= queries[:, head][..., dims] @ keys[:, head][..., dims].mT
    return float(error.square().mean() if counted is None else error[counted].square().sum())


@pytest.mark.parametrize("kind", ["scale of its own", "torch's scale", "norms"])
def test_losses_are_those_of_the_scores(kind: str) -> None:
    model, inputs = of_kind(kind)
    selection = greedyprune.select(model, inputs, layers=NAMES, size=6, **FEW)
    layer, (queries, keys) = selection.layers[NAMES[0]], queries_and_keys(model, inputs)
    whole = loss_of(queries, keys, torch.zeros(HEADS, 0, dtype=torch.int64))
    for k, loss in enumerate(layer.losses.tolist(), 1):
        kept = kept_of_heads(layer, layer.order[:k])
        assert loss == pytest.approx(loss_of(queries, keys, kept) / whole, rel=1e-5)
    assert layer.weights.tolist() == [1.0] * 6
    assert layer.objective == "imitation"


def test_each_pick_lowers_the_loss_most() -> None:
    """With norms, all heads keep the same dimensions, so that there are eight units to pick."""
    model, inputs = of_kind("norms")
    selection = greedyprune.select(model, inputs, layers=NAMES, size=8, **FEW)
    layer, (queries, keys) = selection.layers[NAMES[0]], queries_and_keys(model, inputs)
    picked: list[int] = []
    for _ in range(8):
        losses = {
            unit: loss_of(queries, keys, torch.tensor([[*picked, unit]] * HEADS))
            for unit in range(8) if unit not in picked
        }  # fmt: skip
        picked.append(min(losses, key=losses.__getitem__))
    assert layer.order.tolist() == picked


def test_each_head_keeps_its_own_best() -> None:
    """With one pick, each head keeps the dimension that lowers the error of its own scores most."""
    model, inputs = of_kind("scale of its own")
    selection = greedyprune.select(model, inputs, layers=NAMES, size=1, **FEW)
    layer, (queries, keys) = selection.layers[NAMES[0]], queries_and_keys(model, inputs)
    kept = kept_of_heads(layer, layer.kept)
    for head in range(HEADS):
        of_head = queries[:, head : head + 1], keys[:, head : head + 1]
        losses = [loss_of(*of_head, torch.tensor([[dim]])) for dim in range(8)]
        assert int(kept[head]) == losses.index(min(losses))


class Masked(nn.Module):
    """A network that takes a mask of padding."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        output: Tensor = self.network(x) * attention_mask.any(1, keepdim=True)
        return output


def test_padding_does_not_count() -> None:
    network, inputs = of_kind("scale of its own")
    model, mask = Masked(network), torch.arange(7) < torch.randint(3, 8, (len(inputs), 1))
    names = [f"network.{name}" for name in NAMES]
    data = {"x": inputs, "attention_mask": mask}
    selection = greedyprune.select(model, data, layers=names, size=4, **FEW)
    layer, (queries, keys) = selection.layers[names[0]], queries_and_keys(network, inputs)
    layer = layer.__class__(**{
        **vars(layer), "slices": {n.removeprefix("network."): s for n, s in layer.slices.items()}
    })  # fmt: skip
    pairs = (mask[:, None, :, None] & mask[:, None, None, :]).expand(-1, HEADS, -1, -1)
    error = loss_of(queries, keys, kept_of_heads(layer, layer.kept), pairs)
    whole = loss_of(queries, keys, torch.zeros(HEADS, 0, dtype=torch.int64), pairs)
    assert float(layer.losses[-1]) == pytest.approx(error / whole, rel=1e-5)


class Padded(nn.Module):
    """Attention whose heads come before the samples, or in one dimension with them."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 24) for _ in range(3))
        self.last, self.layout = nn.Linear(24, 4), layout

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        given = (layer(x).unflatten(-1, (4, -1)) for layer in (self.q, self.k, self.v))
        order = (0, 2, 1, 3) if self.layout == "samples, heads" else (2, 0, 1, 3)
        q, k, v = (each.permute(order).flatten(0, 1) for each in given)
        if self.layout == "heads before samples":
            q, k, v = (each.unflatten(0, (4, -1)) for each in (q, k, v))
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        if self.layout != "heads before samples":
            y = y.unflatten(0, (len(x), 4) if order[1] == 2 else (4, len(x)))
        y = y.transpose(0, 1) if order[1] == 0 else y
        output: Tensor = self.last(y.transpose(1, 2).flatten(2))
        return output


@pytest.mark.parametrize("layout", ["samples, heads", "heads, samples", "heads before samples"])
@pytest.mark.parametrize("samples", [2, 4, 8])
def test_hidden_tokens_change_nothing(layout: str, samples: int) -> None:
    torch.manual_seed(0)
    model, inputs = Padded(layout).eval(), torch.randn(samples, 7, 6)
    mask = torch.arange(7) < torch.randint(2, 6, (samples, 1))
    losses = []
    for hidden in (0.0, 100.0):
        x = inputs.masked_fill(~mask[..., None], hidden)
        data = {"x": x, "attention_mask": mask}
        selection = greedyprune.select(model, data, layers="q[query-key]", size=3, **FEW)
        losses.append(selection.layers["q[query-key]"].losses)
    torch.testing.assert_close(losses[0], losses[1])


def test_bad_numbers() -> None:
    model, inputs = of_kind("scale of its own")
    model.blocks[0].qkv.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or inf"):
        greedyprune.select(model, inputs, layers=NAMES, **FEW)


def test_batches_of_several_sizes() -> None:
    """Sums over batches, also where heads and samples are one dimension of the product."""
    for kind in ("scale of its own", "torch's module", "grouped"):
        model, inputs = of_kind(kind)
        table = greedyprune.layers(model, inputs).inside_heads
        names = [*table]
        whole = greedyprune.select(model, inputs, layers=names, **FEW)
        parts = greedyprune.select(model, [inputs[:20], inputs[20:]], layers=names, **FEW)
        for name in names:
            if table[name].consumers:  # their ridge depends on the batches
                continue
            assert whole.layers[name].order.tolist() == parts.layers[name].order.tolist()
            torch.testing.assert_close(whole.layers[name].losses, parts.layers[name].losses)
