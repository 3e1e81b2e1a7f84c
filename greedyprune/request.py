"""The arguments of `select`, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .graph.groups import Group
from .kernels.path import Rule
from .objectives.job import REPEATS_LIMIT, generator
from .objectives.options import DAMPING, Fisher, Imitation, Loss
from .runtime.arguments import is_int, is_number, one_of, positive_int
from .runtime.progress import warn
from .sizes.budget import Budget
from .sizes.kinds import nearest, size_step, sizes_in_one_share

OBJECTIVES = {"imitation": Imitation, "loss": Loss, "fisher": Fisher}
WEIGHTS = ("auto", "counts", "uniform", "none", "refit")
Size = int | float


@dataclass(frozen=True)
class Request:
    """The checked arguments; sizes are still relative to each layer's number of units.

    layers:    producers by name; None: all
    consumers: for layers that are named by hand with their consumers: consumer by producer
    objective: "auto", "imitation", "loss" or "fisher"; its options are in the field of that name
    """

    layers: tuple[str, ...] | None
    consumers: Mapping[str, str] | None
    size: Size | Mapping[str, Size] | None
    budget: Budget | None
    steps: int | None
    tolerance: float | None
    round_to: int
    objective: str
    imitation: Imitation
    loss: Loss
    fisher: Fisher
    weights: str
    replacement: bool
    seed: int
    memory_limit: int | None

    @property
    def sized_layers(self) -> tuple[str, ...]:
        """The layers that `size` has entries for."""
        return tuple(self.size) if isinstance(self.size, Mapping) else ()

    @property
    def trials(self) -> int:
        """`Budget.trials`; 0 without a budget."""
        return 0 if self.budget is None else self.budget.trials

    @property
    def keep(self) -> Sequence[str]:
        """`Budget.keep`; () without a budget."""
        return () if self.budget is None else self.budget.keep

    def rule(self, group: Group, size: int, *, by_loss: bool) -> Rule:
        """When to stop and what may be picked in a layer.

        size:    how many units it keeps, from `sizes_of`
        by_loss: is it judged by the loss, whose candidates can be drawn?

        ValueError for more steps without replacement, units or candidates than it has units.
        """
        layer, units, steps = group.producer, group.units, self.steps
        if steps is None:
            steps = size * REPEATS_LIMIT if self.replacement else size
        else:
            size = units + 1  # exactly so many steps
        if not self.replacement and steps > units:
            raise ValueError(
                f"steps: found {steps} without replacement, but layer {layer!r} has {units} units; "
                f"expected at most {units}"
            )
        if not by_loss:
            return Rule(steps, size, self.replacement)
        draws, candidates = None, self.loss.candidates
        if candidates is not None and candidates > units:
            raise ValueError(
                f"candidates: found {candidates}, but layer {layer!r} has {units} units; "
                f"expected at most {units}"
            )
        if candidates is not None and self.loss.draw == "random":
            draws = torch.empty(steps, candidates, dtype=torch.float64, device="cpu")
            draws.uniform_(generator=generator(self.seed, 1))
        return Rule(steps, size, self.replacement, draws, self.loss.shortlist or 0)

    def sizes_of(self, groups: Sequence[Group]) -> dict[str, int]:
        """How many units each group keeps; without a size, all.

        Groups that have to keep one share of their units keep the one that is nearest to what each
        would keep by itself. ValueError where numbers of units are given that are not one share,
        or where something else than a size ends the paths.
        """
        shares = dict.fromkeys(group.share for group in groups if group.share)
        ends = {
            "tolerance": self.tolerance is not None, "steps": self.steps is not None,
            "replacement": self.replacement,
        }  # fmt: skip
        given = [option for option, is_given in ends.items() if is_given]
        if shares and given:
            one, other, *_ = next(iter(shares))
            raise ValueError(
                f"{given[0]}: found one, but the model needs {one!r} and {other!r} to keep one "
                "share of their units; expected a size or a Budget, and distinct picks"
            )
        sizes = self.sizes_alone(groups)
        for names in shares if self.size is not None else ():
            together = [group for group in groups if group.producer in names]
            sizes |= self._one_share(together, sizes)
        return sizes

    def sizes_alone(self, groups: Sequence[Group]) -> dict[str, int]:
        """What `size` and `round_to` mean for each group by itself; without a size, all units."""
        if self.size is None:
            return {group.producer: group.units for group in groups}
        return {
            group.producer: nearest(
                self._size(group.producer, group.units), group.units,
                size_step(group, self.round_to),
            )
            for group in groups
        }  # fmt: skip

    def _one_share(self, groups: Sequence[Group], sizes: Mapping[str, int]) -> dict[str, int]:
        """The groups' sizes in one share, nearest to what they would be by themselves."""
        names, given = [group.producer for group in groups], self.size
        asked = {name: given[name] if isinstance(given, Mapping) else given for name in names}
        wanted, units = 0.0, groups[0].units
        for group in groups:
            share = asked[group.producer]
            if not isinstance(share, float):
                share = sizes[group.producer] / group.units
            wanted += share / len(groups)
        best = min(
            sizes_in_one_share(groups, self.round_to),
            key=lambda each: (round(abs(each[0] / units - wanted), 9), -each[0]),
        )
        result = dict(zip(names, best, strict=True))
        for group in groups:
            name, number = group.producer, asked[group.producer]
            if isinstance(number, int) and self.round_to == 1 and result[name] != number:
                others = ", ".join(repr(other) for other in names if other != name)
                raise ValueError(
                    f"size: found {number} of the {group.units} units of {name!r}, which has to "
                    f"keep one share with {others}; expected a fraction, or numbers in proportion "
                    "to their units"
                )
        return result

    def _size(self, layer: str, units: int) -> int:
        size = self.size
        if isinstance(size, Mapping):
            if layer not in size:
                raise ValueError(
                    f"size: no entry for layer {layer!r}, expected one for each layer "
                    "(layers=[...] selects from some of them)"
                )
            size = size[layer]
        assert size is not None
        if isinstance(size, float):
            return max(1, round(size * units))
        if size > units:
            raise ValueError(
                f"size: found {size}, but layer {layer!r} has {units} units; "
                f"expected 1 to {units}, or a fraction in (0, 1]"
            )
        return size


