"""Losses and metrics of whole networks, without a trace on whatever training draws from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..data.forward import evaluating, main_output, run_model
from ..data.losses import Criterion, Metric, number

ACCURACY = "accuracy"  # the metric that needs no outputs to be kept


def metric_of(metric: object, criterion: Criterion) -> str | Metric | None:
    """The metric that the argument `metric` of `PretrainingMonitor` means, for this loss."""
    if metric == "auto":
        return ACCURACY if criterion.kind in ("cross_entropy", "bce_with_logits") else None
    if metric is None or callable(metric):
        return metric
    raise TypeError(f"metric: found {metric!r}, expected 'auto', a function or None")


def measure(
    model: nn.Module, batches: Iterable[Batch], criterion: Criterion, metric: str | Metric | None
) -> tuple[float, float | None]:
    """The loss over all batches, as torch defines it on all samples at once, and the metric.

    A metric of the user's own gets the outputs and targets of all batches, joined.
    """
    loss, mass, hits, seen = 0.0, 0.0, 0, 0
    kept: list[tuple[Tensor, Tensor]] = []
    with evaluating(model):
        for batch in batches:
            outputs = main_output(run_model(model, batch))
            if (targets := batch.targets) is None:
                raise ValueError(
                    "data: found inputs without targets, expected both, to measure the loss"
                )
            if criterion.function is not None or callable(metric):
                kept.append((outputs, targets))
            if criterion.function is None:
                target = criterion.target(targets, tuple(outputs.shape) or (1,))
                flat = outputs.reshape(-1, target.outputs).T
                loss, mass = loss + float(target.loss_sum(flat.double())), mass + target.mass
            if metric == ACCURACY:
                right, known = _hits(outputs, targets, criterion)
                hits, seen = hits + right, seen + known
        joined = [torch.cat(parts) for parts in zip(*kept, strict=True)]
        if criterion.function is not None:
            loss, mass = number("loss", criterion.function(*joined)), 1.0
        if callable(metric):
            return loss / mass, number("metric", metric(*joined))
    return loss / mass, hits / seen if metric == ACCURACY else None


def _hits(outputs: Tensor, targets: Tensor, criterion: Criterion) -> tuple[int, int]:
    """How many predictions are right, and of how many."""
    if criterion.kind == "bce_with_logits":
        return int(((outputs > 0) == (targets > 0.5)).sum()), targets.numel()
    if targets.is_floating_point():  # class probabilities
        targets = targets.argmax(-1)
    known = targets != criterion.ignore_index
    return int(((outputs.argmax(-1) == targets) & known).sum()), int(known.sum())
