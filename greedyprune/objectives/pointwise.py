"""Equation (1) itself: the loss of every candidate, for loops that no kernel runs as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..data.losses import loss_of_function
from ..data.targets import joined_over, part_of
from ..kernels import ops
from ..kernels.path import Rule
from ..runtime.resume import Steps
from .features import InMemory, Streamed
from .minibatches import MiniBatches
from .source import Block


class PointwiseObjective:
    """The candidates' losses, block by block of the data, for the losses that kernels know.

    It serves the reference backend, features that do not fit in memory, and several ranks on
    mini-batches or GPUs. Where all units are candidates, a step takes one pass: the loss after a
    pick and the next step's scores come from the same block.

    with_gap: is the Frank-Wolfe gap wanted?
    mass:     what sums over all samples are divided by
    steps:    keeps results that take a pass
    """

    def __init__(
        self, features: InMemory | Streamed, backend: str, batches: MiniBatches | None,
        with_gap: bool, mass: float, rule: Rule, steps: Steps,
    ) -> None:  # fmt: skip
        self.units, self._rule, self._steps = features.units, rule, steps
        self._features, self._backend, self._batches = features, backend, batches
        self._with_gap, self._mass = with_gap and batches is None, mass
        self._counts = torch.zeros(features.units, dtype=torch.float64, device=features.device)
        self._loss, self._gap = 0.0, 0.0
        # float32 scores with error bounds suffice where only the lowest score matters.
        self._dtype = torch.float32 if backend == "cpu" and not rule.shortlist else torch.float64
        self._looks_ahead = batches is None and rule.draws is None and not rule.shortlist
        self._next_scores = torch.empty(0)  # (2, N) of the next step, where it looks ahead

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        if self._next_scores.numel():
            scores, errors = self._next_scores[:, candidates]
        else:
            scores, errors = self._scores(k, candidates, everywhere, self._dtype)
        if self._dtype == torch.float64:
            return scores
        near = torch.arange(len(candidates))
        if errors.isfinite().all():
            near = (scores - errors <= (scores + errors).min()).nonzero().flatten()
        if len(near) == 1:
            return scores
        exact = torch.full_like(scores, math.inf)
        exact[near] = self._scores(k, candidates[near], everywhere, torch.float64)[0]
        return exact

    def _scores(self, k: int, candidates: Tensor, everywhere: bool, dtype: torch.dtype) -> Tensor:
        def compute() -> Tensor:
            sums = self._no_scores(candidates)
            for block in self._features.blocks() if everywhere else self._seen(k):
                sums += self._score(block, k, candidates, dtype)
            return self._summed(sums)

        return self._steps.once(f"scores {k} {everywhere} {dtype}", compute)

    def _score(self, block: Block, k: int, units: Tensor, dtype: torch.dtype) -> Tensor:
        """Each unit's sum of losses at step k, and the largest rounding error in it: (2, n)."""
        scores = self._no_scores(units)
        scores[0] = ops.candidate_loss(
            block.features, self._features.outgoing, self._outputs(block.features, k),
            block.target, shrink=1 / k, units=units,
            extent=block.extent or self._features.extent, dtype=dtype, backend=self._backend,
            errors=scores[1] if dtype == torch.float32 else None,
        )  # fmt: skip
        return scores

    def _no_scores(self, units: Tensor) -> Tensor:
        return torch.zeros(2, len(units), dtype=torch.float64, device=self._features.device)

    def _summed(self, scores: Tensor) -> Tensor:
        self._features.ranks.sum("scores", scores)
        return (scores / self._mass).cpu()

    def add(self, k: int, unit: int) -> None:
        self._counts[unit] += 1
        results = self._steps.once(f"step {k} {unit}", lambda: self._step(k))
        (self._loss, self._gap), self._next_scores = results[:, 0].tolist(), results[:, 1:]

    def _step(self, k: int) -> Tensor:
        """Step k's loss above its gap; to their right the next step's scores: (2, 1 + N)."""
        ranks, units = self._features.ranks, torch.arange(self.units)
        loss, along = 0.0, 0.0
        slopes = torch.zeros(self.units, dtype=torch.float64, device=self._features.device)
        scores = self._no_scores(units)
        ahead = self._looks_ahead and self._rule.goes_on(k, int(self._counts.count_nonzero()))
        for block in self._features.blocks():
            outputs = self._outputs(block.features, k)
            loss += float(block.target.loss_sum(outputs))
            if self._with_gap:
                gradient = block.target.gradient(outputs)
                along += float((gradient * (outputs - self._features.bias[:, None])).sum())
                slopes += ops.candidate_slope(
                    block.features, self._features.outgoing, gradient, units=units,
                    backend=self._backend,
                )  # fmt: skip
            if ahead:
                scores += self._score(block, k + 1, units, self._dtype)
        loss, along = ranks.sum_numbers("loss", loss, along)
        ranks.sum("slopes", slopes)
        gap = along - float(slopes.min())
        reached = torch.tensor([[loss], [gap]], dtype=torch.float64) / self._mass
        return torch.cat([reached, self._summed(scores)], 1) if ahead else reached

    def loss(self, k: int) -> float:
        return self._loss

    def gap(self, k: int) -> float | None:
        return self._gap if self._with_gap else None

    def _seen(self, k: int) -> Iterable[Block]:
        """The samples that step k scores on."""
        if self._batches is None:
            return self._features.blocks()
        assert isinstance(self._features, InMemory)
        part = self._batches.part(k)
        if part.start == part.stop:
            return []
        return [Block(self._features.features[:, part], self._features.target[part])]

    def _outputs(self, features: Tensor, k: int) -> Tensor:
        """b + z / k for the samples of features (N, b): (C, b) float64."""
        picked = self._counts.nonzero().flatten()
        weights = self._features.outgoing[picked] * (self._counts[picked] / k)[:, None]
        return self._features.bias[:, None] + weights.T @ features[picked].double()