def check_model(model: nn.Module) -> None:
    """TypeError for parameters that hold no real numbers."""
    for name, tensor in model.named_parameters():
        if tensor.is_meta or tensor.is_complex():
            what = "is on the meta device" if tensor.is_meta else f"is {tensor.dtype}"
            raise TypeError(f"model: {name!r} {what}, expected real numbers in memory")


def checked_request(
    *,
    size: object = None,
    steps: object = None,
    tolerance: object = None,
    round_to: object = None,
    layers: object = None,
    objective: object = "auto",
    weights: object = "auto",
    replacement: object = None,
    seed: object = 0,
    memory_limit: object = None,
) -> Request:
    """Checks arguments of `select`; ValueError or TypeError naming the one that is wrong."""
    kind, options = _objective(objective)
    one_of("weights", weights, WEIGHTS)
    if size is not None and steps is not None:
        raise ValueError(f"steps: found size={size!r} and steps={steps!r}, expected one of them")
    steps = positive_int("steps", steps)
    if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance: found {tolerance!r}, expected a fraction of at least 0")
    if not is_int(seed):
        raise TypeError(f"seed: found {seed!r}, expected an int")
    if replacement not in (None, True, False):
        raise TypeError(f"replacement: found {replacement!r}, expected True, False or None")
    multiple = positive_int("round_to", round_to)
    budget, names = size if isinstance(size, Budget) else None, _layers(layers)
    if multiple and (steps is not None or tolerance is not None):
        other = "tolerance" if tolerance is not None else "steps"
        raise ValueError(f"round_to: found {multiple} with {other}, expected a size")
    if budget is not None and tolerance is not None:
        raise ValueError("size: found a Budget and tolerance, expected one of them")
    if isinstance(size, Mapping):
        size = {name: _checked_size(value) for name, value in size.items()}
    elif budget is None and size is not None:
        size = _checked_size(size)
    elif budget is None and steps is None and tolerance is None:
        size = 0.5
    request = Request(
        layers=names[0],
        consumers=names[1],
        size=None if budget is not None else size,  # type: ignore[arg-type]
        budget=budget,
        steps=steps,
        tolerance=None if tolerance is None else float(tolerance),
        round_to=multiple or 1,
        objective=kind,
        imitation=options if isinstance(options, Imitation) else Imitation(),
        loss=options if isinstance(options, Loss) else Loss(),
        fisher=options if isinstance(options, Fisher) else Fisher(),
        weights=str(weights),
        replacement=steps is not None if replacement is None else bool(replacement),
        seed=int(seed),
        memory_limit=positive_int("memory_limit", memory_limit),
    )
    _check_effects(request)
    return request


