"""Pruned nn.MultiheadAttention: torch's own forward cannot have heads and model size apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import close
from torch import Tensor, nn

import greedyprune
from greedyprune.surgery.attention import MultiheadAttention
from greedyprune.surgery.cut import masked

KEYS = torch.zeros(4, 7, dtype=torch.bool)
KEYS[:, -2:] = True  # which keys are padding
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)[:, [*range(5), 3, 4]].double()
OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"add_bias_kv": True, "kdim": 6, "vdim": 10, "batch_first": True},
]
MASKS: list[dict[str, Any]] = [
    {},
    {"key_padding_mask": KEYS},
    {"attn_mask": CAUSAL},
    {"attn_mask": CAUSAL < 0, "key_padding_mask": KEYS},
    {"attn_mask": torch.linspace(-3, 3, 560).view(16, 5, 7).double()},
    {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": KEYS},
    {"need_weights": False},
    {"need_weights": False, "attn_mask": CAUSAL, "key_padding_mask": KEYS.double() * -3},
    {"average_attn_weights": False},
]


def attention(**options: Any) -> tuple[nn.MultiheadAttention, list[Tensor]]:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 4, **options).eval().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    lengths, sizes = (5, 7, 7), (12, options.get("kdim", 12), options.get("vdim", 12))
    inputs = [torch.randn(n, 4, size).double() for n, size in zip(lengths, sizes, strict=True)]
    if options.get("batch_first"):
        inputs = [tensor.transpose(0, 1) for tensor in inputs]
    return module, inputs


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_the_forward_gives_what_torchs_gives(options: dict[str, Any], mask: dict[str, Any]) -> None:
    module, inputs = attention(**options)
    own = copy.deepcopy(module)
    own.__class__ = MultiheadAttention
    expected, weights = module(*inputs, **mask)
    output, own_weights = own(*inputs, **mask)
    assert close(output, expected, 1e-12)
    assert (weights is None) == (own_weights is None)
    if weights is not None:
        assert close(own_weights, weights, 1e-12)


def test_one_sample_without_a_batch() -> None:
    module, inputs = attention()
    own = copy.deepcopy(module)
    own.__class__ = MultiheadAttention
    single = [tensor[:, 0] for tensor in inputs]
    for mask in ({}, {"key_padding_mask": KEYS[0]}, {"attn_mask": CAUSAL}):
        for output, expected in zip(own(*single, **mask), module(*single, **mask), strict=True):
            assert output.shape == expected.shape
            assert close(output, expected, 1e-12)


def test_a_causal_hint_without_a_mask_is_refused_as_by_torch() -> None:
    module, inputs = attention()
    own = copy.deepcopy(module)
    own.__class__ = MultiheadAttention
    for each in (module, own):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            each(*inputs, is_causal=True)


class Attending(nn.Module):
    """Attention from one projection of the inputs to two others, with padding."""

    def __init__(self, mask: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.mask, self.first = mask, options.get("batch_first", False)
        self.query, self.key = nn.Linear(9, 12), nn.Linear(9, options.get("kdim", 12))
        self.value = nn.Linear(9, options.get("vdim", 12))
        self.attention, self.head = nn.MultiheadAttention(12, 4, **options), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x) for layer in (self.query, self.key, self.value))
        if not self.first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        output = self.attention(query[: None if self.first else 5], key, value, **self.mask)[0]
        return self.head(output)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", [
    {}, {"key_padding_mask": KEYS}, {"need_weights": False, "key_padding_mask": KEYS},
])  # fmt: skip
def test_heads_and_model_size_are_cut(
    options: dict[str, Any], mask: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model, x = Attending(mask, **options).eval().double(), torch.randn(4, 7, 9).double()
    for parameter in model.attention.parameters():
        nn.init.normal_(parameter)
    sizes = {name: 2 / 3 if found.units != 4 else 0.5
             for name, found in greedyprune.layers(model, x).items()}  # fmt: skip
    assert any(size == 0.5 for size in sizes.values())
    selection = greedyprune.select(
        model, [x], layers=list(sizes), size=sizes, objective="imitation", progress=False
    )
    small = greedyprune.prune(model, selection)
    assert close(small(x), masked(model, selection)(x), 1e-12)
    assert type(small.attention) is MultiheadAttention
    assert small.attention.num_heads == 2
    assert small.attention.embed_dim == len(small.attention.out_proj.weight) == 8
    greedyprune.save_pruned(small, tmp_path / "small.safetensors")
    loaded = greedyprune.load_pruned(tmp_path / "small.safetensors", lambda: copy.deepcopy(model))
    assert torch.equal(loaded(x), small(x))


def test_the_same_share_of_both_keeps_torchs_class() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True)
    model = nn.Sequential(nn.Linear(9, 12), layer, nn.Linear(12, 3)).eval()
    x = torch.randn(8, 7, 9)
    for layers, kind in (("all", nn.MultiheadAttention), (None, MultiheadAttention)):
        selection = greedyprune.select(
            model, [x], size=0.5, layers=layers, objective="imitation", progress=False
        )
        small = greedyprune.prune(model, selection)
        assert type(small[1].self_attn) is kind
        with torch.no_grad():  # with torch's fast path, where the class is torch's
            fast = small(x)
        assert close(fast, small(x), 1e-5)


class Padded(nn.Module):
    """torch's encoder, which makes nested tensors of padded batches where nothing is trained."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(12, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        hidden = self.encoder(x, src_key_padding_mask=padding)
        return self.head(hidden.masked_fill(padding[..., None], 0).sum(1))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_an_encoder_with_a_pruned_layer_makes_no_nested_tensors() -> None:
    torch.manual_seed(0)
    padding = torch.zeros(32, 6, dtype=torch.bool)
    padding[::2, 4:] = True
    model, data = Padded().eval(), {"x": torch.randn(32, 6, 12), "padding": padding}
    name = "encoder.layers.1.self_attn.in_proj_weight"
    selection = greedyprune.select(model, data, size=2, layers=[name], objective="imitation")
    small = greedyprune.prune(model, selection)
    with torch.no_grad():
        output = small(**data)
    assert close(output, small(**data), 1e-5)


@pytest.mark.parametrize("layers", [["attention.in_proj_weight"], ["query"], None])
def test_a_pruned_network_with_another_forward_is_trained(layers: list[str] | None) -> None:
    torch.manual_seed(0)
    model, x = Attending({"need_weights": False}, batch_first=True).eval(), torch.randn(64, 7, 9)
    for parameter in model.attention.parameters():
        nn.init.normal_(parameter)
    selection = greedyprune.select(
        model, x, layers=layers, size=0.5, objective="imitation", progress=False
    )
    small = greedyprune.prune(model, selection)
    trained = greedyprune.refit(model, selection, x, epochs=5, progress=False)
    assert (trained(x) - model(x)).norm() < (small(x) - model(x)).norm()
    assert type(model.attention) is nn.MultiheadAttention
