"""The checks that `ops` makes of its arguments. A message says what was found and expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.losses import Target

FEATURE_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_backend(backend: str, *expected: str) -> None:
    """Raises ValueError unless `backend` is among the expected ones."""
    if backend not in expected:
        names = ", ".join(map(repr, expected))
        raise ValueError(f"backend: found {backend!r}, expected one of {names}")


def check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    """Raises ValueError unless the tensor has this shape, TypeError unless it has this type."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {shape}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: found {tensor.dtype}, expected {dtype}")


def checked_units(units: Tensor | None, features: Tensor) -> Tensor:
    """The units (n,) int64 on the features' device, all of them for None, if they exist."""
    if units is None:
        return torch.arange(len(features), device=features.device)
    if units.dtype != torch.int64 or units.dim() != 1:
        raise TypeError(f"units: found {units.dtype} {tuple(units.shape)}, expected int64 (n,)")
    if len(units) and not (int(units.min()) >= 0 and int(units.max()) < len(features)):
        raise ValueError(
            f"units: found indices from {int(units.min())} to {int(units.max())}, expected them in "
            f"[0, {len(features)})"
        )
    return units.to(features.device).contiguous()


def check_features(
    features: Tensor, outgoing: Tensor | None = None, backend: str = "cpu", spread: bool = False
) -> None:
    """Raises ValueError or TypeError unless features (N, m) and outgoing (N, C) suit a kernel.

    spread: the samples are spread over processes, so that this one may have none
    """
    if features.dtype not in FEATURE_TYPES or (features.itemsize < 4 and backend == "cpu"):
        expected = "float32 or float64" + (", bfloat16 or float16" if backend != "cpu" else "")
        raise TypeError(f"features: found {features.dtype}, expected {expected}")
    if features.dim() != 2 or (features.shape[1] > 1 and features.stride(1) != 1):
        raise ValueError(
            f"features: found shape {tuple(features.shape)} with strides {features.stride()}, "
            "expected (N, m) with contiguous rows"
        )
    if not (len(features) if spread else features.numel()):
        raise ValueError(f"features: found shape {tuple(features.shape)}, expected N, m >= 1")
    if outgoing is not None and (outgoing.dim() != 2 or len(outgoing) != len(features)):
        raise ValueError(
            f"outgoing: found shape {tuple(outgoing.shape)}, expected ({len(features)}, C)"
        )


def check_target(target: Target, features: Tensor, outgoing: Tensor) -> None:
    """Raises ValueError unless the target has the outputs and samples of the other two."""
    if (target.outputs, target.samples) != (outgoing.shape[1], features.shape[1]):
        raise ValueError(
            f"target: found C={target.outputs}, m={target.samples}, expected "
            f"C={outgoing.shape[1]}, m={features.shape[1]}"
        )


def check_starts(starts: Tensor, batch: int, steps: int, samples: int) -> None:
    """Raises ValueError unless starts (steps,) int64 are those of mini-batches of the samples."""
    if (
        starts.dtype != torch.int64
        or starts.dim() != 1
        or len(starts) < steps
        or not (int(starts.min()) >= 0 and int(starts.max()) + batch <= samples)
    ):
        raise ValueError(
            f"starts: found {starts.dtype} {tuple(starts.shape)}, expected int64 "
            f"({steps},) in [0, {samples} - {batch}]"
        )


def check_spread(ranks: int, starts: Tensor | None, mass: float | None, backend: str) -> None:
    """Raises ValueError where `greedy_pointwise` can't work on samples spread over processes."""
    if starts is not None or backend == "cuda":
        what = "backend='cuda'" if starts is None else "starts"
        raise ValueError(f"ranks: found {ranks} with {what}, expected one")
    if mass is None:
        raise ValueError(f"mass: found None with {ranks} ranks, expected that of all samples")


def check_parts(grams: Sequence[Tensor], rights: Sequence[Tensor], widths: Sequence[int]) -> None:
    """Raises ValueError or TypeError unless these are least squares in the same N units."""
    if not len(grams) == len(rights) == len(widths) or not len(grams):
        raise ValueError(
            f"grams: found {len(grams)} with {len(rights)} right sides and {len(widths)} widths, "
            "expected as many of each, at least one"
        )
    units = 0
    for i, (gram, right, width) in enumerate(zip(grams, rights, widths, strict=True)):
        features = len(gram)
        check(f"grams[{i}]", gram, (features, features), torch.float64)
        check(f"rights[{i}]", right, (features, right.shape[-1]), torch.float64)
        if width < 1 or features % width:
            raise ValueError(
                f"widths[{i}]: found {width} for {features} features, expected a divisor"
            )
        units = units or features // width
        if features // width != units:
            raise ValueError(
                f"grams[{i}]: found {features // width} units, expected {units} as in the first"
            )
