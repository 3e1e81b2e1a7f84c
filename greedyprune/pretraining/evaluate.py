"""The loss and the metric of a whole network over batches of data."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..data.batches import Batch
from ..data.compared import Compared, compared
from ..data.forward import evaluating, main_output, run_model
from ..data.losses import Criterion, Metric, ask, number
from ..data.padding import NO_LABEL
from ..data.targets import joined

ACCURACY = "accuracy"  # counted batch by batch; a user's function needs all outputs at once


def metric_of(metric: object, criterion: Criterion) -> str | Metric | None:
    """The metric that `PretrainingMonitor(metric=...)` means for this loss."""
    if metric == "auto":
        return ACCURACY if criterion.kind in ("cross_entropy", "bce_with_logits") else None
    if metric is None or callable(metric):
        return metric
    raise TypeError(f"metric: found {metric!r}, expected 'auto', a function or None")


def loss_and_metric(
    model: nn.Module, batches: Iterable[Batch], criterion: Criterion, metric: str | Metric | None
) -> tuple[float, float | None]:
    """The loss over all samples, reduced as torch reduces it, and the metric (None: there is none).

    A user's function as loss or metric is called once, with the outputs and targets of all batches
    concatenated. The model is left as it was (see `evaluating`).

    Raises:
        ValueError: data without targets, or data that do not fit the model or the loss
        TypeError: a user's function that returns no number
    """
    loss_sum, mass, correct, labelled = 0.0, 0.0, 0, 0
    pairs: list[tuple[Tensor, Tensor]] = []  # outputs and targets, for the user's functions
    with evaluating(model):
        for batch in batches:
            outputs = main_output(run_model(model, batch))
            if batch.targets is None:
                raise ValueError(
                    "data: found inputs without targets, expected both, to measure the loss"
                )
            if criterion.function is not None or callable(metric):
                pairs.append((outputs, batch.targets))
            if criterion.function is not None:
                continue
            found = compared(criterion, outputs, batch)
            loss_sum += float(found.target.loss_sum(found.columns(outputs)))
            mass += found.target.mass
            if metric == ACCURACY:
                batch_correct, batch_labelled = _correct(outputs, batch.targets, found)
                correct, labelled = correct + batch_correct, labelled + batch_labelled
        concatenated = [joined(parts) for parts in zip(*pairs, strict=True)]
        if not mass and criterion.function is None:
            raise ValueError(NO_LABEL)
        if criterion.function is not None:
            loss_sum, mass = number("loss", ask("loss", criterion.function, *concatenated)), 1.0
        if criterion.reduction == "sum":
            mass = 1.0
        if callable(metric):
            return loss_sum / mass, number("metric", ask("metric", metric, *concatenated))
    return loss_sum / mass, correct / max(1, labelled) if metric == ACCURACY else None


def _correct(outputs: Tensor, targets: Tensor, found: Compared) -> tuple[int, int]:
    """How many predictions are correct, and how many predictions have a label."""
    columns = found.columns(outputs)
    if found.target.kind == "bce_with_logits":
        return int(((columns > 0) == (found.columns(targets) > 0.5)).sum()), columns.numel()
    label = found.target.label
    if targets.is_floating_point():  # class probabilities
        label = found.columns(targets).argmax(0)
    assert label is not None
    return int((columns.argmax(0) == label).sum()), columns.shape[1]