def _objective(objective: object) -> tuple[str, object]:
    for name, options in OBJECTIVES.items():
        if isinstance(objective, options):
            return name, objective
        if objective is options:
            raise TypeError(
                f"objective: found the class {options.__name__}, expected an instance of it: "
                f"{options.__name__}()"
            )
    names = "auto", *OBJECTIVES
    if objective not in names:
        raise ValueError(
            f"objective: found {objective!r}, expected one of {', '.join(map(repr, names))}, or "
            "an Imitation, Loss or Fisher with options"
        )
    return str(objective), None


def _check_effects(request: Request) -> None:
    """ValueError for options that other arguments would leave without effect.

    A warning for a tolerance of the loss that may have been meant in percent.
    """
    of_loss = request.objective in ("auto", "loss") and request.loss.metric is None
    if of_loss and (tolerance := request.tolerance or 0) > 1:
        warn(
            f"tolerance: {tolerance:g} allows {1 + tolerance:g} times the dense loss; "
            f"{tolerance:g} % is tolerance={tolerance / 100:g}"
        )
    if request.loss.metric is not None and request.tolerance is None:
        raise ValueError(
            "metric: found a function without a tolerance, expected a tolerance too, which says "
            "how much of the metric may be lost"
        )
    if request.imitation.swaps:
        swaps = f"swaps: found {request.imitation.swaps} with"
        if request.tolerance is not None:
            raise ValueError(f"{swaps} a tolerance, expected no tolerance: exchanges need a size")
        if request.weights not in ("auto", "refit"):
            raise ValueError(f"{swaps} weights={request.weights!r}, expected weights='refit'")
        if request.replacement:
            raise ValueError(f"{swaps} replacement, expected none: exchanges need distinct units")
    refits = request.weights in ("auto", "refit")
    for options in (request.imitation, request.fisher):
        if options.damping != DAMPING and not refits:
            raise ValueError(
                f"damping: found {options.damping} with weights={request.weights!r}, expected "
                "weights='refit': damping is the ridge of its least squares"
            )


def _layers(layers: object) -> tuple[tuple[str, ...] | None, Mapping[str, str] | None]:
    if layers is None:
        return None, None
    if isinstance(layers, str):
        return (layers,), None
    if isinstance(layers, Mapping):
        consumers = {}
        for producer, consumer in layers.items():
            if isinstance(consumer, (list, tuple)) and len(consumer) == 1:
                consumer = consumer[0]
            if not isinstance(producer, str) or not isinstance(consumer, str):
                raise TypeError(
                    f"layers: found {{{producer!r}: {consumer!r}}}, expected names of one producer "
                    "and one consumer"
                )
            consumers[producer] = consumer
        if not consumers:
            raise ValueError("layers: found an empty mapping, expected at least one layer")
        return tuple(consumers), consumers
    if isinstance(layers, Sequence) and layers and all(isinstance(n, str) for n in layers):
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers: found {list(layers)!r}, expected each name once")
        return tuple(layers), None
    raise TypeError(f"layers: found {layers!r}, expected a name, a list of names or a mapping")


def _checked_size(size: object) -> Size:
    expected = "expected an int of at least 1 (units), a float in (0, 1] (a fraction) or a Budget"
    if not is_number(size):
        raise TypeError(f"size: found {size!r}, {expected}")
    checked = int(size) if is_int(size) else float(size)
    if not (checked >= 1 if isinstance(checked, int) else 0 < checked <= 1):
        raise ValueError(f"size: found {size!r}, {expected}")
    return checked
