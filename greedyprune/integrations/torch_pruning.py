"""Greedy forward selection as an importance of Torch-Pruning's pruners."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.forward import evaluating
from ..graph.groups import Group
from ..graph.propagate import NotPrunableError, Slice
from ..graph.tracing import LAYER_TYPES
from ..kernels import backend as _backend
from ..kernels.path import Rule
from ..objectives.layer_products import LayerProducts, collect, reweighted_losses, unscaled_path
from ..objectives.memory import bytes_of, turns
from ..runtime.free_memory import room

try:
    from torch_pruning.pruner.importance import Importance
except ImportError as error:
    raise ImportError(
        "greedyprune.integrations.torch_pruning needs Torch-Pruning: "
        "pip install 'greedyprune[torch-pruning]'"
    ) from error


EVEN = 1e-12  # between scores of channels after which nothing is lost any more


class GreedyImportance(Importance):
    """Scores channels by when greedy forward selection picks them, for Torch-Pruning's pruners.

    Starting from none of a group's channels, each step adds the one that brings the outputs of the
    layers that take them closest to what they are in the dense network, all weights as they are
    (`select(objective="imitation", weights="none")`). A channel's score is the largest squared
    error that is left, at its turn or later, as a share of that without any channel: so scores fall
    along the picks, and those of several layers can be compared (`global_pruning=True`).

    Channels of a residual stream, which `select` leaves whole, are scored by the errors of all
    layers that read it, summed; normalisation between the stream and those layers is taken to stay
    as it is. An attention head's channels are scored one by one; Torch-Pruning averages them.

    All layers are scored in one pass over the data, when a pruner first asks, and again once
    weights have changed: between iterative steps, say.

    Args:
        model: the model that the pruner was given
        data: as for `select`; targets are not used

    Raises:
        TypeError: no nn.Module, or no data; and when a pruner asks, ValueError: NaN or inf, or a
            group whose channels do not make up all inputs of the Linears and convolutions that
            take them (the model's outputs, parts of a concatenation, grouped convolutions)

    Example:
        >>> import torch_pruning as tp
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> images = torch.randn(16, 3, 8, 8)
        >>> tp.pruner.BasePruner(
        ...     model, images[:1], importance=GreedyImportance(model, images), pruning_ratio=0.5,
        ...     ignored_layers=[model[2]],
        ... ).step()
        >>> model[0].out_channels
        4
    """

    def __init__(self, model: nn.Module, data: object) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: found {type(model).__name__}, expected an nn.Module")
        Batches(data, model)  # says what is wrong with it
        self._model, self._data = model, data
        self._weights: object = None  # what the scores were computed from
        self._scores: dict[nn.Module, Tensor] = {}  # of each layer's inputs

    def __call__(self, group: Any) -> Tensor:
        """The scores (n,) of the n root channels of a `torch_pruning.Group`."""
        weights = [(id(p), p._version, p.shape) for p in self._model.parameters()]
        if weights != self._weights:
            groups = list(self._groups(group._DG.get_all_groups()))
            self._scores, self._weights = self._scored(groups), weights
        if not any(item.dep.target.module in self._scores for item in _consumers(group)):
            self._scores |= self._scored([self._group(group)])
        item = next(i for i in _consumers(group) if i.dep.target.module in self._scores)
        inputs = dict(zip(item.root_idxs, item.idxs, strict=True))
        return self._scores[item.dep.target.module][[inputs[root] for root in group[0].idxs]]

    def _groups(self, found: Iterable[Any]) -> Iterator[Group]:
        for group in found:
            try:
                yield self._group(group)
            except NotPrunableError:  # the pruner may never ask
                continue

    def _group(self, found: Any) -> Group:
        """Torch-Pruning's group in the form of ours."""
        names = {module: name for name, module in self._model.named_modules()}
        root, units = names[found[0].dep.target.module], len(found[0].idxs)
        slices: dict[str, Slice] = {}
        for item in _consumers(found):
            layer = item.dep.target.module
            at = _slice(layer, item, units)
            if at is None:
                raise _refuse(root, f"which {names.get(layer)!r} takes otherwise")
            slices[f"{names[layer]}.weight"] = at
        if not slices:
            raise _refuse(root, "which no layer takes")
        consumers = tuple(name.removesuffix(".weight") for name in slices)
        return Group((root,), consumers, units, slices, output=False)

    def _scored(self, groups: list[Group]) -> dict[nn.Module, Tensor]:
        batches = Batches(self._data, self._model)
        limit = room(batches.device)
        needed = [
            bytes_of(self._model, group, Rule(group.units, group.units, False), "none")
            for group in groups
        ]
        backend = _backend.resolve("auto", batches.on_gpu)
        scores: dict[nn.Module, Tensor] = {}
        for some in turns(groups, needed, limit):
            scores |= self._scored_together(some, batches, backend)
        return scores

    def _scored_together(
        self, groups: list[Group], batches: Batches, backend: str
    ) -> dict[nn.Module, Tensor]:
        with evaluating(self._model):
            found = collect(self._model, groups, batches, {}, lambda source, _: source)
        scores = {}
        for sums in found.values():
            of_units = _scores(sums, backend)
            for name in sums.group.consumers:
                at, layer = sums.group.slices[f"{name}.weight"], self._model.get_submodule(name)
                scores[layer] = of_units.repeat_interleave(at.inner).repeat(at.outer)
        return scores


def _scores(sums: LayerProducts, backend: str) -> Tensor:
    """The scores of a group's units: (N,) float64."""
    gram, moments = sums.moments()
    units = sums.group.units
    order = unscaled_path(gram, moments, Rule(units, units, False), backend).order
    losses = reweighted_losses(order, "none", gram, moments)
    left = torch.cat([losses.new_tensor([moments.empty_loss]), losses[:-1]])
    left = left.flip(0).cummax(0).values.flip(0) / (moments.empty_loss or 1.0)
    return torch.empty_like(left).index_copy_(0, order, left + EVEN * torch.arange(units, 0, -1))


def _refuse(root: str, why: str) -> NotPrunableError:
    return NotPrunableError(
        f"group: found the channels of {root!r}, {why}, expected those that make up all inputs of "
        f"plain Linears and convolutions: put {root!r} into ignored_layers"
    )


def _consumers(group: Any) -> list[Any]:
    """The items of a group whose inputs are its channels, not its outputs too."""
    out = group._DG.is_out_channel_pruning_fn
    return [item for item in group if not out(item.dep.handler)]


def _slice(layer: nn.Module, item: Any, units: int) -> Slice | None:
    """Where a layer's inputs have the units' entries; None if it has others, too."""
    if type(layer) not in LAYER_TYPES or getattr(layer, "groups", 1) > 1:
        return None
    inputs = layer.get_parameter("weight").shape[1]
    if inputs % units:
        return None
    roots = dict(zip(item.idxs, item.root_idxs, strict=True))
    for inner in (inputs // units, 1):
        if roots == {i: i // inner % units for i in range(inputs)}:
            return Slice(1, inputs // units // inner, inner)
    return None
