"""Sizes for a budget: how many units each layer keeps within a share of the dense model's cost.

Each layer's greedy path tells its loss at every size. A knapsack (knapsack.py) finds the sizes
whose losses have the lowest sum within the budget.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from .data.batches import Batch, Batches
from .data.forward import hooked, run_model
from .graph.costs import BudgetReport, Cost, count_flops
from .graph.groups import Group
from .graph.names import slice_of
from .knapsack import Knapsack, Numbers, solve
from .objectives.layer_products import LayerProducts
from .runtime.arguments import is_int, is_number
from .runtime.progress import warn
from .surgery.cut import cut_to
from .surgery.selection import LayerSelection

Kinds = Sequence[Sequence[Group]]  # layers that keep one share of their units
KindSizes = Sequence[Sequence[tuple[int, ...]]]  # for each kind, its layers' sizes, ascending
COSTS = ("flops", "params", "latency")
ROUNDS = 4  # a cost is measured, and the limit lowered by the excess, at most so often
SHARES = (1.0, 0.75, 0.5, 0.25)  # of every layer's units, where latencies are measured
SECONDS, RUNS = 2.0, 5  # measuring takes at least so long, and so many runs of each model


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

    Args:
        flops: share of the FLOPs on the first batch, by torch.utils.flop_counter; in (0, 1]
        params: share of the parameters; in (0, 1]
        latency: share of the time of a forward pass of the first batch, measured on the model's
            device; in (0, 1]
        uniform: one size for all layers of a kind. Layers are of a kind if they have the same
            number of units and lie between modules of the same types, such as the feed-forward
            blocks of a transformer
        trials: the number of trials in all. Each is a forward pass of the held-out samples, or a
            call of `score`. At least one for each layer; 0: each layer's own error decides
        score: a function of the model that gives a number of which more is better, such as its
            accuracy on data of your own. It is called once for each trial, with a pruned model that
            the next trial changes

    Raises:
        ValueError, TypeError: none or several of flops, params and latency; one of them, `trials`
            or `score` that is out of range or of another type; a `score` without `trials`

    Example:
        >>> greedyprune.Budget(flops=0.6, uniform=True).share
        0.6
    """

    flops: float | None = None
    params: float | None = None
    latency: float | None = None
    uniform: bool = False
    trials: int = 0
    score: Callable[[nn.Module], float] | None = None

    def __post_init__(self) -> None:
        given = {name: share for name in COSTS if (share := getattr(self, name)) is not None}
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise ValueError(f"Budget: found {names}, expected one of {', '.join(COSTS)}")
        [(name, share)] = given.items()
        if not is_number(share):
            raise TypeError(f"{name}: found {share!r}, expected a share in (0, 1]")
        if not 0 < share <= 1:
            raise ValueError(f"{name}: found {share!r}, expected a share in (0, 1]")
        if not isinstance(self.uniform, bool):
            raise TypeError(f"uniform: found {self.uniform!r}, expected True or False")
        if not is_int(self.trials):
            raise TypeError(f"trials: found {self.trials!r}, expected an int of at least 0")
        if self.trials < 0:
            raise ValueError(f"trials: found {self.trials}, expected at least 0")
        if self.score is not None and not callable(self.score):
            raise TypeError(f"score: found {self.score!r}, expected a function of the model")
        if self.score is not None and not self.trials:
            raise ValueError("score: found one without trials, expected the number of trials")

    @property
    def what(self) -> str:
        """Which cost is limited."""
        return next(name for name in COSTS if getattr(self, name) is not None)

    @property
    def share(self) -> float:
        """The share of the dense model's cost."""
        return float(getattr(self, self.what))


def nearest(size: int, units: int, step: int) -> int:
    """The multiple of `step` nearest to `size`, or `units` if that is nearer; of two the larger."""
    below = size // step * step
    allowed = [multiple for multiple in (below, below + step, units) if 1 <= multiple <= units]
    return min(allowed, key=lambda multiple: (abs(multiple - size), -multiple))


def size_step(group: Group, round_to: int) -> int:
    """The least number of units whose channels are a multiple of `round_to`."""
    channels = math.gcd(*(slice_of(group.slices, name).neighbours for name in group.producers))
    return round_to // math.gcd(round_to, channels)


