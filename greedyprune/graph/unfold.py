"""How a layer's inputs, outputs and weights lie, brought to one form: features by positions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.products import PRODUCT
from .groups import Group
from .propagate import Slice

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PART = 2**24  # bytes of columns at a time


def outputs_of(model: nn.Module, group: Group, consumer: str) -> int:
    weight = weight_of(model.get_submodule(consumer))
    return weight.shape[1 - group.slices[f"{consumer}.weight"].dim]


def weight_of(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")


def unit_major(weight: Tensor, at: Slice, units: int) -> Tensor:
    """A consumer's weight with its features in the units' order: (C, N w)."""
    if at.dim == 0:  # GPT-2's: the weight transposed
        weight = weight.T
    taps = weight[0, 0].numel()
    shaped = weight.reshape(len(weight), at.outer, units, at.inner, taps)
    return shaped.transpose(1, 2).reshape(len(weight), -1)


def module_weight(new: Tensor, at: Slice, like: Tensor) -> Tensor:
    """The other way: new (C, K, w) as the weight of a module that is like the dense one."""
    outputs, units = new.shape[:2]
    taps = like[0, 0].numel() if at.dim == 1 else 1
    shaped = new.reshape(outputs, units, at.outer, at.inner, taps).transpose(1, 2)
    if at.dim == 0:
        return shaped.reshape(outputs, -1).T
    return shaped.reshape(outputs, -1, *like.shape[2:])


def parts(
    module: nn.Module, inputs: Tensor, outputs: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A layer's inputs as `unfolded`, with outputs as (C, positions), some samples at a time.

    Arrays beyond PART bytes would get fresh pages from the system for every batch.
    """
    inputs = _batched(module, inputs)
    outputs = None if outputs is None else _batched(module, outputs)
    taps, positions = 1, 1
    if isinstance(module, CONVOLUTIONS):
        taps, strides = math.prod(module.kernel_size), math.prod(module.stride)
        positions = math.ceil(inputs[0, 0].numel() / strides)
    sample = inputs.shape[1] * taps * positions * inputs.element_size()
    samples = max(1, PART // sample, PRODUCT // positions)
    for i in range(0, len(inputs), samples):
        target = None if outputs is None else as_columns(module, outputs[i : i + samples])
        yield unfolded(module, inputs[i : i + samples]), target


def unfolded(module: nn.Module, inputs: Tensor) -> Tensor:
    """A layer's inputs as (channels, taps, positions): its output is a product with the weights."""
    if inputs.dtype not in (torch.float32, torch.float64):
        inputs = inputs.float()
    inputs = _batched(module, inputs)
    if not isinstance(module, CONVOLUTIONS):
        return inputs.T[:, None]
    spatial = len(module.kernel_size)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    sizes = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            padded.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
        )
    ]
    taps = math.prod(module.kernel_size)
    columns = inputs.new_empty(inputs.shape[1], taps, len(inputs), *sizes)
    for tap in range(taps):
        part, rest = padded, tap
        for dim in reversed(range(spatial)):
            rest, offset = divmod(rest, module.kernel_size[dim])
            start, stride = offset * module.dilation[dim], module.stride[dim]
            part = part.narrow(dim + 2, start, stride * (sizes[dim] - 1) + 1)
            part = part[(slice(None),) * (dim + 2) + (slice(None, None, stride),)]
        columns[:, tap] = part.transpose(0, 1)
    return columns.flatten(2)


def as_columns(module: nn.Module, outputs: Tensor) -> Tensor:
    """A layer's outputs as (C, positions), in the order of `unfolded`'s."""
    return _batched(module, outputs).transpose(0, 1).flatten(1)


def _batched(module: nn.Module, values: Tensor) -> Tensor:
    """A layer's inputs or outputs as (samples, channels, *positions)."""
    if not isinstance(module, CONVOLUTIONS):
        return values.reshape(-1, values.shape[-1])
    return values if values.dim() == len(module.kernel_size) + 2 else values[None]


def by_position(module: nn.Module, inputs: Tensor) -> Tensor:
    """A layer's inputs (or what has their shape) as (positions, F), samples outermost."""
    if not isinstance(module, CONVOLUTIONS):
        return inputs.reshape(-1, inputs.shape[-1])
    channels = inputs.dim() - 1 - len(module.kernel_size)
    moved = inputs.movedim(channels, -1)
    return moved.reshape(-1, moved.shape[-1])
