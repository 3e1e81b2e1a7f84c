"""The arguments of `select`, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.path import Rule
from ..runtime.arguments import is_int, is_number, one_of, positive_int
from ..runtime.distributed import Ranks
from ..runtime.free_memory import room

OBJECTIVES = ("auto", "loss", "imitation", "fisher")
BUDGETS = ("flops", "params", "latency")
WEIGHTS = ("auto", "counts", "uniform", "none", "refit")
METRICS = ("none", "fisher")
MOST_SWAPS = 10_000
REPEATS_LIMIT = 10  # with size and replacement: at most so many steps a unit


@dataclass(frozen=True)
class Batched:
    """Mini-batches of shuffled samples: step k scores on [starts[k - 1], stops[k - 1]).

    order: (m,) int64, the samples in the order that they are shuffled to
    starts, stops: (steps,) int64, `size` apart where all samples are in one place
    """

    order: Tensor
    starts: Tensor
    stops: Tensor
    size: int

    def on_rank(self, ranks: Ranks, samples: int) -> Batched:
        """The same batches, of the samples that this rank has; all are numbered rank after rank."""
        first = sum(ranks.gather("samples", samples)[: ranks.rank])
        own = (self.order >= first) & (self.order < first + samples)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), own.cumsum(0)])
        order = self.order[own] - first
        return Batched(order, before[self.starts], before[self.stops], self.size)


@dataclass(frozen=True)
class Settings:
    """The checked arguments; sizes still relative to each layer's number of units."""

    layers: tuple[str, ...] | None
    consumers: Mapping[str, str] | None
    size: int | float | Mapping[str, int | float] | None
    steps: int | None
    tolerance: float | None
    objective: str
    weights: str
    replacement: bool
    candidates: int | None
    batch_size: int | None
    shortlist: int | None
    screen: int | None
    seed: int
    memory_limit: int
    sequential: bool
    swaps: int
    budget: tuple[str, float] | None
    round_to: int
    uniform: bool
    metric: str
    own_metric: Callable[[Tensor, Tensor], float] | None
    damping: float

    def rule(self, layer: str, units: int, step: int = 1) -> Rule:
        """When to stop and what may be picked, in a layer of so many units; sizes in steps."""
        size, steps = units, self.steps
        if self.size is not None:
            size = nearest(self._size(layer, units), units, step)
        if steps is None:
            steps = size * REPEATS_LIMIT if self.replacement else size
        else:
            size = units + 1  # exactly so many steps
        if not self.replacement and steps > units:
            raise ValueError(
                f"steps: found {steps} without replacement, but layer {layer!r} has {units} units; "
                f"expected at most {units}"
            )
        draws = None
        if self.candidates is not None:
            if self.candidates > units:
                raise ValueError(
                    f"candidates: found {self.candidates}, but layer {layer!r} has {units} units; "
                    f"expected at most {units}"
                )
            draws = torch.empty(steps, self.candidates, dtype=torch.float64, device="cpu")
            draws.uniform_(generator=self._rng(1))
        return Rule(steps, size, self.replacement, draws, self.shortlist or 0)

    def batches(self, steps: int, samples: int, ranks: Ranks) -> Batched | None:
        """The mini-batches that steps score on; None: all samples.

        samples: on this rank

        Passes over the shuffled data, like a training loop's: no sample twice in one pass, and what
        is left over is dropped. Passes differ in the order of the batches and where they begin.
        """
        if self.batch_size is None:
            return None
        own, samples = samples, sum(ranks.gather("samples", samples))
        size, rng = min(self.batch_size, samples), self._rng(2)
        order, starts = torch.randperm(samples, device="cpu", generator=rng), []
        count = samples // size
        for _ in range(-(-steps // count)):
            first = torch.randint(samples % size + 1, (), device="cpu", generator=rng)
            starts.append(first + size * torch.randperm(count, device="cpu", generator=rng))
        firsts = torch.cat(starts)[:steps].contiguous()
        found = Batched(order, firsts, firsts + size, size)
        return found if ranks.size == 1 else found.on_rank(ranks, own)

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

    def _rng(self, stream: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed((self.seed * 4 + stream) % 2**63)


def resolve(
    *,
    model: object,
    layers: object,
    size: object,
    steps: object,
    tolerance: object,
    objective: object,
    weights: object,
    replacement: object,
    candidates: object,
    batch_size: object,
    shortlist: object,
    screen: object,
    seed: object,
    memory_limit: object,
    sequential: object,
    swaps: object,
    budget: object,
    round_to: object,
    uniform: object,
    metric: object,
    damping: object,
) -> Settings:
    """Checks the arguments of `select`; ValueError or TypeError naming the one that is wrong."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, expected an nn.Module")
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        raise TypeError(
            f"model: found a compiled {type(inner).__name__}, expected the module that it wraps: "
            "model._orig_mod"
        )
    for name, tensor in model.named_parameters():
        if tensor.is_meta or tensor.is_complex():
            found = "is on the meta device" if tensor.is_meta else f"is {tensor.dtype}"
            raise TypeError(f"model: {name!r} {found}, expected real numbers in memory")
    one_of("objective", objective, OBJECTIVES)
    one_of("weights", weights, WEIGHTS)
    own_metric = metric if callable(metric) else None
    if own_metric is None:
        one_of("metric", metric, METRICS)
    elif objective != "loss" or tolerance is None:
        raise ValueError(
            f"metric: found a function with objective={objective!r} and tolerance={tolerance!r}, "
            "expected objective='loss' and a tolerance, which is then of this metric"
        )
    if size is not None and steps is not None:
        raise ValueError(f"steps: found size={size!r} and steps={steps!r}, expected one of them")
    steps = positive_int("steps", steps)
    candidates = positive_int("candidates", candidates)
    batch_size = positive_int("batch_size", batch_size)
    shortlist = positive_int("shortlist", shortlist)
    screen = positive_int("screen", screen)
    if screen is not None and objective != "loss":
        raise ValueError(
            f"screen: found {screen} with objective={objective!r}, expected objective='loss'"
        )
    if shortlist is not None and batch_size is None:
        raise ValueError(
            f"shortlist: found {shortlist} without batch_size, expected batch_size too: the "
            "shortlist is of those that score best on a mini-batch"
        )
    if objective == "fisher" and batch_size is not None:
        raise ValueError(
            f"batch_size: found {batch_size} with objective='fisher', expected none: it takes one "
            "pass over all samples"
        )
    if metric == "fisher" and objective in ("loss", "fisher"):
        raise ValueError(
            f"metric: found 'fisher' with objective={objective!r}, expected 'none': it is for "
            "layers that imitate"
        )
    if metric == "fisher" and batch_size is not None:
        raise ValueError(
            f"metric: found {metric!r} with batch_size, expected 'none': on mini-batches errors "
            "are not measured in a metric"
        )
    limit = positive_int("memory_limit", memory_limit)
    if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):  # type: ignore[operator]
        raise ValueError(f"tolerance: found {tolerance!r}, expected a fraction of at least 0")
    if not (is_number(damping) and 0 < damping < math.inf):  # type: ignore[operator]
        raise ValueError(f"damping: found {damping!r}, expected a number above 0")
    if not is_int(seed):
        raise TypeError(f"seed: found {seed!r}, expected an int")
    if swaps is not None and not (is_int(swaps) and swaps >= 0):  # type: ignore[operator]
        raise ValueError(f"swaps: found {swaps!r}, expected an int of at least 0")
    if not isinstance(sequential, bool):
        raise TypeError(f"sequential: found {sequential!r}, expected True or False")
    if replacement not in (None, True, False):
        raise TypeError(f"replacement: found {replacement!r}, expected True, False or None")
    share = _budget(budget)
    others = {"size": size, "steps": steps, "tolerance": tolerance}
    given = [name for name, value in others.items() if value is not None]
    if share is not None and given:
        raise ValueError(f"budget: found budget and {given[0]}, expected one of them")
    step = positive_int("round_to", round_to)
    if not isinstance(uniform, bool):
        raise TypeError(f"uniform: found {uniform!r}, expected True or False")
    if (step or uniform) and (steps is not None or tolerance is not None):
        raise ValueError(
            f"{'round_to' if step else 'uniform'}: found with {given[-1]}, expected size or budget"
        )
    if isinstance(size, Mapping):
        size = {name: _checked_size(each) for name, each in size.items()}
    elif size is not None:
        size = _checked_size(size)
    elif steps is None and tolerance is None and share is None:
        size = 0.5
    names, consumers = _layers(layers)
    return Settings(
        layers=names,
        consumers=consumers,
        size=size,
        steps=steps,
        tolerance=None if tolerance is None else float(tolerance),  # type: ignore[arg-type]
        objective=str(objective),
        weights=str(weights),
        replacement=steps is not None if replacement is None else bool(replacement),
        candidates=candidates,
        batch_size=batch_size,
        shortlist=shortlist,
        screen=screen,
        seed=int(seed),  # type: ignore[call-overload]
        memory_limit=limit or room(torch.device("cpu")),
        sequential=sequential,
        swaps=MOST_SWAPS if swaps is None else int(swaps),  # type: ignore[call-overload]
        budget=share,
        round_to=step or 1,
        uniform=uniform,
        metric="none" if own_metric else str(metric),
        own_metric=own_metric,
        damping=float(damping),  # type: ignore[arg-type]
    )


def nearest(size: int, units: int, step: int) -> int:
    """The multiple of `step` nearest to `size`, or all units where they are; of two the larger."""
    below = size // step * step
    allowed = [each for each in (below, below + step, units) if 1 <= each <= units]
    return min(allowed, key=lambda each: (abs(each - size), -each))


def _budget(budget: object) -> tuple[str, float] | None:
    if budget is None:
        return None
    expected = "expected {'flops': 0.6}, {'params': 0.5} or {'latency': 0.7}, say"
    if not isinstance(budget, Mapping):
        raise TypeError(f"budget: found {budget!r}, {expected}")
    if len(budget) != 1 or next(iter(budget)) not in BUDGETS:
        raise ValueError(f"budget: found {dict(budget)!r}, {expected}")
    [(what, share)] = budget.items()
    if not is_number(share):
        raise TypeError(f"budget: found {dict(budget)!r}, {expected}")
    if not 0 < share <= 1:
        raise ValueError(f"budget: found {dict(budget)!r}, expected a share in (0, 1]")
    return what, float(share)


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
    raise TypeError(f"layers: found {layers!r}, expected a name, names or a mapping of names")


def _checked_size(size: object) -> int | float:
    expected = "expected an int of at least 1 (units) or a float in (0, 1] (a fraction)"
    if not is_number(size):
        raise TypeError(f"size: found {size!r}, {expected}")
    checked = int(size) if is_int(size) else float(size)  # type: ignore[call-overload,arg-type]
    if not (checked >= 1 if isinstance(checked, int) else 0 < checked <= 1):
        raise ValueError(f"size: found {size!r}, {expected}")
    return checked
