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
from ..data.positions import Draws, places
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


def columns_in_halves(
    window: Window | None, inputs: Tensor, draws: Draws, outputs: Sequence[Tensor] = (), *,
    halves: bool = True, mask: Tensor | None = None, stride: int = 1,
) -> Iterator[tuple[int, Tensor, list[Tensor]]]:  # fmt: skip
    """A layer's inputs and outputs at the positions of each half: (0 or 1, inputs, outputs).

    Both as from `columns_at`. A layer whose positions are not those of m samples is in the half of
    the first sample.

    window: how a convolution goes over its inputs, in this and the other functions; None: the layer
        is no convolution
    draws:  of the batch's m samples
    halves: False: all samples are in the first half
    mask:   (m, T) bool, of the positions that count; hidden ones have no column. None: all count
    stride: one of every `stride` positions has a column
    """
    shape = positions_shape(window, inputs)
    keep, rows = counted(mask, shape), math.prod(shape)
    chosen = places(draws.starts, rows, stride, None if keep is None else keep.flatten())
    of_half, second = [chosen], draws.second_half
    if halves and rows % len(second) == 0:
        in_second = second[chosen // max(1, rows // len(second))]
        of_half = [chosen[~in_second], chosen[in_second]]
    elif halves and bool(second[0]):
        of_half = [chosen[:0], chosen]
    for half, its_places in enumerate(of_half):
        for columns, of_outputs in columns_at(window, inputs, its_places, outputs):
            yield half, columns, of_outputs


def columns_at(
    window: Window | None, inputs: Tensor, at: Tensor, outputs: Sequence[Tensor] = ()
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """A layer's inputs and outputs at some positions, a part of these at a time.

    The inputs are (channels, taps, positions), float32 or float64, the outputs (C, positions). The
    layer's output is its weight as (C, channels * taps) times the inputs, plus its bias.

    at:      the positions' places (n,) int64, in order
    outputs: tensors of the shape of the layer's output
    """
    at = at.to(inputs.device)
    inputs = _batched(window, inputs.to(kept_type(inputs)))
    outputs = [_batched(window, each) for each in outputs]
    taps = 1 if window is None else math.prod(window.kernel_size)
    at_once = max(PRODUCT, PART // max(1, inputs.shape[1] * taps * inputs.element_size()))
    for part in at.split(at_once) if len(at) else ():
        if window is None:
            columns = inputs.index_select(0, part).T[:, None]
            yield columns, [each.index_select(0, part).T for each in outputs]
        else:
            yield _windows_at(window, inputs, part, outputs)


def kept_type(inputs: Tensor) -> torch.dtype:
    """The type of a layer's columns."""
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


def _windows_at(
    window: Window, inputs: Tensor, at: Tensor, outputs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """`columns_at` for a convolution, all in one part."""
    sizes = output_sizes(window, inputs.shape[2:])
    positions, taps = math.prod(sizes), math.prod(window.kernel_size)
    columns = inputs.new_empty(inputs.shape[1], taps, len(at))
    of_outputs = [each.new_empty(each.shape[1], len(at)) for each in outputs]
    first, last = (int(place) // positions for place in (at[0], at[-1]))
    at_once = max(1, PART // max(1, inputs[0].numel() * inputs.element_size()))
    for i in range(first, last + 1, at_once):  # samples, some at a time, to copy few
        samples = slice(i, min(i + at_once, last + 1))
        ends = torch.tensor([i, samples.stop], device=at.device) * positions
        start, end = torch.searchsorted(at, ends).tolist()
        here = at[start:end] - i * positions
        padded = _padded(window, inputs[samples])
        strides = padded[0, 0].contiguous().stride()
        maps = padded.transpose(0, 1).flatten(1)  # (channels, all samples' entries)
        corners = _dot(_grid(sizes), window.stride, strides).to(at.device)
        corner = here // positions * padded[0, 0].numel() + corners[here % positions]
        offsets = _dot(_grid(window.kernel_size), window.dilation, strides)
        for tap, offset in enumerate(offsets.tolist()):
            columns[:, tap, start:end] = maps.index_select(1, corner + offset)
        for output, each in zip(of_outputs, outputs, strict=True):
            of_samples = each[samples].transpose(0, 1).flatten(1)
            output[:, start:end] = of_samples.index_select(1, here)
    return columns, of_outputs


def _grid(sizes: Sequence[int]) -> Tensor:
    """The indices of all entries of a map of these sizes: (entries, dimensions) int64."""
    return torch.cartesian_prod(*map(torch.arange, sizes)).view(math.prod(sizes), -1)


def _dot(indices: Tensor, steps: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The places of entries that are `steps` apart in a map with these strides."""
    return (indices * torch.tensor(steps) * torch.tensor(strides)).sum(1)


def _padded(window: Window, inputs: Tensor) -> Tensor:
    """A convolution's inputs with its padding, and spread if it is a transposed one."""
    mode = "constant" if window.padding_mode == "zeros" else window.padding_mode
    return functional.pad(_spread(window, inputs), window.padding, mode=mode)


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


def output_shape(window: Window | None, inputs: Tensor, outputs: int) -> tuple[int, ...]:
    """The shape of a layer's output with this many channels, for these inputs."""
    if window is None:
        return (*inputs.shape[:-1], outputs)
    samples, *sizes = positions_shape(window, inputs)
    shape = (samples, outputs, *sizes)
    return shape if inputs.dim() == len(shape) else shape[1:]


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
    """A layer's outputs as (C, positions)."""
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
