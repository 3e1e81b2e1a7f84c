"""From a layer's data to its greedy path: which formulation, which kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..data.losses import Target, loss_of_function
from ..kernels import ops
from ..kernels.loop import greedy
from ..kernels.path import Path, Rule, Step
from ..kernels.products import PRODUCT
from ..runtime.checkpoint import NOTHING, Steps
from ..runtime.distributed import ALONE
from .features import Block, LayerData
from .moments import moments
from .options import Batched

# What columns of the Gram matrix cost beside all of it (benchmarks/NOTES.md, "columns or Gram"):
# how many are fetched for a pick, on MNIST networks with 200 to 1800 steps.
COLUMNS_PER_PICK = {"cpu": 2.1, "cuda": 7.0}
THIN_RATE = 0.7  # multiplications a second in products with few columns, beside square ones


def columns_are_cheaper(units: int, picks: int, backend: str = "cpu") -> bool:
    """Is it cheaper to fetch columns for so many picks than to compute half of the matrix?"""
    return COLUMNS_PER_PICK[backend] * picks / THIN_RATE < units / 2


class PointwiseObjective:
    """Equation (1) as it stands: the loss of every candidate, block by block of the data.

    The reference backend's objective for every loss, and the others' where the features do not fit
    in memory, or several ranks share work that kernels do not. One pass a step where all units are
    candidates: what a pick leads to and the next step's losses come from the same block.
    """

    def __init__(
        self, data: LayerData, backend: str, batches: Batched | None, with_gap: bool, mass: float,
        rule: Rule, steps: Steps,
    ) -> None:  # fmt: skip
        self.units, self._rule, self._steps = data.units, rule, steps
        self._data, self._backend, self._batches = data, backend, batches
        self._with_gap, self._mass = with_gap and batches is None, mass
        self._counts = torch.zeros(data.units, dtype=torch.float64, device=data.device)
        self._loss, self._gap = 0.0, 0.0
        # Only where the lowest score is all that matters can float32 tell, with its errors.
        self._dtype = torch.float32 if backend == "cpu" and not rule.shortlist else torch.float64
        self._sees_ahead = batches is None and rule.draws is None and not rule.shortlist
        self._ahead = torch.empty(0)  # the next step's scores of all units, where it sees ahead

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        if self._ahead.numel():
            found = self._ahead[:, candidates]
        else:
            found = self._scores(k, candidates, everywhere, self._dtype)
        scores, errors = found
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
            own = candidates[self._data.peers.part(len(candidates))]
            sums = self._no_scores(own)
            for block in self._data.blocks() if everywhere else self._seen(k):
                sums += self._score(block, k, own, dtype)
            return self._summed(sums)

        return self._steps.once(f"scores {k} {everywhere} {dtype}", compute)

    def _score(self, block: Block, k: int, units: Tensor, dtype: torch.dtype) -> Tensor:
        """Each unit's sum of losses at step k, and what rounding can have moved it by: (2, n)."""
        found = self._no_scores(units)
        found[0] = ops.candidate_loss(
            block.features, self._data.outgoing, self._outputs(block.features, k), block.target,
            shrink=1 / k, units=units, extent=block.extent or self._data.extent, dtype=dtype,
            backend=self._backend, errors=found[1] if dtype == torch.float32 else None,
        )  # fmt: skip
        return found

    def _no_scores(self, units: Tensor) -> Tensor:
        return torch.zeros(2, len(units), dtype=torch.float64, device=self._data.device)

    def _summed(self, scores: Tensor) -> Tensor:
        self._data.ranks.sum("scores", scores)
        return (self._data.peers.joined("scores", scores, 1) / self._mass).cpu()

    def add(self, k: int, unit: int) -> None:
        self._counts[unit] += 1
        found = self._steps.once(f"step {k} {unit}", lambda: self._step(k))
        (self._loss, self._gap), self._ahead = found[:, 0].tolist(), found[:, 1:]

    def _step(self, k: int) -> Tensor:
        """Step k's loss above its gap; on their right the next step's scores: (2, 1 + N)."""
        ranks, peers = self._data.ranks, self._data.peers
        own = torch.arange(self.units)[peers.part(self.units)]
        loss, along = 0.0, 0.0
        slopes = torch.zeros(len(own), dtype=torch.float64, device=self._data.device)
        scores = self._no_scores(own)
        ahead = self._sees_ahead and self._rule.goes_on(k, int(self._counts.count_nonzero()))
        for block in self._data.blocks():
            outputs = self._outputs(block.features, k)
            loss += float(block.target.loss_sum(outputs))
            if self._with_gap:
                gradient = block.target.gradient(outputs)
                along += float((gradient * (outputs - self._data.bias[:, None])).sum())
                slopes += ops.candidate_slope(
                    block.features, self._data.outgoing, gradient, units=own,
                    backend=self._backend,
                )  # fmt: skip
            if ahead:
                scores += self._score(block, k + 1, own, self._dtype)
        loss, along = ranks.sum_numbers("loss", loss, along)
        ranks.sum("slopes", slopes)
        slopes = peers.joined("slopes", slopes)
        gap = along - float(slopes.min())
        reached = torch.tensor([[loss], [gap]], dtype=torch.float64) / self._mass
        return torch.cat([reached, self._summed(scores)], 1) if ahead else reached

    def loss(self, k: int) -> float:
        return self._loss

    def gap(self, k: int) -> float | None:
        return self._gap if self._with_gap else None

    def _seen(self, k: int) -> Iterable[Block]:
        if self._batches is None:
            return self._data.blocks()
        assert self._data.features is not None and self._data.target is not None
        batch = slice(int(self._batches.starts[k - 1]), int(self._batches.stops[k - 1]))
        if batch.start == batch.stop:  # all of it is on other ranks
            return []
        return [Block(self._data.features[:, batch], self._data.target[batch])]

    def _outputs(self, features: Tensor, k: int) -> Tensor:
        """b + z / k for the samples of features (N, b): (C, b) float64."""
        picked = self._counts.nonzero().flatten()
        weights = self._data.outgoing[picked] * (self._counts[picked] / k)[:, None]
        return self._data.bias[:, None] + weights.T @ features[picked].double()


