"""How tensors reach the extension: the structs of csrc/kernels.h, made from tensors by name.

The extension says which fields each of its structs has (csrc/bindings.h reads them off kernels.h).
A struct can only be made with all of them, so that no field is forgotten here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.losses import Target
from ..runtime.distributed import ALONE, Ranks
from .backend import extension
from .path import Moments, Path, Rule

LOSSES = {  # the names of csrc/kernels.h
    "mse": "squared_error",
    "cross_entropy": "cross_entropy",
    "bce_with_logits": "logistic",
}
Native = Any  # a struct of the extension, which has no type stubs


def type_number(dtype: torch.dtype) -> int:
    """The number that csrc/kernels.h has for a type of features."""
    number: int = extension().TYPES[str(dtype).removeprefix("torch.")]
    return number


class Structs:
    """Makes the extension's structs, and keeps the tensors that they point to alive."""

    def __init__(self) -> None:
        self._alive: list[object] = []

    def make(self, kind: type[Native], **fields: object) -> Native:
        """A struct with these fields: a tensor as its address, None as a null pointer.

        Raises TypeError where a field is missing or unknown.
        """
        if fields.keys() != set(kind.FIELDS):
            differing = ", ".join(sorted(fields.keys() ^ set(kind.FIELDS)))
            raise TypeError(f"{kind.__name__}: found other fields than expected: {differing}")
        struct = kind()
        for name, value in fields.items():
            self._alive.append(value)
            setattr(struct, name, self._address(value) if isinstance(value, Tensor) else value)
        return struct

    def _address(self, tensor: Tensor) -> int:
        assert tensor.is_contiguous()
        if not tensor.numel():  # torch gives an empty tensor the address 0, which would mean None
            tensor = tensor.new_zeros(1)
            self._alive.append(tensor)
        return tensor.data_ptr()

    def features(self, features: Tensor, extent: Extent | None = None) -> Native:
        """features: (N, m), each row contiguous; extent: theirs, for kernels that need it"""
        self._alive.append(features)
        units, samples = features.shape
        return self.make(
            extension().Features,
            data=features.data_ptr(),  # the rows need not follow one another
            type=type_number(features.dtype),
            units=units,
            samples=samples,
            stride=features.stride(0),
            squares=None if extent is None else extent.squares,
            largest=None if extent is None else extent.largest,
        )

    def target(self, target: Target, dtype: torch.dtype, scale: float) -> Native:
        """scale: factor of the loss"""

        def real(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype).contiguous()

        _C = extension()
        return self.make(
            _C.TargetF64 if dtype == torch.float64 else _C.TargetF32,
            loss=_C.LOSSES[LOSSES[target.kind]],
            outputs=target.outputs,
            value=real(target.value),
            label=None if target.label is None else target.label.contiguous(),
            weight=real(target.weight),
            scale=scale,
        )

    def quadratic(
        self, moments: Moments, rounding: float, state: Tensor | None = None, **exact: object
    ) -> Native:
        """state: (N,) float64 zeros; exact: the fields for scores from the features"""
        names = ("features", "outgoing", "target", "sum", "residual", "all_units")
        return self.make(
            extension().Quadratic,
            units=len(moments.norm),
            scale=1 / moments.mass,
            gram_diagonal=moments.norm.contiguous(),
            phi_norm=moments.norm.sqrt(),
            beta=moments.beta.contiguous(),
            target_norm=moments.target_norm,
            rounding=rounding,
            state=torch.zeros_like(moments.norm) if state is None else state,
            **{"outputs": 0, **dict.fromkeys(names), **exact},
        )


class Run(Structs):
    """What every greedy kernel takes: the rule, the path that it writes, scratch.

    ranks: the processes that the samples are spread over
    """

    def __init__(
        self, rule: Rule, units: int, with_gap: bool, device: torch.device | None = None,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        super().__init__()
        _C = extension()
        steps = rule.steps
        draws = None if rule.draws is None else rule.draws.to(device).contiguous()
        if draws is not None and (draws.dtype != torch.float64 or len(draws) < steps):
            raise ValueError(
                f"draws: found {draws.dtype} {tuple(draws.shape)}, expected float64 ({steps}, n)"
            )
        self._order = torch.zeros(steps, dtype=torch.int64, device=device)
        self._losses = torch.zeros(steps, dtype=torch.float64, device=device)
        self._gap = torch.zeros_like(self._losses) if with_gap else None
        self.picked = torch.empty(units, dtype=torch.int64, device=device)
        self.path = self.make(
            _C.Path, order=self._order, losses=self._losses, gap=self._gap, length=0, scored=0,
            rescored=0,
        )  # fmt: skip
        self.rule = self.make(
            _C.Rule,
            steps=steps,
            size=rule.size,
            replacement=rule.replacement,
            shortlist=rule.shortlist,
            candidates=0 if draws is None else draws.shape[1],
            draws=draws,
        )
        self.ranks = ranks
        exchange = 2 * units + 3 if ranks.size > 1 else 0
        self._exchange = torch.empty(exchange, dtype=torch.float64) if exchange else None
        self.workspace = self.make(
            _C.Workspace,
            exchange=self._exchange,
            ranks=ranks.size,
            available=torch.empty_like(self.picked),
            contenders=torch.empty_like(self.picked),
            picked=self.picked,
            scores=torch.empty(units, dtype=torch.float64, device=device),
            errors=torch.empty(units, dtype=torch.float64, device=device),
        )

    def sum(self, count: int, picks: int) -> None:
        """Adds up the first `count` numbers of the exchange over the ranks.

        picks: a number for the picks so far, which has to be the same on all ranks
        """
        assert self._exchange is not None
        self.ranks.sum(f"greedy step after picks {picks:x}", self._exchange[:count])

    def result(self) -> Path:
        """The path that the kernel wrote."""
        k = self.path.length
        gap = None if self._gap is None else self._gap[:k].clone()
        order, losses = self._order[:k].clone(), self._losses[:k].clone()
        return Path(order, losses, gap, self.path.scored, self.path.rescored)


@dataclass(frozen=True)
class Extent:
    """How large each unit's features are.

    squares: (N,) float64, their sum of squares; largest: (N,) float64, their largest magnitude
    """

    squares: Tensor
    largest: Tensor

    @classmethod
    def zeros(cls, units: int) -> Extent:
        zeros = torch.zeros(2, units, dtype=torch.float64)
        return cls(zeros[0], zeros[1])
