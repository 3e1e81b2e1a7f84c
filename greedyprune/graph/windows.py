"""How convolutions go over their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

TRANSPOSED_TYPES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED_TYPES)


class Window(NamedTuple):
    """How a convolution's kernel goes over its input.

    padding:      for each end of each dimension, as nn.functional.pad takes it
    padding_mode: how the padding is filled, as in nn.Conv2d
    spread:       in a transposed convolution, its stride: its input's entries lie so far apart,
                  with zeros between them, and an ordinary convolution of stride 1 goes over that,
                  with the kernel flipped. Else empty
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    padding_mode: str
    spread: tuple[int, ...] = ()


def window_of(module: nn.Module) -> Window | None:
    """How a plain convolution goes over its input; None for a Linear or Conv1D."""
    if not isinstance(module, CONVOLUTION_TYPES):
        return None
    if isinstance(module, TRANSPOSED_TYPES):
        transposed: Any = module
        return _spread_window(
            transposed.kernel_size, transposed.stride, transposed.dilation, transposed.padding,
            transposed.output_padding,
        )  # fmt: skip
    padding: Any = module._reversed_padding_repeated_twice
    return Window(
        tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation), tuple(padding),
        module.padding_mode,
    )  # fmt: skip


def window_from(options: Mapping[str, Any], kernel: tuple[int, ...], transposed: bool) -> Window:
    """How a convolution goes over its input, from the arguments of its operation by name.

    kernel: the sizes of its kernel
    """
    dims = len(kernel)

    def for_each_dim(value: Any) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        return values * dims if len(values) == 1 else values

    stride, dilation = for_each_dim(options["stride"]), for_each_dim(options["dilation"])
    if transposed:
        sides = for_each_dim(options["padding"]), for_each_dim(options["output_padding"])
        return _spread_window(kernel, stride, dilation, *sides)
    padding: Any = options["padding"]
    ends: list[int] = []  # the last dimension first
    for dim in reversed(range(dims)):
        if padding == "same":
            total = dilation[dim] * (kernel[dim] - 1)
            ends += [total // 2, total - total // 2]
        else:
            ends += [0, 0] if padding == "valid" else [for_each_dim(padding)[dim]] * 2
    return Window(kernel, stride, dilation, tuple(ends), "zeros")


def _spread_window(
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
    output_padding: Sequence[int],
) -> Window:  # fmt: skip
    """A transposed convolution as one over its spread input."""
    ends: list[int] = []  # the last dimension first
    for dim in reversed(range(len(kernel))):
        end = dilation[dim] * (kernel[dim] - 1) - padding[dim]
        ends += [end, end + output_padding[dim]]
    ones = (1,) * len(kernel)
    return Window(
        tuple(kernel), ones, tuple(dilation), tuple(ends), "zeros", spread=tuple(stride)
    )  # fmt: skip
