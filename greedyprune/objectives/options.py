"""The objectives of `select(objective=...)`, each with its own options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..runtime.arguments import is_int, is_number, one_of, positive_int

METRICS = ("none", "fisher")
DRAWS = ("random", "gradient")
MOST_SWAPS = 10_000
DAMPING = 1e-4  # the least ridge of least squares, as a share of the features' squares


@dataclass(frozen=True)
class Imitation:
    """Judges units by the squared error to the dense outputs of the layers that take them.

    This needs no labels. It is the default for layers inside a network. Query-key dimensions of
    attention are judged by the error of the attention scores in the dense network: greedy steps
    alone, without any of these options.

    Args:
        swaps: the largest number of exchanges after the greedy steps. An exchange replaces a kept
            unit by a dropped one, and is made only if it lowers the error. Exchanges need
            weights="refit" and no tolerance. Exchanged units come last in `order`. None: no limit,
            if exchanges are possible; 0: no exchanges
        damping: the least ridge of least squares, as a share of the features' squares; above 0.
            Each layer gets the damping, between this one and 100, that does best in 2-fold
            cross-validation over the samples. The ridge is towards the dense weights
        metric: how output errors are weighted: "none": all equally; "fisher": by their effect on
            the model's predictions. This takes one more backward pass, with labels drawn from the
            predictions by `seed` (Martens 2020, arXiv:1412.1193)
        sequential: True: layer by layer, each on the inputs that it receives from the layers
            already pruned; False: all layers from one pass through the dense network, or in turns
            of a pass each if their sums do not fit in memory together. It is always False if
            `layers` is a mapping that names the consumers, and for a layer whose consumer runs
            several times in a forward pass with the same weights
        exact_losses: True: all positions of feature maps and sequences have a part in the sums
            that units are picked by; the losses are then those of all data, too. False: where a
            layer has far more positions than features, a sample of them has, other ones for each of
            the data's samples. The losses are then those of the sampled positions

    Raises:
        ValueError, TypeError: an option that is out of range

    Source: Ye et al. 2020, arXiv:2003.01794 (layer-wise imitation); Meng et al. 2024,
    arXiv:2403.12983 (exchanges); eq. (2) and (4).
    """

    swaps: int | None = None
    damping: float = DAMPING
    metric: str = "none"
    sequential: bool = True
    exact_losses: bool = False

    def __post_init__(self) -> None:
        if self.swaps is not None and not (is_int(self.swaps) and self.swaps >= 0):
            raise ValueError(f"swaps: found {self.swaps!r}, expected an int of at least 0")
        _check_damping(self.damping)
        _check_bool("exact_losses", self.exact_losses)
        one_of("metric", self.metric, METRICS)
        _check_bool("sequential", self.sequential)


@dataclass(frozen=True)
class Loss:
    """Judges units by the model's own loss (eq. (1)).

    It is the default if the units are taken by a Linear that gives the model's output. Inside a
    network, the layers that follow run for every candidate.

    Args:
        candidates: score only this many candidates in each step (Ye et al. 2020: 50); None: all
        draw: which candidates to score: "random": drawn by `seed`; "gradient": those with the
            lowest derivative of the loss, which takes one backward pass a step
        batch_size: score each step on a mini-batch of this many samples, drawn by `seed` (Wolfe et
            al. 2021); the reported losses are those of all samples
        shortlist: with batch_size: score this many of the mini-batch's best candidates again on all
            samples
        metric: a function of all outputs and targets, whose value should be high; `tolerance` then
            refers to it: a layer is done at (1 - tolerance) times the dense network's value
        sequential: True: layer by layer, each in the network whose earlier layers are pruned;
            False: each in the dense network

    Raises:
        ValueError, TypeError: an option that is out of range, or has no effect without another

    Source: Ye et al. 2020, arXiv:2003.01794; Wolfe et al. 2021, arXiv:2108.00259.
    """

    candidates: int | None = None
    draw: str = "random"
    batch_size: int | None = None
    shortlist: int | None = None
    metric: Callable[[Tensor, Tensor], float] | None = None
    sequential: bool = True

    def __post_init__(self) -> None:
        for name in ("candidates", "batch_size", "shortlist"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        one_of("draw", self.draw, DRAWS)
        if self.draw == "gradient" and self.candidates is None:
            raise ValueError("draw: found 'gradient' without candidates, expected candidates too")
        if self.shortlist is not None and self.batch_size is None:
            raise ValueError(
                f"shortlist: found {self.shortlist} without batch_size, expected batch_size too: "
                "the shortlist has the units that score best on a mini-batch"
            )
        if self.metric is not None and not callable(self.metric):
            raise TypeError(f"metric: found {self.metric!r}, expected a function or None")
        _check_bool("sequential", self.sequential)


@dataclass(frozen=True)
class Fisher:
    """Judges units by a second-order approximation of the loss in one gate for each unit (eq. (5)).

    A gate is a factor on a unit's outgoing weights. One backward pass through the dense network
    serves all layers, or those that fit in memory together. The samples have to be the first
    dimension of the inputs, and the loss a mean over them.

    Args:
        damping: the ridge of least squares on the gates, towards gates of 1, as a share of the
            squares of their derivatives; above 0

    Raises:
        ValueError: damping that is out of range

    Source: the empirical Fisher information; Martens 2020, arXiv:1412.1193, section 10.
    """

    damping: float = DAMPING

    def __post_init__(self) -> None:
        _check_damping(self.damping)


def _check_damping(damping: object) -> None:
    if not (is_number(damping) and damping > 0):
        raise ValueError(f"damping: found {damping!r}, expected a number above 0")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: found {value!r}, expected True or False")
