"""A layer whose consumer gives the model's output: eq. (1), from the units' features.

Also a layer that imitates with the theory's weights and whose Gram matrix does not fit in memory:
its consumer's dense output is then the target, and columns of the Gram matrix suffice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..data.losses import Target, bound
from ..data.targets import samples_in
from ..graph.groups import Group
from ..kernels import ops
from ..kernels.loop import greedy
from ..kernels.path import Path, Rule, Step
from ..kernels.products import PRODUCT
from ..runtime.checkpoint import NO_CHECKPOINT
from ..runtime.distributed import ALONE
from ..runtime.progress import warn
from ..runtime.resume import Steps
from ..surgery.layer_selection import LayerSelection
from .features import InMemory, Streamed, layer_features
from .job import (
    Job,
    loop_has_kept_weights,
    warn_of_missed_tolerance,
    warn_of_repeats,
)
from .memory import least_squares_bytes, refitted_units
from .minibatches import MiniBatches, mini_batches
from .moments import moments
from .pointwise import CustomObjective, PointwiseObjective
from .reweight import Reweighting

# Fetching the columns of a pick costs as much as so many columns of the whole Gram matrix; measured
# on MNIST networks with 200 to 1800 steps (benchmarks/NOTES.md, "columns or Gram").
COLUMNS_PER_PICK = {"cpu": 2.1, "cuda": 7.0}
THIN_RATE = 0.7  # multiplications a second in products with few columns, beside square products
# With a tolerance, reweighted losses take a pass; they are compared after 32, 128, 512, ... steps.
FIRST_LOOK, LOOK_FACTOR = 32, 4


def select_layer(job: Job, group: Group, *, imitation: bool = False) -> LayerSelection:
    """Selects a layer's units by the loss of its consumer's output.

    imitation: squared error to the consumer's dense output, rather than the model's loss
    """
    rule = job.rule(group)
    limit = max(1, job.memory_limit - least_squares_bytes(refitted_units(job, group, imitation)))
    job = replace(job, memory_limit=limit)
    features = layer_features(job, group, imitation=imitation, limit=limit)
    try:
        return _selected(job, rule, features)
    finally:
        if isinstance(features, Streamed):
            features.close()


def _selected(job: Job, rule: Rule, features: InMemory | Streamed) -> LayerSelection:
    group, kind = features.group, features.criterion.kind
    if kind == "custom":
        warn(
            "loss: a function of your own takes the slow path: it is called for each candidate in "
            "each step; 'mse', 'cross_entropy' and 'bce_with_logits' have kernels",
        )
    weights = "counts" if job.weights == "auto" else job.weights
    batches = _shuffled_batches(job, rule, features)
    solver = Solver(job, features, rule, batches)
    dense_loss, empty_loss = solver.moments.dense_loss, solver.moments.empty_loss
    if isinstance(features, InMemory) and kind == "custom":
        dense_loss = CustomObjective(features).dense_loss()
    goal = -math.inf
    if job.tolerance is not None and features.imitation:
        goal = job.tolerance * empty_loss
    elif job.tolerance is not None:
        goal = dense_loss + job.tolerance * abs(dense_loss)
    as_picked = loop_has_kept_weights(weights, rule)
    all_candidates = rule.draws is None and batches is None
    reweighting = Reweighting(features, weights, solver.moments.mass, job.memory_limit)
    order, next_look = list[int](), FIRST_LOOK

    with job.bar(total=rule.steps, desc=f"layer {group.producer}: greedy steps") as shown:

        def step(k: int, unit: int, loss: float) -> bool:
            nonlocal next_look
            shown.update()
            order.append(unit)
            if as_picked:
                return loss <= goal
            if goal == -math.inf or k < next_look:
                return False
            next_look *= LOOK_FACTOR
            return bool((reweighting.losses(torch.tensor(order))[0] <= goal).any())

        path = solver.run(with_gap=all_candidates and as_picked, step=step)
    losses, fitted = path.losses, None
    if not as_picked:
        losses, fitted = reweighting.losses(path.order)
        reached = (losses <= goal).nonzero()
        if len(reached):
            losses = losses[: int(reached[0]) + 1]
            path = replace(path, order=path.order[: len(losses)])
    warn_of_repeats(job, group, path.order)
    warn_of_missed_tolerance(group, losses, goal)
    scale = features.criterion.scale(solver.moments.mass)
    certified = all_candidates and weights == "counts" and rule.replacement and kind != "custom"
    return LayerSelection.of_path(
        group.units, path.order, weights,
        None if fitted is None else {group.consumer: fitted}, losses=losses * scale,
        gap=None if path.gap is None else path.gap * scale,
        dense_loss=torch.tensor(dense_loss * scale, dtype=torch.float64),
        bound=bound(dense_loss, solver.moments.spread, len(path.order)) * scale
        if certified else None,
        **group.cut, outputs={group.consumer: features.outputs}, loss=kind,
        objective="imitation" if features.imitation else "loss",
    )  # fmt: skip


def _shuffled_batches(job: Job, rule: Rule, features: InMemory | Streamed) -> MiniBatches | None:
    """The mini-batches of each step, after shuffling the features to match; None: all samples."""
    if job.loss.batch_size is None or features.imitation:
        return None
    if not isinstance(features, InMemory) or not features.in_memory:
        samples = sum(block.features.shape[1] for block in features.blocks())
        width = features.width if isinstance(features, Streamed) else 0
        raise features.source.too_large(features.sample_bytes, samples, width, "batch_size")
    given = samples_in(features.targets)
    if features.targets is not None and given != features.samples:
        raise ValueError(
            f"batch_size: found {given} targets for {features.samples} samples of "
            f"layer {features.group.producer!r}, expected one for each: a loss of your own is "
            "called with the targets of a mini-batch"
        )
    batches = mini_batches(job, rule.steps, features.samples)
    assert batches is not None
    features.shuffle(batches.order)
    return batches


def columns_are_cheaper(units: int, picks: int, backend: str = "cpu") -> bool:
    """Is fetching the columns of this many picks cheaper than half of the Gram matrix?"""
    return COLUMNS_PER_PICK[backend] * picks / THIN_RATE < units / 2


class Solver:
    """Runs the greedy loop for one layer by the formulation that is cheapest for its data.

    Squared error goes by the Gram matrix, or by columns of it where those are cheaper or the matrix
    does not fit in memory. Other losses go by the kernel that scores candidates, or by the Python
    loop where the features are streamed.
    """

    def __init__(
        self, job: Job, features: InMemory | Streamed, rule: Rule, batches: MiniBatches | None
    ) -> None:
        self.features, self._backend = features, job.backend
        self._rule, self._batches = rule, batches
        self._steps = Steps(job.checkpoint, features.group.producer)  # of steps that take a pass
        self._gram: Tensor | None = None
        ranks, units = features.ranks, features.units
        self._free = min(ranks.gather("memory", job.memory_limit - features.bytes_held))
        quadratic = (
            features.criterion.kind == "mse" and job.backend != "reference" and batches is None
        )
        if rule.draws is not None and features.in_memory:
            quadratic = False  # a few random candidates are scored at once from their features
        few = quadratic and columns_are_cheaper(units, rule.most(units), job.backend)
        # Streamed features get one pass: for the Gram matrix if it fits.
        fits = units * units * 8 <= self._free
        self._columns = quadratic and (not fits or (few and features.in_memory))
        if quadratic and not self._columns:
            if isinstance(features, Streamed):
                features.release(self._free - 8 * units * units)
            self._gram = torch.zeros(units, units, dtype=torch.float64, device=features.device)
        self.moments = moments(features, job.backend, self._gram)

    def run(self, *, with_gap: bool, step: Step | None) -> Path:
        """All greedy steps."""
        custom = self.features.criterion.kind == "custom"
        with (ALONE if custom else self.features.ranks).loop(2 * self.features.units + 3):
            return self._run(with_gap, step)

    def _run(self, with_gap: bool, step: Step | None) -> Path:
        features, rule = self.features, self._rule
        if features.criterion.kind == "custom":
            assert isinstance(features, InMemory)
            return greedy(CustomObjective(features, self._batches), rule, step)
        exact = self._exact()
        ranks = features.ranks if exact is not None else ALONE  # without it no sample is looked at
        if self._gram is not None:
            return ops.greedy_gram(
                self._gram, self.moments, rule, exact=exact, with_gap=with_gap, step=step,
                ranks=ranks, backend=self._backend,
            )  # fmt: skip
        if self._columns:
            # A fetch is a pass of its own, or a wait for the GPU or for other ranks.
            block = 16 if exact is not None else 64
            capacity = min(
                self._free // (8 * features.units), block + 8 * rule.most(features.units)
            )
            columns = self._fetcher(self._free - 8 * features.units * capacity)
            if not features.in_memory:
                columns = self._remembered(columns)
            return ops.greedy_columns(
                columns, self.moments, rule, exact=exact, block=block, capacity=capacity,
                with_gap=with_gap, step=step, ranks=ranks, backend=self._backend,
            )  # fmt: skip
        if isinstance(features, InMemory) and features.in_memory and self._has_kernel():
            return ops.greedy_pointwise(
                features.features, features.outgoing, features.bias, self._target(features), rule,
                extent=features.extent, mass=self.moments.mass, with_gap=with_gap, step=step,
                ranks=features.ranks, backend=self._backend,
                starts=None if self._batches is None else self._batches.starts,
                batch=0 if self._batches is None else self._batches.size,
            )  # fmt: skip
        objective = PointwiseObjective(
            features, self._backend, self._batches, with_gap, self.moments.mass, rule,
            Steps(NO_CHECKPOINT, "") if features.in_memory else self._steps,
        )  # fmt: skip
        return greedy(objective, rule, step)

    def _has_kernel(self) -> bool:
        """Does one kernel run all greedy steps by the candidates' losses?"""
        features = self.features
        if self._backend == "reference":
            return False
        if features.ranks.size > 1 and (self._backend == "cuda" or self._batches is not None):
            return False
        # It needs three arrays of (C, m), and C may be a vocabulary.
        assert isinstance(features, InMemory)
        fits = 20 * features.outputs * features.samples <= self._free
        return features.ranks.agree("memory for outputs", fits)

    def _target(self, features: InMemory) -> Target:
        """The target, with a linear term where that of any rank has one: ranks add up alike."""
        target = features.target
        if any(features.ranks.gather("linear term", target.linear is not None)):
            zeros = torch.zeros(target.outputs, target.samples, dtype=torch.float64)
            return replace(target, linear=zeros if target.linear is None else target.linear)
        return target

    def _exact(self) -> ops.Exact | None:
        """The features in memory decide what float32 products, twice as fast, leave open."""
        features = self.features
        quadratic = self._columns or self._gram is not None
        if not (quadratic and features.in_memory and isinstance(features, InMemory)):
            return None
        if self._backend != "cpu":
            return None
        assert features.target.value is not None
        rounding = ops.columns_rounding(features.product_dtype)
        if self._gram is not None:  # n u / (1 - n u) for sums of n products, rounded up
            rounding = (PRODUCT + 4) * torch.finfo(features.product_dtype).eps / 2
        rounding += features.ranks.size * 2.0**-53
        return ops.Exact(
            rounding=rounding,
            features=features.features,
            outgoing=features.outgoing,
            target=features.target.value - features.bias[:, None],
        )

    def _remembered(
        self, fetch: Callable[[Tensor, Tensor], None]
    ) -> Callable[[Tensor, Tensor], None]:
        """Fetches that a checkpoint keeps, because each takes a pass."""

        def remembered(units: Tensor, out: Tensor) -> None:
            def compute() -> Tensor:
                fetch(units, out)
                return out

            out.copy_(self._steps.once(f"columns {units.tolist()}", compute))

        return remembered

    def _fetcher(self, free: int) -> Callable[[Tensor, Tensor], None]:
        """Fetches columns of the Gram matrix: out[i] = <phi_units[i], phi_j> for every j.

        free: bytes that the features may take in the products' dtype
        """
        features, dtype = self.features, self.features.product_dtype
        known = features.features if isinstance(features, InMemory) else None
        narrow = features.in_memory and self._backend == "cpu"
        if known is not None and narrow and known.dtype == dtype:
            rows = known

            def summed(units: Tensor, out: Tensor) -> None:
                ops.gram_columns(rows, features.outgoing, units, out, spread=True)
                features.ranks.sum(f"columns {units.tolist()}", out)

            return summed
        wide = None
        if known is not None and 8 * known.numel() <= free:
            wide = known.to(dtype)  # converted once; a fetch is then one product

        def columns(units: Tensor, out: Tensor) -> None:
            if wide is not None:
                torch.mm(wide[units], wide.T, out=out)
            else:
                out.zero_()
                for block in features.blocks():
                    h = block.features.to(dtype)
                    out += h[units] @ h.T
            out *= features.outgoing[units] @ features.outgoing.T
            features.ranks.sum(f"columns {units.tolist()}", out)

        return columns
