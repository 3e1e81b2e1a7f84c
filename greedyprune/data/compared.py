"""What a loss compares: rows of the model's outputs, and the target of each row.

A *row* is one sample or, where the model has outputs for each position, one position. Positions
that are hidden, and class indices that the loss ignores, have no row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .batch import Batch
from .forward import main_output
from .losses import Criterion, Target
from .padding import counted


@dataclass(frozen=True)
class Compared:
    """The rows of a batch's outputs that the loss compares.

    target:    of these rows
    class_dim: the outputs' dimension that is not one of the rows; None: there is none
    rows:      (all rows,) bool, which of them are compared; None: all
    """

    target: Target
    class_dim: int | None
    rows: Tensor | None

    def columns(self, outputs: Tensor) -> Tensor:
        """The compared outputs (C, rows) float64; they have derivatives in `outputs`."""
        columns = as_rows(outputs.double(), self.class_dim)
        return (columns if self.rows is None else columns[self.rows]).T


def compared(criterion: Criterion, outputs: object, batch: Batch) -> Compared:
    """What the loss compares of the model's outputs for a batch.

    ValueError or TypeError where there are no targets, or where they do not match the outputs.
    """
    output, targets = main_output(outputs), batch.targets
    shape = tuple(output.shape) or (1,)
    if targets is None:
        raise ValueError(
            "data: found inputs without targets, expected (inputs, targets) for the loss, or "
            "objective='imitation', which needs none"
        )
    if criterion.kind == "custom":
        classes = shape[-1] if len(shape) > 1 else 1
        samples = math.prod(shape) // max(1, classes)
        shown = counted(batch.padding.outputs, shape[:-1])
        weight = None if shown is None else shown.flatten().double()
        target = Target("custom", classes, samples, float(samples), weight=weight)
        return Compared(target, -1, None)
    if not isinstance(targets, Tensor):
        criterion.target(targets, shape)  # raises
    if criterion.kind == "cross_entropy" and not targets.is_floating_point():
        return _of_labels(criterion, targets, shape, batch)
    dim = class_dim_of(criterion, shape, batch)
    rows = counted(batch.padding.outputs, row_shape(shape, dim))
    if tuple(targets.shape) != shape:
        criterion.target(targets, shape)  # raises
    if rows is None and dim == -1 and (len(shape) < 3 or not criterion.classes_last):
        return Compared(criterion.target(targets, shape), dim, None)
    rows = None if rows is None else rows.flatten()
    flat = as_rows(targets, dim)
    flat = flat if rows is None else flat[rows]
    return Compared(criterion.target(flat, tuple(flat.shape)), dim, rows)


def _of_labels(
    criterion: Criterion, labels: Tensor, shape: tuple[int, ...], batch: Batch
) -> Compared:
    """The rows of class indices, without those that the loss ignores."""
    dim = class_dim_of(criterion, shape, batch)
    if dim is None or row_shape(shape, dim) != labels.shape:
        return Compared(criterion.target(labels, shape), dim, None)  # raises
    rows, flat = labels.reshape(-1) != criterion.ignore_index, labels.reshape(-1)
    visible = counted(batch.padding.outputs, tuple(labels.shape))
    if visible is not None:
        rows = rows & visible.flatten()
    if bool(rows.all()):
        return Compared(criterion.target(flat, (len(flat), shape[dim])), dim, None)
    flat = flat[rows]
    return Compared(criterion.target(flat, (len(flat), shape[dim])), dim, rows)


def class_dim_of(criterion: Criterion, shape: tuple[int, ...], batch: Batch) -> int | None:
    """The dimension of the classes, or of the outputs of a row; None: each output is a row."""
    targets, mask = batch.targets, batch.padding.outputs
    if len(shape) < 2:
        return None
    if criterion.kind == "cross_entropy":
        if not isinstance(targets, Tensor):
            return -1
        if not targets.is_floating_point():
            return criterion.class_dim(shape, tuple(targets.shape))
        by_position = mask is not None and shape[:-1] == tuple(mask.shape)
        return -1 if len(shape) == 2 or criterion.classes_last or by_position else 1
    if mask is None:
        return -1
    if shape == tuple(mask.shape) and not criterion.classes_last:
        return None
    return criterion.class_dim(shape, tuple(mask.shape))


def row_shape(shape: tuple[int, ...], class_dim: int | None) -> tuple[int, ...]:
    """The shape of outputs without the dimension of the classes."""
    if class_dim is None:
        return shape
    class_dim %= len(shape)
    return shape[:class_dim] + shape[class_dim + 1 :]


def as_rows(values: Tensor, class_dim: int | None) -> Tensor:
    """Outputs, or targets of their shape, as (rows, C)."""
    if class_dim is None or values.dim() < 2:
        return values.reshape(-1, 1)
    moved = values.movedim(class_dim, -1)
    return moved.reshape(-1, moved.shape[-1])
