"""A layer inside a network, judged by the loss of the whole network: eq. (1) unchanged.

Each candidate is a run of the layers that follow (Ye et al. 2020, arXiv:2003.01794).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..data.batches import Batch, samples_of
from ..data.losses import Criterion, Metric, ask, number
from ..graph.groups import Group
from ..graph.unfold import outputs_of
from ..kernels.loop import greedy
from ..kernels.path import first_picks
from ..runtime.resume import Steps
from ..surgery.cut import masked
from ..surgery.layer_selection import LayerSelection
from ..surgery.selection import Selection
from .job import (
    Job,
    loop_has_kept_weights,
    warn_of_missed_tolerance,
    warn_of_repeats,
)
from .layer_products import LayerProducts, collect
from .memory import refit_bytes
from .minibatches import MiniBatches, joined, mini_batches
from .network import Network, NetworkState
from .options import DAMPING

NEAR = 1e-5  # relative: losses so close are computed again in float64 (float32's differ by 1e-7)


def select_layers(job: Job, groups: Sequence[Group]) -> dict[str, LayerSelection]:
    """Selects layers in the order of the graph; backend="reference" runs the network in float64."""
    refitted = 0
    if job.weights == "refit":
        refitted = max(refit_bytes(job, group).together for group in groups)
    network = Network(
        job.model, job.batches, job.criterion, job.memory_limit - refitted, job.bar,
        traced=job.traced,
    )  # fmt: skip
    if job.backend == "reference":
        exact = network.exact()
        if exact is None:
            raise ValueError(
                "backend: found 'reference', which runs the network in float64, expected another: "
                "the model can't run in float64"
            )
        network, job = exact, replace(job, model=exact.model, batches=job.batches.of(exact.model))
    samples = None if job.loss.batch_size is None else joined(job.batches)
    selected: dict[str, LayerSelection] = {}
    for group in sorted(groups, key=lambda group: network.first_of(group.consumers)[0]):
        layer = job.checkpoint.finished(group.producer)
        if layer is None:
            products = None
            if job.weights == "refit":
                earlier = Selection(selected if job.loss.sequential else {})
                pruned = masked(job.model, earlier)
                products = collect(pruned, [group], job.batches, {}, job.bar, wide=job.wide)[
                    group.producer
                ]
            layer = select_layer(job, group, network, samples, products)
        selected[group.producer] = job.checkpoint.finish(group.producer, layer)
        if job.loss.sequential:
            network.change(network.weights_of(layer))
    return selected


def select_layer(
    job: Job, group: Group, network: Network, samples: Batch | None,
    products: LayerProducts | None,
) -> LayerSelection:  # fmt: skip
    """Selects a layer's units by the whole network's loss.

    samples:  all samples as one batch, for mini-batches
    products: of the layer's features, for weights="refit"
    """
    rule, weights = job.rule(group), "counts" if job.weights == "auto" else job.weights
    unscaled = weights == "none" and not rule.replacement
    as_picked = loop_has_kept_weights(weights, rule) or unscaled
    network.stop_before(network.first_of(group.consumers)[1])
    dense_loss = network.loss({})
    if not math.isfinite(dense_loss):
        raise ValueError(
            f"layer {group.producer!r}: the network's loss is {dense_loss}, expected a finite "
            "number: NaN or inf in weights or activations"
        )
    metric, dense_value = None, dense_loss  # what the tolerance is of: the lower, the better
    if job.loss.metric is not None:
        metric = Criterion("custom", function=_checked(job.loss.metric))
        dense_value = -network.loss({}, metric)
    goal = -math.inf
    if job.tolerance is not None:
        goal = dense_value + job.tolerance * abs(dense_value)
    batches = None
    if samples is not None:
        count = (samples_of(samples) or 1) if samples.args or samples.kwargs else 0
        batches = mini_batches(job, rule.steps, count)
    objective = NetworkObjective(job, group, network, not unscaled, batches, samples)
    order, losses, reached = list[int](), list[float](), list[float]()

    def layer() -> LayerSelection:
        picks = torch.tensor(order)
        return LayerSelection.of_path(
            group.units, picks, weights,
            None if products is None else products.refit_on(first_picks(picks), DAMPING),
            losses=torch.tensor(losses, dtype=torch.float64), gap=None, bound=None,
            dense_loss=torch.tensor(dense_loss, dtype=torch.float64), **group.cut,
            outputs={name: outputs_of(network.model, group, name) for name in group.consumers},
            loss=network.criterion.kind, objective="loss",
        )  # fmt: skip

    with job.bar(total=rule.steps, desc=f"layer {group.producer}: greedy steps") as shown:

        def step(k: int, unit: int, loss: float) -> bool:
            shown.update()
            order.append(unit)
            pruned = {} if as_picked and metric is None else network.weights_of(layer())
            losses.append(loss if as_picked else network.loss(pruned))
            reached.append(losses[-1] if metric is None else -network.loss(pruned, metric))
            return reached[-1] <= goal

        greedy(objective, rule, step)
    selected = layer()
    warn_of_repeats(job, group, selected.order)
    warn_of_missed_tolerance(group, torch.tensor(reached), goal, 1 if metric is None else -1)
    return selected


def _checked(metric: Metric) -> Callable[[Tensor, Tensor], Tensor]:
    """A user's metric as a tensor; TypeError or ValueError if it is not a finite number."""

    def value(outputs: Tensor, targets: Tensor) -> Tensor:
        result = number("metric", ask("metric", metric, outputs, targets))
        if not math.isfinite(result):
            raise ValueError(f"metric: your function returned {result}, expected a finite number")
        return torch.tensor(result, dtype=torch.float64)

    return value


