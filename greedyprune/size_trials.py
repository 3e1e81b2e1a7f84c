"""What a network's outputs lose at each size of a layer: the curves of `Budget(trials=)`.

A trial cuts the layers of one kind in a copy of the model, with the weights of their greedy paths,
and runs the copy on samples that are held out. A greedy path contains every size of its layer, so a
trial costs one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from .data.batches import Batch, Batches, samples_of
from .data.divergence import Parts, divergence, parts_of
from .data.forward import is_separate, run_model
from .data.halves import held_out
from .data.losses import number
from .data.random_state import preserving_random_state, seed_all
from .graph.export import without_cache
from .objectives.job import Job
from .sizes.budget import Budget
from .sizes.kinds import Kinds, KindSizes
from .sizes.knapsack import Numbers
from .sizing import sums_of
from .surgery.cut import cut, mask
from .surgery.layer_selection import LayerSelection
from .surgery.selection import Selection
from .surgery.spare import Spare

HELD = 256  # samples that trials run on, at most
ONE_IN = 4  # of so many samples one is held out


def held_out_of(model: nn.Module, batches: Batches) -> tuple[list[Batch], Batches]:
    """A quarter of the data, of which trials run on the first samples, and all other data.

    A sample's own numbers decide whether it is held out. So it is in every pass, whatever the order
    and the batches. Where samples can't run without the others, as the nodes of a graph, whole
    batches are held out. Every process gets the samples of all. ValueError where there are none.
    """
    ranks = batches.ranks
    separate = ranks.agree("separate samples", is_separate(model, batches.first()))
    is_held = partial(held_out, one_in=ONE_IN, separate=separate)
    held, count, rest = list[Batch](), 0, 0
    for batch in batches:
        chosen = is_held(batch)
        part, number_held = batch.only(chosen), int(chosen.sum())
        rest += len(chosen) - number_held
        if part is not None and count < HELD:
            held.append(part)
            count += number_held
        if count >= HELD and rest:
            break
    counts = ranks.gather("held-out samples", (count, rest))
    if not all(sum(each) for each in zip(*counts, strict=True)):
        what = "samples in the data" if separate else "batches, which can't be taken apart"
        raise ValueError(
            f"trials: found {sum(map(sum, counts))} {what}, too few to hold a quarter out; "
            "expected more, or Budget(trials=0)"
        )
    on_cpu = [batch.on(torch.device("cpu")) for batch in held]
    every = [batch for part in ranks.gather("samples for trials", on_cpu) for batch in part]
    first, left = list[Batch](), HELD
    for batch in every:
        if left > 0:
            first.append((batch.few(left) if separate else batch).on(batches.device))
            left -= (samples_of(batch) or 1) if separate else 1
    return first, batches.where(lambda batch: ~is_held(batch))


class SizeTrials:
    """The curve of each kind of layers, measured as soon as the paths of all its layers are known.

    held: from `held_out_of`

    Raises ValueError for fewer trials than kinds that have several sizes.
    """

    def __init__(
        self, job: Job, budget: Budget, held: Sequence[Batch], kinds: Kinds, sizes_of: KindSizes
    ) -> None:
        several = sum(len(sizes) > 1 for sizes in sizes_of)
        if budget.trials < several:
            raise ValueError(
                f"trials: found {budget.trials}, expected at least {several}, one for each of "
                "the layers that may have a size of its own"
            )
        self._job, self._score, self._held = job, budget.score, held
        self._kinds, self._sizes = kinds, sizes_of
        self._count = budget.trials // max(1, several)
        self._paths = dict[str, LayerSelection]()
        self._errors = dict[str, Tensor]()
        self._curves = dict[int, list[float]]()

    @cached_property
    def _network(self) -> Network:
        return Network(self._job, self._held, self._score)

    def add(self, name: str, path: LayerSelection, errors: Tensor) -> None:
        """Takes the whole path of a layer, and its own errors with 1 to N units, (N,)."""
        self._paths[name], self._errors[name] = path, errors
        for i, kind in enumerate(self._kinds):
            if i not in self._curves and all(group.producer in self._errors for group in kind):
                self._curves[i] = self._job.checkpoint.value(
                    f"trials {i}",
                    partial(self._job.ranks.on_first, "trials", partial(self._curve, i)),
                )
                for group in kind:
                    del self._paths[group.producer]

    def curves(self) -> list[Numbers]:
        """For each kind, what is lost at each of its sizes."""
        return [np.array(self._curves[i]) for i in range(len(self._kinds))]

    def _curve(self, i: int) -> list[float]:
        """Trials at a few sizes; at the others, linear interpolation in the layers' own errors.

        Where a trial loses less than one of a larger size, it counts as much as that one.
        """
        names, sizes = [group.producer for group in self._kinds[i]], self._sizes[i]
        [errors] = sums_of([self._kinds[i]], [sizes], self._errors)
        tried, losses = _spread(len(sizes), self._count), list[float]()
        for j in self._job.bar(tried, f"layer {names[0]}: trials of sizes"):
            layers = {n: self._paths[n].at(k) for n, k in zip(names, sizes[j], strict=True)}
            loss = self._network.loss(layers)
            if not math.isfinite(loss):
                raise ValueError(
                    f"trials: the loss is {loss} with {sizes[j][0]} units in layer {names[0]!r}, "
                    "expected outputs of finite numbers, or a score"
                )
            losses.append(loss)
        tried, losses = [*tried, len(sizes) - 1], [*losses, 0.0]
        falling = np.maximum.accumulate(np.array(losses)[::-1])
        own = np.maximum.accumulate(errors[::-1])[::-1]
        values: list[float] = np.interp(own, own[tried[::-1]], falling).tolist()
        return values


class Network:
    """A model of which layers are cut, and what is then lost on some samples.

    Every pass draws the same random numbers. ValueError where the outputs of the dense model take
    more memory than there is, or have no numbers to compare.

    score: a function of the model of which more is better; None: the divergence of the outputs
    """

    def __init__(
        self, job: Job, held: Sequence[Batch], score: Callable[[nn.Module], float] | None
    ) -> None:
        model = job.model
        self._held = [replace(batch, kwargs=without_cache(model, batch.kwargs)) for batch in held]
        self._criterion, self._score, self._spare = job.criterion, score, Spare(model)
        self._dense_score, self._dense = 0.0, list[Parts]()
        if score is not None:
            self._dense_score = self._score_of(score, self._spare.restored(None))
            return
        size = 0
        for batch in self._held:
            self._dense.append(self._parts(model, batch))
            size += sum(part.nbytes for part in self._dense[-1].values())
            if size > job.memory_limit:
                raise ValueError(
                    f"memory_limit: found {job.memory_limit} bytes, but the outputs of the "
                    f"samples for trials take at least {size}; expected more memory, or a score"
                )
        if math.isnan(divergence(self._dense, self._dense)):
            raise ValueError(
                "trials: found outputs without floating-point numbers other than 0 to compare, "
                "expected some, or a score"
            )

    def loss(self, layers: Mapping[str, LayerSelection]) -> float:
        """What is lost with these layers cut and all others dense."""
        selection = Selection(layers)
        names = {name for layer in layers.values() for name in layer.slices}
        full = self._spare.restored(names if self._score is None else None)
        mask(full, selection)
        small = cut(full, selection)
        if self._score is not None:
            return self._dense_score - self._score_of(self._score, small)
        return divergence(self._dense, (self._parts(small, batch) for batch in self._held))

    def _parts(self, model: nn.Module, batch: Batch) -> Parts:
        with preserving_random_state([]):
            seed_all()
            return parts_of(self._criterion, run_model(model, batch), batch)

    @staticmethod
    def _score_of(score: Callable[[nn.Module], float], model: nn.Module) -> float:
        """ValueError or TypeError where the score is no finite number."""
        with preserving_random_state([]):
            seed_all()
            value = number("score", score(model))
        if not math.isfinite(value):
            raise ValueError(f"score: your function returned {value}, expected a finite number")
        return value


def _spread(sizes: int, count: int) -> list[int]:
    """Up to `count` indices of sizes, ascending, none of them the last.

    The first one and, in about equal ratios, from a sixteenth to half of the sizes; a single one is
    a quarter.
    """
    left = set(range(sizes - 1))
    shares = [1 / 4] if count == 1 else [0, *np.geomspace(1 / 16, 1 / 2, count - 1)]
    chosen = list[int]()
    for wanted in [round(share * sizes) - 1 for share in shares]:
        if left:
            nearest = min(left, key=lambda index: (abs(index - wanted), index))
            chosen.append(nearest)
            left.remove(nearest)
    return sorted(chosen)
