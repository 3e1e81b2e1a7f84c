"""Sums over the data that a layer is selected from: products of its features, and of its gates.

Each consumer's input is unfolded to one column for each position (a convolution's input as its
patches), and K = X X^T is added up. With w_a the weights on feature a, units i and j have
G_ij = N^2 sum of K_ab <w_a, w_b> over their features a and b (eq. (2)). The right side of
every least squares problem is K W^T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.forward import check_finite, hooked, run_model
from ..graph.executor import GraphExecutors, tensors_of
from ..graph.groups import Group
from ..graph.tracing import window_of
from ..graph.unfold import unfolded_parts, unit_major, weight_of
from ..kernels import exchange, ops
from ..kernels.least_squares import on_units, ridge
from ..kernels.path import Moments, NestedFit, Path, Rule, Step
from ..kernels.products import add_right, add_upper_product, mirror
from ..runtime.checkpoint import NO_CHECKPOINT, Checkpoint
from ..runtime.distributed import Ranks
from ..runtime.progress import Bar
from ..runtime.resume import Pass
from ..surgery.selection import LayerSelection, distinct_counts
from .memory import WIDEST

Roots = Mapping[str, Tensor]  # square roots of the metrics of consumers' output errors, by name


class Products:
    """The sums of one least squares problem in the units' features; a unit's lie side by side.

    name:   of the layer that takes the units
    weight: (C, F) float64, what the features are multiplied with in the dense network
    gram:   (F, F) float64, K; until `finish` only the blocks on and above the diagonal
    root:   (C, C) float64, the square root of the metric that errors are measured in; None: I
    given:  are the targets added with the inputs? Else they are the dense outputs for these inputs
    """

    def __init__(
        self, name: str, units: int, weight: Tensor, device: torch.device, given: bool = False
    ) -> None:
        self.name, self.units, self.weight = name, units, weight
        self.outputs, self.features = weight.shape
        shape = self.features, self.features
        self.gram = torch.zeros(shape, dtype=torch.float64, device=device)
        self.root: Tensor | None = None
        self.positions = 0
        self._cross: Tensor | None = None
        if given:
            self._cross = self.gram.new_zeros(self.features, self.outputs)
        self._target_norm = 0.0

    def add(self, inputs: Tensor, outputs: Tensor | None = None) -> None:
        """Adds one batch of inputs and of their targets; None: the dense outputs."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """The sums so far."""
        numbers = torch.tensor([self.positions, self._target_norm], dtype=torch.float64)
        cross = {} if self._cross is None else {"cross": self._cross}
        return {"gram": self.gram, "numbers": numbers, **cross}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Sets the sums to what `state` returned."""
        self.gram.copy_(state["gram"])
        self.positions, self._target_norm = int(state["numbers"][0]), float(state["numbers"][1])
        if self._cross is not None:
            self._cross.copy_(state["cross"])

    @property
    def mass(self) -> float:
        """What sums of squares are divided by."""
        return float(self.positions * self.outputs)

    @property
    def width(self) -> int:
        """Features a unit."""
        return self.features // self.units

    def finish(self, ranks: Ranks, owner: int | None = None) -> None:
        """Adds up all ranks' sums, for all ranks or the owner, and moves them to the CPU."""
        ranks.sum_upper(f"products {self.name!r}", self.gram, owner)
        counts = ranks.sum_numbers(f"sums {self.name!r}", self.positions, self._target_norm)
        self.positions, self._target_norm = int(counts[0]), counts[1]
        if self._cross is not None:
            ranks.sum(f"right side {self.name!r}", self._cross)
            self._cross = self._cross.cpu()
        mirror(self.gram)
        self.gram = self.gram.cpu()

    def right(self) -> Tensor:
        """<x_i, target>, (F, C) float64."""
        return self.gram @ self.weight.T if self._cross is None else self._cross

    def target_norm(self) -> float:
        """|target|^2."""
        if self._cross is None:
            return float((self.right() * self.weight.T).sum())
        return self._target_norm

    def end_losses(self) -> tuple[float, float]:
        """|target - output|^2 with all units as they are, and without any unit."""
        output_norm = float(((self.gram @ self.weight.T) * self.weight.T).sum())
        if self._cross is None:
            return 0.0, output_norm
        along = float((self._cross * self.weight.T).sum())
        return self._target_norm - 2 * along + output_norm, self._target_norm

    def unit_beta(self) -> Tensor:
        """<phi_i, target> / N for each unit i: (N,) float64."""
        return (self.right() * self.weight.T).view(self.units, -1).sum(1)

    def unit_gram(self) -> Tensor:
        """<phi_i, phi_j> / N^2 for units i and j: (N, N) float64."""
        products = (self.weight.T @ self.weight).mul_(self.gram)
        if self.width == 1:
            return products
        shape = self.units, self.width, self.units, self.width
        return products.view(shape).sum((1, 3))


