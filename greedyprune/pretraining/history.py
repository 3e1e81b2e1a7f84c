"""The records that a `PretrainingMonitor` keeps: one `Check` each time that it prunes a copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..surgery.layer_selection import LayerSelection


@dataclass(frozen=True)
class LayerCheck:
    """The greedy path of one layer at a check. Its losses are on `data`, never on `held_out`.

    name:        the layer's name in the model
    objective:   the objective that the layer was selected by: "loss", "imitation" or "fisher"
    units:       how many units the layer has
    kept:        how many distinct units were kept
    order:       the picks in sequence
    losses:      the objective after each step. For "loss" that is the loss of the model with this
                 layer pruned, and with the layers that were pruned before it. For the other
                 objectives it is the layer's own error.
    dense_loss:  the objective of the dense layer
    gap:         the Frank-Wolfe gap at the last step; None where it is not known
    bound:       the bound of eq. (3) at the last step; None where its conditions do not hold
    """

    name: str
    objective: str
    units: int
    kept: int
    order: tuple[int, ...]
    losses: tuple[float, ...]
    dense_loss: float
    gap: float | None
    bound: float | None

    @classmethod
    def of(cls, name: str, layer: LayerSelection) -> LayerCheck:
        return cls(
            name=name, objective=layer.objective, units=len(layer.counts), kept=len(layer.kept),
            order=tuple(layer.order.tolist()), losses=tuple(layer.losses.tolist()),
            dense_loss=float(layer.dense_loss),
            gap=None if layer.gap is None else float(layer.gap[-1]),
            bound=None if layer.bound is None else float(layer.bound[-1]),
        )  # fmt: skip


@dataclass(frozen=True)
class Check:
    """What the monitor measured at one iteration of training.

    Losses and metrics are those of whole networks. They are measured on `held_out` where the
    monitor has it, else on `data`. A metric is None where the monitor has none.

    iteration:        how often `step` had been called before the check
    seconds:          how long the check took
    training_seconds: time since the first `step`, without the checks
    dense_loss:       the loss of the network in training
    dense_metric:     the metric of the network in training
    loss:             the loss of the pruned network
    metric:           the metric of the pruned network
    layers:           the greedy path of each layer
    """

    iteration: int
    seconds: float
    training_seconds: float
    dense_loss: float
    dense_metric: float | None
    loss: float
    metric: float | None
    layers: tuple[LayerCheck, ...]

    @property
    def units(self) -> int:
        """The number of units in all layers that were selected from."""
        return sum(layer.units for layer in self.layers)

    @property
    def kept(self) -> int:
        """The number of distinct units kept, over all layers."""
        return sum(layer.kept for layer in self.layers)

    @property
    def gap(self) -> float | None:
        """The Frank-Wolfe gap of the model's loss on `data`.

        None unless exactly one layer was selected from, by the objective "loss".
        """
        layer = self._layer_by_loss()
        return None if layer is None else layer.gap

    @property
    def bound(self) -> float | None:
        """The bound of eq. (3) on the model's loss on `data`; None where `gap` is None."""
        layer = self._layer_by_loss()
        return None if layer is None else layer.bound

    def scalars(self) -> dict[str, float]:
        """The numbers for a logger, by tag ("greedyprune/loss", ...); unknown ones are left out."""
        values: dict[str, float | None] = {
            "dense_loss": self.dense_loss, "loss": self.loss, "dense_metric": self.dense_metric,
            "metric": self.metric, "gap": self.gap, "bound": self.bound, "kept": self.kept,
            "seconds": self.seconds,
        }  # fmt: skip
        return {f"greedyprune/{n}": float(v) for n, v in values.items() if v is not None}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Check:
        """The inverse of `dataclasses.asdict`; JSON may have turned tuples into lists."""
        layers = tuple(
            LayerCheck(
                **{**layer, "order": tuple(layer["order"]), "losses": tuple(layer["losses"])}
            )
            for layer in state["layers"]
        )
        return cls(**{**state, "layers": layers})

    def _layer_by_loss(self) -> LayerCheck | None:
        """The layer whose objective is the loss of the whole model, if there is only this layer."""
        if len(self.layers) != 1 or self.layers[0].objective != "loss":
            return None
        return self.layers[0]
