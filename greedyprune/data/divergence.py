"""How far a model's outputs are from those of the dense model, without labels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from .batch import Batch
from .compared import as_rows, class_dim_of, row_shape
from .forward import leaves_of, main_output, shown
from .losses import Criterion
from .padding import counted

Parts = Mapping[str, Tensor]  # what is compared of the outputs for a batch
LOGITS = "logits"  # the name of the part that probabilities follow from


def parts_of(criterion: Criterion, outputs: object, batch: Batch) -> Parts:
    """The logits alone, (rows, classes), if the outputs have some, else all floating-point tensors.

    The outputs are logits with a cross-entropy loss or "bce_with_logits", and if their name is
    `logits`. A row is a sample or a position; for "bce_with_logits" it is one probability. Hidden
    positions are left out.
    """
    logits = _logits(criterion, outputs, batch)
    if logits is not None:
        return {LOGITS: logits}
    leaves = leaves_of(outputs)
    return {
        f"output {place}": shown(leaf, batch.padding)
        for place, leaf in zip(leaves[::2], leaves[1::2], strict=True)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def _logits(criterion: Criterion, outputs: object, batch: Batch) -> Tensor | None:
    """The rows of the logits; None: the outputs are none, or their classes are not known."""
    kind = criterion.kind if batch.targets is not None else ""
    if isinstance(outputs, Tensor) and kind not in ("cross_entropy", "bce_with_logits"):
        return None
    with suppress(ValueError):
        output = main_output(outputs)
        shape = tuple(output.shape)
        dim = 1 if len(shape) > 3 else -1  # maps (m, C, H, W), or (m, T, C)
        if kind == "cross_entropy":
            dim = class_dim_of(criterion, shape, batch) or -1
        rows = as_rows(output, dim)
        visible = counted(batch.padding.outputs, row_shape(shape, dim)) if len(shape) > 1 else None
        rows = rows if visible is None else rows[visible.flatten()]
        if kind == "bce_with_logits":
            rows = torch.stack([rows.flatten(), torch.zeros_like(rows).flatten()], 1)
        return rows if rows.shape[1] > 1 else None
    return None


def divergence(dense: Sequence[Parts], pruned: Iterable[Parts]) -> float:
    """The divergence of the outputs for several batches; NaN where no part can be compared.

    For logits it is the Kullback-Leibler divergence of their softmax, in nats, the mean over rows.
    For other tensors it is the squared error as a share of the dense tensor's squares, the mean
    over the tensors. Tensors that pruning has made smaller are left out.
    """
    totals, weights = defaultdict[str, float](float), defaultdict[str, float](float)
    for parts, others in zip(dense, pruned, strict=True):
        for name, expected in parts.items():
            other = others.get(name)
            if other is None or other.shape != expected.shape:
                continue
            one, two = expected.double(), other.double()
            if name == LOGITS:
                one, two = one.log_softmax(1), two.log_softmax(1)
                terms = one.exp() * (one - two)
                totals[name] += float(terms.where(one > -math.inf, 0).sum())
                weights[name] += len(one)
            else:
                totals[name] += float((one - two).square().sum())
                weights[name] += float(one.square().sum())
    shares = [totals[name] / weight for name, weight in weights.items() if weight > 0]
    return sum(shares) / len(shares) if shares else math.nan
