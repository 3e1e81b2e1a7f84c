"""Why layers can't be pruned: the reasons that the graph gave, by layer and in few words."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from .adapters import ADAPTED, has_adapter
from .groups import QUERY_KEY, VALUE
from .slices import NotPrunableError
from .tracing import LAYER_TYPES, is_plain

MOST_NAMES = 8  # of layers that are listed for one reason


def without_layer(error: object) -> str:
    """The reason in an error, without the layer's name before it."""
    return re.sub(r"^layer '[^']*': ", "", str(error))


def refused_in(model: nn.Module, structure: Mapping[str, object]) -> dict[str, str]:
    """Why layers can't be pruned, by their names: those of the graph and those that do not run."""
    refused = {
        name: without_layer(reason)
        for name, reason in structure.items()
        if isinstance(reason, NotPrunableError) and not name.endswith((QUERY_KEY, VALUE))
    }  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, LAYER_TYPES) and name not in structure:
            refused[name] = ADAPTED if has_adapter(model, name) else why_not(module)
    return refused


def by_reason(refused: Mapping[str, str]) -> list[str]:
    """Why layers can't be pruned, as one text for each reason: "'a', 'b': the reason"."""
    names_of: dict[str, list[str]] = {}
    for name, reason in refused.items():
        names_of.setdefault(reason, []).append(repr(name))
    return [
        ", ".join(names[:MOST_NAMES] + ["..."] * (len(names) > MOST_NAMES)) + f": {reason}"
        for reason, names in names_of.items()
    ]


def why_not(module: nn.Module) -> str:
    """The reason why a module is not a producer, if the graph has no layer of its name."""
    kind = type(module).__name__
    if not isinstance(module, LAYER_TYPES):
        return f"{kind}: not a Linear or convolution"
    if "weight" not in module._parameters:
        return f"{kind}: its weight is computed, by a parametrization or torch.nn.utils.prune"
    if not is_plain(module):
        return f"{kind}: it runs no linear map of its own weight"
    return f"{kind}: it does not run, or shares its weight"
