"""How tensors reach the extension: the structs of csrc/kernels.h, filled field by field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.losses import KINDS, Target
from ..runtime.distributed import ALONE, Ranks
from .backend import extension
from .path import Moments, Path, Rule

FEATURE_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Struct:
    """Fills the extension's structs from tensors, and keeps those alive as long as itself."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def fill(self, struct: Any, **fields: Any) -> Any:
        for name, value in fields.items():
            if isinstance(value, Tensor):
                assert value.is_contiguous()
                if not value.numel():  # null would say that there is none
                    value = value.new_zeros(1)
                self._kept.append(value)
                value = value.data_ptr()
            elif value is None:
                value = 0
            else:
                self._kept.append(value)
            setattr(struct, name, value)
        return struct


class Run(Struct):
    """What every greedy kernel takes: the rule, the path that it writes, scratch.

    ranks: that the samples are spread over
    """

    def __init__(
        self, rule: Rule, units: int, with_gap: bool, device: torch.device | None = None,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        super().__init__()
        _C = extension()
        double, steps = torch.float64, rule.steps
        draws = None if rule.draws is None else rule.draws.to(device).contiguous()
        if draws is not None and (draws.dtype != double or len(draws) < steps):
            raise ValueError(
                f"draws: found {draws.dtype} {tuple(draws.shape)}, expected float64 ({steps}, n)"
            )
        self._order = torch.zeros(steps, dtype=torch.int64, device=device)
        self._losses = torch.zeros(steps, dtype=double, device=device)
        self._gap = torch.zeros_like(self._losses) if with_gap else None
        self.picked = torch.empty(units, dtype=torch.int64, device=device)
        self.path = self.fill(_C.Path(), order=self._order, losses=self._losses, gap=self._gap)
        self.rule = self.fill(
            _C.Rule(),
            steps=steps,
            size=rule.size,
            replacement=rule.replacement,
            shortlist=rule.shortlist,
            candidates=0 if draws is None else draws.shape[1],
            draws=draws,
        )
        self.ranks = ranks
        self._exchange = torch.empty(2 * units + 3, dtype=double) if ranks.size > 1 else None
        self.workspace = self.fill(
            _C.Workspace(),
            exchange=self._exchange,
            ranks=ranks.size,
            available=torch.empty_like(self.picked),
            contenders=torch.empty_like(self.picked),
            picked=self.picked,
            scores=torch.empty(units, dtype=double, device=device),
            errors=torch.empty(units, dtype=double, device=device),
        )

    def sum(self, count: int, picks: int) -> None:
        """Adds up the first numbers of the exchange over the ranks; picks: has to be the same."""
        assert self._exchange is not None
        self.ranks.sum(f"greedy step after picks {picks:x}", self._exchange[:count])

    def result(self) -> Path:
        k = self.path.length
        gap = None if self._gap is None else self._gap[:k].clone()
        order, losses = self._order[:k].clone(), self._losses[:k].clone()
        return Path(order, losses, gap, self.path.scored, self.path.rescored)


@dataclass(frozen=True)
class Extent:
    """How large each unit's features are, (N,) float64: sum of squares, and largest magnitude."""

    squares: Tensor
    largest: Tensor

    @classmethod
    def zeros(cls, units: int) -> Extent:
        zeros = torch.zeros(2, units, dtype=torch.float64)
        return cls(zeros[0], zeros[1])


def features_struct(keep: Struct, features: Tensor, extent: Extent | None = None) -> Any:
    units, samples = features.shape
    keep._kept.append(features)
    struct = extension().Features()
    if extent is not None:
        keep.fill(struct, squares=extent.squares, largest=extent.largest)
    struct.data, struct.type = features.data_ptr(), FEATURE_TYPES[features.dtype]
    struct.units, struct.samples = units, samples
    struct.stride = features.stride(0)
    return struct


def target_struct(keep: Struct, target: Target, dtype: torch.dtype, scale: float) -> Any:
    def as_real(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype).contiguous()

    _C = extension()
    return keep.fill(
        _C.TargetF64() if dtype == torch.float64 else _C.TargetF32(),
        loss=KINDS[target.kind][0],
        outputs=target.outputs,
        value=as_real(target.value),
        label=None if target.label is None else target.label.contiguous(),
        weight=as_real(target.weight),
        scale=scale,
    )


def quadratic_struct(run: Run, moments: Moments, rounding: float) -> Any:
    return run.fill(
        extension().Quadratic(),
        units=len(moments.norm),
        scale=1 / moments.mass,
        norm=moments.norm.contiguous(),
        size=moments.norm.sqrt(),
        beta=moments.beta.contiguous(),
        target_norm=moments.target_norm,
        rounding=rounding,
        state=torch.zeros_like(moments.norm),
    )
