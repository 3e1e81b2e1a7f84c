"""The result of `select`: a frozen record that can be cut, saved, loaded, shown and plotted."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .costs import Budget, Cost
from .figures import BLACK, BLUE, GREY, legend_below, panels_of
from .files import read_tensors, write_tensors
from .reference import Refit
from .reweight import distinct_counts, factors
from .settings import is_int
from .walk import Slice

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

FORMAT = "greedyprune-selection-2"
_TENSORS = (
    "order",
    "counts",
    "kept",
    "weights",
    "losses",
    "dense_loss",
    "bound",
    "gap",
    "distinct",
)


_REFIT = dataclasses.fields(Refit)


@dataclass(frozen=True, eq=False)
class LayerSelection:
    """The greedy path of one layer with N units, k steps, K distinct units kept.

    All tensors are on the CPU.

    order:      (k,) int64, the picks in sequence
    counts:     (N,) int64, how often each unit was picked
    kept:       (K,) int64, the distinct units, ascending
    weights:    (K,) float64, what multiplies the kept units' outgoing weights; after
                weights="refit" with objective "loss" or "imitation": (C, K) float64, the consumer's
                new weights, for a consumer with C outputs; (C, K, w) for one that takes w features
                of each unit, as a convolution its taps; those of the first of several consumers
    losses:     (k,) float64, the objective after each step, for the network so weighted
    dense_loss: () float64, the objective of the dense layer
    bound:      (k,) float64, README eq. 3; None where its conditions do not hold
    gap:        (k,) float64, the Frank-Wolfe gap: losses - gap is at most the loss of any convex
                reweighting of all units; None where that is not known
    distinct:   (k,) int64, distinct units after each step
    outputs:    the layers that take the units' outputs, and how many outputs those have
    slices:     parameters and buffers with entries of the units, and where
    fitted:     after weights="refit": the least squares of each consumer, for every size
    gates:      the same of one gate a unit, what multiplies its outgoing weights
    weighting, loss, objective: the arguments `weights`, `loss`, `objective` of `select`, resolved
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
    fitted: Mapping[str, Refit] | None = field(default=None, repr=False)
    gates: Refit | None = field(default=None, repr=False)

    @classmethod
    def of_path(
        cls, units: int, order: Tensor, weighting: str, fitted: Mapping[str, Refit] | None,
        gates: Refit | None = None, **fields: Any,
    ) -> LayerSelection:  # fmt: skip
        """The record of the picks `order` (k,) among `units` units."""
        counts = torch.bincount(order, minlength=units)
        kept = counts.nonzero().flatten()
        if gates is not None:
            weights = _sorted_outgoing(gates, len(kept)).flatten()
        elif fitted is None:
            weights = factors(weighting, counts, kept)
        else:
            weights = _sorted_outgoing(next(iter(fitted.values())), len(kept))
            weights = weights[..., 0] if weights.shape[2] == 1 else weights
        return cls(
            order=order, counts=counts, kept=kept, weights=weights.contiguous(),
            distinct=distinct_counts(order), weighting=weighting, fitted=fitted, gates=gates,
            **fields,
        )  # fmt: skip

    def at(self, k: int) -> LayerSelection:
        """The same path after k steps; ValueError if it has fewer, TypeError for no int."""
        expected = f"expected an int from 1 to {len(self.order)}, the path's steps"
        if not is_int(k):
            raise TypeError(f"k: found {k!r}, {expected}")
        if not 1 <= k <= len(self.order):
            raise ValueError(f"k: found {k}, {expected}")

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:k].clone()

        return LayerSelection.of_path(
            len(self.counts), self.order[:k].clone(), self.weighting, self.fitted, self.gates,
            losses=self.losses[:k].clone(), dense_loss=self.dense_loss, bound=cut(self.bound),
            gap=cut(self.gap), slices=self.slices, outputs=self.outputs, loss=self.loss,
            objective=self.objective,
        )  # fmt: skip

    def new_weights(self, consumer: str) -> Tensor | None:
        """After weights="refit": a consumer's weights (C, K, w) on the kept units' features."""
        if self.fitted is None:
            return None
        return _sorted_outgoing(self.fitted[consumer], len(self.kept))


