"""Hugging Face models: which entries of a config describe a pruned model, if any do.

`from_pretrained` builds a model from its config alone. Most configs have one width for the
feed-forward blocks of all layers and one number of heads for all attention layers. Some classes
read sizes layer by layer from `config.per_layer_config` (transformers 5.14 and later). Which of
these a class reads is found by trial: the class builds a model from the edited config, on the meta
device, and the shapes are compared.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from .groups import QUERY_KEY, VALUE, Group
from .names import slice_of
from .slices import Slice

# The names in configs for the width of feed-forward blocks, and for the numbers of heads.
WIDTHS = (
    "intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff",
    "hidden_dim", "moe_intermediate_size", "shared_expert_intermediate_size",
)  # fmt: skip
HIDDEN = ("hidden_size", "n_embd", "d_model")  # the width of the residual stream
HEADS = ("num_attention_heads", "num_key_value_heads")
ENTRIES = (*WIDTHS, *HIDDEN, *HEADS, "head_dim")
PER_LAYER = "per_layer_config"
METHOD = "save_pretrained"

Edits = dict[str, Any]  # new values of entries, by names such as "text_config.intermediate_size"
Shapes = dict[str, tuple[int, ...]]


class Cut(NamedTuple):
    """A layer of which `kept` units of `units` stay, and where its tensors hold them.

    slices, also: as in `Group`
    """

    units: int
    kept: int
    slices: Mapping[str, Slice]
    also: Mapping[str, Slice]

    def inside(self, prefix: str) -> Cut:
        """The tensors whose names start with `prefix`, under the rest of their names."""
        slices, also = (
            {t.removeprefix(prefix): at for t, at in places.items() if t.startswith(prefix)}
            for places in (self.slices, self.also)
        )
        return Cut(self.units, self.kept, slices, also)


class Forecast(NamedTuple):
    """Kinds of layers, as patterns of their names, by how `save_pretrained` can describe them.

    any_size: every layer may have its own size
    one_size: all layers of the kind need the same size
    never:    the config has no entry for the size
    """

    any_size: tuple[str, ...]
    one_size: tuple[str, ...]
    never: tuple[str, ...]

    def __str__(self) -> str:
        parts = []
        if self.any_size:
            parts.append(f"takes any sizes of {', '.join(self.any_size)}")
        if self.one_size:
            parts.append(
                f"needs one size for all of {', '.join(self.one_size)} "
                "(size=greedyprune.Budget(..., uniform=True))"
            )
        if self.never:
            parts.append(f"is refused once {', '.join(self.never)} is cut (use save_pruned)")
        return f"{METHOD} {'; '.join(parts)}"


def outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The Hugging Face models in a model that are in no other one, with their names' prefixes.

    transformers is not imported for this: without it there are none.
    """
    kind = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    if kind is None:
        return
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, kind) and not f"{name}.".startswith(inside):
            prefix = f"{name}." if name else ""
            inside = (*inside, prefix)
            yield prefix, module


def pattern(name: str) -> str:
    """A layer's name with a star for the index in each list: "layers.*.fc1"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def cuts_in(prefix: str, cuts: Mapping[str, Cut]) -> dict[str, Cut]:
    """The cuts of the layers whose names start with `prefix`, under the rest of their names."""
    return {
        name.removeprefix(prefix): cut.inside(prefix)
        for name, cut in cuts.items()
        if name.startswith(prefix)
    }


def shapes_of(model: nn.Module) -> Shapes:
    """The shapes of all parameters and buffers, by their names."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def cut_shapes(shapes: Shapes, cuts: Mapping[str, Cut]) -> Shapes:
    """The shapes after the cuts, from those of the dense or the pruned model."""
    left: dict[tuple[str, int], int] = {}
    for cut in cuts.values():
        for tensor, at in (*cut.slices.items(), *cut.also.items()):
            gone = at.width * (cut.units - cut.kept)
            left[tensor, at.dim] = left.get((tensor, at.dim), at.size) - gone
    small = dict(shapes)
    for (tensor, dim), size in left.items():
        if tensor in small:
            small[tensor] = (*small[tensor][:dim], size, *small[tensor][dim + 1 :])
    return small


