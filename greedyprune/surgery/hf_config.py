"""Hugging Face models after pruning: a config that describes them, or no `save_pretrained`.

`from_pretrained` builds a model from its config, so it can load a pruned model only if the config
describes that model's sizes. Where one does, the pruned model gets it. Where none does, the pruned
model's `save_pretrained` raises, while there is still time to save the model in another way.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..graph.pretrained import (
    METHOD,
    Cut,
    apply_entries,
    cut_shapes,
    cuts_in,
    entries_of,
    find_edits,
    forecast,
    outermost,
    pattern,
    shapes_of,
)
from ..runtime.progress import warn
from .layer_selection import LayerSelection
from .selection import Selection


class Refusal:
    """Stands on a pruned model in place of its class's `save_pretrained`, and raises.

    It is an attribute of the instance, so that the model keeps its class. It does not keep the
    model alive. A copy of the model, or one from a pickle, has a Refusal of its own.

    Two calls pass, because they write files for this model in memory and not for from_pretrained:
    that of a Trainer, whose checkpoints resume the training (it names `state_dict`), and that of a
    model with adapters, which writes the adapters only.
    """

    def __init__(self, model: nn.Module, sentence: str) -> None:
        self._model, self.sentence = weakref.ref(model), sentence

    def __reduce__(self) -> tuple[Any, ...]:
        return Refusal, (self._model(), self.sentence)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        adapters = getattr(model, "_hf_peft_config_loaded", False)
        if not adapters and "state_dict" not in kwargs:
            raise ValueError(self.sentence)
        if not adapters:
            warn(f"{self.sentence} (a Trainer's checkpoints are written, and resume the training)")
        return getattr(type(model), METHOD)(model, *args, **kwargs)


def describe(small: nn.Module, selection: Selection) -> None:
    """Edits the configs of the Hugging Face models in a pruned model, or refuses to save them."""
    cuts = _cuts(selection.layers)
    for prefix, model in outermost(small):
        inside = cuts_in(prefix, cuts)
        if METHOD in vars(model):  # it was pruned before, and no config described it
            continue
        edits = find_edits(model, inside, shapes_of(model))
        if edits is None:
            refuse_to_save(model, _sentence(model, inside))
        else:
            apply_entries(model, edits)


def refuse_to_save(model: nn.Module, sentence: str) -> None:
    """Makes `save_pretrained` of a Hugging Face model, and of those in it, raise this sentence."""
    for module in model.modules():
        if hasattr(type(module), METHOD):
            vars(module)[METHOD] = Refusal(module, sentence)


def how_saved(model: nn.Module, selected: Mapping[str, LayerSelection]) -> str | None:
    """What `save_pretrained` will do with the pruned model; None without a Hugging Face model."""
    cuts, lines = _cuts(selected), []
    for prefix, part in outermost(model):
        if isinstance(refusal := vars(part).get(METHOD), Refusal):  # it was pruned before
            lines.append(refusal.sentence)
            continue
        inside = cuts_in(prefix, cuts)
        edits = find_edits(part, inside, cut_shapes(shapes_of(part), inside))
        lines.append(
            _sentence(part, inside) if edits is None
            else f"{METHOD}: from_pretrained will load the pruned model"
        )  # fmt: skip
    return "\n".join(lines) or None


def saved_configs(model: nn.Module) -> dict[str, Any]:
    """The entries of the configs in a model that `describe` may edit, with the models' prefixes."""
    return {
        f"{prefix}{name}": value
        for prefix, part in outermost(model)
        for name, value in entries_of(part.config).items()
    }


def saved_refusal(model: nn.Module) -> str | None:
    """The sentence that `save_pretrained` raises; None if it does not raise."""
    refusals = (vars(part).get(METHOD) for _, part in outermost(model))
    return next((r.sentence for r in refusals if isinstance(r, Refusal)), None)


def restore(model: nn.Module, configs: Mapping[str, Any], sentence: str | None) -> None:
    """Gives a loaded model what `saved_configs` and `saved_refusal` gave of the saved one."""
    for prefix, part in outermost(model):
        inside = {n.removeprefix(prefix): v for n, v in configs.items() if n.startswith(prefix)}
        apply_entries(part, inside)
        if sentence is not None:
            refuse_to_save(part, sentence)


def _cuts(selected: Mapping[str, LayerSelection]) -> dict[str, Cut]:
    return {
        name: Cut(len(layer.counts), len(layer.kept), layer.slices, layer.also)
        for name, layer in selected.items()
    }


def _sentence(model: nn.Module, cuts: Mapping[str, Cut]) -> str:
    """Why a pruned model can't be saved by `save_pretrained`, and what to do."""
    found = forecast(model, cuts)
    never = ", ".join(found.never)
    kinds = never or ", ".join(dict.fromkeys(map(pattern, cuts)))
    config = type(getattr(model, "config", None)).__name__
    sentence = (
        f"{METHOD}: {config} can't describe the sizes of {kinds} in this pruned model, so "
        "from_pretrained could not load it; save it with greedyprune.save_pruned"
    )
    if found.one_size or found.any_size:
        left_out = f", without {never}" if never else ""
        sentence += (
            ", or select one size for all layers of a kind with "
            f"size=greedyprune.Budget(..., uniform=True){left_out}"
        )
    return sentence
