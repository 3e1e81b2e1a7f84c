"""One layer's greedy path: from its units' features, from sums over its consumers, or through all.

from_features: where a Linear gives the model's output, by any loss; kernels for most
from_sums:     imitation and the Fisher information of gates, from products over all samples
from_network:  the whole network's loss, where other layers follow
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch, samples_of
from ..data.losses import Criterion, Metric, bound, number
from ..graph.groups import Group
from ..graph.unfold import outputs_of
from ..kernels.loop import greedy
from ..kernels.path import Path, Rule, Step
from ..runtime.checkpoint import Steps
from ..runtime.progress import warn
from ..surgery.selection import LayerSelection, distinct_counts, first_picks
from .features import LayerData
from .imitation import Sums, losses_of
from .memory import check_least_squares
from .network_loss import Network, NetworkObjective
from .options import REPEATS_LIMIT, Settings
from .output_loss import CustomObjective, Solver
from .reweight import losses_along, refit

Bar = Callable[..., Any]


def from_features(
    data: LayerData, rule: Rule, chosen: Settings, backend: str, bar: Bar, steps: Steps
) -> LayerSelection:
    if data.criterion.kind == "custom":
        warn(
            "loss: a function of your own takes the slow path, a call for each candidate and step; "
            "'mse', 'cross_entropy' and 'bce_with_logits' have kernels",
        )
    if chosen.batch_size is not None and not data.in_memory:
        raise ValueError(
            f"batch_size: the activations do not fit in memory_limit={chosen.memory_limit} bytes, "
            "expected them to: raise the limit or give fewer samples"
        )
    weights = chosen.weights
    if weights == "auto":
        weights = "refit" if data.imitation else "counts"
    native = _native(weights, rule)
    batches = chosen.batches(rule.steps, data.samples, data.ranks) if chosen.batch_size else None
    if batches is not None:
        data.shuffle(batches.order)
    solver = Solver(data, backend, rule, chosen.memory_limit, batches, steps)
    dense_loss, empty_loss = solver.moments.dense_loss, solver.moments.empty_loss
    if data.criterion.kind == "custom":
        dense_loss = CustomObjective(data).dense_loss()
    enough = -float("inf")
    if chosen.tolerance is not None:
        enough = chosen.tolerance * empty_loss if data.imitation else (
            dense_loss + chosen.tolerance * abs(dense_loss))  # fmt: skip
    whole = rule.draws is None and chosen.batch_size is None

    def path_of(rule: Rule) -> Path:
        with bar(total=rule.steps, desc=f"layer {data.group.producer}: greedy steps") as shown:
            step = _step(shown, enough if native else -float("inf"))
            return solver.run(rule, with_gap=whole and native, step=step)

    if native or chosen.tolerance is None:
        path = path_of(rule)
        losses, fitted = path.losses, None
        if not native:
            fitted = refit(data, path.order) if weights == "refit" else None
            losses = losses_along(data, path.order, weights, fitted, solver.moments.mass)
    else:
        mass, limit = solver.moments.mass, chosen.memory_limit
        path, losses, fitted = _until(path_of, rule, enough, data, weights, mass, limit)
    _warn_of_repeats(data.group.producer, rule, path.order, chosen)
    _warn_of_missed(data.group.producer, losses, enough)
    certified = (
        whole and weights == "counts" and rule.replacement and data.criterion.kind != "custom"
    )
    return LayerSelection.of_path(
        data.units, path.order, weights,
        None if fitted is None else {data.group.consumer: fitted}, losses=losses,
        gap=path.gap,
        dense_loss=torch.tensor(dense_loss, dtype=torch.float64),
        bound=bound(dense_loss, solver.moments.spread, len(path.order)) if certified else None,
        slices=dict(data.group.slices), outputs={data.group.consumer: data.outputs},
        loss=data.criterion.kind,
        objective="imitation" if data.imitation else "loss",
    )  # fmt: skip


def from_sums(
    sums: Sums, rule: Rule, chosen: Settings, backend: str, bar: Bar, loss: str = "mse"
) -> LayerSelection:
    """loss: what the sums are of the gates for ("mse" in their features, for imitation)"""
    group = sums.group
    weights = "refit" if chosen.weights == "auto" else chosen.weights
    native = _native(weights, rule)
    gram, moments = (None, None) if weights == "refit" else sums.moments()
    dense_loss, empty_loss = (
        sums.ends() if moments is None else (moments.dense_loss, moments.empty_loss)
    )
    enough = -float("inf")
    if chosen.tolerance is not None:
        enough = chosen.tolerance * empty_loss
    with bar(total=rule.steps, desc=f"layer {group.producer}: greedy steps") as shown:
        fitted = None
        if gram is None or moments is None:
            path, fitted = sums.refit(
                rule, backend, _step(shown, enough),
                swaps=0 if chosen.tolerance is not None else chosen.swaps,
                damping=chosen.damping,
            )  # fmt: skip
        elif weights == "none" and not rule.replacement:
            path = sums.path_unscaled(gram, moments, rule, backend, _step(shown, -float("inf")))
        else:
            path = sums.path(gram, moments, rule, backend, with_gap=native and rule.draws is None,
                             step=_step(shown, enough if native else -float("inf")))  # fmt: skip
    losses = path.losses
    if gram is not None and moments is not None and not native:
        along = losses_of(first_picks(path.order), weights, gram, moments)
        losses = along[distinct_counts(path.order) - 1]
    reached = (losses <= enough).nonzero()
    k = int(reached[0]) + 1 if len(reached) else len(losses)
    order, gap = path.order[:k], None if path.gap is None else path.gap[:k]
    _warn_of_missed(group.producer, losses[:k], enough)
    _warn_of_repeats(group.producer, rule, order, chosen)
    certified = rule.draws is None and weights == "counts" and rule.replacement
    gates = fitted.pop(sums.gates) if fitted and sums.gates else None
    return LayerSelection.of_path(
        group.units, order, weights, fitted or None, gates, losses=losses[:k], gap=gap,
        dense_loss=torch.tensor(dense_loss, dtype=torch.float64),
        bound=bound(dense_loss, moments.spread, k) if certified and moments else None,
        slices=dict(group.slices), outputs=sums.outputs, loss=loss,
        objective="fisher" if sums.gates else "imitation",
    )  # fmt: skip


def from_network(
    network: Network, group: Group, rule: Rule, chosen: Settings, samples: Batch | None,
    sums: Sums | None, bar: Bar, steps: Steps,
) -> LayerSelection:  # fmt: skip
    """Candidates by the whole network's loss.

    samples: all of them, for mini-batches; sums: for weights="refit"
    """
    weights = "counts" if chosen.weights == "auto" else chosen.weights
    as_they_are = weights == "none" and not rule.replacement
    native = _native(weights, rule) or as_they_are
    network.stop_before(network.first_of(group.consumers)[1])
    dense_loss = network.loss({})
    if not math.isfinite(dense_loss):
        raise ValueError(
            f"layer {group.producer!r}: the network's loss is {dense_loss}, expected a finite "
            "number: NaN or inf in weights or activations"
        )
    metric, whole = None, dense_loss  # what tolerance is of: the lower, the better
    if chosen.own_metric is not None:
        metric = Criterion("custom", function=_checked(chosen.own_metric))
        whole = -network.loss({}, metric)
    enough = -math.inf
    if chosen.tolerance is not None:
        enough = whole + chosen.tolerance * abs(whole)
    batched = None
    if samples is not None:
        some = bool(samples.args or samples.kwargs)  # on this rank
        count = (samples_of(samples) or 1) if some else 0
        batched = chosen.batches(rule.steps, count, network.ranks)
    objective = NetworkObjective(
        network, group, not as_they_are, batched, samples, chosen.screen, steps
    )
    order, losses, reached = list[int](), list[float](), list[float]()

    def layer() -> LayerSelection:
        picks = torch.tensor(order)
        return LayerSelection.of_path(
            group.units, picks, weights,
            None if sums is None else sums.refit_of(first_picks(picks), chosen.damping),
            losses=torch.tensor(losses, dtype=torch.float64), gap=None, bound=None,
            dense_loss=torch.tensor(dense_loss, dtype=torch.float64), slices=dict(group.slices),
            outputs={name: outputs_of(network.model, group, name) for name in group.consumers},
            loss=network.criterion.kind, objective="loss",
        )  # fmt: skip

    with bar(total=rule.steps, desc=f"layer {group.producer}: greedy steps") as shown:

        def step(k: int, unit: int, loss: float) -> bool:
            shown.update()
            order.append(unit)
            now = {} if native and metric is None else network.weights_of(layer())
            losses.append(loss if native else network.loss(now))
            reached.append(losses[-1] if metric is None else -network.loss(now, metric))
            return reached[-1] <= enough

        greedy(objective, rule, step)
    found = layer()
    _warn_of_repeats(group.producer, rule, found.order, chosen)
    _warn_of_missed(group.producer, torch.tensor(reached), enough, 1 if metric is None else -1)
    return found


def _checked(metric: Metric) -> Callable[[Tensor, Tensor], Tensor]:
    """A metric of the user's own, as a tensor; what is wrong with its value shows here."""

    def value(outputs: Tensor, targets: Tensor) -> Tensor:
        found = number("metric", metric(outputs, targets))
        if not math.isfinite(found):
            raise ValueError(f"metric: your function returned {found}, expected a finite number")
        return torch.tensor(found, dtype=torch.float64)

    return value


