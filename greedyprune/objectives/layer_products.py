"""The sums that a layer is selected from, of all of its consumers, and the paths that follow.

Either each consumer's products of features (products.py), or the products of the layer's gates
(fisher.py).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.forward import check_finite, hooked, run_model
from ..data.padding import NO_PADDING, NO_POSITION
from ..data.parts import Parts
from ..data.positions import NO_DRAWS, Draws
from ..graph.executors import GraphExecutors
from ..graph.groups import Group
from ..graph.names import owner_of
from ..graph.networks import tensors_of
from ..kernels import exchange, ops
from ..kernels.dual import DualPart, greedy_dual
from ..kernels.least_squares import chosen_damping, on_units, ridge
from ..kernels.path import Moments, NestedFit, Path, Rule, Step, first_picks
from ..runtime.checkpoint import NO_CHECKPOINT, Checkpoint
from ..runtime.progress import Bar
from ..runtime.resume import Pass
from ..surgery.layer_selection import Fit, LayerSelection, distinct_counts
from .memory import WIDEST
from .products import ConsumerProducts, Products
from .row_products import RowProducts

Fits = dict[str, Fit]  # by consumer
Roots = Mapping[str, Tensor]  # square roots of the metrics of consumers' output errors, by name


class LayerProducts:
    """The products of all of a group's consumers, and the paths that follow from them.

    The loss is the sum of the consumers' squared errors, each times its factor, over the mass.

    outputs: how many outputs each consumer has
    gates:   "", or the name of the products that are of one gate a unit (fisher.py)
    """

    def __init__(
        self, group: Group, consumers: Sequence[Products], outputs: Mapping[str, int],
        gates: str = "",
    ) -> None:  # fmt: skip
        self.group, self.consumers, self.outputs, self.gates = group, consumers, outputs, gates

    @staticmethod
    def of_consumers(
        model: nn.Module, group: Group, roots: Roots, *, given: bool = False, halves: bool = False,
        weights: Mapping[str, Tensor] | None = None, samples: int = 0, wide: bool = False,
    ) -> LayerProducts:  # fmt: skip
        """Empty sums; ValueError where weights are not finite.

        given, halves, samples: as for `ConsumerProducts`
        wide: are columns kept, and no sums?
        weights: the weights that the consumers have by now; None: the dense ones
        """
        for name in (*group.producers, *group.consumers):
            check_finite(name, owner_of(model, name))
        kind = RowProducts if wide else ConsumerProducts
        consumers = [
            kind(
                model,
                group,
                name,
                roots.get(name),
                given=given,
                halves=halves,
                current=(weights or {}).get(name),
                samples=samples,
            )
            for name in group.consumers
        ]
        return LayerProducts(group, consumers, {c.name: c.outputs for c in consumers})

    @property
    def mass(self) -> float:
        """What sums of squares are divided by; ValueError where no position counts."""
        mass = sum(consumer.mass for consumer in self.consumers)
        if not mass:
            raise ValueError(NO_POSITION)
        return mass

    @cached_property
    def factors(self) -> list[float]:
        """What each consumer's squared error counts with.

        That is 1, but in a stream, and for the scores of several attentions, the errors count as
        shares of those without any unit: the loss is the mean of the shares. A consumer whose
        target is zero then counts 0.
        """
        if not (self.group.stream or self.group.scores) or self.gates:
            return [1.0] * len(self.consumers)
        norms = [consumer.target_norm() for consumer in self.consumers]
        share = self.mass / len(norms)
        return [share / norm if norm > 0 else 0.0 for norm in norms]

    def end_losses(self) -> tuple[float, float]:
        """The loss with all units as they are, and without any unit."""
        ends = [consumer.end_losses() for consumer in self.consumers]
        dense, empty = (self._weighted(errors) for errors in zip(*ends, strict=True))
        return max(0.0, dense) / self.mass, empty / self.mass

    def _weighted(self, errors: Iterable[float]) -> float:
        return sum(f * error for f, error in zip(self.factors, errors, strict=True))

    def moments(self) -> tuple[Tensor, Moments]:
        """G (N, N) float64 and the sums of eq. (2), for the dense output as the target."""
        units = self.group.units
        (first, *others), (factor, *factors) = self.consumers, self.factors
        gram = first.unit_gram().mul_(factor)
        for factor, consumer in zip(factors, others, strict=True):
            gram.add_(consumer.unit_gram(), alpha=factor)
        beta = torch.zeros(units, dtype=torch.float64)
        for factor, consumer in zip(self.factors, self.consumers, strict=True):
            beta.add_(consumer.unit_beta(), alpha=factor)
        mean_norm = float(gram.sum())  # |mean phi|^2
        gram *= units**2
        beta *= units
        target_norm = self._weighted(consumer.target_norm() for consumer in self.consumers)
        norm = gram.diagonal().clone()
        spread = max(0.0, float(norm.mean()) - mean_norm) / self.mass  # B / 2 = 1 / C
        dense, empty = self.end_losses()
        return gram, Moments(
            first.positions, self.mass, norm, beta, target_norm, dense, spread, empty
        )

    def damping(self, kept: int, least: float) -> float:
        """The damping of least squares for about `kept` units, by cross-validation.

        It is chosen for the units whose own contributions to the consumers' outputs are the
        largest, so that no greedy path is needed; at most half the units.
        """
        consumers, factors = self.consumers, self.factors
        if not all(consumer.halves for consumer in consumers):
            return least
        assert all(len(consumer.sums) == 2 for consumer in consumers), "halves were added up"
        norms = [f * each.contributions() for f, each in zip(factors, consumers, strict=True)]
        kept = max(1, min(kept, self.group.units // 2))
        units = torch.stack(norms).sum(0).argsort(descending=True, stable=True)[:kept].sort().values
        pairs = zip(consumers, factors, strict=True)
        problems = [consumer.errors_without(units, factor) for consumer, factor in pairs]
        return chosen_damping(problems, least)[0]

    def refit_path(
        self, rule: Rule, backend: str, step: Step | None, *, swaps: int, damping: float
    ) -> tuple[Path, Fits]:
        """Greedy steps of least squares refitted in each (eq. (4)), then exchanges.

        The ridge R, a diagonal matrix, is towards the dense weights W: with the weights B on the
        kept units, tr((W - B) R (W - B)^T) is added to the squared error, where B is 0 for other
        units. That is least squares with K + R in the place of K, and with the right side
        (K + R) W^T. The losses are those without the ridge.

        Each consumer is a part of its own. Its factor multiplies its gains where the right side is
        multiplied by the root of the factor; what was solved is divided by that root in the end.
        """
        if self.wide:
            return self._dual_path(rule, step, damping)
        consumers, factors = self.consumers, self.factors
        widths = [consumer.width for consumer in consumers]
        ridges = [ridge(consumer.squares(), damping) for consumer in consumers]
        rights = [_right(*each) for each in zip(consumers, ridges, strict=True)]
        for factor, right in zip(factors, rights, strict=True):
            right *= math.sqrt(factor)
        target_norm = self._weighted(
            consumer.target_norm() + float((consumer.weight.square() * added).sum())
            for consumer, added in zip(consumers, ridges, strict=True)
        )
        grams = [consumer.gram for consumer in consumers]
        undamped = [gram.diagonal().clone() for gram in grams]
        for gram, added in zip(grams, ridges, strict=True):
            gram.diagonal().add_(added)
        path, fits = ops.greedy_refit(
            grams, rights, target_norm, rule, widths=widths, scale=1 / self.mass, step=step,
            backend=backend,
        )  # fmt: skip
        picked = fits[0].units
        problems = list(zip(grams, rights, widths, strict=True))
        if swaps and max(widths) <= WIDEST and len(picked) == len(path.order):
            parts = [exchange.Part(gram, exchange.narrowed(r), w) for gram, r, w in problems]
            best = exchange.best_exchanged(parts, target_norm, picked, swaps, backend)
            if not best.equal(picked):
                fits = [on_units(gram, right, best, width) for gram, right, width in problems]
                gains = torch.stack([_gains(fit) for fit in fits]).sum(0)
                losses = (target_norm - gains.cumsum(0)) / self.mass
                path = Path(best, losses, None, path.scored, path.rescored)
        for gram, diagonal in zip(grams, undamped, strict=True):
            gram.diagonal().copy_(diagonal)
        by_consumer, losses = dict[str, Fit](), path.losses
        at = distinct_counts(path.order) - 1
        for factor, consumer, added, fit in zip(factors, consumers, ridges, fits, strict=True):
            if factor:
                part = replace(fit, solved=fit.solved / math.sqrt(factor))
            else:  # no error counted, so its right side was zero
                right = _right(consumer, added)
                part = on_units(consumer.gram, right, fit.units, consumer.width, added)
            losses = losses - factor * part.distances(consumer.weight, added)[at] / self.mass
            if consumer.root is not None:  # the weights themselves are the same in any metric
                plain = torch.linalg.solve(consumer.root, part.solved, left=False)
                part = replace(part, solved=plain)
            by_consumer[consumer.name] = replace(part, units=part.units.clone())
        return replace(path, losses=losses.clamp(min=0)), by_consumer

    def _dual_path(self, rule: Rule, step: Step | None, damping: float) -> tuple[Path, Fits]:
        """`refit_path` from the columns themselves; there are no exchanges."""
        parts = list[DualPart]()
        for consumer, factor in zip(self.consumers, self.factors, strict=True):
            assert isinstance(consumer, RowProducts)
            scale, added = math.sqrt(factor), ridge(consumer.squares(), damping)
            dense = consumer.weight if scale == 1 else consumer.weight * scale
            targets = consumer.targets * scale
            parts.append(DualPart(consumer.rows, targets, dense, added, consumer.width))
        path, _ = greedy_dual(parts, rule, scale=1 / self.mass, step=step)
        parts.clear()
        return path, self.refit_on(first_picks(path.order), damping)

    @property
    def wide(self) -> bool:
        return any(consumer.wide for consumer in self.consumers)

    def refit_on(self, units: Tensor, damping: float) -> Fits:
        """Each consumer's least squares on given units (K,) int64, towards the dense weights."""
        fitted = dict[str, Fit]()
        for consumer in self.consumers:
            added = ridge(consumer.squares(), damping)
            if isinstance(consumer, RowProducts):
                fitted[consumer.name] = consumer.fit(units, added)
                continue
            right = _right(consumer, added)
            fitted[consumer.name] = on_units(consumer.gram, right, units, consumer.width, added)
        return fitted


