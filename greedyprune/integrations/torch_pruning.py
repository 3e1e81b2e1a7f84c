"""Greedy forward selection as an importance criterion for Torch-Pruning's pruners.

In Torch-Pruning a group is a list of layers with coupled channels, and an importance is a function
from a group to a score for each channel. The pruners remove the channels with the lowest scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.forward import evaluating
from ..graph.groups import Group
from ..graph.slices import NotPrunableError, Slice
from ..graph.tracing import LAYER_TYPES, is_plain
from ..graph.windows import TRANSPOSED_TYPES
from ..kernels import backend as _backend
from ..kernels.path import Rule
from ..objectives.layer_products import LayerProducts, collect, reweighted_losses, unscaled_path
from ..objectives.memory import bytes_of, turns
from ..runtime.free_memory import room
from ..runtime.modules import module_of

try:
    from torch_pruning.pruner.importance import Importance
except ImportError as error:
    raise ImportError(
        "greedyprune.integrations.torch_pruning needs Torch-Pruning; install the extra: "
        "pip install '.[torch-pruning]' in the checkout"
    ) from error


if TYPE_CHECKING:
    from torch_pruning._helpers import GroupItem
    from torch_pruning.dependency import Group as PruningGroup

# Once the picked channels reproduce the outputs, all later channels have an error of zero. This
# difference between their scores keeps the order of the picks.
TIE_BREAK = 1e-12


class GreedyImportance(Importance):
    """Scores a channel by how early greedy forward selection picks it, for Torch-Pruning's pruners.

    Greedy selection starts with no channel of a group. Each step adds the channel that brings the
    outputs of the layers that take the group's channels closest to their dense outputs. The weights
    stay as they are, so this is `select(objective="imitation", weights="none")`.

    Each pick has an error: the squared error before the pick, as a share of the error without any
    channel. A channel's score is the largest error from its own pick on. So scores fall along the
    picks, and the scores of several layers can be compared (`global_pruning=True`).

    The channels of a residual stream are scored by the sum of the errors of all layers that read
    the stream, as if the normalisation between the stream and these layers did not change. The
    channels of an attention head are scored one by one, and Torch-Pruning averages them.

    All layers are scored in one pass over the data when a pruner first asks for scores, and again
    when weights have changed, for example between iterative steps. Layers whose sums do not fit in
    memory together take turns, with a pass each.

    Args:
        model: the model that the pruner was given
        data: as for `select`; targets are not used
        mask: as for `select`: which positions of padded sequences count

    Raises:
        TypeError: `model` is not an nn.Module, or `data` has a type that `select` does not take
        ValueError: raised when a pruner asks for scores: weights or activations have NaN or inf, or
            the channels of a group are not all the inputs of the Linears and convolutions that take
            them. Examples are the model's outputs, parts of a concatenation, and grouped
            convolutions.

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

    Source: Ye et al. 2020, arXiv:2003.01794; eq. (2) for imitation.
    """

    def __init__(self, model: nn.Module, data: object, *, mask: str | None = "auto") -> None:
        module_of(model)  # raises for what is none
        Batches(data, model, mask=mask)  # raises at once for data that are none
        self._model, self._data, self._mask = model, data, mask
        self._scores: dict[nn.Module, Tensor] = {}  # from a layer to the scores of its inputs
        # The parameters that the scores hold for: identity, version and shape of each.
        self._scored_parameters: list[tuple[int, int, torch.Size]] | None = None

    def __call__(self, group: PruningGroup) -> Tensor:
        """The scores (n,) float64 of the n channels of the group's first layer."""
        parameters = [(id(p), p._version, p.shape) for p in self._model.parameters()]
        if parameters != self._scored_parameters:
            groups = list(self._scorable(group._DG.get_all_groups()))
            self._scores, self._scored_parameters = self._score(groups), parameters
        consumers = _consumers(group)
        if not any(item.dep.target.module in self._scores for item in consumers):
            self._scores |= self._score([self._converted(group)])
        item = next(i for i in consumers if i.dep.target.module in self._scores)
        input_of = dict(zip(item.root_idxs, item.idxs, strict=True))
        return self._scores[item.dep.target.module][[input_of[root] for root in group[0].idxs]]

    def _scorable(self, groups: Iterable[PruningGroup]) -> Iterator[Group]:
        """The groups that can be scored. The pruner may never ask for scores of the others."""
        for group in groups:
            try:
                yield self._converted(group)
            except NotPrunableError:
                continue

    def _converted(self, group: PruningGroup) -> Group:
        """Torch-Pruning's group as a group of this package."""
        names = {module: name for name, module in self._model.named_modules()}
        producer, units = names[group[0].dep.target.module], len(group[0].idxs)
        slices: dict[str, Slice] = {}
        for item in _consumers(group):
            layer = item.dep.target.module
            inputs = _inputs_of_units(layer, item, units)
            if inputs is None:
                raise _not_scorable(producer, f"not all inputs of {names.get(layer)!r} are theirs")
            slices[f"{names[layer]}.weight"] = inputs
        if not slices:
            raise _not_scorable(producer, "no layer takes them")
        consumers = tuple(name.removesuffix(".weight") for name in slices)
        return Group((producer,), consumers, units, slices, output=False)

    def _score(self, groups: list[Group]) -> dict[nn.Module, Tensor]:
        """For every layer that takes a group's channels, the scores of its inputs.

        As many groups share a pass over the data as the free memory allows.
        """
        batches = Batches(self._data, self._model, mask=self._mask)
        limit = room(batches.device)
        needed = [
            bytes_of(self._model, group, Rule(group.units, group.units, False), "none")
            for group in groups
        ]
        backend = _backend.resolve("auto", batches.on_gpu)
        scores: dict[nn.Module, Tensor] = {}
        for turn in turns(groups, needed, limit):
            scores |= self._score_in_one_pass(turn, batches, backend)
        return scores

    def _score_in_one_pass(
        self, groups: list[Group], batches: Batches, backend: str
    ) -> dict[nn.Module, Tensor]:
        with evaluating(self._model):
            sums_by_producer = collect(
                self._model, groups, batches, {}, lambda iterable, _: iterable
            )
        scores = {}
        for products in sums_by_producer.values():
            unit_scores = _scores(products, backend)
            for name in products.group.consumers:
                layer, inputs = (
                    self._model.get_submodule(name),
                    products.group.slices[f"{name}.weight"],
                )
                scores[layer] = torch.empty(inputs.size, dtype=torch.float64)
                scores[layer][inputs.places] = unit_scores[:, None]
        return scores


