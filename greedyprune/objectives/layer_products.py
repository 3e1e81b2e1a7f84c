"""The sums that a layer is selected from, of all of its consumers, and the paths that follow.

Either each consumer's products of features (products.py), or the products of the layer's gates
(fisher.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.forward import check_finite, hooked, run_model
from ..data.halves import in_second_half
from ..data.padding import NO_PADDING, NO_POSITION
from ..graph.executor import tensors_of
from ..graph.executors import GraphExecutors
from ..graph.groups import Group
from ..kernels import exchange, ops
from ..kernels.least_squares import chosen_damping, feature_rows, on_units, ridge
from ..kernels.path import Moments, NestedFit, Path, Rule, Step
from ..runtime.checkpoint import NO_CHECKPOINT, Checkpoint
from ..runtime.progress import Bar
from ..runtime.resume import Pass
from ..surgery.selection import LayerSelection, distinct_counts
from .memory import WIDEST
from .products import ConsumerProducts, Products

Roots = Mapping[str, Tensor]  # square roots of the metrics of consumers' output errors, by name


class LayerProducts:
    """The products of all of a group's consumers, and the paths that follow from them.

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
        model: nn.Module, group: Group, roots: Roots, *, given: bool = False, halves: bool = False
    ) -> LayerProducts:
        """Empty sums; ValueError where weights are not finite.

        given, halves: as for `Products`
        """
        for name in (*group.producers, *group.consumers):
            check_finite(name, model.get_submodule(name))
        consumers = [
            ConsumerProducts(
                name, model.get_submodule(name), group, roots.get(name), given=given, halves=halves
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

    def end_losses(self) -> tuple[float, float]:
        """The loss with all units as they are, and without any unit."""
        ends = (consumer.end_losses() for consumer in self.consumers)
        dense, empty = map(sum, zip(*ends, strict=True))
        return max(0.0, dense) / self.mass, empty / self.mass

    def moments(self) -> tuple[Tensor, Moments]:
        """G (N, N) float64 and the sums of eq. (2), for the dense output as the target."""
        units, (first, *others) = self.group.units, self.consumers
        gram = first.unit_gram()
        for consumer in others:
            gram += consumer.unit_gram()
        mean_norm = float(gram.sum())  # |mean phi|^2
        gram *= units**2
        beta = units * sum(
            (consumer.unit_beta() for consumer in self.consumers), torch.zeros(units).double()
        )
        target_norm = sum(consumer.target_norm() for consumer in self.consumers)
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
        consumers = self.consumers
        if not all(consumer.halves for consumer in consumers):
            return least
        assert all(len(consumer.sums) == 2 for consumer in consumers), "halves were added up"
        norms = torch.stack([consumer.contributions() for consumer in consumers]).sum(0)
        kept = max(1, min(kept, self.group.units // 2))
        units = norms.argsort(descending=True, stable=True)[:kept].sort().values
        problems = [consumer.errors_without(units) for consumer in consumers]
        squares = [
            consumer.squares()[feature_rows(units, consumer.width)] for consumer in consumers
        ]
        return chosen_damping(problems, least, squares)[0]

    def refit_path(
        self, rule: Rule, backend: str, step: Step | None, *, swaps: int, damping: float
    ) -> tuple[Path, dict[str, NestedFit]]:
        """Greedy steps of least squares refitted in each (eq. (4)), then exchanges.

        The ridge R, a diagonal matrix, is towards the dense weights W: with the weights B on the
        kept units, tr((W - B) R (W - B)^T) is added to the squared error, where B is 0 for other
        units. That is least squares with K + R in the place of K, and with the right side
        (K + R) W^T. The losses are those without the ridge. Several consumers take a unit through
        features of their own: their problems are one, whose matrices are zero between them.
        """
        width = sum(consumer.width for consumer in self.consumers)
        ridges = [ridge(consumer.squares(), damping) for consumer in self.consumers]
        gram, right, slices = self._side_by_side(ridges)
        target_norm = sum(
            consumer.target_norm() + float((consumer.weight.square() * its_ridge).sum())
            for consumer, its_ridge in zip(self.consumers, ridges, strict=True)
        )
        undamped = gram.diagonal().clone()
        by_unit = [its_ridge.view(self.group.units, -1) for its_ridge in ridges]
        gram.diagonal().add_(torch.cat(by_unit, 1).flatten())
        path, fitted = ops.greedy_refit(
            gram, right, target_norm, rule, width=width, scale=1 / self.mass, step=step,
            backend=backend,
        )  # fmt: skip
        if swaps and width <= WIDEST and len(fitted.units) == len(path.order):
            best = exchange.best_exchanged(
                gram, right, target_norm, fitted.units, width, swaps, backend
            )
            if not best.units.equal(fitted.units):
                gains = best.solved.square().sum(1).view(-1, width).sum(1)
                losses = (target_norm - gains.cumsum(0)) / self.mass
                path, fitted = Path(best.units, losses, None, path.scored, path.rescored), best
        gram.diagonal().copy_(undamped)
        by_consumer, losses = {}, path.losses
        at = distinct_counts(path.order) - 1
        for consumer, its_ridge, (columns, outputs) in zip(
            self.consumers, ridges, slices, strict=True
        ):
            part = replace(fitted, units=fitted.units.clone())
            if len(self.consumers) > 1:
                rows = torch.arange(len(fitted.factor)).view(-1, width)[:, columns].flatten()
                solved = fitted.solved[rows][:, outputs].clone()
                part = NestedFit(fitted.units.clone(), fitted.factor[rows[:, None], rows], solved)
            losses = losses - part.distances(consumer.weight, its_ridge)[at] / self.mass
            if consumer.root is not None:  # the weights themselves are the same in any metric
                plain = torch.linalg.solve(consumer.root, part.solved, left=False)
                part = replace(part, solved=plain)
            by_consumer[consumer.name] = part
        return replace(path, losses=losses.clamp(min=0)), by_consumer

    def refit_on(self, units: Tensor, damping: float) -> dict[str, NestedFit]:
        """Each consumer's least squares on given units (K,) int64, towards the dense weights."""
        fitted = {}
        for consumer in self.consumers:
            added = ridge(consumer.squares(), damping)
            right = consumer.right() + added[:, None] * consumer.weight.T
            fitted[consumer.name] = on_units(consumer.gram, right, units, consumer.width, added)
        return fitted

    def _side_by_side(
        self, ridges: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[tuple[slice, slice]]]:
        """All consumers' problem: (N w, N w) and (N w, C), and where each consumer's part is.

        The right side has the ridges' part, the matrix does not.
        """
        if len(self.consumers) == 1:
            [only] = self.consumers
            right = only.right() + ridges[0][:, None] * only.weight.T
            return only.gram, right, [(slice(None), slice(None))]
        n, width = self.group.units, sum(consumer.width for consumer in self.consumers)
        outputs = sum(consumer.outputs for consumer in self.consumers)
        gram = torch.zeros(n, width, n, width, dtype=torch.float64)
        right = torch.zeros(n, width, outputs, dtype=torch.float64)
        slices, column, output = [], 0, 0
        for consumer, its_ridge in zip(self.consumers, ridges, strict=True):
            columns = slice(column, column + consumer.width)
            its_outputs = slice(output, output + consumer.outputs)
            column, output = columns.stop, its_outputs.stop
            products = consumer.gram.view(n, consumer.width, n, consumer.width)
            gram[:, columns, :, columns] = products
            its_right = consumer.right() + its_ridge[:, None] * consumer.weight.T
            right[:, columns, its_outputs] = its_right.view(n, consumer.width, -1)
            slices.append((columns, its_outputs))
        return gram.view(n * width, n * width), right.view(n * width, outputs), slices


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
    owned: bool = False, halves: bool = False,
) -> dict[str, LayerProducts]:  # fmt: skip
    """The products of every group by the name of its layer, in one pass over the data.

    purpose: tells a checkpoint these sums from others of the same layers
    owned:   each group's are wanted on one rank only, its owner
    halves:  as for `Products`
    """
    ranks = batches.ranks
    every = [LayerProducts.of_consumers(model, group, roots, halves=halves) for group in groups]
    consumers = [consumer for products in every for consumer in products.consumers]
    resumed = Pass(checkpoint, purpose + " ".join(group.producer for group in groups))
    resumed.hold(*consumers)
    takers: dict[str, list[Products]] = {}
    for consumer in consumers:
        takers.setdefault(consumer.name, []).append(consumer)

    second_half: Tensor | None = None
    padding = NO_PADDING

    def add(name: str, inputs: Tensor) -> None:
        for consumer in takers[name]:
            consumer.add(inputs.detach(), second_half=second_half, mask=padding.of(name))

    # Hooks do not see the input of every linear map; the graph has them all.
    executors = GraphExecutors(model) if any(group.inner for group in groups) else None
    tensors = tensors_of(model)
    with hooked(model, takers if executors is None else (), before=add):
        for batch in resumed.new(bar(batches, "activations")):
            second_half = in_second_half(batch) if halves else None
            padding = batch.padding
            if executors is None:
                run_model(model, batch)
            else:
                executors.of(batch).visit_inputs(batch, tensors, takers, add)
    collected: dict[str, LayerProducts] = {}
    for i, products in enumerate(every):
        owner = ranks.owner(i) if owned else None
        for consumer in products.consumers:
            consumer.finish(ranks, owner)
        if owner in (None, ranks.rank):
            collected[products.group.producer] = products
    return collected
