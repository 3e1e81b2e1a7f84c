"""Imitation: the consumers' dense outputs are the target, and sums over the samples all it takes.

While the model runs once, each consumer's input is unfolded to one column a position (a
convolution's as its patches), and K = X X^T added up. With w_a the weights on feature a, units i
and j have  G_ij = N^2 sum of K_ab <w_a, w_b>  over their features a and b (README eq. 2), and the
right side of every least squares problem is K W^T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Batches
from ..data.forward import check_finite, run_model
from ..graph.groups import Group
from ..graph.replay import Replay
from ..graph.unfold import parts, unit_major, weight_of
from ..kernels import ops
from ..kernels.exchange import best_exchanged
from ..kernels.path import Moments, Path, Refit, Rule, Step
from ..kernels.products import add_right, add_upper_product, mirror
from ..runtime.checkpoint import NOTHING, Checkpoint, Pass
from ..runtime.distributed import Ranks
from ..surgery.selection import distinct_counts

WIDEST = 64  # features a unit that exchanges are tried with
Roots = Mapping[str, Tensor]  # of consumers' metrics


class Products:
    """The sums of one least squares problem in the units' features, a unit's side by side.

    name:   of the layer that takes the units
    weight: (C, F) float64, what the features are multiplied with in the dense network
    gram:   (F, F) float64, K; only blocks on and above the diagonal until `finish`
    root:   (C, C) float64, the square root of the metric that errors are measured in; None: I
    given:  are the targets added with the inputs? Else they are what the inputs give
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
        right = self.features, self.outputs
        self._cross = torch.zeros(right, dtype=torch.float64, device=device) if given else None
        self._target_norm = 0.0

    def add(self, inputs: Tensor, outputs: Tensor | None = None) -> None:
        """Adds one batch of inputs and of what they should give; None: what they give."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What has been added so far."""
        numbers = torch.tensor([self.positions, self._target_norm], dtype=torch.float64)
        cross = {} if self._cross is None else {"cross": self._cross}
        return {"gram": self.gram, "numbers": numbers, **cross}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.gram.copy_(state["gram"])
        self.positions, self._target_norm = int(state["numbers"][0]), float(state["numbers"][1])
        if self._cross is not None:
            self._cross.copy_(state["cross"])

    @property
    def mass(self) -> float:
        """What the sums of squares are divided by."""
        return float(self.positions * self.outputs)

    @property
    def width(self) -> int:
        """Features a unit."""
        return self.features // self.units

    def finish(self, ranks: Ranks, owner: int | None = None) -> None:
        """Adds up all ranks' sums, for all or for one; takes them to the CPU, to the solvers."""
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

    def ends(self) -> tuple[float, float]:
        """|target - output|^2 with all units as they are, and without any."""
        own = float(((self.gram @ self.weight.T) * self.weight.T).sum())  # |output|^2
        if self._cross is None:
            return 0.0, own
        along = float((self._cross * self.weight.T).sum())
        return self._target_norm - 2 * along + own, self._target_norm

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


class Consumer(Products):
    """One consumer of a group, that imitates its dense output."""

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

    def add(self, inputs: Tensor, outputs: Tensor | None = None) -> None:
        if not inputs.isfinite().all():
            raise ValueError(
                f"layer {self.layer!r}: NaN or inf in its activations on the data, expected finite "
                "numbers"
            )
        bias, double = getattr(self._module, "bias", None), torch.float64
        for columns, target in parts(self._module, inputs, outputs):
            taps, positions = columns.shape[1:]
            rows = columns.view(self._at.outer, self.units, self._at.inner, taps, positions)
            rows = rows.transpose(0, 1).reshape(self.features, positions)
            add_upper_product(self.gram, rows, double)  # what is left of the loss may be small
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


