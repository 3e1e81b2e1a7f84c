"""The config of a Hugging Face model, edited so that it describes the pruned model.

A config has one width for the feed-forward blocks of all layers and one number of heads for all
attention layers. Where the pruned layers have several, the config stays as it is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .module_sizes import sizes_of
from .selection import Selection

# The names in configs for the width of feed-forward blocks, and for the numbers of heads.
_WIDTHS = (
    "intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff",
    "hidden_dim",
)  # fmt: skip
_HEADS = ("num_attention_heads", "num_key_value_heads")
_ENTRIES = (*_WIDTHS, *_HEADS, "head_dim")


def describe(small: nn.Module, selection: Selection) -> None:
    """Edits the pruned model's config so that the model's class builds the same sizes from it.

    The config stays as it is where no edit does that: where layers of one kind have several widths,
    or where their width follows from the hidden size. A model without a config stays, too.
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
    except Exception:  # of any kind: the class refuses these sizes, or the config lacks an entry
        return
    if _shapes(built) == _shapes(small):
        apply_sizes(small, edits)


def config_sizes(model: nn.Module) -> dict[str, int]:
    """The entries of the model's config that `describe` may edit; empty without a config."""
    config = getattr(model, "config", None)
    sizes = {name: getattr(config, name, None) for name in _ENTRIES}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def apply_sizes(model: nn.Module, sizes: dict[str, int]) -> None:
    """Gives the model a copy of its config with these entries; the original is not changed."""
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
    """The entries that describe the layers that were cut."""
    edits = {}
    for name, layer in selection.layers.items():
        units, kept = len(layer.counts), len(layer.kept)
        if layer.slices[f"{name}.weight"].inner == 1:
            for entry in _WIDTHS:
                if getattr(config, entry, 0) in (units, None):  # None: GPT-2's default
                    edits[entry] = kept
        elif config.num_attention_heads % units == 0:  # a unit: the heads that share a key
            heads = config.num_attention_heads
            edits["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // heads
            for entry in _HEADS:
                if hasattr(config, entry):
                    edits[entry] = getattr(config, entry) // units * kept
    return edits


def _shapes(model: nn.Module) -> dict[str, object]:
    """The shapes of all tensors and the sizes of all modules, by their names."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.shape for name, tensor in tensors.items()} | {
        f"{name}.": sizes_of(module) for name, module in model.named_modules()
    }
