"""The losses that the kernels know, as torch defines them, brought to the kernels' form.

Every one of them is a weighted sum over samples of a convex, smooth function of the outputs, plus
a term linear in the outputs (label smoothing, soft targets), divided by a mass:

    L(f) = ( sum_s weight_s l(f[:, s]; target_s) + sum_s <linear[:, s], f[:, s]> ) / mass
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# The smoothness of l in the outputs (README eq. 3 before averaging) and the kernels' number for it.
KINDS = {"mse": (0, 2.0), "cross_entropy": (1, 0.5), "bce_with_logits": (2, 0.25)}
_FUNCTIONS: dict[object, str] = {
    functional.mse_loss: "mse",
    functional.cross_entropy: "cross_entropy",
    functional.binary_cross_entropy_with_logits: "bce_with_logits",
}
_MODULES: dict[type[nn.Module], str] = {
    nn.MSELoss: "mse",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.BCEWithLogitsLoss: "bce_with_logits",
}


@dataclass(frozen=True)
class Target:
    """What outputs (C, m) are compared with, for one block of m samples.

    value:  (C, m) float64   mse: the targets; bce_with_logits: the targets in [0, 1]; else None
    label:  (m,) int32       cross_entropy: the classes; else None
    weight: (m,) float64 for cross_entropy, (C, m) else; None: ones
    linear: (C, m) float64   the linear term; None: none
    mass:   what the sums are divided by; the masses of the blocks of one data set add up
    """

    kind: str
    outputs: int
    samples: int
    mass: float
    value: Tensor | None = None
    label: Tensor | None = None
    weight: Tensor | None = None
    linear: Tensor | None = None

    def __getitem__(self, samples: slice | Tensor) -> Target:
        """The same for some of the samples, mass unchanged: parts of one loss add up."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[..., samples].contiguous()

        parts: dict[str, Any] = {name: cut(getattr(self, name)) for name in TENSORS}
        index = samples if isinstance(samples, Tensor) else range(self.samples)[samples]
        return replace(self, samples=len(index), **parts)

    @property
    def nbytes(self) -> int:
        tensors = (getattr(self, name) for name in TENSORS)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def none(self) -> Target:
        """The same of no samples."""
        return replace(self[:0], mass=0.0)

    def to(self, device: torch.device) -> Target:
        parts: dict[str, Any] = {
            name: None if (tensor := getattr(self, name)) is None else tensor.to(device)
            for name in TENSORS
        }
        return replace(self, **parts)

    def relative(self, outputs: Tensor) -> Tensor:
        """The outputs (C, m) less the target (mse) or each sample's highest (cross_entropy)."""
        if self.kind == "mse":
            assert self.value is not None
            return outputs - self.value
        if self.kind == "cross_entropy":
            return outputs - outputs.amax(0)
        return outputs

    def loss_sum(self, outputs: Tensor) -> Tensor:
        """mass * L for outputs (..., C, m): (...,) float64. torch's definition, term by term."""
        if self.kind == "cross_entropy":
            assert self.label is not None
            label = self.label.long().expand(*outputs.shape[:-2], 1, -1)
            each = outputs.logsumexp(-2) - outputs.gather(-2, label).squeeze(-2)
        elif self.kind == "mse":
            assert self.value is not None
            each = (outputs - self.value).square()
        else:
            assert self.value is not None
            each = functional.softplus(outputs) - outputs * self.value
        if self.weight is not None:
            each = each * self.weight
        total = each.flatten(outputs.dim() - 2).sum(-1)
        if self.linear is not None:
            total = total + (outputs * self.linear).flatten(-2).sum(-1)
        return total

    def gradient(self, outputs: Tensor) -> Tensor:
        """d(mass * L) / d outputs, (C, m)."""
        if self.kind == "cross_entropy":
            assert self.label is not None
            slope = outputs.softmax(0)
            slope.scatter_add_(0, self.label.long()[None], slope.new_full(slope[:1].shape, -1.0))
        elif self.kind == "mse":
            assert self.value is not None
            slope = 2 * (outputs - self.value)
        else:
            assert self.value is not None
            slope = outputs.sigmoid() - self.value
        if self.weight is not None:
            slope = slope * self.weight
        return slope if self.linear is None else slope + self.linear


