"""A layer's inputs, outputs and weights as matrices, so that a convolution is a matrix product.

A *position* is one sample's token or pixel: one output of the layer for every channel. A *feature*
is one of the numbers that a layer's weight multiplies at a position: one input channel of a Linear,
one input channel at one of the kernel's taps of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.padding import counted
from ..kernels.products import PRODUCT
from .groups import Group
from .names import module_of_layer, slice_of, weight_of
from .slices import Slice
from .windows import Window, window_of

PART = 2**24  # bytes of unfolded inputs at a time


def outputs_of(model: nn.Module, group: Group, consumer: str) -> int:
    """How many output channels a consumer of the group has."""
    return weight_of(model, consumer).shape[out_dim_of(slice_of(group.slices, consumer).dim)]


def out_dim_of(in_dim: int) -> int:
    """The dimension of a weight that has its outputs, from the one that has its inputs."""
    return 1 if in_dim == 2 else 1 - in_dim


def consumer_window(model: nn.Module, group: Group, consumer: str) -> Window | None:
    """How a consumer of the group goes over its inputs; None: it is no convolution."""
    module = module_of_layer(model, consumer)
    return group.windows.get(consumer) or (None if module is None else window_of(module))


def unit_major(weight: Tensor, at: Slice) -> Tensor:
    """A consumer's weight as (C, N * w): C outputs, and the w features of each of N units together.

    at: where the weight holds the units
    """
    weight = outputs_first(weight, at.dim)
    return weight.index_select(1, at.places.flatten().to(weight.device)).flatten(1)


def outputs_first(weight: Tensor, in_dim: int) -> Tensor:
    """A weight as an ordinary convolution's or Linear's: (outputs, inputs, *taps).

    The weights of transposed convolutions and of transformers' Conv1D begin with their inputs. The
    taps of the former are flipped (tracing.Window). Weights of experts (experts, outputs, inputs)
    have a tap for each expert.
    """
    if in_dim == 1:
        return weight
    if in_dim == 2:
        return weight.permute(1, 2, 0)
    return weight.transpose(0, 1).flip([*range(2, weight.dim())])


def as_stored(weight: Tensor, in_dim: int) -> Tensor:
    """The inverse of `outputs_first`."""
    return weight.permute(2, 0, 1) if in_dim == 2 else outputs_first(weight, in_dim)


def module_weight(new: Tensor, dim: int, like: Tensor) -> Tensor:
    """The inverse of `unit_major`, for features in any order: new (C, ...) as a consumer's weight.

    dim:  the weight's dimension that has the features
    like: the dense weight, for a convolution's kernel size
    """
    taps = outputs_first(like, dim).shape[2:]
    return as_stored(new.reshape(len(new), -1, *taps), dim)


def in_halves(
    window: Window | None, inputs: Tensor, outputs: Tensor | None, second: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """A layer's inputs and outputs of the samples in each half: (0 or 1, inputs, outputs).

    window: how a convolution goes over its inputs, in this and the other functions; None: the layer
        is no convolution
    second: (m,) bool: is the sample in the second half? None: all are in the first. A layer whose
        rows are not those of m samples is in the half of the first sample
    """
    inputs = _batched(window, inputs)
    outputs = None if outputs is None else _batched(window, outputs)
    if second is None or len(inputs) % len(second) or bool((second == second[0]).all()):
        yield (0 if second is None else int(second[0])), inputs, outputs
        return
    rows = second.repeat_interleave(len(inputs) // len(second)).to(inputs.device)
    for half, chosen in enumerate((~rows, rows)):
        yield half, inputs[chosen], None if outputs is None else outputs[chosen]


def columns_in_halves(
    window: Window | None, inputs: Tensor, outputs: Tensor | None, second: Tensor | None,
    mask: Tensor | None = None,
) -> Iterator[tuple[int, Tensor, Tensor | None]]:  # fmt: skip
    """The parts of `unfolded_parts` for the samples in each half: (0 or 1, inputs, outputs).

    second: as for `in_halves`
    mask:   (m, T) bool, of the positions that count; hidden ones have no column. None: all count
    """
    keep = counted(mask, positions_shape(window, inputs))
    if keep is None:
        for half, its_inputs, its_outputs in in_halves(window, inputs, outputs, second):
            for columns, target in unfolded_parts(window, its_inputs, its_outputs):
                yield half, columns, target
        return
    inputs = _batched(window, inputs)
    outputs = None if outputs is None else _batched(window, outputs)
    keep = keep.reshape(len(inputs), -1)
    rows = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    if second is not None and len(inputs) % len(second) == 0:
        rows = second.repeat_interleave(len(inputs) // len(second)).to(inputs.device)
    for half, in_half in enumerate((~rows, rows)):
        chosen = in_half & keep.any(1)
        if not bool(chosen.any()):
            continue
        its_outputs = None if outputs is None else outputs[chosen]
        parts = unfolded_parts(window, inputs[chosen], its_outputs, keep[chosen])
        for columns, target in parts:
            yield half, columns, target


def unfolded_parts(
    window: Window | None, inputs: Tensor, outputs: Tensor | None, keep: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A layer's inputs as `unfolded` and its outputs as `as_columns`, a few samples at a time.

    keep: (samples, positions of a sample) bool: which positions get a column; None: all

    A part has at most PART bytes of unfolded inputs (or, where that is more, one sample, or PRODUCT
    positions): the system would give larger arrays fresh pages of memory for every batch.
    """
    inputs = _batched(window, inputs)
    outputs = None if outputs is None else _batched(window, outputs)
    taps, positions = 1, 1
    if window is not None:
        taps, strides = math.prod(window.kernel_size), math.prod(window.stride)
        positions = math.ceil(inputs[0, 0].numel() * math.prod(window.spread) / strides)
    sample = inputs.shape[1] * taps * positions * inputs.element_size()
    samples = max(1, PART // sample, PRODUCT // positions)
    for i in range(0, len(inputs), samples):
        target = None if outputs is None else as_columns(window, outputs[i : i + samples])
        columns = unfolded(window, inputs[i : i + samples])
        if keep is not None and not bool((kept := keep[i : i + samples].flatten()).all()):
            columns = columns[..., kept]
            target = None if target is None else target[:, kept]
        yield columns, target


def unfolded(window: Window | None, inputs: Tensor) -> Tensor:
    """A layer's inputs as (channels, taps, positions), float32 or float64.

    The layer's output, as `as_columns`, is its weight as (C, channels * taps) times these.
    """
    if inputs.dtype not in (torch.float32, torch.float64):
        inputs = inputs.float()
    inputs = _batched(window, inputs)
    if window is None:
        return inputs.T[:, None]
    spatial = len(window.kernel_size)
    inputs = _spread(window, inputs)
    mode = "constant" if window.padding_mode == "zeros" else window.padding_mode
    padded = functional.pad(inputs, window.padding, mode=mode)
    sizes = _sizes_over(window, inputs.shape[2:])
    taps = math.prod(window.kernel_size)
    columns = inputs.new_empty(inputs.shape[1], taps, len(inputs), *sizes)
    for tap in range(taps):
        part, rest = padded, tap
        for dim in reversed(range(spatial)):
            rest, offset = divmod(rest, window.kernel_size[dim])
            start, stride = offset * window.dilation[dim], window.stride[dim]
            part = part.narrow(dim + 2, start, stride * (sizes[dim] - 1) + 1)
            part = part[(slice(None),) * (dim + 2) + (slice(None, None, stride),)]
        columns[:, tap] = part.transpose(0, 1)
    return columns.flatten(2)


def output_sizes(window: Window, sizes: Sequence[int]) -> list[int]:
    """The spatial sizes of a convolution's output for inputs of these sizes."""
    apart = window.spread or (1,) * len(sizes)
    return _sizes_over(
        window, [(size - 1) * step + 1 for size, step in zip(sizes, apart, strict=True)]
    )


def _spread(window: Window, inputs: Tensor) -> Tensor:
    """The inputs with zeros between their entries, for a transposed convolution."""
    if not window.spread:
        return inputs
    sizes = [(n - 1) * step + 1 for n, step in zip(inputs.shape[2:], window.spread, strict=True)]
    apart = inputs.new_zeros(*inputs.shape[:2], *sizes)
    places: Any = (..., *(slice(None, None, step) for step in window.spread))
    apart[places] = inputs
    return apart


def _sizes_over(window: Window, sizes: Sequence[int]) -> list[int]:
    """The spatial sizes of a convolution's output for spread inputs of these sizes."""
    pads = window.padding  # the last dimension's come first
    padded = [size + pads[-2 * i - 2] + pads[-2 * i - 1] for i, size in enumerate(sizes)]
    return [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            padded, window.kernel_size, window.stride, window.dilation, strict=True
        )
    ]