class Sums:
    """What one group is selected from: all of its consumers' products.

    outputs: how many each consumer has
    gates:   "", or the name of the products that are of one gate a unit (fisher.py)
    """

    def __init__(
        self, group: Group, consumers: Sequence[Products], outputs: Mapping[str, int],
        gates: str = "",
    ) -> None:  # fmt: skip
        self.group, self.consumers, self.outputs, self.gates = group, consumers, outputs, gates

    @staticmethod
    def of_consumers(model: nn.Module, group: Group, roots: Roots, given: bool = False) -> Sums:
        """Nothing added yet; ValueError where weights are not finite."""
        for name in (*group.producers, *group.consumers):
            check_finite(name, model.get_submodule(name))
        consumers = [
            Consumer(name, model.get_submodule(name), group, roots.get(name), given)
            for name in group.consumers
        ]
        return Sums(group, consumers, {each.name: each.outputs for each in consumers})

    @property
    def mass(self) -> float:
        return sum(each.mass for each in self.consumers)

    def ends(self) -> tuple[float, float]:
        """The loss with all units as they are, and without any."""
        dense, empty = map(sum, zip(*(each.ends() for each in self.consumers), strict=True))
        return max(0.0, dense) / self.mass, empty / self.mass

    def moments(self) -> tuple[Tensor, Moments]:
        """G (N, N) float64 and the sums of README eq. 2, the dense output being the target."""
        n, (first, *others) = self.group.units, self.consumers
        gram = first.unit_gram()
        for each in others:
            gram += each.unit_gram()
        mean_norm = float(gram.sum())  # |mean phi|^2
        gram *= n**2
        beta = n * sum((each.unit_beta() for each in self.consumers), torch.zeros(n).double())
        target_norm = sum(each.target_norm() for each in self.consumers)
        norm = gram.diagonal().clone()
        spread = max(0.0, float(norm.mean()) - mean_norm) / self.mass  # B / 2 = 1 / C
        dense, empty = self.ends()
        return gram, Moments(
            first.positions, self.mass, norm, beta, target_norm, dense, spread, empty
        )

    def path(
        self, gram: Tensor, moments: Moments, rule: Rule, backend: str, *, with_gap: bool,
        step: Step | None,
    ) -> Path:  # fmt: skip
        """Greedy steps of README eq. 2."""
        if backend == "cuda":  # the sums are on the processor
            backend = "cpu"
        return ops.greedy_gram(gram, moments, rule, with_gap=with_gap, step=step, backend=backend)

    def path_unscaled(
        self, gram: Tensor, moments: Moments, rule: Rule, backend: str, step: Step | None = None
    ) -> Path:
        """Greedy steps towards the network whose weights stay as they are: eq. 2 with N for k.

        Then a unit's share of the target is a constant, like its norm; what is added to all of them
        so that none is below the norm moves no pick. The path has the losses of another problem.
        """
        linear = 2 * self.group.units * moments.beta
        constants = moments.norm + (linear.max() - linear)
        other = replace(moments, norm=constants, beta=torch.zeros_like(linear))
        return self.path(gram, other, rule, backend, with_gap=False, step=step)

    def refit(
        self, rule: Rule, backend: str, step: Step | None, swaps: int, damping: float
    ) -> tuple[Path, dict[str, Refit]]:
        """Greedy steps of least squares refitted in each; the losses are those without the ridge.

        Several consumers take a unit through features of their own: least squares problems side by
        side, as one whose matrices are zero between them.
        """
        gram, right, parts = self._side_by_side()
        target_norm = sum(each.target_norm() for each in self.consumers)
        widths = torch.tensor([each.width for each in self.consumers])
        ridges = [_ridge(each, damping) for each in self.consumers]
        width, undamped = int(widths.sum()), gram.diagonal().clone()
        damping_of = torch.tensor(ridges).double().repeat_interleave(widths)
        gram.diagonal().add_(damping_of.repeat(self.group.units))
        path, found = ops.greedy_refit(
            gram, right, target_norm, rule, width=width, scale=1 / self.mass, step=step,
            backend=backend,
        )  # fmt: skip
        if swaps and width <= WIDEST and len(found.units) == len(path.order):
            best = best_exchanged(gram, right, target_norm, found.units, width, swaps, backend)
            if not best.units.equal(found.units):
                gains = best.solved.square().sum(1).view(-1, width).sum(1)
                losses = (target_norm - gains.cumsum(0)) / self.mass
                path, found = Path(best.units, losses, None, path.scored, path.rescored), best
        gram.diagonal().copy_(undamped)
        fitted, losses = {}, path.losses
        at = distinct_counts(path.order) - 1
        for each, ridge, (own, out) in zip(self.consumers, ridges, parts, strict=True):
            fitted[each.name] = replace(found, units=found.units.clone())
            if len(self.consumers) > 1:
                rows = torch.arange(len(found.factor)).view(-1, width)[:, own].flatten()
                factor, solved = found.factor[rows[:, None], rows], found.solved[rows][:, out]
                fitted[each.name] = Refit(found.units.clone(), factor, solved.clone())
            losses = losses - ridge / self.mass * fitted[each.name].norms()[at]
            if each.root is not None:  # the weights themselves are the same in any metric
                plain = torch.linalg.solve(each.root, fitted[each.name].solved, left=False)
                fitted[each.name] = replace(fitted[each.name], solved=plain)
        return replace(path, losses=losses.clamp(min=0)), fitted

    def _side_by_side(self) -> tuple[Tensor, Tensor, list[tuple[slice, slice]]]:
        """The least squares problem of all consumers: (N w, N w), (N w, C); where each one's is."""
        if len(self.consumers) == 1:
            [each] = self.consumers
            return each.gram, each.right(), [(slice(None), slice(None))]
        n, width = self.group.units, sum(each.width for each in self.consumers)
        outputs = sum(each.outputs for each in self.consumers)
        gram = torch.zeros(n, width, n, width, dtype=torch.float64)
        right = torch.zeros(n, width, outputs, dtype=torch.float64)
        parts, first, first_output = [], 0, 0
        for each in self.consumers:
            own = slice(first, first + each.width)
            out = slice(first_output, first_output + each.outputs)
            first, first_output = own.stop, out.stop
            gram[:, own, :, own] = each.gram.view(n, each.width, n, each.width)
            right[:, own, out] = each.right().view(n, each.width, each.outputs)
            parts.append((own, out))
        return gram.view(n * width, n * width), right.view(n * width, outputs), parts

    def refit_of(self, units: Tensor, damping: float) -> dict[str, Refit]:
        """Least squares on given units (K,) int64, each consumer's."""
        fitted = {}
        for each in self.consumers:
            rows = (units[:, None] * each.width + torch.arange(each.width)).flatten()
            gram = each.gram[rows[:, None], rows]
            gram.diagonal().add_(_ridge(each, damping))
            factor = torch.linalg.cholesky(gram)
            solved = torch.linalg.solve_triangular(factor, each.right()[rows], upper=False)
            fitted[each.name] = Refit(units, factor, solved)
        return fitted