class Targets:
    """The targets of one block after another, joined; with room for `capacity` samples at first.

    Not a list of tensors: small ones that live on, allocated between two batches' activations, take
    the room that the first left, the next no longer fit there, and the heap grows with every batch.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._tensors: dict[str, Tensor] = {}
        self._first: Target | None = None
        self._sizes: list[tuple[int, float]] = []  # of the blocks: samples and mass
        self._samples = 0  # of all of them

    def append(self, target: Target) -> None:
        none: dict[str, Any] = dict.fromkeys(TENSORS)
        self._first = self._first or replace(target, **none)
        start, self._samples = self._samples, self._samples + target.samples
        for name in TENSORS:
            part = getattr(target, name)
            if part is not None or name in self._tensors:
                room = self._room_for(name, part, self._samples)
                room[..., start : self._samples] = _absent(name) if part is None else part
        self._sizes.append((target.samples, target.mass))

    def joined(self) -> Target:
        assert self._first is not None
        mass = sum(mass for _, mass in self._sizes)
        tensors: dict[str, Any] = {
            name: room[..., : self._samples].contiguous() for name, room in self._tensors.items()
        }
        return replace(self._first, samples=self._samples, mass=mass, **tensors)

    def blocks(self) -> list[Target]:
        """The targets as they came."""
        if not self._sizes:
            return []
        whole, found, start = self.joined(), [], 0
        for samples, mass in self._sizes:
            found.append(replace(whole[start : start + samples], mass=mass))
            start += samples
        return found

    def _room_for(self, name: str, part: Tensor | None, end: int) -> Tensor:
        room = self._tensors.get(name)
        if room is None or room.shape[-1] < end:
            like = part if room is None else room
            assert like is not None
            self._capacity = max(self._capacity, 2 * end if room is not None else end)
            larger = like.new_full((*like.shape[:-1], self._capacity), _absent(name))
            if room is not None:
                larger[..., : room.shape[-1]] = room
            room = self._tensors[name] = larger
        return room


TENSORS = ("value", "label", "weight", "linear")  # of a Target


def _absent(name: str) -> float:
    """What None stands for."""
    return 1.0 if name == "weight" else 0.0


@dataclass(frozen=True)
class Criterion:
    """A loss by name with torch's options for it, or the user's own function (`kind` "custom")."""

    kind: str
    function: Callable[[Tensor, Tensor], Tensor] | None = None
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    @property
    def smoothness(self) -> float:
        """B of README eq. 3, of one sample's (one output's, where elementwise) loss."""
        return KINDS[self.kind][1]

    def target(self, targets: Tensor, outputs: tuple[int, ...]) -> Target:
        """The kernels' form of `targets` for model outputs of shape `outputs`, (..., C).

        Raises ValueError or TypeError where torch's own function would refuse, and for labels out
        of range.
        """
        if self.kind == "cross_entropy":
            return self._cross_entropy(targets, outputs)
        if tuple(targets.shape) != outputs:
            hint = ""
            if targets.numel() == math.prod(outputs):
                hint = "; targets[:, None] or targets.squeeze(1) would"
            raise ValueError(
                f"data: found targets of shape {tuple(targets.shape)}, expected the shape of the "
                f"model's outputs, {outputs}, for loss={self.kind!r}{hint}"
            )
        if targets.is_complex():
            raise TypeError(f"data: targets are {targets.dtype}, expected real numbers")
        classes = outputs[-1] if len(outputs) > 1 else 1
        value = targets.double().reshape(-1, classes).T.contiguous()
        if not value.isfinite().all():
            raise ValueError("data: NaN or inf in the targets, expected finite numbers")
        samples = value.shape[1]
        block = Target(self.kind, classes, samples, float(samples * classes), value=value)
        return block if self.kind == "mse" else self._logistic(block)

    def _logistic(self, block: Target) -> Target:
        value = block.value
        assert value is not None
        weight = _per_output(self.weight, block, "weight")
        pos_weight = _per_output(self.pos_weight, block, "pos_weight")
        if value.numel() and not (value.min() >= 0 and value.max() <= 1):
            raise ValueError(
                f"data: targets between {value.min():g} and {value.max():g}, "
                "expected [0, 1] for loss='bce_with_logits'"
            )
        if self.weight is None and self.pos_weight is None:
            return block
        # w [p y softplus(-x) + (1 - y) softplus(x)] = A [softplus(x) - x y'], A = w (1 + (p-1) y)
        positive = 1 + (pos_weight - 1) * value
        moved = torch.where(positive > 0, 1 - (1 - value) / positive, 0.0)
        return replace(block, value=moved, weight=(weight * positive).contiguous())

    def _cross_entropy(self, targets: Tensor, outputs: tuple[int, ...]) -> Target:
        if len(outputs) != 2:
            raise ValueError(
                f"loss: found model outputs of shape {outputs} with class indices, expected (m, C) "
                "for cross_entropy (for binary labels: loss='bce_with_logits' and floating targets)"
            )
        samples, classes = outputs
        device = targets.device
        weight = torch.ones(classes, dtype=torch.float64, device=device)
        if self.weight is not None:
            if self.weight.shape != (classes,):
                raise ValueError(
                    f"loss: found a class weight of shape {tuple(self.weight.shape)}, "
                    f"expected ({classes},)"
                )
            weight = self.weight.to(device, torch.float64)
        smooth = self.label_smoothing
        if targets.is_floating_point():
            if tuple(targets.shape) != outputs:
                raise ValueError(
                    f"data: found {targets.dtype} targets of shape {tuple(targets.shape)}, "
                    f"expected class indices (int64) of shape ({samples},) or probabilities of "
                    f"shape {outputs}"
                )
            share = weight * (targets.double() * (1 - smooth) + smooth / classes)
            if not ((targets >= 0) & (targets <= 1)).all():
                raise ValueError("data: found class probabilities outside [0, 1], or NaN")
            label, mass = share.argmax(1), float(samples)
        else:
            label, seen = self._labels(targets, samples, classes)
            if not smooth:  # nothing of size (C, m): C may be a vocabulary
                return _on_labels(label, weight[label] * seen, classes)
            share = nn.functional.one_hot(label, classes) * weight * (1 - smooth)
            share = (share + smooth / classes * weight) * seen[:, None]
            mass = float((weight[label] * seen).sum())
        total = share.sum(1)  # the weight of logsumexp; the rest of the loss is linear
        block = replace(_on_labels(label, total, classes), mass=mass)
        linear = -share.T
        linear[label, torch.arange(samples, device=device)] += total
        return replace(block, linear=linear.contiguous()) if bool(linear.any()) else block

    def _labels(self, targets: Tensor, samples: int, classes: int) -> tuple[Tensor, Tensor]:
        if targets.shape != (samples,):
            raise ValueError(
                f"data: targets of shape {tuple(targets.shape)}, expected class indices of shape "
                f"({samples},) for model outputs of shape ({samples}, {classes})"
            )
        label = targets.long()
        seen = label != self.ignore_index
        if not bool(seen.any()):
            seen_range = (0, 0)
        else:
            seen_range = (int(label[seen].min()), int(label[seen].max()))
        if seen_range[0] < 0 or seen_range[1] >= classes:
            raise ValueError(
                f"data: labels from {seen_range[0]} to {seen_range[1]}, expected class indices in "
                f"[0, {classes}) for {classes} model outputs"
                + (" (or loss='bce_with_logits' and floating targets)" if classes == 1 else "")
            )
        return torch.where(seen, label, 0), seen


def _on_labels(label: Tensor, weight: Tensor, classes: int) -> Target:
    """Cross-entropy of class indices (m,), each sample's with its weight (m,)."""
    mass = float(weight.sum())
    target = Target("cross_entropy", classes, len(label), mass, label=label.int())
    return target if bool((weight == 1).all()) else replace(target, weight=weight)