def positions_shape(window: Window | None, inputs: Tensor) -> tuple[int, ...]:
    """The shape of a layer's positions, for these inputs: its output's without the channels."""
    if window is None:
        return tuple(inputs.shape[:-1])
    batched = _batched(window, inputs)
    return (len(batched), *output_sizes(window, batched.shape[2:]))


def input_positions(window: Window | None, inputs: Tensor) -> tuple[int, ...]:
    """The shape of the positions of a layer's inputs, in the order of `by_position`."""
    if window is None:
        return tuple(inputs.shape[:-1])
    channels = inputs.dim() - 1 - len(window.kernel_size)
    return tuple(inputs.shape[:channels]) + tuple(inputs.shape[channels + 1 :])


def output_positions(window: Window | None, outputs: Tensor) -> tuple[int, ...]:
    """The shape of a layer's positions, for these outputs."""
    if window is None:
        return tuple(outputs.shape[:-1])
    batched = _batched(window, outputs)
    return (len(batched), *batched.shape[2:])


def as_columns(window: Window | None, outputs: Tensor) -> Tensor:
    """A layer's outputs as (C, positions), the positions in the order of `unfolded`."""
    return _batched(window, outputs).transpose(0, 1).flatten(1)


def _batched(window: Window | None, values: Tensor) -> Tensor:
    """A layer's inputs or outputs as (samples, channels, *positions); a token is a sample."""
    if window is None:
        return values.reshape(-1, values.shape[-1])
    return values if values.dim() == len(window.kernel_size) + 2 else values[None]


def by_position(window: Window | None, inputs: Tensor) -> Tensor:
    """A layer's inputs, or values of their shape, as (positions, channels), samples outermost."""
    if window is None:
        return inputs.reshape(-1, inputs.shape[-1])
    channels = inputs.dim() - 1 - len(window.kernel_size)
    moved = inputs.movedim(channels, -1)
    return moved.reshape(-1, moved.shape[-1])
