"""Small Hugging Face models of many classes, with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
VOCABULARY = 50
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
BLOCKS = {
    "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6,
}  # fmt: skip
IMAGES = {"image_size": 8, "patch_size": 4}
STACKS = {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 20, "decoder_ffn_dim": 28,
    "decoder_start_token_id": 2,
}  # fmt: skip


def tokens(length: int = 10, samples: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, VOCABULARY, (samples, length), generator=generator)


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


Family = Callable[[Any], tuple[nn.Module, Inputs]]  # of the module `transformers`


def _text(kind: str, config: str, **entries: Any) -> Family:
    def make(transformers: Any) -> tuple[nn.Module, Inputs]:
        made = getattr(transformers, config)(**TOKENS | entries)
        return getattr(transformers, kind)(made), {"input_ids": tokens()}

    return make


def _translator(
    kind: str, config: str, **entries: Any
) -> Callable[[Any], tuple[nn.Module, Inputs]]:
    def make(transformers: Any) -> tuple[nn.Module, Inputs]:
        model, inputs = _text(kind, config, **entries)(transformers)
        return model, inputs | {"decoder_input_ids": tokens(6)}

    return make


def _vit(transformers: Any) -> tuple[nn.Module, Inputs]:
    config = transformers.ViTConfig(**BLOCKS, **IMAGES)
    return transformers.ViTForImageClassification(config), {"pixel_values": images()}


def _clip(transformers: Any) -> tuple[nn.Module, Inputs]:
    text = BLOCKS | TOKENS | {"max_position_embeddings": 16}
    vision = BLOCKS | IMAGES | {"intermediate_size": 28}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    return transformers.CLIPModel(config), {"input_ids": tokens(), "pixel_values": images()}


def _whisper(transformers: Any) -> tuple[nn.Module, Inputs]:
    config = transformers.WhisperConfig(
        **TOKENS, **STACKS, num_mel_bins=8, max_source_positions=12, max_target_positions=20,
        suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    sounds = torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(0))
    return model, {"input_features": sounds, "decoder_input_ids": tokens(6)}


GROUPED = BLOCKS | {"num_key_value_heads": 3, "max_position_embeddings": 64}
T5 = {"d_model": 24, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 6,
      "decoder_start_token_id": 0}  # fmt: skip
FAMILIES = {
    "albert": _text("AlbertForSequenceClassification", "AlbertConfig", embedding_size=12, **BLOCKS),
    "bart": _translator("BartForConditionalGeneration", "BartConfig", **STACKS),
    "bert": _text("BertForSequenceClassification", "BertConfig", **BLOCKS),
    "clip": _clip,
    "distilbert": _text("DistilBertForSequenceClassification", "DistilBertConfig", dim=24,
                        hidden_dim=20, n_layers=2, n_heads=6),
    "gpt2": _text("GPT2LMHeadModel", "GPT2Config", n_embd=24, n_layer=2, n_head=6, n_positions=64),
    "llama": _text("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "llama, tied": _text("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True, **GROUPED),
    "masked": _text("BertForMaskedLM", "BertConfig", **BLOCKS),
    "mistral": _text("MistralForCausalLM", "MistralConfig", **GROUPED),
    "qwen2": _text("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "t5": _translator("T5ForConditionalGeneration", "T5Config", **T5),
    "t5, gated": _translator("T5ForConditionalGeneration", "T5Config", tie_word_embeddings=False,
                             feed_forward_proj="gated-gelu", **T5),
    "vit": _vit,
    "whisper": _whisper,
}  # fmt: skip


def family(name: str) -> tuple[nn.Module, Inputs]:
    """A model in eval mode and inputs; skips the test without transformers."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[name](pytest.importorskip("transformers"))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval(), inputs


@torch.no_grad()
def floats(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All floating-point outputs at the top of the model's output."""
    outputs = model.eval()(**inputs)
    found = [out for out in outputs.values() if isinstance(out, Tensor) and out.is_floating_point()]
    assert found
    return found