def _per_output(option: Tensor | None, block: Target, name: str) -> Tensor:
    if option is None:
        return torch.ones((), dtype=torch.float64)
    flat = option.double().reshape(-1)
    if flat.numel() != 1 and option.shape not in ((block.outputs,), (1, block.outputs)):
        raise ValueError(
            f"loss: {name} of shape {tuple(option.shape)}, expected one number for each of the "
            f"{block.outputs} outputs"
        )
    return flat[:, None].to(block.value.device if block.value is not None else flat.device)


def criterion_of(loss: object, targets: Tensor | None) -> Criterion:
    """The criterion that the argument `loss` of `select` means; "auto" looks at the targets."""
    if loss == "auto":
        if targets is None or targets.is_floating_point():
            return Criterion("mse")
        return Criterion("cross_entropy")
    if isinstance(loss, str):
        if loss not in KINDS:
            raise ValueError(
                f"loss: found {loss!r}, expected one of {['auto', *KINDS]} or a callable"
            )
        return Criterion(loss)
    if isinstance(loss, type):
        raise TypeError(f"loss: found the class {loss.__name__}, expected an instance of it")
    if type(loss) in _MODULES:
        return _from_module(loss)  # type: ignore[arg-type]
    if isinstance(loss, nn.Module) or callable(loss):
        kind = next((kind for function, kind in _FUNCTIONS.items() if function is loss), None)
        return Criterion(kind) if kind else Criterion("custom", function=loss)
    raise TypeError(
        f"loss: found {type(loss).__name__}, expected a name, a torch loss or a callable"
    )