def _right(consumer: Products, added: Tensor) -> Tensor:
    """The right side with the part of a ridge `added` (N w,) towards W: (N w, C) float64."""
    return consumer.right() + added[:, None] * consumer.weight.T


def _gains(fit: NestedFit) -> Tensor:
    """By how much each unit lowers the squared error, after those before it: (K,) float64."""
    return fit.solved.square().sum(1).view(-1, fit.width).sum(1)


def unscaled_path(
    gram: Tensor, moments: Moments, rule: Rule, backend: str, step: Step | None = None
) -> Path:
    """Greedy steps for weights that stay as they are: eq. (2) with N in the place of k.

    A unit's share of the target is then a constant, like its norm. A number that is added to all
    units' constants, so that none is below the norm, changes no pick. The path's losses are those
    of this other problem.
    """
    linear = 2 * len(gram) * moments.beta
    constants = moments.norm + (linear.max() - linear)
    other = replace(moments, norm=constants, beta=torch.zeros_like(linear))
    return ops.greedy_gram(gram, other, rule, with_gap=False, step=step, backend=backend)


def reweighted_losses(units: Tensor, weights: str, gram: Tensor, moments: Moments) -> Tensor:
    """The losses of the first 1 to K of `units` (K,) for "uniform" or "none": (K,) float64."""
    part = gram[units[:, None], units]
    squares = part.cumsum(0).cumsum(1).diagonal()
    along = moments.beta[units].cumsum(0)
    shrink = torch.full((len(units),), 1 / len(gram), dtype=torch.float64)
    if weights == "uniform":
        shrink = torch.arange(1, len(units) + 1).double().reciprocal()
    return (moments.target_norm - 2 * shrink * along + shrink**2 * squares) / moments.mass


