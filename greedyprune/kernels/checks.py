"""What `ops` asks of its tensors; each message shows what was found and expected."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.losses import Target
from .structs import FEATURE_TYPES


def checked_units(units: Tensor | None, features: Tensor) -> Tensor:
    if units is None:
        return torch.arange(len(features), device=features.device)
    if units.dtype != torch.int64 or units.dim() != 1:
        raise TypeError(f"units: found {units.dtype} {tuple(units.shape)}, expected int64 (n,)")
    if len(units) and not (int(units.min()) >= 0 and int(units.max()) < len(features)):
        raise ValueError(f"units: found other indices, expected them in [0, {len(features)})")
    return units.to(features.device).contiguous()


def check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {shape}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: found {tensor.dtype}, expected {dtype}")


def check_features(
    features: Tensor, outgoing: Tensor | None = None, backend: str = "cpu", spread: bool = False
) -> None:
    """spread: may this process have no samples, because others have them?"""
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
    if (target.outputs, target.samples) != (outgoing.shape[1], features.shape[1]):
        raise ValueError(
            f"target: found C={target.outputs}, m={target.samples}, expected "
            f"C={outgoing.shape[1]}, m={features.shape[1]}"
        )
