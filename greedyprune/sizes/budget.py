"""`Budget`, what the pruned model may cost, and the report of the sizes that were chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..runtime.arguments import is_int, is_number

COSTS = ("flops", "params", "latency", "memory")


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost, for `select(size=...)`, as a share of the dense model's cost.

    The sizes k_l of the layers l are those within the budget that minimise

        sum over l of  L_l(k_l) / L_l(0),

    where L_l(k) is the squared error to the dense output of layer l's consumers when it keeps the
    first k units of its greedy path and all other layers are dense. For objective "fisher", the
    losses L_l(k) in the gates are summed and not divided. The sum is minimised exactly, or up to
    the gap that `selection.budget` reports.

    With `trials`, L_l(k) / L_l(0) is replaced by what the network loses with k units in layer l and
    all other layers dense: the divergence of its outputs from the dense ones (Kullback-Leibler, in
    nats, for logits; the squared error as a share of the dense output's squares for others), or the
    fall of `score`. It is measured at a few sizes of each layer, on at most 256 samples. They are
    of a quarter of the data that is held out: the layers' paths are solved on the rest. Between
    these sizes it is interpolated linearly in the layer's own error.

    At least one cost is given. With several, the pruned model is within all of them.

    Args:
        flops: share of the FLOPs on the first batch, by torch.utils.flop_counter; in (0, 1]
        params: share of the parameters; in (0, 1]
        latency: share of the time of a forward pass of the first batch, measured on the model's
            device; in (0, 1]
        deploy: a function of a model that returns what `latency` is measured of, for example
            `torch.compile`, or `lambda model: model.to(memory_format=torch.channels_last)`. It gets
            a copy. What it returns is called on the first batch, without gradients. None: the model
        memory: share of the peak memory of a forward pass of the first batch without gradients; in
            (0, 1]. That is the most bytes that parameters, buffers and the tensors which torch's
            operations return take at one moment
        uniform: one size for all layers of a kind. Layers are of a kind if they have the same
            number of units and lie between modules of the same types, such as the feed-forward
            blocks of a transformer
        keep: names of layers or blocks that keep all their units, or patterns of names such as
            "*.conv1" (Unix shell style, as in fnmatch). Layers that need one share with them keep
            all, too
        min_share: every layer keeps at least this share of its units; in [0, 1]
        trials: the number of trials in all. Each is a forward pass of the held-out samples, or a
            call of `score`. At least one for each layer; 0: each layer's own error decides
        score: a function of the model that gives a number of which more is better, such as its
            accuracy on data of your own. It is called once for each trial, with a pruned model that
            the next trial changes

    Raises:
        ValueError, TypeError: no cost; an argument that is out of range or of another type; a
            `score` without `trials`

    Example:
        >>> greedyprune.Budget(flops=0.5, params=0.6).shares
        {'flops': 0.5, 'params': 0.6}
    """

    flops: float | None = None
    params: float | None = None
    latency: float | None = None
    memory: float | None = None
    deploy: Callable[[nn.Module], Callable[..., object]] | None = None
    uniform: bool = False
    keep: str | Sequence[str] = ()
    min_share: float = 0.0
    trials: int = 0
    score: Callable[[nn.Module], float] | None = None

    def __post_init__(self) -> None:
        for name, share in self.shares.items():
            _check_share(name, share, "(0, 1]")
            if share == 0:
                raise ValueError(f"{name}: found {share!r}, expected a share in (0, 1]")
            object.__setattr__(self, name, float(share))  # a number that JSON can hold
        if not self.shares:
            raise ValueError(f"Budget: found none, expected at least one of {', '.join(COSTS)}")
        _check_share("min_share", self.min_share, "[0, 1]")
        if not isinstance(self.uniform, bool):
            raise TypeError(f"uniform: found {self.uniform!r}, expected True or False")
        keep = (self.keep,) if isinstance(self.keep, str) else self.keep
        if not isinstance(keep, Sequence) or not all(isinstance(name, str) for name in keep):
            raise TypeError(f"keep: found {self.keep!r}, expected names or patterns of layers")
        object.__setattr__(self, "keep", tuple(keep))
        object.__setattr__(self, "min_share", float(self.min_share))
        if self.deploy is not None and not callable(self.deploy):
            raise TypeError(f"deploy: found {self.deploy!r}, expected a function of the model")
        if self.deploy is not None and self.latency is None:
            raise ValueError("deploy: found one without latency, expected a share of the latency")
        if not is_int(self.trials):
            raise TypeError(f"trials: found {self.trials!r}, expected an int of at least 0")
        if self.trials < 0:
            raise ValueError(f"trials: found {self.trials}, expected at least 0")
        if self.score is not None and not callable(self.score):
            raise TypeError(f"score: found {self.score!r}, expected a function of the model")
        if self.score is not None and not self.trials:
            raise ValueError("score: found one without trials, expected the number of trials")

    @property
    def shares(self) -> dict[str, float]:
        """The costs that are limited, and to which share of the dense model's."""
        return {name: share for name in COSTS if (share := getattr(self, name)) is not None}

    @property
    def what(self) -> str:
        """The cost that is limited; the first of several."""
        return next(iter(self.shares))

    @property
    def share(self) -> float:
        """The share of the dense model's cost `what`."""
        return self.shares[self.what]


def _check_share(name: str, share: object, interval: str) -> None:
    expected = f"expected a share in {interval}"
    if not is_number(share):
        raise TypeError(f"{name}: found {share!r}, {expected}")
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: found {share!r}, {expected}")


@dataclass(frozen=True)
class BudgetReport:
    """How the sizes were chosen for a budget.

    asked:     for each cost that was limited, the share of the dense model's that was asked for
    left:      for each of these costs, the share that the pruned model really has: measured by
               `select`, computed from the layers' sizes by `Selection.resize`
    objective: the sum over the layers that `Budget` minimises
    gap:       no sizes within the budget have a sum below objective - gap; 0: these are the best
    """

    asked: Mapping[str, float]
    left: Mapping[str, float]
    objective: float
    gap: float

    @property
    def what(self) -> str:
        """The limited cost; of several, the one that comes nearest to its limit."""
        return max(self.asked, key=lambda name: self.left[name] / self.asked[name])

    @property
    def share(self) -> float:
        """The share of the dense model's cost `what` that was asked for."""
        return self.asked[self.what]

    @property
    def reached(self) -> float:
        """The share of the dense model's cost `what` that the pruned model really has."""
        return self.left[self.what]
