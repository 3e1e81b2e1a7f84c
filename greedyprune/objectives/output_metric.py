"""The metric of output errors for `Imitation(metric="fisher")`: their effect on predictions.

Errors e of a layer with C outputs count as e^T F e, with F = sum of g g^T over samples and
positions, (C, C), and g the derivative of -log p(y | x) in the layer's output. The labels y are
drawn from the model's own predictions (Martens 2020, arXiv:1412.1193, explains why not the data's).
Each position counts by itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.compared import as_rows, class_dim_of, row_shape
from ..data.losses import Criterion
from ..data.padding import counted
from ..graph.unfold import as_columns, output_positions
from ..graph.windows import Window
from .derivatives import derivatives
from .job import Job

IDENTITY_SHARE = 0.5  # the best of 0.01 to 0.8 on a ResNet-20


def roots(
    job: Job, outputs: Mapping[str, int], windows: Mapping[str, Window | None]
) -> dict[str, Tensor]:
    """The symmetric square root of each layer's metric, (C, C) float64 on the CPU.

    The metric is half the identity, and half F in the scale at which its mean diagonal is 1: F only
    models how the loss depends on one layer's output.

    outputs: the layers, and how many outputs C each has
    windows: how those of them that are convolutions go over their inputs

    ValueError for a custom loss, which has no predictions to draw labels from.
    """
    kind = job.criterion.kind
    if kind == "custom":
        raise ValueError(
            "metric: found 'fisher' with a loss of your own, expected 'mse', "
            "'cross_entropy' or 'bce_with_logits', from whose predictions labels can be drawn"
        )
    torch.manual_seed((job.seed + job.ranks.rank) % 2**64)  # the caller has forked the generators

    def slope(outputs: Tensor, batch: Batch) -> Tensor:
        return _slope(outputs, job.criterion, batch)

    sums = {name: torch.zeros(n, n, dtype=torch.float64) for name, n in outputs.items()}
    batches = job.bar(job.batches, "Fisher information")
    for batch, by_layer in derivatives(job.model, list(outputs), batches, slope, inputs=False):
        for name, uses in by_layer.items():
            for _, derivative in uses:
                columns = as_columns(windows[name], derivative).float()
                rows = counted(batch.padding.of(name), output_positions(windows[name], derivative))
                if rows is not None:
                    columns = columns[:, rows.flatten().to(columns.device)]
                sums[name] += (columns @ columns.T).double().cpu()
    job.ranks.sum("metrics", *sums.values())
    return {name: _root(total) for name, total in sums.items()}


def _slope(outputs: Tensor, criterion: Criterion, batch: Batch) -> Tensor:
    """The derivative of -log p(y) in the outputs, for labels y drawn from the predictions.

    It is 0 in positions that are hidden, and no labels are drawn for these.
    """
    dim = class_dim_of(criterion, tuple(outputs.shape), batch)
    rows = as_rows(outputs, dim)
    shown = counted(batch.padding.outputs, row_shape(tuple(outputs.shape), dim))
    if shown is None:
        slope = _drawn(rows, criterion.kind)
    else:
        at = shown.flatten().to(rows.device)
        slope = torch.zeros_like(rows)
        slope[at] = _drawn(rows[at], criterion.kind)
    if dim is None:
        return slope.view(outputs.shape)
    moved = outputs.movedim(dim, -1)
    return slope.reshape(moved.shape).movedim(-1, dim)


def _drawn(rows: Tensor, kind: str) -> Tensor:
    """The derivative for each row of the outputs (rows, C)."""
    if kind == "mse":
        return torch.randn_like(rows)  # Gaussian noise around the outputs
    if kind == "bce_with_logits":
        probability = rows.sigmoid()
        return probability - torch.bernoulli(probability)
    if not len(rows):
        return rows
    probability = rows.float().softmax(-1)
    labels = torch.multinomial(probability, 1)
    minus_one = torch.full_like(labels, -1, dtype=probability.dtype)
    return probability.scatter_add(-1, labels, minus_one).to(rows.dtype)


def _root(fisher: Tensor) -> Tensor:
    scale = float(fisher.diagonal().mean()) or 1.0  # 1: no prediction depends on the layer
    metric = (1 - IDENTITY_SHARE) / scale * fisher
    metric.diagonal().add_(IDENTITY_SHARE)
    values, vectors = torch.linalg.eigh(metric)
    return (vectors * values.sqrt()) @ vectors.T
