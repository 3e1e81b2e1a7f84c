"""A Hugging Face model's config, edited to describe what pruning leaves, where its class can."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .module_sizes import sizes_of
from .selection import Selection

# What configs call the width of feed-forward blocks, and the numbers of heads.
_WIDTHS = (
    "intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff",
    "hidden_dim",
)  # fmt: skip
_HEADS = ("num_attention_heads", "num_key_value_heads")
_ENTRIES = (*_WIDTHS, *_HEADS, "head_dim")


def describe(small: nn.Module, selection: Selection) -> None:
    """Edits the pruned model's config, so that its class builds modules of the same sizes from it.

    Left as it is where that fails: where layers of one kind have several widths, or have widths
    that follow from the hidden size.
    """
    config: Any = getattr(small, "config", None)
    if not hasattr(config, "from_dict"):
        return
    try:
        edits = _edits(config, selection)
        if not edits:
            return
        with torch.device("meta"):
            built = type(small)(config.from_dict(config.to_dict() | edits))
    except Exception:  # whatever a class has against such sizes, or its config lacks
        return
    if _shapes(built) == _shapes(small):
        apply_sizes(small, edits)


def config_sizes(model: nn.Module) -> dict[str, int]:
    """The entries of the model's config that `describe` may have edited; none without a config."""
    config = getattr(model, "config", None)
    found = {name: getattr(config, name, None) for name in _ENTRIES}
    return {name: size for name, size in found.items() if isinstance(size, int)}


def apply_sizes(model: nn.Module, sizes: dict[str, int]) -> None:
    """Gives the model a config with these entries; the one that it was made from stays."""
    config = getattr(model, "config", None)
    if config is None or config_sizes(model) | sizes == config_sizes(model):
        return
    edited = copy.deepcopy(config)
    for name in sizes.keys() & set(_ENTRIES):
        setattr(edited, name, sizes[name])
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = edited


def _edits(config: Any, selection: Selection) -> dict[str, int]:
    """What the config would have to say of the layers that were cut."""
    edits = {}
    for name, layer in selection.layers.items():
        units, kept = len(layer.counts), len(layer.kept)
        if layer.slices[f"{name}.weight"].inner == 1:
            for entry in _WIDTHS:
                if getattr(config, entry, 0) in (units, None):  # None: GPT-2's default
                    edits[entry] = kept
        elif config.num_attention_heads % units == 0:  # a unit: heads with one key and value
            heads = config.num_attention_heads
            edits["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // heads
            for entry in _HEADS:
                if hasattr(config, entry):
                    edits[entry] = getattr(config, entry) // units * kept
    return edits


def _shapes(model: nn.Module) -> dict[str, object]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.shape for name, tensor in tensors.items()} | {
        f"{name}.": sizes_of(module) for name, module in model.named_modules()
    }
