"""What a `PretrainingMonitor` records at each check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..surgery.selection import LayerSelection


@dataclass(frozen=True)
class LayerCheck:
    """The greedy path of one layer at a check, its losses on `data` (not on `held_out`).

    units, kept: units of the layer, and distinct ones kept
    order:       the picks in sequence
    losses:      the objective after each step: where that is "loss", the model's with this layer
                 pruned, and those before it; else ("imitation", say) this layer's own
    dense_loss:  the same of the dense layer
    gap, bound:  the Frank-Wolfe gap and README eq. 3 at the last step; None where not known
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
        last = [None if each is None else float(each[-1]) for each in (layer.gap, layer.bound)]
        return cls(
            name, layer.objective, len(layer.counts), len(layer.kept),
            tuple(layer.order.tolist()), tuple(layer.losses.tolist()), float(layer.dense_loss),
            *last,
        )  # fmt: skip


@dataclass(frozen=True)
class Check:
    """What was found at one iteration.

    Losses and metrics are of the whole networks, dense and pruned, run on `held_out` where that was
    given, else on `data`; the metrics None where there is none.

    iteration:        calls of `step` until then
    seconds:          that the check took
    training_seconds: since the first `step`, without the checks
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
        """Of all layers that are selected from."""
        return sum(layer.units for layer in self.layers)

    @property
    def kept(self) -> int:
        """Distinct units kept, of all layers."""
        return sum(layer.kept for layer in self.layers)

    @property
    def gap(self) -> float | None:
        """The Frank-Wolfe gap of the model's loss on `data`; None where layers imitate."""
        return self._of_the_loss("gap")

    @property
    def bound(self) -> float | None:
        """README eq. 3 for the model's loss on `data`; None where layers imitate."""
        return self._of_the_loss("bound")

    def scalars(self) -> dict[str, float]:
        """What a logger is given, by tag."""
        found = {name: getattr(self, name) for name in (
            "dense_loss", "loss", "dense_metric", "metric", "gap", "bound", "kept", "seconds",
        )}  # fmt: skip
        return {f"greedyprune/{n}": float(v) for n, v in found.items() if v is not None}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Check:
        """From what `dataclasses.asdict` made of one, tuples perhaps as lists."""
        layers = (
            LayerCheck(**{**each, "order": tuple(each["order"]), "losses": tuple(each["losses"])})
            for each in state["layers"]
        )
        return cls(**{**state, "layers": tuple(layers)})

    def _of_the_loss(self, name: str) -> float | None:
        if len(self.layers) != 1 or self.layers[0].objective != "loss":
            return None
        return getattr(self.layers[0], name)