def _native(weights: str, rule: Rule) -> bool:
    """Is the network that the loop evaluates by eq. 1 the one that is kept?"""
    return weights == "counts" or (weights == "uniform" and not rule.replacement)


def _warn_of_missed(layer: str, losses: Tensor, enough: float, sign: int = 1) -> None:
    """sign: -1 for a metric, of which more is better."""
    if float(losses[-1]) > enough > -math.inf:
        warn(
            f"tolerance: layer {layer!r} ends at {sign * float(losses[-1]):.4g} after "
            f"{len(losses)} steps, {'above' if sign > 0 else 'below'} the {sign * enough:.4g} that "
            "was asked for",
        )


def _until(
    path_of: Callable[[Rule], Path], rule: Rule, enough: float, data: LayerData, weights: str,
    mass: float, limit: int,
) -> tuple[Path, Tensor, Any]:  # fmt: skip
    """Runs longer and longer paths (they are nested) until the reweighted loss is low enough."""
    steps = 32
    while True:
        part = replace(rule, steps=min(steps, rule.steps))
        path = path_of(part)
        fitted = None
        if weights == "refit":
            check_least_squares(data.group.producer, len(first_picks(path.order)), limit)
            fitted = refit(data, path.order)
        losses = losses_along(data, path.order, weights, fitted, mass)
        reached = (losses <= enough).nonzero()
        if len(reached):
            k = int(reached[0]) + 1
            return Path(path.order[:k], path.losses[:k], None), losses[:k], fitted
        if len(path.order) < part.steps or part.steps == rule.steps:
            return path, losses, fitted
        steps *= 4


def _step(shown: Any, enough: float) -> Step:
    def step(k: int, unit: int, loss: float) -> bool:
        shown.update()
        return loss <= enough

    return step


def _warn_of_repeats(layer: str, rule: Rule, order: Tensor, chosen: Settings) -> None:
    distinct = int(distinct_counts(order)[-1])
    stuck = len(order) == rule.steps and distinct < rule.size
    if chosen.size is not None and rule.replacement and stuck:
        warn(
            f"layer {layer!r}: after {rule.steps} steps ({REPEATS_LIMIT} times its "
            f"size) repeats left it at {distinct} of {rule.size} distinct units",
        )