def find_edits(model: nn.Module, cuts: Mapping[str, Cut], expected: Shapes) -> Edits | None:
    """The edits of a Hugging Face model's config with which its class builds these shapes.

    Tensors that the unchanged config describes wrongly already, such as a replaced classifier, are
    not compared. None: no edits that are known here do it.

    Args:
        model: the model, dense or pruned, whose config still describes the dense one
        cuts: the layers that are cut, by their producers' names
        expected: the pruned model's shapes
    """
    config: Any = model.config
    try:
        dense = _built_shapes(model, config)
    except Exception:  # of any kind: the class takes more than a config
        return None
    cut_tensors = {tensor for cut in cuts.values() for tensor in cut.slices}
    wrong_before = _unlike(dense, expected) - cut_tensors
    for edits in ({}, _one_size(model, cuts), _per_layer(model, cuts)):
        try:
            edited = copy.deepcopy(config)
            set_entries(edited, edits)
            built = _built_shapes(model, edited)
        except Exception:  # of any kind: the class or the config refuses these sizes
            continue
        if _unlike(built, expected) <= wrong_before:
            return edits
    return None


def forecast(model: nn.Module, layers: Mapping[str, Cut]) -> Forecast:
    """What `save_pretrained` of a Hugging Face model takes, whatever the layers keep.

    Args:
        model: the model, dense or pruned, whose config still describes the dense one
        layers: by the names of their first producers; `kept` does not matter
    """
    kinds: dict[object, list[str]] = {}
    for name, cut in layers.items():
        kinds.setdefault(tuple(_entries(model, name, cut)) or pattern(name), []).append(name)
    uncut = {name: cut._replace(kept=cut.units) for name, cut in layers.items()}
    dense, found = cut_shapes(shapes_of(model), uncut), Forecast((), (), ())
    for names in kinds.values():
        patterns = tuple(dict.fromkeys(map(pattern, names)))
        for form, odd in (("any_size", 1), ("one_size", 0)):
            cuts = {
                name: layers[name]._replace(kept=max(1, layers[name].units // 2 + odd * (i % 2)))
                for i, name in enumerate(names)
            }
            if form == "any_size" and len({cut.kept for cut in cuts.values()}) == 1:
                continue  # a single layer: one size says it all
            if find_edits(model, cuts, cut_shapes(dense, cuts)) is not None:
                break
        else:
            form = "never"
        found = found._replace(**{form: (*getattr(found, form), *patterns)})
    return found


def before_selection(model: nn.Module, groups: Mapping[str, Group]) -> str | None:
    """What `save_pretrained` takes, in one line for each Hugging Face model; None without one."""
    cuts = {
        name: Cut(group.units, group.units, group.slices, group.also)
        for name, group in groups.items()
    }
    lines = []
    for prefix, part in outermost(model):
        found = forecast(part, cuts_in(prefix, cuts))
        refusal = getattr(vars(part).get(METHOD), "sentence", None)  # it was pruned before
        lines += [refusal] if refusal else [str(found)] if any(found) else []
    return "\n".join(lines) or None


def set_entries(config: Any, edits: Edits) -> None:
    """Sets entries of a config, in place."""
    for name, value in sorted(edits.items(), key=lambda item: item[0].endswith(PER_LAYER)):
        path, _, entry = name.rpartition(".")
        setattr(attrgetter(path)(config) if path else config, entry, value)


def entries_of(config: Any) -> Edits:
    """The entries of a config, and of the configs in it, that pruning may edit."""
    found: Edits = {}
    for path, part in _configs_in(config):
        for entry in ENTRIES:
            if isinstance(value := _read(part, entry), int):
                found[f"{path}{entry}"] = value
        if overrides := _overrides(part):
            found[f"{path}{PER_LAYER}"] = overrides
    return found


def apply_entries(model: nn.Module, edits: Edits) -> None:
    """Gives the model and its modules copies of their configs with these entries.

    Modules that share a config share its copy. Some modules have copies of the model's config, such
    as T5's encoder and decoder; these get the entries, too.
    """
    root = getattr(model, "config", None)
    if root is None or entries_of(root) | edits == entries_of(root):
        return
    copies: dict[int, Any] = {}  # deepcopy's memo
    configs: dict[int, Any] = {}
    for module in model.modules():
        if hasattr(vars(module).get("config"), "from_dict"):
            module.config = copy.deepcopy(module.config, copies)
            configs[id(module.config)] = module.config
    parts = {id(part) for _, part in _configs_in(model.config)}
    set_entries(model.config, edits)
    of_root = {entry: value for entry, value in edits.items() if "." not in entry}
    for key, config in configs.items():
        if key not in parts and type(config) is type(root):
            set_entries(config, of_root)


def _built_shapes(model: nn.Module, config: Any) -> Shapes:
    """The shapes of a model that its class builds from the config as `from_pretrained` reads it."""
    with torch.device("meta"):
        return shapes_of(type(model)(config.from_dict(config.to_dict())))


def _unlike(shapes: Shapes, others: Shapes) -> set[str]:
    """The names of the tensors that only one has, or whose shapes differ."""
    return {name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name)}


def _configs_in(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The config and those in it, such as CLIP's text_config, with their entries' prefixes."""
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "from_dict") and not isinstance(value, type):
            yield from _configs_in(value, f"{path}{name}.")


def _read(config: Any, entry: str) -> Any:
    """An entry of a config; None if there is none, or if it differs from layer to layer."""
    try:
        return getattr(config, entry, None)
    except Exception:  # transformers raises a RuntimeError for such entries
        return None


def _overrides(config: Any) -> dict[str, Any]:
    """The sizes of single layers in a config, by the layers' indices."""
    return config.to_dict().get(PER_LAYER) or {}


def _owner(model: nn.Module, name: str) -> tuple[str, Any]:
    """The config that a layer's sizes come from, and the prefix of its entries."""
    paths = {id(part): path for path, part in _configs_in(model.config)}
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if id(config) in paths:
            return paths[id(config)], config
    return "", model.config


def _entries(model: nn.Module, name: str, cut: Cut) -> Edits:
    """The entries that say how many units the layer `name` has, with their new values."""
    if name.endswith((QUERY_KEY, VALUE)):  # a config's `head_dim` also scales the scores
        return {}
    path, config = _owner(model, name)
    if "*" not in pattern(name):  # the stream begins before the blocks
        hidden = {e: cut.kept for e in HIDDEN if _read(config, e) == cut.units}
        if hidden:
            return {f"{path}{entry}": value for entry, value in hidden.items()}
    if slice_of(cut.slices, name).neighbours == 1:
        widths = {
            entry: cut.kept for entry in WIDTHS
            if hasattr(type(config), entry) or entry in vars(config)
            if _read(config, entry) in (cut.units, None)  # None: GPT-2's default
            and not _of_other_stack(entry, name)
        }  # fmt: skip
        return {f"{path}{entry}": value for entry, value in widths.items()}
    heads = _read(config, HEADS[0])
    if not isinstance(heads, int) or heads % cut.units:  # a unit: the heads that share a key
        return {}
    edits: Edits = {}
    if "head_dim" not in (getattr(config, "per_layer_attributes", None) or ()):
        head_dim, hidden = _read(config, "head_dim"), _read(config, "hidden_size")
        if head_dim is None and not isinstance(hidden, int):  # MobileViT: a size for each stage
            return {}
        edits[f"{path}head_dim"] = head_dim or hidden // heads
    for entry in HEADS:
        if isinstance(value := _read(config, entry), int):
            edits[f"{path}{entry}"] = value // cut.units * cut.kept
    return edits


def _of_other_stack(entry: str, name: str) -> bool:
    """Is this an entry of the encoder's blocks, and the layer not in the encoder (or decoder)?"""
    stack = entry.partition("_")[0]
    return stack in ("encoder", "decoder") and stack not in name.split(".")


def _one_size(model: nn.Module, cuts: Mapping[str, Cut]) -> Edits:
    """Edits for one size of all layers of a kind; the last layer's, if they differ."""
    edits: Edits = {}
    for name, cut in cuts.items():
        edits |= _entries(model, name, cut)
    return edits


def _per_layer(model: nn.Module, cuts: Mapping[str, Cut]) -> Edits:
    """Edits for sizes that differ from layer to layer."""
    edits: Edits = {}
    configs = dict(_configs_in(model.config))
    for name, cut in cuts.items():
        index = next(filter(str.isdigit, name.split(".")), None)
        for dotted, value in _entries(model, name, cut).items():
            path, _, entry = dotted.rpartition(".")
            path = f"{path}." if path else ""
            key = f"{path}{PER_LAYER}"
            if index is None or not hasattr(type(configs[path]), PER_LAYER):
                edits[dotted] = value
                continue
            if key not in edits:
                edits[key] = {int(i): dict(sizes) for i, sizes in _overrides(configs[path]).items()}
            edits[key].setdefault(int(index), {})[entry] = value
    return edits
