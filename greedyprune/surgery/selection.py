"""The result of `select`: a frozen record for `prune`, which can be shortened, saved and shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..data.batches import Batch
from ..graph.costs import Cost
from ..graph.slices import Slice
from ..kernels.dual import DualFit
from ..kernels.path import NestedFit
from ..runtime.arguments import ByName, one_of
from ..runtime.files import read_tensors, write_tensors
from ..sizes.budget import Budget, BudgetReport
from ..sizes.curves import Curves
from ..sizes.frontier import Frontier
from . import selection_report
from .layer_selection import Fit, LayerSelection

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

FORMAT = "greedyprune-selection-3"
TENSORS = (
    "order", "counts", "kept", "weights", "losses", "dense_loss", "bound", "gap", "distinct",
)  # fmt: skip
PLACES = ("slices", "also", "sizes")
MOST_NAMES = 8  # of layers in an error message


@dataclass(frozen=True, eq=False)
class Selection:
    """The result of `select`: `layers` maps a layer's name to its LayerSelection.

    Where the model has one selected layer, the Selection has that layer's tensors, too: `order`,
    `counts`, `kept`, `weights`, `losses`, `dense_loss`, `bound`, `gap` and `distinct`. With several
    layers these raise AttributeError; write `selection.layers[name].order`.

    costs:  the model's "params", and its "flops" on the first batch, for any sizes of the layers;
            None if the selection is not from `select`
    budget: how the sizes were chosen for a budget; None if there was no budget
    curves: what is lost at each size of each layer, for `resize` and `frontier`; None if there was
            no budget
    refused: the layers that can't be pruned, and why, as in `greedyprune.layers`, unless the caller
             named the layers; and those that `Budget(keep=)` keeps
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
    curves: Curves | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(ByName(self.layers)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Selection, (
            dict(self.layers), self.costs, self.budget, dict(self.refused), None, self.saving,
            self.curves,
        )  # fmt: skip

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
        return self.costs[what].dense, self.costs[what].at(self._sizes())

    def at(self, k: int) -> Selection:
        """The paths of all layers after k steps: one run of `select` serves every size.

        ValueError if k is not between 1 and the number of steps of the shortest path. Layers that
        have to keep one share of their units would keep different ones; `prune` refuses them.
        """
        shortest = min(self.layers.values(), key=lambda layer: len(layer.order))
        shortest.at(k)  # checks k
        layers = {name: layer.at(k) for name, layer in self.layers.items()}
        return dataclasses.replace(self, layers=layers, budget=None)

    def resize(self, budget: Budget) -> Selection:
        """The selection for a smaller budget, from the same paths: no data and no model are needed.

        A layer's path is cut after its first picks, so no layer gets larger than it is. Start from
        a selection for the largest budget of interest; `Budget(flops=1.0)` has whole paths. The
        layers' weights assume the other layers as they were selected, so `refit` gains more than
        after a `select` for the same budget. Exchanges, which come last in a path, are lost.

        Args:
            budget: costs, which this selection was made for or which are known for all models
                (FLOPs and parameters), and `min_share`. It can have no other options than the
                budget that this selection was made for

        Returns:
            a Selection, whose `budget.left` is computed and not measured

        Raises:
            ValueError: there are no curves, since the selection was not made for a Budget; a share
                that is higher than this selection's or lower than that of the smallest sizes; an
                option that takes data or the model
            TypeError: `budget` is no Budget

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(),
            ...                       nn.Linear(9, 1))
            >>> whole = greedyprune.select(model, torch.randn(32, 4), size=Budget(params=1.0))
            >>> whole.resize(Budget(params=0.5)).budget.left["params"] <= 0.5
            True
        """
        curves = self._curves_for("resize")
        if not isinstance(budget, Budget):
            raise TypeError(f"budget: found {type(budget).__name__}, expected a Budget")
        _check_resizing(budget, curves)
        now = self._sizes()
        asked = self.budget.asked if self.budget else {}
        ends = {what: max(curves.share(what, now), asked.get(what, 0)) for what in budget.shares}
        if all(share > ends[what] for what, share in budget.shares.items()):
            what, end = next(iter(ends.items()))
            raise ValueError(
                f"{what}: found {budget.shares[what]:g}, but the paths end at the sizes of this "
                f"selection, which leave {end:.4g} of the dense model's; expected at most this "
                "share, or `select` with a larger Budget"
            )
        curves = curves.restricted(now, budget.min_share)
        for what, share in budget.shares.items():
            least = curves.share(what, curves.least())
            if share < least:
                with_share = f" with min_share={budget.min_share:g}" * bool(budget.min_share)
                raise ValueError(
                    f"{what}: found {share:g}, but the smallest sizes of the layers{with_share} "
                    f"leave {least:.4g} of the dense model's; expected at least this share"
                )
        limits = {what: share * curves.dense(what) for what, share in budget.shares.items()}
        sizes, best = curves.within(limits)
        left = {what: curves.share(what, sizes) for what in budget.shares}
        return dataclasses.replace(
            self, layers={name: layer.of_size(sizes[name]) for name, layer in self.layers.items()},
            budget=BudgetReport(budget.shares, left, best.value, best.gap),
        )  # fmt: skip

    def frontier(self, what: str | None = None) -> Frontier:
        """What is lost against what the model costs, for a range of budgets.

        Args:
            what: the cost; None: the first one that this selection's budget limits

        Returns:
            a Frontier, which has a table, `summary()`, and a figure, `plot()`

        Raises:
            ValueError: there are no curves, since the selection was not made for a Budget; a cost
                that is not known
        """
        curves = self._curves_for("frontier")
        if what is None:
            what = next(iter(self.budget.asked if self.budget else curves.costs))
        one_of("what", what, tuple(curves.costs))
        return Frontier.of(curves, what, self._sizes())

    def _sizes(self) -> dict[str, int]:
        return {name: len(layer.kept) for name, layer in self.layers.items()}

    def _curves_for(self, method: str) -> Curves:
        if self.curves is None:
            raise ValueError(
                f"{method}: found a selection without a budget, expected one that "
                "select(size=Budget(...)) returned"
            )
        return self.curves

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
                for item in dataclasses.fields(refit):
                    tensors[f"{i}.{key}.{item.name}"] = getattr(refit, item.name)
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
            "curves": json.dumps(None if self.curves is None else self.curves.as_json()),
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
                key: _fit_of(tensors, f"{i}.{key}.")
                for key in ("gates", *(f"fitted.{consumer}" for consumer in fields["outputs"]))
                if f"{i}.{key}.units" in tensors
            }
            gates, name = refits.pop("gates", None), fields.pop("name")
            assert gates is None or isinstance(gates, NestedFit)
            fitted = {key.removeprefix("fitted."): refit for key, refit in refits.items()}
            fields |= {key: tuple(fields.get(key, ())) for key in ("tied", "share", "rescaled")}
            layers[name] = LayerSelection(**fields, fitted=fitted or None, gates=gates)
        costs = json.loads(header.get("costs", "{}"))
        budget, curves = (json.loads(header.get(key, "null")) for key in ("budget", "curves"))
        return Selection(
            layers,
            {what: Cost.of_json(cost) for what, cost in costs.items()} or None,
            None if budget is None else BudgetReport(**budget),
            json.loads(header.get("refused", "{}")),
            saving=json.loads(header.get("saving", "null")),
            curves=None if curves is None else Curves.of_json(curves),
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


def _fit_of(tensors: Mapping[str, Tensor], prefix: str) -> Fit:
    kind = DualFit if f"{prefix}rows" in tensors else NestedFit
    return kind(**{item.name: tensors[prefix + item.name] for item in dataclasses.fields(kind)})


def _check_resizing(budget: Budget, curves: Curves) -> None:
    """ValueError for what can't be had from curves alone."""
    for what in budget.shares:
        if what not in curves.costs:
            raise ValueError(
                f"{what}: found {budget.shares[what]:g}, but it was not measured for this "
                f"selection; expected {', '.join(curves.costs)}, or `select` with this Budget"
            )
    options = {"keep": bool(budget.keep), "trials": bool(budget.trials)}
    options["uniform"] = budget.uniform and not curves.uniform
    for option, is_given in options.items():
        if is_given:
            raise ValueError(
                f"{option}: found {getattr(budget, option)!r}, which the sizes of this selection "
                "were chosen without; expected costs and min_share, or `select` with this Budget"
            )
