"""torch's losses in the one form that the kernels compute.

For outputs f of C numbers for each of m samples, every loss is

    L(f) = ( sum_s weight_s l(f[:, s]; target_s) + sum_s <linear[:, s], f[:, s]> ) / mass.

Here l is convex and smooth in the outputs. The linear term comes from label smoothing and from soft
targets. The mass is what torch divides by: the number of samples, of outputs, or a sum of weights.

The file is longer than 400 lines because the three losses share nearly all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.errors import raised_here

# For each loss the smoothness of l in the outputs: B of eq. (3) before any mean over the outputs.
SMOOTHNESS = {"mse": 2.0, "cross_entropy": 0.5, "bce_with_logits": 0.25}
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
    """What the outputs (C, m) of one block of m samples are compared with.

    kind:    the name of the loss
    outputs, samples: C and m
    mass:    what the sums are divided by; the masses of the blocks of one data set add up
    value:   (C, m) float64: the targets of mse; those of bce_with_logits, in [0, 1]; else None
    label:   (m,) int32: the classes for cross_entropy; else None
    weight:  (m,) float64 for cross_entropy, else (C, m) float64; None stands for ones. For a
        user's function (m,), 0 for hidden positions, which only least squares leaves out
    linear:  (C, m) float64: the linear term; None stands for zeros
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
        """The target of some of the samples. The mass stays: the losses of all parts add up."""

        def part_of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[..., samples].contiguous()

        parts: dict[str, Any] = {name: part_of(getattr(self, name)) for name in TENSORS}
        index = samples if isinstance(samples, Tensor) else range(self.samples)[samples]
        return replace(self, samples=len(index), **parts)

    @property
    def nbytes(self) -> int:
        tensors = (getattr(self, name) for name in TENSORS)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def none(self) -> Target:
        """A target of the same kind without samples."""
        return replace(self[:0], mass=0.0)

    def to(self, device: torch.device) -> Target:
        tensors: dict[str, Any] = {
            name: None if (tensor := getattr(self, name)) is None else tensor.to(device)
            for name in TENSORS
        }
        return replace(self, **tensors)

    def relative(self, outputs: Tensor) -> Tensor:
        """The outputs (C, m) less the target (mse) or each sample's largest one (cross_entropy).

        The kernels round these to float32, where small numbers lose less.
        """
        if self.kind == "mse":
            assert self.value is not None
            return outputs - self.value
        if self.kind == "cross_entropy":
            return outputs - outputs.amax(0)
        return outputs

    def loss_sum(self, outputs: Tensor) -> Tensor:
        """mass * L for outputs (..., C, m) float64: (...,) float64, as torch defines it."""
        if self.kind == "cross_entropy":
            assert self.label is not None
            label = self.label.long().expand(*outputs.shape[:-2], 1, -1)
            losses = outputs.logsumexp(-2) - outputs.gather(-2, label).squeeze(-2)
        elif self.kind == "mse":
            assert self.value is not None
            losses = (outputs - self.value).square()
        else:
            assert self.value is not None
            losses = functional.softplus(outputs) - outputs * self.value
        if self.weight is not None:
            losses = losses * self.weight
        total = losses.flatten(outputs.dim() - 2).sum(-1)
        if self.linear is not None:
            total = total + (outputs * self.linear).flatten(-2).sum(-1)
        return total

    def gradient(self, outputs: Tensor) -> Tensor:
        """The derivative of mass * L in the outputs (C, m): (C, m)."""
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
    """The targets of successive blocks, in tensors that grow; at first for `capacity` samples.

    A list of the blocks' targets would waste memory. Their small tensors would be allocated between
    the activations of two batches, and would live on. Then the activations of the next batch would
    no longer fit where those of the last one were, and the heap would grow with every batch.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._tensors: dict[str, Tensor] = {}
        self._first: Target | None = None
        self._sizes: list[tuple[int, float]] = []  # samples and mass of each block
        self._samples = 0  # of all blocks

    def append(self, target: Target) -> None:
        """Adds one block."""
        without_tensors: dict[str, Any] = dict.fromkeys(TENSORS)
        self._first = self._first or replace(target, **without_tensors)
        start, self._samples = self._samples, self._samples + target.samples
        for name in TENSORS:
            part = getattr(target, name)
            if part is not None or name in self._tensors:
                buffer = self._buffer_for(name, part, self._samples)
                buffer[..., start : self._samples] = _absent(name) if part is None else part
        self._sizes.append((target.samples, target.mass))

    def joined(self) -> Target:
        """All blocks as one target."""
        assert self._first is not None
        mass = sum(mass for _, mass in self._sizes)
        tensors: dict[str, Any] = {
            name: buffer[..., : self._samples].contiguous()
            for name, buffer in self._tensors.items()
        }
        return replace(self._first, samples=self._samples, mass=mass, **tensors)

    def blocks(self) -> list[Target]:
        """The blocks, as they were added."""
        if not self._sizes:
            return []
        whole, blocks, start = self.joined(), [], 0
        for samples, mass in self._sizes:
            blocks.append(replace(whole[start : start + samples], mass=mass))
            start += samples
        return blocks

    def _buffer_for(self, name: str, part: Tensor | None, end: int) -> Tensor:
        """The buffer of one tensor of the targets, enlarged for `end` samples where necessary.

        part: the block's tensor; it gives the shape where there is no buffer yet
        """
        buffer = self._tensors.get(name)
        if buffer is None or buffer.shape[-1] < end:
            like = part if buffer is None else buffer
            assert like is not None
            self._capacity = max(self._capacity, 2 * end if buffer is not None else end)
            larger = like.new_full((*like.shape[:-1], self._capacity), _absent(name))
            if buffer is not None:
                larger[..., : buffer.shape[-1]] = buffer
            buffer = self._tensors[name] = larger
        return buffer


TENSORS = ("value", "label", "weight", "linear")  # the fields of a Target that are tensors


def _absent(name: str) -> float:
    """The number that None stands for in a field of Target."""
    return 1.0 if name == "weight" else 0.0


@dataclass(frozen=True)
class Criterion:
    """A loss: one of torch's, by name and with its options, or a user's function.

    kind:     "mse", "cross_entropy", "bce_with_logits", or "custom" for a function
    function: the user's function of outputs and targets
    weight, pos_weight, ignore_index, label_smoothing: as in torch.nn's losses
    reduction: "mean" or "sum": are losses divided by their mass?
    classes_last: is the outputs' last dimension that of the classes? None: shapes say which
    """

    kind: str
    function: Callable[[Tensor, Tensor], Tensor] | None = None
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    classes_last: bool | None = None

    @property
    def smoothness(self) -> float:
        """The smoothness of l: for one sample, or for one output where the loss is elementwise."""
        return SMOOTHNESS[self.kind]

    @property
    def ignored_label(self) -> int | None:
        """What the labels of hidden positions become; None: targets are no labels."""
        return self.ignore_index if self.kind in ("cross_entropy", "custom") else None

    def scale(self, mass: float) -> float:
        """What a mean over this mass is multiplied by, to be the loss in its own scale."""
        return mass if self.reduction == "sum" else 1.0

    def class_dim(self, outputs: tuple[int, ...], positions: tuple[int, ...]) -> int:
        """The dimension of the classes in outputs of this shape: -1, or 1 as in torch's losses.

        positions: the shape of class indices for these outputs, or of their mask

        ValueError where both fit: (m, C, C) outputs with (m, C) class indices.
        """
        last = outputs[:-1] == positions
        second = len(outputs) > 2 and outputs[:1] + outputs[2:] == positions
        if last and second and self.classes_last is None:
            raise ValueError(
                f"data: found model outputs of shape {outputs} with targets of shape {positions}, "
                "whose classes can be the outputs' dimension 1 or the last; expected a first batch "
                "of another length, or loss=a function of your own"
            )
        return 1 if second and not (last and self.classes_last) else -1

    def target(self, targets: Tensor, outputs: tuple[int, ...]) -> Target:
        """The target that `targets` mean for model outputs of shape `outputs`, (..., C).

        Raises:
            ValueError, TypeError: targets that torch's loss would refuse, and labels out of range
        """
        if not isinstance(targets, Tensor):
            raise TypeError(
                f"data: found targets of type {type(targets).__name__} for loss={self.kind!r}, "
                "expected a tensor, or loss=a function of (outputs, targets)"
            )
        if self.kind == "cross_entropy":
            return self._cross_entropy(targets, outputs)
        if tuple(targets.shape) != outputs:
            hint = ""
            if targets.numel() == math.prod(outputs):
                hint = "; targets[:, None] or targets.squeeze(1) has it"
            raise ValueError(
                f"data: found targets of shape {tuple(targets.shape)}, expected the shape of the "
                f"model's outputs, {outputs}, for loss={self.kind!r}{hint}"
            )
        if targets.is_complex():
            raise TypeError(f"data: found {targets.dtype} targets, expected real numbers")
        classes = outputs[-1] if len(outputs) > 1 else 1
        value = targets.double().reshape(-1, classes).T.contiguous()
        if not value.isfinite().all():
            raise ValueError("data: found NaN or inf in the targets, expected finite numbers")
        samples = value.shape[1]
        block = Target(self.kind, classes, samples, float(samples * classes), value=value)
        return block if self.kind == "mse" else self._logistic(block)

    def _logistic(self, block: Target) -> Target:
        """Adds what bce_with_logits has besides the targets: `weight` and `pos_weight`."""
        value = block.value
        assert value is not None
        weight = _per_output(self.weight, block, "weight")
        pos_weight = _per_output(self.pos_weight, block, "pos_weight")
        if value.numel() and not (value.min() >= 0 and value.max() <= 1):
            raise ValueError(
                f"data: found targets between {value.min():g} and {value.max():g}, "
                "expected [0, 1] for loss='bce_with_logits'"
            )
        if self.weight is None and self.pos_weight is None:
            return block
        # With the weight w, the positive weight p and the target y, torch's loss is that of another
        # target y' with another weight:
        # w [p y softplus(-x) + (1 - y) softplus(x)] = w q [softplus(x) - x y'],
        # where q = 1 + (p - 1) y and y' = 1 - (1 - y) / q.
        factor = 1 + (pos_weight - 1) * value  # q
        new_value = torch.where(factor > 0, 1 - (1 - value) / factor, 0.0)
        return replace(block, value=new_value, weight=(weight * factor).contiguous())

    def _cross_entropy(self, targets: Tensor, outputs: tuple[int, ...]) -> Target:
        """The target for class indices (m,) or class probabilities (m, C).

        Each sample has a weight `share` (m, C) for each class, from class weights, label smoothing
        and probabilities. Its loss is sum_c share_c (logsumexp(f) - f_c). Written with one label,
        that is total * (logsumexp(f) - f_label) plus a linear term, where total = sum_c share_c.
        """
        if not isinstance(targets, Tensor):
            raise TypeError(
                f"data: found targets of type {type(targets).__name__} for loss='cross_entropy', "
                "expected a tensor, or loss=a function of (outputs, targets)"
            )
        if len(outputs) != 2:
            raise ValueError(
                f"loss: found model outputs of shape {outputs} with targets of shape "
                f"{tuple(targets.shape)} for cross_entropy, expected (m, C) with class indices "
                "(m,), or (m, T, C) with (m, T) (for binary labels: loss='bce_with_logits' and "
                "floating targets)"
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
            label, counted = self._labels(targets, samples, classes)
            if not smooth:  # no tensor of size (C, m): C may be the size of a vocabulary
                return _on_labels(label, weight[label] * counted, classes)
            share = nn.functional.one_hot(label, classes) * weight * (1 - smooth)
            share = (share + smooth / classes * weight) * counted[:, None]
            mass = float((weight[label] * counted).sum())
        total = share.sum(1)
        block = replace(_on_labels(label, total, classes), mass=mass)
        linear = -share.T
        linear[label, torch.arange(samples, device=device)] += total
        return replace(block, linear=linear.contiguous()) if bool(linear.any()) else block

    def _labels(self, targets: Tensor, samples: int, classes: int) -> tuple[Tensor, Tensor]:
        """The labels (m,) int64, 0 where `ignore_index` was; and whether each counts: (m,) bool."""
        if targets.shape != (samples,):
            raise ValueError(
                f"data: found targets of shape {tuple(targets.shape)}, expected class indices of "
                f"shape ({samples},) for model outputs of shape ({samples}, {classes})"
            )
        label = targets.long()
        counted = label != self.ignore_index
        lowest, highest = 0, 0
        if bool(counted.any()):
            lowest, highest = int(label[counted].min()), int(label[counted].max())
        if lowest < 0 or highest >= classes:
            raise ValueError(
                f"data: found labels from {lowest} to {highest}, expected class indices in "
                f"[0, {classes}) for {classes} model outputs"
                + (" (or loss='bce_with_logits' and floating targets)" if classes == 1 else "")
            )
        return torch.where(counted, label, 0), counted


def _on_labels(label: Tensor, weight: Tensor, classes: int) -> Target:
    """The target of cross-entropy for class indices (m,) int64 and sample weights (m,) float64."""
    mass = float(weight.sum())
    target = Target("cross_entropy", classes, len(label), mass, label=label.int())
    return target if bool((weight == 1).all()) else replace(target, weight=weight)


def _per_output(option: Tensor | None, block: Target, name: str) -> Tensor:
    """An option of bce_with_logits as a tensor that multiplies (C, m): (C, 1), (1, 1) or ()."""
    if option is None:
        return torch.ones((), dtype=torch.float64)
    flat = option.double().reshape(-1)
    if flat.numel() != 1 and option.shape not in ((block.outputs,), (1, block.outputs)):
        raise ValueError(
            f"loss: found {name} of shape {tuple(option.shape)}, expected one number for each of "
            f"the {block.outputs} outputs"
        )
    return flat[:, None].to(block.value.device if block.value is not None else flat.device)


def criterion_of(loss: object, targets: object) -> Criterion:
    """The criterion that the argument `loss` of `select` means.

    "auto" is cross_entropy for targets that are integers, and mse for others and where there are
    none. ValueError or TypeError for an argument that means no loss.
    """
    if loss == "auto":
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return Criterion("mse")
        return Criterion("cross_entropy")
    if isinstance(loss, str):
        if loss not in SMOOTHNESS:
            raise ValueError(
                f"loss: found {loss!r}, expected one of {['auto', *SMOOTHNESS]} or a callable"
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
    """The criterion of one of torch.nn's losses, with the module's options."""
    reduction = getattr(module, "reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"loss: found reduction={reduction!r}, expected reduction='mean' or 'sum': a loss is "
            "one number"
        )
    options = {
        name: value
        for name in ("weight", "pos_weight", "ignore_index", "label_smoothing")
        if (value := getattr(module, name, None)) is not None
    }
    for name in ("weight", "pos_weight"):
        if name in options and not (options[name].isfinite().all() and (options[name] >= 0).all()):
            raise ValueError(
                f"loss: found negative numbers, NaN or inf in {name}, expected finite numbers "
                "that are not negative"
            )
    return Criterion(_MODULES[type(module)], reduction=reduction, **options)


def loss_of_function(
    function: Callable[[Tensor, Tensor], Tensor] | None, outputs: Tensor, targets: Tensor
) -> Tensor:
    """The loss () by the user's function.

    TypeError or ValueError where the function returns anything but one finite number.
    """
    assert function is not None
    value = ask("loss", function, outputs, targets)
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
    """The derivative of the loss in `leaf`; ValueError where the user's function has none."""
    if not loss.requires_grad:
        raise ValueError(
            "loss: your function has no derivative, expected one that torch can differentiate"
        )
    return torch.autograd.grad(loss, leaf)[0]