class NetworkObjective:
    """eq. (1) for a layer inside a network, whose loss need not be convex in its output.

    scaled:  are the picked units' outgoing weights times N c / k? Else they stay as they are
    batches: mini-batches of the data's samples, of which step k scores on one
    """

    def __init__(
        self, job: Job, group: Group, network: Network, scaled: bool,
        batches: MiniBatches | None, samples: Batch | None,
    ) -> None:  # fmt: skip
        self.units = group.units
        self._network, self._group, self._scaled = network, group, scaled
        self._batches, self._samples = batches, samples
        self._by_gradient = job.loss.candidates if job.loss.draw == "gradient" else None
        self._steps = Steps(job.checkpoint, group.producer)
        self._counts = torch.zeros(group.units, dtype=torch.float64)
        self._loss = math.nan
        self._seen: dict[Network, tuple[int, list[NetworkState]]] = {}

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        label = f"scores {k} {everywhere}"
        return self._steps.once(label, lambda: self._scores(k, candidates, everywhere))

    def _scores(self, k: int, candidates: Tensor, everywhere: bool) -> Tensor:
        scores = torch.full((len(candidates),), math.inf, dtype=torch.float64)
        scored = torch.arange(len(candidates))
        if self._by_gradient is not None and self._by_gradient < len(candidates):
            factors, states = self._factors(k), self._states(self._network, k, everywhere)
            slopes = self._network.slopes(self._group, factors, states)
            scored = slopes[candidates].argsort(stable=True)[: self._by_gradient]
        scores[scored] = self._losses(self._network, k, candidates[scored].tolist(), everywhere)
        near = scores <= scores.min() + NEAR * scores.min().abs()
        dtype = self._network.weight(self._group.consumer).dtype
        tied = int(near.sum()) > 1 and dtype == torch.float32
        if tied and (exact := self._network.exact()) is not None:
            scores[near] = self._losses(exact, k, candidates[near].tolist(), everywhere)
        return scores

    def add(self, k: int, unit: int) -> None:
        self._counts[unit] += 1
        loss = self._steps.once(
            f"loss {k} {unit}", lambda: self._losses(self._network, k, [None], everywhere=True)
        )
        self._loss = float(loss)

    def loss(self, k: int) -> float:
        return self._loss

    def gap(self, k: int) -> float | None:
        return None  # the loss may not be convex

    def _losses(
        self, network: Network, k: int, candidates: Sequence[int | None], everywhere: bool
    ) -> Tensor:
        states = self._states(network, k, everywhere)
        losses = network.losses(self._group, self._factors(k), candidates, self._one(k), states)
        return losses.nan_to_num(nan=math.inf, posinf=math.inf)  # inf - inf after an overflow

    def _one(self, k: int) -> float:
        """What a pick counts for, in step k."""
        return self.units / k if self._scaled else 1.0

    def _factors(self, k: int) -> Tensor:
        return self._counts * self._one(k)

    def _states(self, network: Network, k: int, everywhere: bool) -> list[NetworkState] | None:
        """The mini-batch of step k, run up to the layer; None: all data."""
        if everywhere or self._batches is None or self._samples is None:
            return None
        if network not in self._seen or self._seen[network][0] != k:
            part = self._batches.part(k)
            batch = self._samples.take(self._batches.order[part])
            if network is not self._network:
                batch = batch.to(torch.float64)
            states = network.states_of(batch) if part.start < part.stop else []
            self._seen[network] = k, states
        return self._seen[network][1]