class CustomObjective:
    """A loss of the user's own: one call of it for every candidate. Slow, and says so."""

    def __init__(self, data: LayerData) -> None:
        assert data.features is not None and data.targets is not None
        self.units = data.units
        self._data, self._targets = data, data.ranks.joined("targets", data.targets)
        self._sum = torch.zeros(data.outputs, data.samples, dtype=torch.float64, device=data.device)

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        own = candidates[self._data.peers.part(len(candidates))]
        losses = [self._loss_at(self._sum + self._phi(int(j)), k) for j in own]
        return self._data.peers.joined("losses", torch.tensor(losses, dtype=torch.float64))

    def add(self, k: int, unit: int) -> None:
        self._sum += self._phi(unit)

    def loss(self, k: int) -> float:
        return self._loss_at(self._sum, k)

    def gap(self, k: int) -> float | None:
        return None  # nothing says that it is convex

    def dense_loss(self) -> float:
        assert self._data.features is not None
        return self.outputs_loss(self._data.dense_outputs(self._data.features))

    def _loss_at(self, z: Tensor, k: int) -> float:
        return self.outputs_loss(self._data.bias[:, None] + z / k)

    def _phi(self, unit: int) -> Tensor:
        assert self._data.features is not None
        return self._data.outgoing[unit][:, None] * self._data.features[unit].double()

    def outputs_loss(self, outputs: Tensor) -> float:
        """The loss of outputs (C, m) float64."""
        assert self._data.features is not None
        outputs = self._data.ranks.joined("outputs", outputs, 1)
        full = outputs.T.reshape(-1, *self._data.output_shape)
        full = full.to(self._data.features.dtype)
        return float(loss_of_function(self._data.criterion.function, full, self._targets))