def collect(
    model: nn.Module, groups: Sequence[Group], batches: Batches, roots: Roots, bar: Bar,
    checkpoint: Checkpoint[LayerSelection] = NO_CHECKPOINT, purpose: str = "", *,
    owned: bool = False, halves: bool = False, exact: bool = False, wide: Container[str] = (),
) -> dict[str, LayerProducts]:  # fmt: skip
    """The products of every group by the name of its layer, in one pass over the data.

    purpose: tells a checkpoint these sums from others of the same layers
    owned:   each group's are wanted on one rank only, its owner
    halves:  as for `Products`
    exact:   are all positions in the sums?
    wide:    the layers whose consumers' columns are kept
    """
    ranks = batches.ranks
    samples = 0 if exact else batches.samples
    every = [
        LayerProducts.of_consumers(
            model, group, roots, halves=halves, samples=samples, wide=group.producer in wide
        )
        for group in groups
    ]
    consumers = [consumer for products in every for consumer in products.consumers]
    resumed = Pass(checkpoint, purpose + " ".join(group.producer for group in groups))
    resumed.hold(*consumers)
    takers: dict[str, list[Products]] = {}
    for consumer in consumers:
        takers.setdefault(consumer.name, []).append(consumer)

    draws = NO_DRAWS
    padding = NO_PADDING

    def add(name: str, inputs: Tensor) -> None:
        for consumer in takers[name]:
            consumer.add(inputs.detach(), draws, padding.of(name))

    # Hooks do not see the input of every linear map; the graph has them all.
    parts = Parts(model, batches)
    executors = GraphExecutors(model) if any(group.inner for group in groups) else None
    tensors = tensors_of(model)
    with hooked(model, takers if executors is None else (), before=add):
        for batch in resumed.new(parts.all(bar)):
            draws = Draws.of(batch)
            padding = batch.padding
            if executors is None:
                run_model(model, batch)
            else:
                executor = executors.of(batch)
                for name in takers:
                    executor.mask_of(name, padding)  # raises where the mask can't be used
                executor.visit_inputs(batch, tensors, takers, add)
    collected: dict[str, LayerProducts] = {}
    for i, products in enumerate(every):
        owner = ranks.owner(i) if owned else None
        for consumer in products.consumers:
            consumer.finish(ranks, owner)
        if owner in (None, ranks.rank):
            collected[products.group.producer] = products
    return collected