def _from_module(module: nn.Module) -> Criterion:
    reduction = getattr(module, "reduction", "mean")
    if reduction != "mean":
        raise ValueError(f"loss: found reduction={reduction!r}, expected reduction='mean'")
    options = {
        name: value
        for name in ("weight", "pos_weight", "ignore_index", "label_smoothing")
        if (value := getattr(module, name, None)) is not None
    }
    for name in ("weight", "pos_weight"):
        if name in options and not (options[name].isfinite().all() and (options[name] >= 0).all()):
            raise ValueError(f"loss: {name} must be finite and not negative")
    return Criterion(_MODULES[type(module)], **options)


def loss_of_function(
    function: Callable[[Tensor, Tensor], Tensor] | None, outputs: Tensor, targets: Tensor
) -> Tensor:
    """A loss of the user's own, (); TypeError or ValueError where it gives no finite number."""
    assert function is not None
    value = function(outputs, targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(
            f"loss: your function returned {type(value).__name__}"
            + (f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "")
            + ", expected a tensor with one number"
        )
    if not value.isfinite():
        raise ValueError(f"loss: your function returned {value.item()}, expected a finite number")
    return value.reshape(())


def slope_in(leaf: Tensor, loss: Tensor) -> Tensor:
    """The derivative of a loss; ValueError where a function of the user's own has none."""
    if not loss.requires_grad:
        raise ValueError("loss: your function has no derivative, expected one for gates and screen")
    return torch.autograd.grad(loss, leaf)[0]


def harmonic(steps: int) -> Tensor:
    """The harmonic numbers H_1 ... H_steps, (steps,) float64."""
    return torch.arange(1, steps + 1, dtype=torch.float64).reciprocal().cumsum(0)


def bound(dense_loss: float, spread: float, steps: int) -> Tensor:
    """The right side of README eq. 3 for k = 1 ... steps: L_N + (B/2) V H_k / k, (steps,) float64.

    spread: (B/2) V, with the samples weighted as the loss weights them
    """
    if not math.isfinite(spread):
        raise ValueError("the spread of the units' outputs is not finite")
    k = torch.arange(1, steps + 1, dtype=torch.float64)
    return dense_loss + spread * harmonic(steps) / k


Metric = Callable[[Tensor, Tensor], float]


def number(name: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name}: your function returned {type(value).__name__}, expected one number"
        ) from None
