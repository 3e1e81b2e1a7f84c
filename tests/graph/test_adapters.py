"""LoRA: the ranks of adapters are no units, and layers with an adapter say what to call first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import greedyprune


class Adapted(nn.Module):
    """A Linear and a low-rank change of it, as peft has them."""

    def __init__(self, base_layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base_layer
        inputs, outputs = base_layer.in_features, base_layer.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


class Gated(nn.Module):
    """Feed-forward blocks whose layers may have adapters."""

    def __init__(self, adapted: set[str]) -> None:
        super().__init__()
        layers = {"up": nn.Linear(8, 12), "gate": nn.Linear(8, 12), "down": nn.Linear(12, 8)}
        for name, layer in layers.items():
            self.add_module(name, Adapted(layer) if name in adapted else layer)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x) * self.gate(x).sigmoid())


def test_ranks_are_no_units_and_adapted_layers_are_refused() -> None:
    """Also a layer without an adapter whose units another layer with one has, too."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Gated({"gate"}), Gated(set())), torch.randn(10, 8)
    table = greedyprune.layers(model, x)
    assert list(table) == ["1.up"]
    ranks = "0.gate.lora_A.default", "0.gate.lora_B.default"
    for name in ("0.up", "0.gate.base_layer", *ranks):
        assert "model = model.merge_and_unload()" in table.refused[name]
    assert list(greedyprune.select(model, x).layers) == ["1.up"]
    with pytest.raises(ValueError, match=r"found '0.gate.lora_A.default'.*merge_and_unload"):
        greedyprune.select(model, x, layers=ranks[0])


def test_one_sentence_where_every_layer_has_an_adapter() -> None:
    model, x = Gated({"up", "gate", "down"}), torch.randn(10, 8)
    with pytest.raises(ValueError, match=r"model: no layer can be pruned: .*merge") as error:
        greedyprune.select(model, x)
    assert str(error.value).count("merge_and_unload") == 1


def test_merged_adapters_are_part_of_their_layers() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=3, intermediate_size=20,
    )  # fmt: skip
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).eval()
    ids = {"input_ids": torch.randint(50, (6, 12))}
    with pytest.raises(ValueError, match=r"model = model.merge_and_unload\(\)"):
        greedyprune.select(model, [ids])
    merged = model.merge_and_unload().requires_grad_(True)
    assert len(greedyprune.select(merged, [ids]).layers) == 2