def _sorted_outgoing(fitted: Refit, kept: int) -> Tensor:
    """The least squares on the first `kept` units, those in ascending order."""
    return fitted.outgoing(kept)[:, fitted.units[:kept].argsort()]


@dataclass(frozen=True, eq=False)
class Selection:
    """What `select` found: `layers` maps a layer's name to its LayerSelection.

    For a model with one selected layer, that layer's attributes (`order`, `kept`, `losses`, ...)
    are also attributes of the Selection.

    costs:  what the model costs for any widths of the layers: "params", and "flops" of the first
            batch; None where the selection is not of `select`
    budget: how the widths were chosen for a budget; None where they were not
    """

    layers: Mapping[str, LayerSelection]
    costs: Mapping[str, Cost] | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "layers":
            raise AttributeError(name)
        if len(self.layers) == 1:
            return getattr(next(iter(self.layers.values())), name)
        raise AttributeError(
            f"a Selection of {len(self.layers)} layers has no {name!r}: use "
            f"selection.layers[name].{name}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Selection, (dict(self.layers), self.costs, self.budget)

    def change(self, what: str) -> tuple[int, int] | None:
        """The dense model's "params" or "flops", and the pruned one's; None where not known.

        FLOPs are torch.utils.flop_counter's, of the first batch of the data.
        """
        if self.costs is None:
            return None
        widths = {name: len(layer.kept) for name, layer in self.layers.items()}
        return self.costs[what].dense, self.costs[what].at(widths)

    def at(self, k: int) -> Selection:
        """The path cut after k steps, in every layer: one run serves every size.

        ValueError if k is not between 1 and the shortest path's steps.
        """
        shortest = min(self.layers.values(), key=lambda layer: len(layer.order))
        shortest.at(k)  # checks k
        return Selection({name: layer.at(k) for name, layer in self.layers.items()}, self.costs)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes one safetensors file, with what is no tensor as JSON in its header."""
        tensors: dict[str, Tensor] = {}
        layers: list[dict[str, Any]] = []
        for i, (name, layer) in enumerate(self.layers.items()):
            for key in _TENSORS:
                if (tensor := getattr(layer, key)) is not None:
                    tensors[f"{i}.{key}"] = tensor
            solved = {f"fitted.{name}": each for name, each in (layer.fitted or {}).items()}
            for key, each in (solved | ({"gates": layer.gates} if layer.gates else {})).items():
                for item in _REFIT:
                    tensors[f"{i}.{key}.{item.name}"] = getattr(each, item.name)
            layers.append({
                "name": name, "outputs": dict(layer.outputs), "weighting": layer.weighting,
                "slices": {key: dataclasses.astuple(at) for key, at in layer.slices.items()},
                "loss": layer.loss, "objective": layer.objective,
            })  # fmt: skip
        header = {
            "format": FORMAT, "layers": json.dumps(layers),
            "budget": json.dumps(None if self.budget is None else dataclasses.asdict(self.budget)),
            "costs": json.dumps({n: each.as_json() for n, each in (self.costs or {}).items()}),
        }  # fmt: skip
        write_tensors(path, tensors, header)

    @staticmethod
    def load(path: str | PathLike[str]) -> Selection:
        """Reads what `save` wrote; ValueError for any other file."""
        tensors, metadata = read_tensors(path, FORMAT, "selection")
        layers = {}
        for i, about in enumerate(json.loads(metadata["layers"])):
            fields: dict[str, Any] = {key: tensors.get(f"{i}.{key}") for key in _TENSORS}
            about["slices"] = {key: Slice(*at) for key, at in about["slices"].items()}
            solved = {
                key: Refit(**{f.name: tensors[f"{i}.{key}.{f.name}"] for f in _REFIT})
                for key in ("gates", *(f"fitted.{consumer}" for consumer in about["outputs"]))
                if f"{i}.{key}.units" in tensors
            }
            gates, name = solved.pop("gates", None), about.pop("name")
            fitted = {key.removeprefix("fitted."): each for key, each in solved.items()}
            layers[name] = LayerSelection(**fields, **about, fitted=fitted or None, gates=gates)
        costs = json.loads(metadata.get("costs", "{}"))
        budget = json.loads(metadata.get("budget", "null"))
        return Selection(
            layers,
            {n: Cost.of_json(each) for n, each in costs.items()} or None,
            None if budget is None else Budget(**budget),
        )

    def summary(self) -> Table:
        """A rich table, a row a layer: `rich.print(selection.summary())`.

        gap and bound are those of the last step: the loss is at most `gap` above that of any convex
        reweighting of all units, and `bound` is what is proved of greedy selection. Below it,
        parameters and FLOPs (of the first batch) before and after.
        """
        from rich.table import Table

        what = sorted({f"{layer.objective}: {layer.loss}" for layer in self.layers.values()})
        table = Table(title=f"greedy forward selection ({', '.join(what)})")
        for column in ("layer", "kept", "steps", "weights", "loss", "dense loss", "gap", "bound"):
            table.add_column(column, justify="left" if column in ("layer", "weights") else "right")
        for name, layer in self.layers.items():
            last = [
                None if t is None else float(t[-1]) for t in (layer.losses, layer.gap, layer.bound)
            ]
            table.add_row(
                name, f"{len(layer.kept)} of {len(layer.counts)}", str(len(layer.order)),
                layer.weighting, _number(last[0]), _number(float(layer.dense_loss)),
                _number(last[1]), _number(last[2]),
            )  # fmt: skip
        table.caption = "\n".join(self._caption()) or None
        return table

    def _caption(self) -> Iterator[str]:
        for what, unit in (("params", "parameters"), ("flops", "FLOPs of the first batch")):
            if change := self.change(what):
                before, after = change
                yield f"{before:,} {unit} before, {after:,} after ({after / max(1, before):.1%})"
        if self.budget is not None:
            found = self.budget
            yield (
                f"{found.what} {found.reached:.4g} for a budget of {found.share:.4g}; loss of the "
                f"widths {found.objective:.4g}, at most {found.gap:.2g} above the best"
            )

    def plot(self) -> Figure:
        """A figure with a panel a layer: loss against k, the dense loss, the bound.

        ImportError without matplotlib (`pip install greedyprune[plot]`).
        """
        figure, panels = panels_of(len(self.layers))
        for panel, (name, layer) in zip(panels, self.layers.items(), strict=True):
            k = torch.arange(1, len(layer.order) + 1)
            marker = "o" if len(k) < 10 else ""
            panel.plot(k, layer.losses, marker=marker, markersize=4, color=BLUE, label="pruned")
            if layer.bound is not None:
                panel.plot(k, layer.bound, ":", color=GREY, label="proved bound (eq. 3)")
            dense = float(layer.dense_loss)
            lowest, highest = float(layer.losses.min()), float(layer.losses.max())
            if layer.bound is not None:
                highest = max(highest, float(layer.bound.max()))
            if layer.objective == "loss":
                panel.axhline(dense, linestyle="--", color=BLACK, linewidth=1, label="dense")
                lowest = min(lowest, dense)
            if 0 < 10 * lowest < highest:
                panel.set_yscale("log")
            panel.locator_params(axis="x", integer=True, min_n_ticks=1)
            panel.set_xlabel("greedy steps k")
            panel.set_ylabel(f"{layer.objective} ({layer.loss})")
            title = [*textwrap.wrap(f"layer {name}", 30)]
            title.append(f"{len(layer.kept)} of {len(layer.counts)} units kept")
            panel.set_title("\n".join(title), fontsize="medium")
        legend_below(figure)
        return figure

    def __repr__(self) -> str:
        layers = ", ".join(
            f"{name!r}: {len(layer.kept)} of {len(layer.counts)} units in {len(layer.order)} steps"
            for name, layer in self.layers.items()
        )
        return f"Selection({{{layers}}})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