def sizes_in_one_share(groups: Sequence[Group], round_to: int) -> list[tuple[int, ...]]:
    """Each group's size, for all shares of their units that these groups can keep, ascending.

    Sizes are multiples of what `round_to` means for each group, or all units.
    """
    parts = math.gcd(*(group.units for group in groups))
    steps = [size_step(group, round_to) for group in groups]
    every = [tuple(group.units // parts * m for group in groups) for m in range(1, parts + 1)]
    return [
        sizes for i, sizes in enumerate(every, 1)
        if i == parts or all(size % step == 0 for size, step in zip(sizes, steps, strict=True))
    ]  # fmt: skip


def kinds_of(model: nn.Module, groups: Sequence[Group], uniform: bool) -> list[list[Group]]:
    """Layers that keep one share of their units: those that the model's code needs to do so.

    uniform: also those with equal numbers of units, cut in the same kinds of tensors
    """
    kinds: dict[object, list[Group]] = {}
    for group in groups:
        places = set()
        for tensor, at in group.places if uniform else ():
            module, _, attribute = tensor.rpartition(".")
            owner = model.get_submodule(module)
            if not isinstance(owner, nn.Embedding):  # a table of T5's biases, for some heads only
                kind = type(owner).__name__
                places.add((kind, attribute, at.dim, at.width, at.neighbours))
        key = (group.units, *sorted(places)) if uniform else group.producer
        kinds.setdefault(key, []).append(group)
    result: list[list[Group]] = []
    for members in kinds.values():
        shares = {name for group in members for name in group.share}
        tied = [kind for kind in result if any(group.producer in shares for group in kind)]
        result = [kind for kind in result if kind not in tied]
        result.append([group for kind in tied for group in kind] + members)
    return result


def within_budget(
    budget: Budget,
    model: nn.Module,
    groups: Sequence[Group],
    batches: Batches,
    cost: Cost | None,
    round_to: int,
    values_of: Callable[[Kinds, KindSizes], Sequence[Numbers]],
) -> tuple[dict[str, int], BudgetReport]:
    """The size of each layer, and the share of the dense model's cost that they take.

    cost:      the model's cost for any sizes; None: latency, which is measured here
    values_of: for each kind of layers what is lost at each of its sizes

    ValueError where the smallest sizes cost more than the budget allows.
    """
    batch, ranks, share = batches.first(), batches.ranks, budget.share
    kinds = kinds_of(model, groups, budget.uniform)
    sizes_of = [sizes_in_one_share(kind, round_to) for kind in kinds]
    if cost is None:
        cost = ranks.on_first("latency", lambda: _latency(model, kinds, batch))
    least = _by_layer(kinds, [sizes[0] for sizes in sizes_of])
    if cost.at(least) > share * cost.dense:
        raise ValueError(
            f"{budget.what}: found {share:g}, but the smallest sizes of the layers leave "
            f"{cost.at(least) / cost.dense:.4g} of the dense model's; expected at least this share"
        )
    knapsack = knapsack_of(kinds, sizes_of, values_of(kinds, sizes_of), cost, share * cost.dense)
    smallest = knapsack.cost(np.zeros(len(kinds), np.int64))
    for _ in range(ROUNDS):
        best = solve(knapsack)
        sizes = _by_layer(kinds, [of[k] for of, k in zip(sizes_of, best.choice, strict=True)])
        reached = ranks.on_first(
            "cost", partial(_measured, budget.what, model, groups, sizes, batch, cost.dense)
        )
        if reached <= share:
            break
        over = (reached - share) * cost.dense
        knapsack = replace(knapsack, limit=max(smallest, knapsack.limit - over))
    else:
        warn(
            f"{budget.what}: found {reached:.4g} of the dense model's, above the {share:.4g} that "
            "was asked for",
        )
    return sizes, BudgetReport(budget.what, share, reached, best.value, best.gap)


def _by_layer(kinds: Sequence[Sequence[Group]], sizes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Sizes by the layers' names. sizes: for each kind those of its layers"""
    return {
        group.producer: size
        for kind, of_kind in zip(kinds, sizes, strict=True)
        for group, size in zip(kind, of_kind, strict=True)
    }


def relative_losses(products: LayerProducts, path: LayerSelection) -> Tensor:
    """A layer's losses with its first 1 to N units, (N,).

    They are divided by its loss without units, except for gates, whose losses are all rises of the
    model's loss.
    """
    empty = 1.0 if products.gates else products.end_losses()[1]
    return path.losses / (empty or 1.0)


def sums_of(kinds: Kinds, sizes_of: KindSizes, losses: Mapping[str, Tensor]) -> list[Numbers]:
    """For each kind, the sum of its layers' losses at each of its sizes.

    losses: for each layer (N,), with its first 1 to N units
    """
    sums = list[Numbers]()
    for kind, sizes in zip(kinds, map(np.array, sizes_of), strict=True):
        paths = [losses[group.producer].numpy() for group in kind]
        sums.append(np.sum([path[sizes[:, j] - 1] for j, path in enumerate(paths)], 0))
    return sums


def knapsack_of(
    kinds: Kinds, sizes_of: KindSizes, values: Sequence[Numbers], cost: Cost, limit: float,
) -> Knapsack:  # fmt: skip
    """An item for each kind of layers. Its width is the size of its first layer.

    sizes_of: for each kind the sizes that its layers can have
    values:   for each kind what is lost at each of them
    """
    costs, widths = [], []
    ratios: dict[str, float] = {}  # of a layer's size to its item's width
    for kind, sizes in zip(kinds, map(np.array, sizes_of), strict=True):
        widths.append(sizes[:, 0].astype(np.float64))
        costs.append(np.zeros(len(sizes)))
        ratios |= {group.producer: group.units / kind[0].units for group in kind}
    place = {group.producer: i for i, kind in enumerate(kinds) for group in kind}
    couplings: dict[tuple[int, int], float] = {}
    for layers, amount in cost.parts.items():
        a_unit = amount / math.prod(cost.units[name] / ratios[name] for name in layers)
        items = sorted(place[name] for name in layers)
        if items[0] == items[-1]:
            costs[items[0]] += a_unit * widths[items[0]] ** len(items)
        else:
            if len(items) > 2:
                names = ", ".join(map(repr, layers))
                raise ValueError(
                    f"size: found a cost that depends on the sizes of {names} together, expected "
                    "Budget(params=) or Budget(flops=)"
                )
            i, j = items  # a weight has two dimensions that are cut
            couplings[i, j] = couplings.get((i, j), 0.0) + a_unit
    rest = cost.dense - sum(cost.parts.values())
    return Knapsack(values, costs, widths, couplings, limit - rest)


def _measured(
    what: str, model: nn.Module, groups: Sequence[Group], widths: Mapping[str, int], batch: Batch,
    dense: int,
) -> float:  # fmt: skip
    """The cost of a model that is really cut to these sizes, as a share of the dense model's."""
    small = cut_to(model, groups, widths)
    if what == "params":
        return sum(parameter.numel() for parameter in small.parameters()) / dense
    if what == "flops":
        return count_flops(small, lambda: run_model(small, batch))[1] / dense
    before, after = (times[""] for times in medians([model, small], batch))
    return after / before


def _latency(model: nn.Module, kinds: Sequence[Sequence[Group]], batch: Batch) -> Cost:
    """Nanoseconds: a module's time is modelled as a constant and a part in proportion to its sizes.

    That part is the slope of a line through the module's times in models cut to a few shares of all
    sizes. All parts are then scaled to the time that the whole model gains.
    """
    groups = [group for kind in kinds for group in kind]
    sizes_of = [sizes_in_one_share(kind, 1) for kind in kinds]
    cut = [
        _by_layer(kinds, [sizes[max(1, round(share * len(sizes))) - 1] for sizes in sizes_of])
        for share in SHARES
    ]
    owners = {name.rpartition(".")[0] for group in groups for name in group.slices}
    models = [cut_to(model, groups, widths) for widths in cut]
    whole = [times[""] for times in medians(models, batch)]
    by_module = medians(models, batch, sorted(owners))
    units = {group.producer: group.units for group in groups}
    parts: Counter[tuple[str, ...]] = Counter()
    for name in owners:
        layers = tuple(
            g.producer for g in groups if any(t.rpartition(".")[0] == name for t in g.slices)
        )
        shares = [math.prod(w[layer] / units[layer] for layer in layers) for w in cut]
        slope = np.polyfit(shares, [times[name] for times in by_module], 1)[0]
        parts[layers] += max(0, round(float(slope)))
    dense = round(whole[0])
    foreseen = dense - Cost(dense, units, parts).at(cut[-1])
    scale = max(0.0, whole[0] - whole[-1]) / max(1, foreseen)
    return Cost(dense, units, {layers: round(scale * t) for layers, t in parts.items()})


def medians(
    models: Sequence[nn.Module], batch: Batch, modules: Sequence[str] = ()
) -> list[dict[str, float]]:
    """Nanoseconds of each model (by the name "") and of its modules, over interleaved runs."""
    times: list[dict[str, list[float]]] = [{} for _ in models]
    begun = time.perf_counter()
    runs = 0
    while runs <= RUNS or time.perf_counter() - begun < SECONDS:
        for model, into in zip(models, times, strict=True):
            for name, elapsed in _timed(model, batch, modules).items():
                if runs:  # the first one warms up
                    into.setdefault(name, []).append(elapsed)
        runs += 1
    return [{name: median(runs) for name, runs in into.items()} for into in times]


def _timed(model: nn.Module, batch: Batch, modules: Sequence[str]) -> dict[str, float]:
    begun: dict[str, float] = {}
    elapsed = dict.fromkeys(modules, 0.0)

    def start(name: str, _: Tensor) -> None:
        begun[name] = _now()

    def stop(name: str, _: Tensor) -> None:
        elapsed[name] += _now() - begun[name]

    with hooked(model, modules, before=start, after=stop):
        before = _now()
        run_model(model, batch)
        elapsed[""] = _now() - before
    return elapsed


def _now() -> float:
    """Nanoseconds, once the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter_ns()
