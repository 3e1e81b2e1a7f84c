"""What a network's outputs lose at each size of a layer: the curves of `Budget(trials=)`.

A trial cuts the layers of one kind in a copy of the model, with the weights of their greedy paths,
and runs the copy on samples that are held out. The greedy path has all sizes in it, so that a trial
costs a forward pass and nothing else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .budget import Budget, Kinds, KindSizes, sums_of
from .data.batches import Batch, Batches, samples_of
from .data.compared import as_rows, class_dim_of, row_shape
from .data.forward import leaves_of, main_output, run_model, shown
from .data.losses import Criterion, number
from .data.padding import counted
from .knapsack import Numbers
from .objectives.job import Job
from .surgery.cut import cut, mask
from .surgery.selection import LayerSelection, Selection
from .surgery.spare import Spare

HELD = 256  # samples that trials run on, at most
SHARE = 4  # and at most one in so many of the data's


def held_out(batches: Batches) -> tuple[list[Batch], Batches]:
    """The first samples of the data, for trials, and all others.

    With several processes, they are the first process's, then the second's, and so on. Every
    process gets them all. ValueError where the data have too few samples.
    """
    ranks, first = batches.ranks, samples_of(batches.first()) or 1
    own = 0 if batches.empty else max(1, len(batches)) * first  # or slightly more
    counts = ranks.gather("samples", own)
    wanted = min(HELD, sum(counts) // SHARE)
    if not wanted:
        raise ValueError(
            f"trials: found {sum(counts)} samples in the data, expected at least {SHARE}, because "
            "trials run on samples that are held out"
        )
    wanted = min(own, max(0, wanted - sum(counts[: ranks.rank])))
    batches.repeat()  # so that the first samples of every pass are the same
    held, taken = list[Batch](), 0
    for batch in batches if wanted else ():
        held.append(batch.few(wanted - taken).map(_on_cpu))
        taken += samples_of(held[-1]) or 1
        if taken >= wanted:
            break
    every = [batch for part in ranks.gather("held-out samples", held) for batch in part]
    return [batch.map(partial(_to, batches.device)) for batch in every], batches.after(taken)


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _to(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


class SizeTrials:
    """The curve of each kind of layers, measured as soon as the paths of all its layers are known.

    Raises ValueError for fewer trials than kinds.
    """

    def __init__(
        self, job: Job, budget: Budget, held: Sequence[Batch], kinds: Kinds, sizes_of: KindSizes
    ) -> None:
        if budget.trials < len(kinds):
            raise ValueError(
                f"trials: found {budget.trials}, expected at least {len(kinds)}, one for each of "
                "the layers that may have a size of its own"
            )
        self._job, self._score, self._held = job, budget.score, held
        self._kinds, self._sizes, self._count = kinds, sizes_of, budget.trials // len(kinds)
        self._paths = dict[str, LayerSelection]()
        self._errors = dict[str, Tensor]()
        self._curves = dict[int, list[float]]()

    @cached_property
    def _network(self) -> Network:
        return Network(self._job.model, self._held, self._job.criterion, self._score)

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
        """Between the sizes that are tried, the loss is a function of the layers' own errors.

        It is linear between the trials. More units never lose more.
        """
        names, sizes = [group.producer for group in self._kinds[i]], self._sizes[i]
        [errors] = sums_of([self._kinds[i]], [sizes], self._errors)
        tried, losses = _spread(len(sizes), self._count), list[float]()
        for j in self._job.bar(tried, f"layer {names[0]}: trials of sizes"):
            layers = {n: self._paths[n].at(k) for n, k in zip(names, sizes[j], strict=True)}
            losses.append(self._network.loss(layers))
        tried, losses = [*tried, len(sizes) - 1], [*losses, 0.0]
        falling = np.maximum.accumulate(np.array(losses)[::-1])
        own = np.maximum.accumulate(errors[::-1])[::-1]
        values: list[float] = np.interp(own, own[tried[::-1]], falling).tolist()
        return values


class Network:
    """A model of which layers are cut, and what its outputs then lose on some samples.

    score: a function of the model of which more is better; None: the outputs' `divergence`
    """

    def __init__(
        self, model: nn.Module, held: Sequence[Batch], criterion: Criterion,
        score: Callable[[nn.Module], float] | None,
    ) -> None:  # fmt: skip
        self._held, self._criterion, self._score = held, criterion, score
        self._spare = Spare(model)
        self._dense_score = None if score is None else _score_of(score, self._spare.whole(set()))
        self._dense = [] if score else [run_model(model, batch) for batch in held]

    def loss(self, layers: Mapping[str, LayerSelection]) -> float:
        """What the network loses with these layers cut and all others dense."""
        selection = Selection(layers)
        names = {name for layer in layers.values() for name in layer.slices}
        full = self._spare.whole(names)
        mask(full, selection)
        small = cut(full, selection)
        if self._score is not None and self._dense_score is not None:
            return self._dense_score - _score_of(self._score, small)
        return divergence(self._criterion, self._dense, small, self._held)


def _spread(sizes: int, count: int) -> list[int]:
    """At most `count` indices of sizes, ascending, none of them the last.

    All of them, or else the first one and, in equal ratios, from a sixteenth to half of the sizes;
    a single one is a quarter.
    """
    if count >= sizes - 1:
        return list(range(sizes - 1))
    shares = [1 / 4] if count == 1 else [0, *np.geomspace(1 / 16, 1 / 2, count - 1)]
    indices = {max(0, min(round(share * sizes) - 1, sizes - 2)) for share in shares}
    return sorted(indices)


def divergence(
    criterion: Criterion, dense: Sequence[object], model: nn.Module, batches: Sequence[Batch]
) -> float:
    """How far a model's outputs are from the dense ones.

    For logits, the Kullback-Leibler divergence of the probabilities in nats, the mean over rows: of
    the softmax with a cross-entropy loss and for an output named `logits`, of the sigmoid with
    "bce_with_logits". For other outputs, the squared error as a share of the squares of the dense
    output, the mean over all tensors that the model returns. Hidden positions do not count.
    """
    totals, weights = Counter[str](), Counter[str]()
    for expected, batch in zip(dense, batches, strict=True):
        outputs = run_model(model, batch)
        rows = [_log_probabilities(criterion, each, batch) for each in (expected, outputs)]
        if rows[0] is not None and rows[1] is not None:
            apart = (rows[0].exp() * (rows[0] - rows[1])).sum()
            parts = {"": (float(apart), float(len(rows[0])))}
        else:
            parts = _squares(expected, outputs, batch)
        for name, (total, weight) in parts.items():
            totals[name] += total  # type: ignore[assignment]
            weights[name] += weight  # type: ignore[assignment]
    shares = [totals[name] / weight for name, weight in weights.items() if weight > 0]
    return sum(shares) / max(1, len(shares))


def _log_probabilities(criterion: Criterion, outputs: object, batch: Batch) -> Tensor | None:
    """The rows' log-probabilities (rows, classes) float64; None: the outputs are no logits."""
    has_targets = batch.targets is not None
    if isinstance(outputs, Tensor) and not (
        has_targets and criterion.kind in ("cross_entropy", "bce_with_logits")
    ):
        return None
    try:
        output = main_output(outputs)
    except ValueError:
        return None
    shape, dim = tuple(output.shape), -1
    if has_targets and criterion.kind == "cross_entropy":
        dim = class_dim_of(criterion, shape, batch) or -1
    logits = as_rows(output.double(), dim)
    visible = counted(batch.padding.outputs, row_shape(shape, dim)) if len(shape) > 1 else None
    if visible is not None:
        logits = logits[visible.flatten()]
    if has_targets and criterion.kind == "bce_with_logits":  # a row for each probability
        logits = torch.stack([logits.flatten(), torch.zeros_like(logits).flatten()], 1)
    return logits.log_softmax(1) if logits.shape[1] > 1 else None


def _squares(dense: object, outputs: object, batch: Batch) -> dict[str, tuple[float, float]]:
    """The squared error and the squares of each tensor, by its place in the output."""
    parts = dict[str, tuple[float, float]]()
    ours, theirs = leaves_of(dense), leaves_of(outputs)
    actual = dict(zip(theirs[::2], theirs[1::2], strict=True))
    for name, expected in zip(ours[::2], ours[1::2], strict=True):
        other = actual.get(name)
        if not isinstance(expected, Tensor) or not expected.is_floating_point():
            continue
        if not isinstance(other, Tensor) or other.shape != expected.shape:  # a stream that is cut
            continue
        one, two = (shown(each, batch.padding).double() for each in (expected, other))
        parts[name] = float((one - two).square().sum()), float(one.square().sum())
    return parts


def _score_of(score: Callable[[nn.Module], float], model: nn.Module) -> float:
    """ValueError or TypeError where the score is no finite number."""
    value = number("score", score(model))
    if not math.isfinite(value):
        raise ValueError(f"score: your function returned {value}, expected a finite number")
    return value
