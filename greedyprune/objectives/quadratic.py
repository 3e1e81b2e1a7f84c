"""From a layer's products to its selection: for imitation, and for gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..data.losses import bound
from ..graph.groups import Group
from ..kernels import ops
from ..kernels.path import NestedFit, first_picks
from ..surgery.layer_selection import Fit, LayerSelection, distinct_counts
from .head_match import matched
from .job import (
    Job,
    loop_has_kept_weights,
    until,
    warn_of_missed_tolerance,
    warn_of_repeats,
)
from .layer_products import LayerProducts, reweighted_losses, unscaled_path


def select_in_turns(
    job: Job, turns: Sequence[Sequence[Group]],
    collect: Callable[[Sequence[Group]], dict[str, LayerProducts]],
    select_layer: Callable[[Job, Group, LayerProducts], LayerSelection],
) -> dict[str, LayerSelection]:  # fmt: skip
    """Selects layers that do not wait for one another, shared out to the ranks.

    turns:   the groups whose products are in memory together
    collect: the products of one turn's groups by the names of their layers, each on its owner
    """
    selected: dict[str, LayerSelection] = {}
    known = job.checkpoint.finished
    for turn in turns:
        by_name = {group.producer: group for group in turn}
        products: dict[str, LayerProducts] = {}
        if any(known(name) is None for name in by_name):
            products = collect(turn)

        def layer(
            name: str, groups: dict[str, Group] = by_name,
            products: dict[str, LayerProducts] = products,
        ) -> LayerSelection:  # fmt: skip
            return known(name) or select_layer(job, groups[name], products[name])

        selected |= job.ranks.each(list(by_name), layer, job.checkpoint.finish)
        products.clear()  # before those of the next turn
    return selected


def select_from(
    job: Job, products: LayerProducts, *, swaps: int, damping: float, loss: str = "mse"
) -> LayerSelection:
    """Selects a layer by the squared error in its products (eq. (2), and eq. (4) with a refit).

    swaps, damping: of least squares refitted in each step
    loss: the kind of loss that gates are of; "mse" for imitation
    """
    if products.group.heads > 1:
        products = matched(products, job.solver_backend)
    group, rule = products.group, job.rule(products.group)
    weights = "refit" if job.weights == "auto" else job.weights
    weights = "none" if group.scores else weights  # no layer has weights of these units
    as_picked = loop_has_kept_weights(weights, rule)
    damping = products.damping(rule.size, damping) if weights == "refit" else damping
    gram, moments = (None, None) if weights == "refit" else products.moments()
    dense_loss, empty_loss = (
        products.end_losses() if moments is None else (moments.dense_loss, moments.empty_loss)
    )
    goal = -math.inf if job.tolerance is None else job.tolerance * empty_loss
    fitted: dict[str, Fit] = {}
    with job.bar(total=rule.steps, desc=f"layer {group.producer}: greedy steps") as shown:
        stop = until(goal, shown)
        if gram is None or moments is None:
            path, fitted = products.refit_path(
                rule, job.solver_backend, stop, swaps=swaps, damping=damping
            )
        elif weights == "none" and not rule.replacement:
            path = unscaled_path(gram, moments, rule, job.solver_backend, until(-math.inf, shown))
        else:
            path = ops.greedy_gram(
                gram, moments, rule, with_gap=as_picked,
                step=stop if as_picked else until(-math.inf, shown), backend=job.solver_backend,
            )  # fmt: skip
    if gram is not None and moments is not None and not as_picked:
        along = reweighted_losses(first_picks(path.order), weights, gram, moments)
        path = replace(path, losses=along[distinct_counts(path.order) - 1])
    reached = (path.losses <= goal).nonzero()
    k = int(reached[0]) + 1 if len(reached) else len(path.losses)
    order, losses, gap = path.order[:k], path.losses[:k], path.gap
    warn_of_missed_tolerance(group, losses, goal)
    warn_of_repeats(job, group, order)
    certified = moments is not None and weights == "counts" and rule.replacement
    gates = fitted.pop(products.gates) if fitted and products.gates else None
    assert gates is None or isinstance(gates, NestedFit)
    return LayerSelection.of_path(
        group.units, order, weights, fitted or None, gates, losses=losses,
        gap=None if gap is None else gap[:k],
        dense_loss=torch.tensor(dense_loss, dtype=torch.float64),
        bound=bound(dense_loss, moments.spread, k) if certified and moments else None,
        **group.cut, outputs=products.outputs, loss=loss,
        objective="fisher" if products.gates else "imitation",
    )  # fmt: skip