def _scores(products: LayerProducts, backend: str) -> Tensor:
    """The scores of a group's N units: (N,) float64."""
    gram, moments = products.moments()
    units = products.group.units
    rule = Rule(steps=units, size=units, replacement=False)
    order = unscaled_path(gram, moments, rule, backend).order
    losses = reweighted_losses(order, "none", gram, moments)
    before = torch.cat([losses.new_tensor([moments.empty_loss]), losses[:-1]])  # each pick
    largest = before.flip(0).cummax(0).values.flip(0) / (moments.empty_loss or 1.0)
    ordered = largest + TIE_BREAK * torch.arange(units, 0, -1)
    return torch.empty_like(ordered).index_copy_(0, order, ordered)


def _not_scorable(producer: str, why: str) -> NotPrunableError:
    return NotPrunableError(
        f"group: found the channels of {producer!r}, but {why}; expected channels that are all the "
        f"inputs of plain Linears and convolutions: put {producer!r} into ignored_layers"
    )


def _consumers(group: PruningGroup) -> list[GroupItem]:
    """The layers of a group that take its channels as inputs and do not pass them on."""
    passes_on = group._DG.is_out_channel_pruning_fn
    return [item for item in group if not passes_on(item.dep.handler)]


def _inputs_of_units(layer: nn.Module, item: GroupItem, units: int) -> Slice | None:
    """Which inputs of a layer belong to which unit; None if some of them belong to no unit."""
    if isinstance(layer, TRANSPOSED_TYPES):
        return None
    if not isinstance(layer, LAYER_TYPES) or not is_plain(layer) or getattr(layer, "groups", 1) > 1:
        return None
    inputs = layer.get_parameter("weight").shape[1]
    if inputs % units:
        return None
    unit_of = dict(zip(item.idxs, item.root_idxs, strict=True))
    owner = torch.tensor([unit_of.get(i, -1) for i in range(inputs)])
    counts = owner[owner >= 0].bincount(minlength=units)
    if len(unit_of) < inputs or bool((counts != inputs // units).any()):
        return None
    places = owner.sort(stable=True).indices.view(units, -1)
    return Slice(1, places, inputs)
