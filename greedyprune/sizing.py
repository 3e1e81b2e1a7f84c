"""Sizes for a budget: how many units each layer keeps within shares of the dense model's costs.

Each layer's greedy path tells its loss at every size. A knapsack (sizes/knapsack.py) finds the
sizes whose losses have the lowest sum within the budget.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor, nn

from . import latency
from .data.batches import Batch, Batches
from .data.forward import run_model
from .graph.costs import Cost, count_flops
from .graph.groups import Group
from .objectives.layer_products import LayerProducts
from .peak_memory import memory_of, moments_of, peaks_of
from .runtime.progress import warn
from .sizes.budget import Budget, BudgetReport
from .sizes.curves import Curves
from .sizes.kinds import Kinds, KindSizes, kinds_of, sizes_in_one_share
from .sizes.knapsack import Numbers
from .surgery.cut import cut_to
from .surgery.layer_selection import LayerSelection

ROUNDS = 5  # costs are measured, and limits moved by what they miss, at most so often
SLACK = 0.02  # of the dense model's cost: a budget that is met so nearly is met
DEAREST = 3  # layers that an error names


def within_budget(
    budget: Budget,
    model: nn.Module,
    groups: Sequence[Group],
    batches: Batches,
    costs: Mapping[str, Cost],
    round_to: int,
    values_of: Callable[[Kinds, KindSizes], Sequence[Numbers]],
) -> tuple[dict[str, int], BudgetReport, Curves]:
    """The size of each layer, the shares of the dense model's costs that they take, the curves.

    costs:     the model's FLOPs and parameters for any sizes
    values_of: for each kind of layers what is lost at each of its sizes

    ValueError where the smallest sizes cost more than the budget allows.
    """
    batch, ranks, asked = batches.first(), batches.ranks, budget.shares
    kinds = kinds_of(model, groups, budget.uniform)
    sizes_of = [sizes_in_one_share(kind, round_to, budget.min_share) for kind in kinds]
    known = {what: [cost] for what, cost in costs.items()}
    if "latency" in asked:
        cost = ranks.on_first(
            "latency", lambda: latency.latency_of(model, kinds, batch, budget.deploy)
        )
        known["latency"] = [cost]
    if "memory" in asked:
        known["memory"] = ranks.on_first(
            "memory", lambda: memory_of(model, kinds, sizes_of, batch, costs["params"])
        )
    nothing = [np.zeros(len(sizes)) for sizes in sizes_of]
    curves = Curves.of(kinds, sizes_of, nothing, known, uniform=budget.uniform)
    _check_possible(budget, model, groups, curves, batches)
    curves = replace(curves, values=values_of(kinds, sizes_of))
    least = curves.least()
    limits = {
        what: max(share, curves.share(what, least)) * curves.dense(what)
        for what, share in asked.items()
    }
    chosen: tuple[dict[str, int], BudgetReport] | None = None
    tried = list[dict[str, int]]()
    for _ in range(ROUNDS):
        sizes, best = curves.within(limits)
        if sizes in tried:
            break
        tried.append(sizes)
        left = ranks.on_first(
            "cost", partial(_measured, budget, tuple(asked), model, groups, sizes, batch, curves)
        )
        report = BudgetReport(asked, left, best.value, best.gap)
        excess = {what: left[what] - share for what, share in asked.items()}
        if max(excess.values()) <= 0:
            if chosen is None or best.value < chosen[1].objective:
                chosen = sizes, report
            if excess[report.what] > -SLACK or report.what in costs:
                break
            excess = {report.what: excess[report.what]}
        for what, over in excess.items():
            if over > 0 or report.what == what:
                limit = limits[what] / curves.dense(what)
                if over > 0:  # other sizes follow
                    limit = min(limit, curves.share(what, sizes))
                limits[what] = max(curves.share(what, least), limit - over) * curves.dense(what)
    if chosen is None:
        chosen = sizes, report
        warn(
            f"{report.what}: found {report.reached:.4g} of the dense model's, above the "
            f"{report.share:.4g} that was asked for",
        )
    return *chosen, curves


def _check_possible(
    budget: Budget, model: nn.Module, groups: Sequence[Group], curves: Curves, batches: Batches
) -> None:
    """ValueError where the smallest sizes cost more than allowed. It names the dearest layers."""
    least = curves.least()
    dear = {what for what, share in budget.shares.items() if curves.share(what, least) > share}
    if not dear:
        return
    batch, ranks = batches.first(), batches.ranks
    left = ranks.on_first(
        "least cost", partial(_measured, budget, tuple(dear), model, groups, least, batch, curves)
    )
    for what in dear:
        if left[what] <= budget.shares[what]:  # what the curves foresee is not exact
            continue
        small = cut_to(model, groups, least)
        dearest = Counter(_by_module(what, small, batch)).most_common(DEAREST)
        names = [
            f"{name!r} ({amount / curves.dense(what):.2g})" for name, amount in dearest if amount
        ]
        raise ValueError(
            f"{what}: found {budget.shares[what]:g}, but the smallest sizes of the layers leave "
            f"{left[what]:.4g} of the dense model's"
            + f", the dearest layers being {', '.join(names)}" * bool(names)
            + "; expected at least this share"
        )


def _by_module(what: str, model: nn.Module, batch: Batch) -> dict[str, float]:
    """The cost of each module that contains no others; memory: the most while it runs."""
    modules = {name: m for name, m in model.named_modules() if not list(m.children())}
    if what == "flops":
        by_module = count_flops(model, lambda: run_model(model, batch))[2]
        return {name: float(by_module.get(name, 0)) for name in modules}
    if what == "latency":
        [times] = latency.medians([model], batch, list(modules))
        return {name: times.get(name, 0.0) for name in modules}
    if what == "memory":
        return peaks_of(model, batch, list(modules))
    return {name: float(sum(p.numel() for p in m.parameters())) for name, m in modules.items()}


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


def _measured(
    budget: Budget, what: Sequence[str], model: nn.Module, groups: Sequence[Group],
    widths: Mapping[str, int], batch: Batch, curves: Curves,
) -> dict[str, float]:  # fmt: skip
    """The costs of a model that is really cut to these sizes, as shares of the dense model's."""
    small, left = cut_to(model, groups, widths), dict[str, float]()
    for name in what:
        if name == "params":
            left[name] = sum(p.numel() for p in small.parameters()) / curves.dense(name)
        elif name == "flops":
            flops = count_flops(small, lambda: run_model(small, batch))[1]
            left[name] = flops / curves.dense(name)
        elif name == "latency":
            whole = cut_to(model, groups, {group.producer: group.units for group in groups})
            models = [whole, cut_to(model, groups, widths)]  # which `deploy` may change
            before, after = (
                times[""] for times in latency.medians(models, batch, deploy=budget.deploy)
            )
            left[name] = after / before
        else:
            left[name] = moments_of(small, batch).peak / curves.dense(name)
    return left
