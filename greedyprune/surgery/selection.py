"""The result of `select`: a frozen record for `prune`, which can be shortened, saved and shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.batches import Batch
from ..graph.costs import BudgetReport, Cost
from ..graph.slices import Slice
from ..kernels.path import NestedFit
from ..runtime.arguments import ByName, is_int, one_of
from ..runtime.files import read_tensors, write_tensors
from . import selection_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

FORMAT = "greedyprune-selection-3"
TENSORS = (
    "order", "counts", "kept", "weights", "losses", "dense_loss", "bound", "gap", "distinct",
)  # fmt: skip
PLACES = ("slices", "also", "sizes")
REFIT_FIELDS = tuple(item.name for item in dataclasses.fields(NestedFit))
MOST_NAMES = 8  # of layers in an error message


@dataclass(frozen=True, eq=False)
class LayerSelection:
    """The greedy path of one layer with N units: k steps, which keep K distinct units.

    All tensors are on the CPU.

    order:      (k,) int64, the picks in sequence
    counts:     (N,) int64, how often each unit was picked
    kept:       (K,) int64, the distinct units, ascending
    weights:    (K,) float64, the factors that multiply the kept units' outgoing weights. After
                weights="refit" with objective "loss" or "imitation" these are the new outgoing
                weights themselves: (C, K) float64 for a consumer with C outputs, or (C, K, w) for
                a consumer that takes w features of each unit, such as a convolution's taps. Where
                there are several consumers, they are the first one's
    losses:     (k,) float64, the objective after each step, of the network with these weights
    dense_loss: () float64, the objective of the dense layer
    bound:      (k,) float64, eq. (3); None where its conditions do not hold
    gap:        (k,) float64, the Frank-Wolfe gap: losses - gap is at most the loss of any convex
                reweighting of all units; None where it is not known
    distinct:   (k,) int64, the number of distinct units after each step
    outputs:    the consumers, which are the layers that take the units' outputs as inputs, each
                with its number of outputs
    slices:     the parameters and buffers that have entries for each unit, and where these are
    fitted:     after weights="refit": each consumer's least squares, for every number of units
    gates:      after weights="refit" with objective "fisher": the least squares of one factor for
                each unit's outgoing weights
    weighting:  how the kept units' outgoing weights were found: "counts", "uniform", "none" or
                "refit", as in the argument `weights` of `select`
    loss:       the loss that `losses` are values of: "mse", "cross_entropy", "bce_with_logits" or
                "custom"; "mse" for a layer that imitates
    objective:  what the layer was judged by: "loss", "imitation" or "fisher"
    also:       those tensors that hold the units along a second dimension, and where
    sizes:      attributes of modules that hold a size, as "module.attribute" or
                "module.attribute[i]", and where the entries that they count belong to units; only
                those that have to be set
    tied:       weights that take the units and stay as they are: embeddings' tables that the last
                layer multiplies with, too, the `weight_hh` of recurrent layers, and all parameters
                of query-key units, which no layer takes. They are cut
    share:      the layers, with this one, that have to keep one share of their units, because the
                model's code needs it; () for any share
    part:       "" or, of dimensions inside attention's heads, "[query-key]" or "[value]"
    rescaled:   parameters of query-key units that cutting multiplies, so that attention scores
                which the code divides by the root of the number of units stay as they are
    """

    order: Tensor
    counts: Tensor
    kept: Tensor
    weights: Tensor
    losses: Tensor
    dense_loss: Tensor
    bound: Tensor | None
    gap: Tensor | None
    distinct: Tensor
    outputs: Mapping[str, int]
    slices: Mapping[str, Slice]
    weighting: str
    loss: str
    objective: str
    fitted: Mapping[str, NestedFit] | None = field(default=None, repr=False)
    gates: NestedFit | None = field(default=None, repr=False)
    also: Mapping[str, Slice] = field(default_factory=dict, repr=False)
    sizes: Mapping[str, Slice] = field(default_factory=dict, repr=False)
    tied: tuple[str, ...] = field(default=(), repr=False)
    share: tuple[str, ...] = field(default=(), repr=False)
    part: str = field(default="", repr=False)
    rescaled: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of_path(
        cls, units: int, order: Tensor, weighting: str, fitted: Mapping[str, NestedFit] | None,
        gates: NestedFit | None = None, **fields: Any,
    ) -> LayerSelection:  # fmt: skip
        """The record of the picks `order` (k,) among `units` units.

        fields: the attributes that do not follow from the picks and the least squares
        """
        counts = torch.bincount(order, minlength=units)
        kept = counts.nonzero().flatten()
        if gates is not None:
            weights = _outgoing_ascending(gates, len(kept)).flatten()
        elif fitted is None:
            weights = factors(weighting, counts, kept)
        else:
            weights = _outgoing_ascending(next(iter(fitted.values())), len(kept))
            weights = weights[..., 0] if weights.shape[2] == 1 else weights
        return cls(
            order=order, counts=counts, kept=kept, weights=weights.contiguous(),
            distinct=distinct_counts(order), weighting=weighting, fitted=fitted, gates=gates,
            **fields,
        )  # fmt: skip

    def at(self, k: int) -> LayerSelection:
        """The same path after k steps; ValueError if it has fewer, TypeError if k is not an int."""
        expected = f"expected an int from 1 to {len(self.order)}, the path's steps"
        if not is_int(k):
            raise TypeError(f"k: found {k!r}, {expected}")
        if not 1 <= k <= len(self.order):
            raise ValueError(f"k: found {k}, {expected}")

        def first(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:k].clone()

        return LayerSelection.of_path(
            len(self.counts), self.order[:k].clone(), self.weighting, self.fitted, self.gates,
            losses=self.losses[:k].clone(), dense_loss=self.dense_loss, bound=first(self.bound),
            gap=first(self.gap), slices=self.slices, also=self.also, sizes=self.sizes,
            tied=self.tied, share=self.share, part=self.part, rescaled=self.rescaled,
            outputs=self.outputs, loss=self.loss, objective=self.objective,
        )  # fmt: skip

    def new_weights(self, consumer: str) -> Tensor | None:
        """A consumer's new weights on the kept units' features, (C, K, w) float64.

        None unless weights="refit" has found new weights.
        """
        if self.fitted is None:
            return None
        return _outgoing_ascending(self.fitted[consumer], len(self.kept))


def _outgoing_ascending(fitted: NestedFit, distinct: int) -> Tensor:
    """The least squares on the first `distinct` units, with these units in ascending order."""
    return fitted.outgoing(distinct)[:, fitted.units[:distinct].argsort()]


@dataclass(frozen=True, eq=False)
class Selection:
    """The result of `select`: `layers` maps a layer's name to its LayerSelection.

    Where the model has one selected layer, the Selection has that layer's tensors, too: `order`,
    `counts`, `kept`, `weights`, `losses`, `dense_loss`, `bound`, `gap` and `distinct`. With several
    layers these raise AttributeError; write `selection.layers[name].order`.

    costs:  the model's "params", and its "flops" on the first batch, for any sizes of the layers;
            None if the selection is not from `select`
    budget: how the sizes were chosen for a budget; None if there was no budget
    refused: the layers that can't be pruned, and why, as in `greedyprune.layers`; empty if the
             caller named the layers
    example: at most two samples of the first batch, on which `prune` checks its result. They stay
             in memory: a Selection that was loaded, copied or pickled has None
    saving: what `save_pretrained` will do with the pruned model; None if the model is not one of
            Hugging Face, or if the selection is not from `select`
    """

    layers: Mapping[str, LayerSelection]
    costs: Mapping[str, Cost] | None = None
    budget: BudgetReport | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    example: Batch | None = field(default=None, repr=False)
    saving: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(ByName(self.layers)))

    def __reduce__(self) -> tuple[Any, ...]:
        refused = dict(self.refused)
        return Selection, (dict(self.layers), self.costs, self.budget, refused, None, self.saving)

    @property
    def order(self) -> Tensor:
        """(k,) int64, the picks in sequence."""
        return self._only_layer("order").order

    @property
    def counts(self) -> Tensor:
        """(N,) int64, how often each unit was picked."""
        return self._only_layer("counts").counts

    @property
    def kept(self) -> Tensor:
        """(K,) int64, the distinct units, ascending."""
        return self._only_layer("kept").kept

    @property
    def weights(self) -> Tensor:
        """float64, see LayerSelection."""
        return self._only_layer("weights").weights

    @property
    def losses(self) -> Tensor:
        """(k,) float64, the objective after each step."""
        return self._only_layer("losses").losses

    @property
    def dense_loss(self) -> Tensor:
        """() float64, the objective of the dense layer."""
        return self._only_layer("dense_loss").dense_loss

    @property
    def bound(self) -> Tensor | None:
        """(k,) float64, eq. (3); None where its conditions do not hold."""
        return self._only_layer("bound").bound

    @property
    def gap(self) -> Tensor | None:
        """(k,) float64, the Frank-Wolfe gap; None where it is not known."""
        return self._only_layer("gap").gap

    @property
    def distinct(self) -> Tensor:
        """(k,) int64, the number of distinct units after each step."""
        return self._only_layer("distinct").distinct

    def _only_layer(self, attribute: str) -> LayerSelection:
        """The layer, where there is one; AttributeError says what to write where there are more."""
        if len(self.layers) == 1:
            return next(iter(self.layers.values()))
        names = [repr(name) for name in self.layers]
        listed = ", ".join(names[:MOST_NAMES] + ["..."] * (len(names) > MOST_NAMES))
        raise AttributeError(
            f"{attribute}: found a Selection of {len(names)} layers, expected "
            f"selection.layers[name].{attribute}, with a name among {listed}"
        )

    def change(self, what: str) -> tuple[int, int] | None:
        """The costs of the dense model and of the pruned one; None if they are not known.

        Args:
            what: "params", or "flops": those of the first batch, by torch.utils.flop_counter

        Raises:
            ValueError: another `what`
        """
        if self.costs is None:
            return None
        one_of("what", what, tuple(self.costs))
        widths = {name: len(layer.kept) for name, layer in self.layers.items()}
        return self.costs[what].dense, self.costs[what].at(widths)

    def at(self, k: int) -> Selection:
        """The paths of all layers after k steps: one run of `select` serves every size.

        ValueError if k is not between 1 and the number of steps of the shortest path. Layers that
        have to keep one share of their units would keep different ones; `prune` refuses them.
        """
        shortest = min(self.layers.values(), key=lambda layer: len(layer.order))
        shortest.at(k)  # checks k
        layers = {name: layer.at(k) for name, layer in self.layers.items()}
        return dataclasses.replace(self, layers=layers, budget=None)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes one safetensors file. Values that are not tensors go into its header, as JSON.

        TypeError if `path` is no path; FileNotFoundError if its folder does not exist.
        """
        tensors: dict[str, Tensor] = {}
        layers: list[dict[str, Any]] = []
        for i, (name, layer) in enumerate(self.layers.items()):
            for key in TENSORS:
                if (tensor := getattr(layer, key)) is not None:
                    tensors[f"{i}.{key}"] = tensor
            refits = {f"fitted.{consumer}": fit for consumer, fit in (layer.fitted or {}).items()}
            if layer.gates is not None:
                refits["gates"] = layer.gates
            for places in PLACES:
                for key, at in getattr(layer, places).items():
                    tensors[f"{i}.{places}.{key}"] = at.places.int()
            for key, refit in refits.items():
                for item in REFIT_FIELDS:
                    tensors[f"{i}.{key}.{item}"] = getattr(refit, item)
            layers.append({
                "name": name, "outputs": dict(layer.outputs), "weighting": layer.weighting,
                "tied": layer.tied, "share": layer.share, "part": layer.part,
                "rescaled": layer.rescaled,
                **{
                    places: {k: (at.dim, at.size) for k, at in getattr(layer, places).items()}
                    for places in PLACES
                },
                "loss": layer.loss, "objective": layer.objective,
            })  # fmt: skip
        costs = {what: cost.as_json() for what, cost in (self.costs or {}).items()}
        header = {
            "format": FORMAT, "layers": json.dumps(layers), "costs": json.dumps(costs),
            "budget": json.dumps(None if self.budget is None else dataclasses.asdict(self.budget)),
            "refused": json.dumps(dict(self.refused)), "saving": json.dumps(self.saving),
        }  # fmt: skip
        write_tensors(path, tensors, header)

    @staticmethod
    def load(path: str | PathLike[str]) -> Selection:
        """Reads a file that `save` wrote; ValueError for any other file."""
        tensors, header = read_tensors(path, FORMAT, "selection")
        layers = {}
        for i, fields in enumerate(json.loads(header["layers"])):
            fields |= {key: tensors.get(f"{i}.{key}") for key in TENSORS}
            for places in PLACES:
                fields[places] = {
                    key: Slice(dim, tensors[f"{i}.{places}.{key}"].long(), size)
                    for key, (dim, size) in fields[places].items()
                }
            refits = {
                key: NestedFit(**{item: tensors[f"{i}.{key}.{item}"] for item in REFIT_FIELDS})
                for key in ("gates", *(f"fitted.{consumer}" for consumer in fields["outputs"]))
                if f"{i}.{key}.units" in tensors
            }
            gates, name = refits.pop("gates", None), fields.pop("name")
            fitted = {key.removeprefix("fitted."): refit for key, refit in refits.items()}
            fields |= {key: tuple(fields.get(key, ())) for key in ("tied", "share", "rescaled")}
            layers[name] = LayerSelection(**fields, fitted=fitted or None, gates=gates)
        costs = json.loads(header.get("costs", "{}"))
        budget = json.loads(header.get("budget", "null"))
        return Selection(
            layers,
            {what: Cost.of_json(cost) for what, cost in costs.items()} or None,
            None if budget is None else BudgetReport(**budget),
            json.loads(header.get("refused", "{}")),
            saving=json.loads(header.get("saving", "null")),
        )

    def summary(self) -> Table:
        """A rich table with one row for each layer: `rich.print(selection.summary())`.

        loss, gap and bound are those of the last step. The loss is at most `gap` above the loss of
        any convex reweighting of all units, and at most `bound`, which is proved. Below the table
        are the parameters and FLOPs (of the first batch) before and after, the layers that can't be
        pruned, and for a Hugging Face model what `save_pretrained` will do with the pruned model.
        """
        params, flops = self.change("params"), self.change("flops")
        return selection_report.summary(
            self.layers, params, flops, self.budget, self.refused, self.saving
        )

    def plot(self) -> Figure:
        """A matplotlib figure with one panel for each layer: loss against k, dense loss, bound.

        ImportError without matplotlib (install the extra: `pip install '.[plot]'` in the checkout).
        """
        return selection_report.plot(self.layers)

    def __repr__(self) -> str:
        layers = ", ".join(
            f"{name!r}: {len(layer.kept)} of {len(layer.counts)} units in {len(layer.order)} steps"
            for name, layer in self.layers.items()
        )
        return f"Selection({{{layers}}})"


def distinct_counts(order: Tensor) -> Tensor:
    """The number of distinct units in order[:i + 1], for each i: (k,) int64."""
    seen: set[int] = set()
    counts = []
    for unit in order.tolist():
        seen.add(unit)
        counts.append(len(seen))
    return torch.tensor(counts, dtype=torch.int64)


def factors(weights: str, counts: Tensor, kept: Tensor) -> Tensor:
    """The factors of the kept units' outgoing weights: (K,) float64.

    weights: "counts", "uniform" or "none", as for `select`
    """
    if weights == "counts":
        return counts[kept].double() * len(counts) / counts.sum()
    value = len(counts) / len(kept) if weights == "uniform" else 1.0
    return torch.full((len(kept),), value, dtype=torch.float64)
