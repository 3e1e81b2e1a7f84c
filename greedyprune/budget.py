"""Widths for a budget: how many units each layer keeps, so that the model costs a given share.

Each layer's greedy path says what it loses at every width; a knapsack (knapsack.py) finds the
widths with the lowest sum of these losses whose cost is within the budget.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from .data.batches import Batch, Batches
from .data.forward import run_model
from .graph.costs import BudgetReport, Cost, count_flops
from .graph.groups import Group
from .kernels.path import Rule
from .knapsack import Knapsack, solve
from .objectives.imitation import Sums
from .objectives.options import Settings, nearest
from .runtime.distributed import Ranks
from .runtime.progress import warn
from .surgery.cut import cut_to
from .surgery.selection import LayerSelection

ROUNDS = 4  # a latency is measured, and asked for a little lower where it was missed
SHARES = (1.0, 0.75, 0.5, 0.25)  # of every layer's units, where latencies are measured
SECONDS, RUNS = 2.0, 5  # measuring takes so long, and at least so many runs of each model


def step_of(group: Group, round_to: int) -> int:
    """The least number of units whose channels are a multiple of `round_to`."""
    channels = math.gcd(*(group.slices[f"{name}.weight"].inner for name in group.producers))
    return round_to // math.gcd(round_to, channels)


def kinds_of(model: nn.Module, groups: Sequence[Group], uniform: bool) -> list[list[Group]]:
    """Layers that get one width: with as many units, cut at the same places of the same modules."""
    if not uniform:
        return [[group] for group in groups]
    kinds: dict[object, list[Group]] = {}
    for group in groups:
        places = []
        for tensor, at in group.slices.items():
            module, _, attribute = tensor.rpartition(".")
            kind = type(model.get_submodule(module)).__name__
            places.append((kind, attribute, at.dim, at.outer, at.inner))
        kinds.setdefault((group.units, *sorted(places)), []).append(group)
    return list(kinds.values())


def check_uniform(kinds: Sequence[Sequence[Group]], rules: Mapping[str, Rule]) -> None:
    for kind in kinds:
        first, *others = (group.producer for group in kind)
        for name in others:
            if rules[name].size != rules[first].size:
                raise ValueError(
                    f"uniform: found sizes {rules[first].size} for {first!r} and "
                    f"{rules[name].size} for {name!r}, expected one for layers of a kind"
                )


def within_budget(
    model: nn.Module, groups: Sequence[Group], batches: Batches, chosen: Settings,
    costs: Mapping[str, Cost], turns: Sequence[Sequence[Group]],
    sums_of: Callable[[Sequence[Group]], dict[str, Sums]],
    path_of: Callable[[Sums], LayerSelection],
) -> tuple[dict[str, int], BudgetReport]:  # fmt: skip
    """The width of each layer, and what of the budget that takes.

    turns: the groups whose sums fit in memory together; sums_of: those sums, each on its owner
    path_of: a layer's whole path from its sums, without replacement and without exchanges
    """
    assert chosen.budget is not None
    what, share = chosen.budget
    batch = batches.first()
    ranks, cost = batches.ranks, costs[what] if what != "latency" else None
    if cost is None:
        cost = ranks.on_first("latency", lambda: _latency(model, groups, batch))
    least = {g.producer: nearest(1, g.units, step_of(g, chosen.round_to)) for g in groups}
    if cost.at(least) > share * cost.dense:
        raise ValueError(
            f"budget: found {{{what!r}: {share:g}}}, but the smallest widths of the layers leave "
            f"{cost.at(least) / cost.dense:.4g} of the dense model's; expected at least that"
        )
    kinds = kinds_of(model, groups, chosen.uniform)
    losses: dict[str, Tensor] = {}
    for some in turns:
        losses |= _losses(some, sums_of(some), path_of, ranks)
    knapsack = knapsack_of(kinds, losses, cost, chosen.round_to, share * cost.dense)
    smallest = knapsack.cost(np.zeros(len(kinds), np.int64))
    for _ in range(ROUNDS):
        best = solve(knapsack)
        widths = {
            group.producer: int(each[k])
            for kind, each, k in zip(kinds, knapsack.widths, best.choice, strict=True)
            for group in kind
        }
        reached = ranks.on_first(
            "cost", partial(_measured, what, model, groups, widths, batch, cost.dense)
        )
        if reached <= share:
            break
        over = (reached - share) * cost.dense
        knapsack = replace(knapsack, limit=max(smallest, knapsack.limit - over))
    else:
        warn(
            f"budget: found {reached:.4g} of the dense model's {what}, above the {share:.4g} that "
            "was asked for",
        )
    return widths, BudgetReport(what, share, reached, best.value, best.gap)


def _losses(
    groups: Sequence[Group],
    found: Mapping[str, Sums],
    path_of: Callable[[Sums], LayerSelection],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """What each layer loses with its first 1 to N units.

    As a share of what it does with none, except for gates, of which all say by how much the model's
    loss rises (fisher.py).
    """

    def losses(name: str) -> Tensor:
        sums = found[name]
        empty = 1.0 if sums.gates else sums.ends()[1]
        return path_of(sums).losses / (empty or 1.0)

    return ranks.each([group.producer for group in groups], losses)


def knapsack_of(
    kinds: Sequence[Sequence[Group]], losses: Mapping[str, Tensor], cost: Cost, round_to: int,
    limit: float,
) -> Knapsack:  # fmt: skip
    """An item for each kind of layers; losses: for each layer (N,), with its first 1 to N units."""
    values, costs, widths = [], [], []
    for kind in kinds:
        units, step = kind[0].units, step_of(kind[0], round_to)
        each = np.array(sorted({nearest(w, units, step) for w in range(1, units + 1)}))
        widths.append(each.astype(np.float64))
        costs.append(np.zeros(len(each)))
        values.append(np.sum([losses[group.producer].numpy()[each - 1] for group in kind], 0))
    place = {group.producer: i for i, kind in enumerate(kinds) for group in kind}
    couplings: dict[tuple[int, int], float] = {}
    for layers, amount in cost.parts.items():
        a_unit = amount / math.prod(cost.units[name] for name in layers)
        items = sorted(place[name] for name in layers)
        if items[0] == items[-1]:
            costs[items[0]] += a_unit * widths[items[0]] ** len(items)
        else:
            i, j = items  # a weight has two dimensions that are cut
            couplings[i, j] = couplings.get((i, j), 0.0) + a_unit
    rest = cost.dense - sum(cost.parts.values())
    return Knapsack(values, costs, widths, couplings, limit - rest)


def _measured(
    what: str, model: nn.Module, groups: Sequence[Group], widths: Mapping[str, int], batch: Batch,
    dense: int,
) -> float:  # fmt: skip
    """What a model that is really cut to these widths costs, as a share of the dense model."""
    small = cut_to(model, groups, widths)
    if what == "params":
        return sum(each.numel() for each in small.parameters()) / dense
    if what == "flops":
        return count_flops(lambda: run_model(small, batch))[1] / dense
    before, after = (each[""] for each in medians([model, small], batch))
    return after / before


def _latency(model: nn.Module, groups: Sequence[Group], batch: Batch) -> Cost:
    """Nanoseconds, as if a module's had a part in proportion to its layers' widths.

    That part is a line through the times of the module in models cut to a few shares of all widths,
    and all of them are scaled to what the whole model gains.
    """
    cut = [{g.producer: max(1, round(share * g.units)) for g in groups} for share in SHARES]
    owners = {name.rpartition(".")[0] for group in groups for name in group.slices}
    models = [cut_to(model, groups, widths) for widths in cut]
    whole = [each[""] for each in medians(models, batch)]
    found = medians(models, batch, sorted(owners))
    units = {group.producer: group.units for group in groups}
    parts: Counter[tuple[str, ...]] = Counter()
    for name in owners:
        layers = tuple(
            g.producer for g in groups if any(t.rpartition(".")[0] == name for t in g.slices)
        )
        shares = [math.prod(w[layer] / units[layer] for layer in layers) for w in cut]
        slope = np.polyfit(shares, [each[name] for each in found], 1)[0]
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
    return [{name: median(each) for name, each in into.items()} for into in times]


def _timed(model: nn.Module, batch: Batch, modules: Sequence[str]) -> dict[str, float]:
    begun: dict[str, float] = {}
    elapsed = dict.fromkeys(modules, 0.0)
    handles = []
    for name in modules:
        module = model.get_submodule(name)

        def start(*_: object, name: str = name) -> None:
            begun[name] = _now()

        def stop(*_: object, name: str = name) -> None:
            elapsed[name] += _now() - begun[name]

        handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    try:
        before = _now()
        run_model(model, batch)
        elapsed[""] = _now() - before
    finally:
        for handle in handles:
            handle.remove()
    return elapsed


def _now() -> float:
    """Nanoseconds, once the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter_ns()