class Solver:
    """Runs the greedy loop for one layer by whichever formulation is cheapest for its data."""

    def __init__(
        self,
        data: LayerData,
        backend: str,
        rule: Rule,
        memory_limit: int,
        batches: Batched | None,
        steps: Steps,
    ) -> None:
        self.data, self.backend, self._batches = data, backend, batches
        self._steps = steps  # where each takes a pass
        self._gram: Tensor | None = None
        self._room = min(data.together.gather("room", memory_limit - data.bytes_held))
        rows = data.peers.part(data.units)
        quadratic = data.criterion.kind == "mse" and backend != "reference" and batches is None
        if rule.draws is not None and data.in_memory:
            quadratic = False  # a few random candidates are scored at once from their features
        fits = -(-data.units // data.peers.size) * data.units * 8 <= self._room
        picks = rule.most(data.units)
        few = quadratic and columns_are_cheaper(data.units, picks, backend)
        # One pass has to do where the features were not kept, so the Gram matrix if it fits.
        self._columns = quadratic and (not fits or (few and data.in_memory))
        if quadratic and not self._columns:
            shape = (rows.stop - rows.start, data.units)
            data.make_room(self._room - 8 * shape[0] * shape[1])
            self._gram = torch.zeros(shape, dtype=torch.float64, device=data.device)
        self.moments = moments(data, backend, self._gram)

    def run(self, rule: Rule, *, with_gap: bool, step: Step | None) -> Path:
        own = self.data.criterion.kind == "custom"
        with (ALONE if own else self.data.ranks).loop(2 * self.data.units + 3):
            return self._run(rule, with_gap, step)

    def _run(self, rule: Rule, with_gap: bool, step: Step | None) -> Path:
        data = self.data
        if data.criterion.kind == "custom":
            return greedy(CustomObjective(data), rule, step)
        kept, exact = data.in_memory, self._exact()
        ranks = data.ranks if exact is not None else ALONE  # without it all are the same
        if self._gram is not None and data.peers.size == 1:
            return ops.greedy_gram(
                self._gram, self.moments, rule, exact=exact, with_gap=with_gap, step=step,
                ranks=ranks, backend=self.backend,
            )  # fmt: skip
        if self._columns or self._gram is not None:
            # A fetch is a pass of its own, or a wait for the GPU or for other ranks.
            block = 16 if exact is not None else 64
            picks = rule.most(data.units)
            room = self._room - (0 if self._gram is None else 8 * self._gram.numel())
            capacity = min(room // (8 * data.units), block + 8 * picks)
            columns = self._columns_of(room - 8 * data.units * capacity)
            if not kept:
                columns = self._kept(columns)
            return ops.greedy_columns(
                columns, self.moments, rule, exact=exact, block=block, capacity=capacity,
                with_gap=with_gap, step=step, ranks=ranks, backend=self.backend,
            )  # fmt: skip
        if kept and self._one_kernel():
            assert data.features is not None and data.target is not None
            return ops.greedy_pointwise(
                data.features, data.outgoing, data.bias, self._target(), rule,
                extent=data.extent, mass=self.moments.mass, with_gap=with_gap, step=step,
                ranks=data.ranks, backend=self.backend,
                starts=None if self._batches is None else self._batches.starts,
                batch=0 if self._batches is None else self._batches.size,
            )  # fmt: skip
        objective = PointwiseObjective(
            data, self.backend, self._batches, with_gap, self.moments.mass, rule,
            self._steps if not kept else Steps(NOTHING, ""),
        )  # fmt: skip
        return greedy(objective, rule, step)

    def _one_kernel(self) -> bool:
        """Is there one for all greedy steps by the candidates' losses?"""
        data = self.data
        if self.backend == "reference" or data.peers.size > 1:
            return False
        if data.ranks.size > 1 and (self.backend == "cuda" or self._batches is not None):
            return False
        # Is there room for three arrays of (C, m)? C may be a vocabulary.
        fits = 20 * data.outputs * data.samples <= self._room
        return data.ranks.agree("room for outputs", fits)

    def _target(self) -> Target:
        """With a linear term where that of any rank has one, as its sums are added up."""
        target = self.data.target
        assert target is not None
        if any(self.data.ranks.gather("linear term", target.linear is not None)):
            zeros = torch.zeros(target.outputs, target.samples, dtype=torch.float64)
            return replace(target, linear=zeros if target.linear is None else target.linear)
        return target

    def _exact(self) -> ops.Exact | None:
        """Float32 products are twice as fast, and the features in memory make up for them."""
        data = self.data
        quadratic = self._columns or self._gram is not None
        if not (quadratic and data.in_memory) or self.backend != "cpu" or data.peers.size > 1:
            return None
        assert data.features is not None and data.target is not None
        assert data.target.value is not None
        rounding = ops.columns_rounding(data.product_dtype)
        if self._gram is not None:  # n u / (1 - n u) for sums of n products, and a little
            rounding = (PRODUCT + 4) * torch.finfo(data.product_dtype).eps / 2
        rounding += data.ranks.size * 2.0**-53
        return ops.Exact(
            rounding=rounding,
            features=data.features,
            outgoing=data.outgoing,
            target=data.target.value - data.bias[:, None],
        )

    def _kept(self, columns: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor, Tensor], None]:
        def known(units: Tensor, out: Tensor) -> None:
            def found() -> Tensor:
                columns(units, out)
                return out

            out.copy_(self._steps.once(f"columns {units.tolist()}", found))

        return known

    def _columns_of(self, room: int) -> Callable[[Tensor, Tensor], None]:
        """Columns of the Gram matrix: out[i] = <phi_units[i], phi_j> for every j.

        room: bytes that the features in the products' type may take
        """
        data, features, dtype = self.data, self.data.features, self.data.product_dtype
        narrow = data.in_memory and data.peers.size == 1 and self.backend == "cpu"
        if features is not None and narrow and features.dtype == dtype:

            def summed(units: Tensor, out: Tensor) -> None:
                ops.gram_columns(features, data.outgoing, units, out, spread=True)
                data.ranks.sum(f"columns {units.tolist()}", out)

            return summed

        own, peers = data.peers.part(data.units), data.peers
        if self._gram is not None:  # its rows of this rank's units
            rows = self._gram

            def joined(units: Tensor, out: Tensor) -> None:
                out.copy_(peers.joined("columns", rows[:, units]).T)

            return joined

        wide = None
        if features is not None and 8 * features.numel() <= room:
            wide = features.to(dtype)  # once; a fetch is then one product

        def columns(units: Tensor, out: Tensor) -> None:
            part = out if peers.size == 1 else torch.empty_like(out[:, own])
            if wide is not None:
                torch.mm(wide[units], wide[own].T, out=part)
            else:
                part.zero_()
                for block in data.blocks():
                    h = block.features.to(dtype)
                    part += h[units] @ h[own].T
            part *= data.outgoing[units] @ data.outgoing[own].T
            data.ranks.sum(f"columns {units.tolist()}", part)
            if peers.size > 1:
                out.copy_(peers.joined("columns", part, 1))

        return columns