def harmonic(steps: int) -> Tensor:
    """The harmonic numbers H_1 ... H_steps, (steps,) float64."""
    return torch.arange(1, steps + 1, dtype=torch.float64).reciprocal().cumsum(0)


def bound(dense_loss: float, spread: float, steps: int) -> Tensor:
    """The right side of eq. (3), L_N + (B/2) V H_k / k, for k = 1 ... steps: (steps,) float64.

    dense_loss: L_N
    spread:     (B/2) V, where samples have the weights that they have in the loss
    """
    if not math.isfinite(spread):
        raise ValueError("the spread of the units' outputs is not finite")
    k = torch.arange(1, steps + 1, dtype=torch.float64)
    return dense_loss + spread * harmonic(steps) / k


Metric = Callable[[Tensor, Tensor], float]  # of outputs and targets
R = TypeVar("R")


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return f"type {type(value).__name__}"


def ask(name: str, function: Callable[[Tensor, Tensor], R], outputs: Tensor, targets: Tensor) -> R:
    """What the user's function for the argument `name` returns.

    What the function raises gets a note that names the argument and the shapes (from Python 3.11).
    """
    try:
        return function(outputs, targets)
    except Exception as error:
        if hasattr(error, "add_note") and not raised_here(error):
            error.add_note(
                f"{name}: your function raised this. It was called with outputs of "
                f"{_form(outputs)} and targets of {_form(targets)}"
            )
        raise


def number(name: str, value: object) -> float:
    """What the user's function for the argument `name` returned, as a float; else TypeError."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name}: your function returned {type(value).__name__}, expected one number"
        ) from None