def _ridge(products: Products, damping: float) -> float:
    return damping * float(products.gram.diagonal().mean()) or 1.0  # 1: all units are dead


def collect(
    model: nn.Module, groups: Sequence[Group], batches: Batches, roots: Roots,
    bar: Callable[..., Any], checkpoint: Checkpoint = NOTHING, what: str = "", owned: bool = False,
) -> dict[str, Sums]:  # fmt: skip
    """The sums of every group, in one pass over the data.

    checkpoint: keeps the sums as they grow; what: tells these from others of the same layers
    owned: each group's on one rank only, its owner
    """
    ranks, together = batches.ranks, [Sums.of_consumers(model, group, roots) for group in groups]
    resumed = Pass(checkpoint, what + " ".join(group.producer for group in groups))
    resumed.hold(*(each for sums in together for each in sums.consumers))
    _pass(model, together, resumed.new(bar(batches, "activations")))
    found: dict[str, Sums] = {}
    for i, sums in enumerate(together):
        owner = ranks.owner(i) if owned else None
        for each in sums.consumers:
            each.finish(ranks, owner)
        if owner in (None, ranks.rank):
            found[sums.group.producer] = sums
    return found


def replayed(
    model: nn.Module, group: Group, replay: Replay, roots: Roots, bar: Callable[..., Any],
    checkpoint: Checkpoint,
) -> Sums:  # fmt: skip
    """The sums of one group: inputs from the network pruned so far, targets from the dense one."""
    sums = Sums.of_consumers(model, group, roots, given=True)
    by_name = {each.name: each for each in sums.consumers}
    resumed = Pass(checkpoint, group.producer)
    resumed.hold(*sums.consumers)
    replay.visit(
        group.consumers, lambda name, inputs, outputs: by_name[name].add(inputs, outputs), bar,
        resumed,
    )  # fmt: skip
    for each in sums.consumers:
        each.finish(replay.ranks)
    return sums


def _pass(model: nn.Module, together: Sequence[Sums], batches: Iterable[Batch]) -> None:
    def hook(consumer: Products) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            consumer.add((args[0] if args else kwargs["input"]).detach())

        return add

    handles = [
        model.get_submodule(each.name).register_forward_pre_hook(hook(each), with_kwargs=True)
        for sums in together
        for each in sums.consumers
    ]
    try:
        for batch in batches:
            run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def losses_of(units: Tensor, weights: str, gram: Tensor, moments: Moments) -> Tensor:
    """The losses of the first 1 to K of `units` (K,) for "uniform" or "none": (K,) float64."""
    part = gram[units[:, None], units]
    squares = part.cumsum(0).cumsum(1).diagonal()
    along = moments.beta[units].cumsum(0)
    shrink = torch.full((len(units),), 1 / len(gram), dtype=torch.float64)
    if weights == "uniform":
        shrink = torch.arange(1, len(units) + 1).double().reciprocal()
    return (moments.target_norm - 2 * shrink * along + shrink**2 * squares) / moments.mass
