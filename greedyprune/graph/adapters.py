"""Low-rank adapters (LoRA and its relatives): layers that are added to another layer's output.

Their ranks are not units of the model. Layers with an adapter attached are not cut, because the
adapter's own files and config would no longer fit. Merged into its layer, an adapter is part of it.
"""

from __future__ import annotations

from torch import nn

from .names import module_of_layer

ADAPTED = (
    "an adapter is attached to it or to a layer that has its units, too; merge it into the model "
    "first (with peft: model = model.merge_and_unload())"
)

# The attributes that hold an adapter's first factor.
_LOW_RANK = ("lora_A", "lora_a", "lora_down", "lora_embedding_A")


def has_adapter(model: nn.Module, layer: str) -> bool:
    """Is a layer part of an adapter, or is one attached to it?"""
    parts = layer.split(".")
    path = parts[: -1 if module_of_layer(model, layer) is None else None]
    modules = (model.get_submodule(".".join(path[:end])) for end in range(1, len(path) + 1))
    return any(
        any(hasattr(module, attribute) for attribute in _LOW_RANK)
        or (type(module).__module__.startswith("peft.") and hasattr(module, "base_layer"))
        for module in modules
    )