class ConsumerProducts(Products):
    """The products of one consumer, whose target is its dense output."""

    def __init__(
        self, name: str, module: nn.Module, group: Group, root: Tensor | None = None,
        given: bool = False,
    ) -> None:  # fmt: skip
        dense, at = weight_of(module), group.slices[f"{name}.weight"]
        weight = unit_major(dense.detach().double().cpu(), at, group.units)
        weight = weight if root is None else root @ weight
        super().__init__(name, group.units, weight, dense.device, given)
        self.root, self.layer = root, group.producer
        self._module, self._at = module, at
        self._window = group.windows.get(name) or window_of(module)

    def add(self, inputs: Tensor, outputs: Tensor | None = None) -> None:
        if not inputs.isfinite().all():
            raise ValueError(
                f"layer {self.layer!r}: NaN or inf in its activations on the data, expected finite "
                "numbers"
            )
        bias, double = getattr(self._module, "bias", None), torch.float64
        for columns, target in unfolded_parts(self._window, inputs, outputs):
            taps, positions = columns.shape[1:]
            rows = columns.view(self._at.outer, self.units, self._at.inner, taps, positions)
            rows = rows.transpose(0, 1).reshape(self.features, positions)
            add_upper_product(self.gram, rows, double)  # float64: the loss can be a small rest
            self.positions += positions
            if target is None:
                continue
            if bias is not None:
                target = target - bias.detach()[:, None]
            if self.root is not None:
                target = self.root.to(target) @ target
            assert self._cross is not None
            add_right(self._cross, rows, target, double)
            self._target_norm += float(target.double().square().sum())


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
        model: nn.Module, group: Group, roots: Roots, given: bool = False
    ) -> LayerProducts:
        """Empty sums; ValueError where weights are not finite."""
        for name in (*group.producers, *group.consumers):
            check_finite(name, model.get_submodule(name))
        consumers = [
            ConsumerProducts(name, model.get_submodule(name), group, roots.get(name), given)
            for name in group.consumers
        ]
        return LayerProducts(group, consumers, {c.name: c.outputs for c in consumers})

    @property
    def mass(self) -> float:
        return sum(consumer.mass for consumer in self.consumers)

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

    def refit_path(
        self, rule: Rule, backend: str, step: Step | None, *, swaps: int, damping: float
    ) -> tuple[Path, dict[str, NestedFit]]:
        """Greedy steps of least squares refitted in each (eq. (4)), then exchanges.

        The losses are those without the ridge. Several consumers take a unit through features of
        their own: their least squares problems are one, whose matrices are zero between them.
        """
        gram, right, slices = self._side_by_side()
        target_norm = sum(consumer.target_norm() for consumer in self.consumers)
        widths = torch.tensor([consumer.width for consumer in self.consumers])
        ridges = [ridge(consumer.gram.diagonal(), damping) for consumer in self.consumers]
        width, undamped = int(widths.sum()), gram.diagonal().clone()
        ridge_of = torch.tensor(ridges).double().repeat_interleave(widths)
        gram.diagonal().add_(ridge_of.repeat(self.group.units))
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
            losses = losses - its_ridge / self.mass * part.norms()[at]
            if consumer.root is not None:  # the weights themselves are the same in any metric
                plain = torch.linalg.solve(consumer.root, part.solved, left=False)
                part = replace(part, solved=plain)
            by_consumer[consumer.name] = part
        return replace(path, losses=losses.clamp(min=0)), by_consumer

    def refit_on(self, units: Tensor, damping: float) -> dict[str, NestedFit]:
        """Each consumer's least squares on given units (K,) int64."""
        return {
            consumer.name: on_units(
                consumer.gram, consumer.right(), units, consumer.width,
                ridge(consumer.gram.diagonal(), damping),
            )
            for consumer in self.consumers
        }  # fmt: skip

    def _side_by_side(self) -> tuple[Tensor, Tensor, list[tuple[slice, slice]]]:
        """All consumers' problem: (N w, N w) and (N w, C), and where each consumer's part is."""
        if len(self.consumers) == 1:
            [only] = self.consumers
            return only.gram, only.right(), [(slice(None), slice(None))]
        n, width = self.group.units, sum(consumer.width for consumer in self.consumers)
        outputs = sum(consumer.outputs for consumer in self.consumers)
        gram = torch.zeros(n, width, n, width, dtype=torch.float64)
        right = torch.zeros(n, width, outputs, dtype=torch.float64)
        slices, column, output = [], 0, 0
        for consumer in self.consumers:
            columns = slice(column, column + consumer.width)
            its_outputs = slice(output, output + consumer.outputs)
            column, output = columns.stop, its_outputs.stop
            products = consumer.gram.view(n, consumer.width, n, consumer.width)
            gram[:, columns, :, columns] = products
            right[:, columns, its_outputs] = consumer.right().view(n, consumer.width, -1)
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
    checkpoint: Checkpoint[LayerSelection] = NO_CHECKPOINT, purpose: str = "", owned: bool = False,
) -> dict[str, LayerProducts]:  # fmt: skip
    """The products of every group by the name of its layer, in one pass over the data.

    purpose: tells a checkpoint these sums from others of the same layers
    owned:   each group's are wanted on one rank only, its owner
    """
    ranks = batches.ranks
    every = [LayerProducts.of_consumers(model, group, roots) for group in groups]
    consumers = [consumer for products in every for consumer in products.consumers]
    resumed = Pass(checkpoint, purpose + " ".join(group.producer for group in groups))
    resumed.hold(*consumers)
    takers: dict[str, list[Products]] = {}
    for consumer in consumers:
        takers.setdefault(consumer.name, []).append(consumer)

    def add(name: str, inputs: Tensor) -> None:
        for consumer in takers[name]:
            consumer.add(inputs.detach())

    # Hooks do not see the input of every linear map; the graph has them all.
    executors = GraphExecutors(model) if any(group.inner for group in groups) else None
    tensors = tensors_of(model)
    with hooked(model, takers if executors is None else (), before=add):
        for batch in resumed.new(bar(batches, "activations")):
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