class CustomObjective:
    """A custom loss, called once for every candidate. This is slow, and a warning says so.

    batches: step k scores on one of them; None: on all samples
    """

    def __init__(self, features: InMemory, batches: MiniBatches | None = None) -> None:
        assert features.targets is not None
        self.units = features.units
        self._features, self._batches = features, batches
        self._targets = joined_over(features.ranks, features.targets)
        self._sum = torch.zeros(
            features.outputs, features.samples, dtype=torch.float64, device=features.device
        )

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        part, targets = slice(None), self._targets
        if self._batches is not None and not everywhere:
            part = self._batches.part(k)
            assert self._features.targets is not None
            targets = joined_over(self._features.ranks, part_of(self._features.targets, part))
        losses = [
            self._loss_at(self._sum[:, part] + self._phi(int(j), part), k, targets)
            for j in candidates
        ]
        return torch.tensor(losses, dtype=torch.float64)

    def add(self, k: int, unit: int) -> None:
        self._sum += self._phi(unit)

    def loss(self, k: int) -> float:
        return self._loss_at(self._sum, k, self._targets)

    def gap(self, k: int) -> float | None:
        return None  # the loss may not be convex

    def dense_loss(self) -> float:
        return self.outputs_loss(self._features.dense_outputs(self._features.features))

    def outputs_loss(self, outputs: Tensor) -> float:
        """The loss of outputs (C, m) float64 for all samples of this rank."""
        return self._loss_of(outputs, self._targets)

    def _phi(self, unit: int, part: slice = slice(None)) -> Tensor:
        """phi_unit for some of this rank's samples: (C, b) float64."""
        weights = self._features.outgoing[unit]
        return weights[:, None] * self._features.features[unit, part].double()

    def _loss_at(self, z: Tensor, k: int, targets: Any) -> float:
        return self._loss_of(self._features.bias[:, None] + z / k, targets)

    def _loss_of(self, outputs: Tensor, targets: Any) -> float:
        """The loss of this rank's outputs (C, b) joined with the others'; targets: of all ranks."""
        outputs = self._features.ranks.joined("outputs", outputs, 1)
        shaped = outputs.T.reshape(-1, *self._features.output_shape)
        shaped = shaped.to(self._features.features.dtype)
        return float(loss_of_function(self._features.criterion.function, shaped, targets))
