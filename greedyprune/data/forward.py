"""Running the user's model on batches, in eval mode, and leaving it as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch
from .losses import Criterion, Target


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the model in eval mode, without gradients and without autocast.

    Afterwards the modes of all modules, the buffers and torch's random numbers are as before.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(b, b.clone()) for b in model.buffers() if not b.is_meta]
    kinds = (t.device.type for t in model.parameters() if not t.is_meta)
    device = next(kinds, "cpu")
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        model.eval()
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices),
            torch.autocast(device, enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        for buffer, saved in buffers:
            if not torch.equal(buffer, saved):
                with torch.no_grad():
                    buffer.copy_(saved)
        for module, training in modes.items():
            module.training = training


def same_outputs(expected: object, outputs: object) -> bool:
    """Are two outputs of a model, of any structure, the same up to rounding?

    Tensors and numbers are compared in tuples, dicts, dataclasses and other objects with
    attributes. Numbers that are infinite or NaN must be so in both. Of integers, which rounding can
    flip where they come from comparisons, one in a hundred may differ.
    """
    one, other = leaves_of(expected), leaves_of(outputs)
    return len(one) == len(other) and all(map(_same, one, other))


def leaves_of(outputs: object) -> list[Any]:
    """The tensors, numbers and texts in an output of any structure, each after its place in it."""
    leaves, seen, todo = list[Any](), set[int](), [("", outputs)]
    while todo:
        place, value = todo.pop()
        if isinstance(value, Mapping):
            todo += [(f"{place}.{key}", entry) for key, entry in value.items()]
        elif isinstance(value, (list, tuple)):
            todo += [(f"{place}.{i}", entry) for i, entry in enumerate(value)]
        elif isinstance(value, (Tensor, bool, int, float, str, type(None))):
            leaves += [place, value]
        elif hasattr(value, "__array__"):
            leaves += [place, torch.as_tensor(value)]
        elif hasattr(value, "__dict__") and not callable(value) and id(value) not in seen:
            seen.add(id(value))
            todo += [(f"{place}.{name}", entry) for name, entry in vars(value).items()]
    return leaves


def _same(expected: object, actual: object) -> bool:
    if isinstance(expected, float) and isinstance(actual, float):
        expected, actual = (torch.tensor(number) for number in (expected, actual))
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return type(expected) is type(actual) and expected == actual
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    one, other = (_dense(tensor).detach().cpu() for tensor in (expected, actual))
    if not expected.is_floating_point() and not expected.is_complex():
        return int((one != other).sum()) <= one.numel() / 100
    rounding = 0.02 if torch.finfo(expected.dtype).bits <= 16 else 1e-4
    one, other = one.double(), other.double()
    finite, infinite = one.isfinite(), one.isinf()
    if not (one.isnan().equal(other.isnan()) and one[infinite].equal(other[infinite])):
        return False
    largest = float(one[finite].abs().max()) if finite.any() else 0.0
    differences = (other[finite] - one[finite]).abs()
    return bool((differences <= rounding * (largest or 1.0)).all())


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, strided and real, from a sparse, quantised or complex one."""
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def alike(expected: Tensor, actual: Tensor) -> bool:
    """Are two floating-point outputs the same up to rounding?"""
    rounding = 0.02 if torch.finfo(expected.dtype).bits == 16 else 1e-4
    return expected.shape == actual.shape and (
        float((actual - expected).abs().max()) <= rounding * (float(expected.abs().max()) or 1.0)
    )


def run_model(model: nn.Module, batch: Batch) -> object:
    """The model's output on a batch; ValueError, with the reason, where the model raises."""
    try:
        return model(*batch.args, **batch.kwargs)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"data: the model can't run on a batch ({lines[0]})") from error


def target_of(criterion: Criterion, outputs: object, targets: Tensor | None) -> Target:
    """The kernels' target for the model's outputs and the targets of a batch.

    ValueError where there are no targets, or where they do not match the outputs.
    """
    shape = tuple(main_output(outputs).shape) or (1,)
    if targets is None:
        raise ValueError("data: found inputs without targets, expected both for objective='loss'")
    if criterion.kind == "custom":
        classes = shape[-1] if len(shape) > 1 else 1
        samples = math.prod(shape) // max(1, classes)
        return Target("custom", classes, samples, float(samples))
    return criterion.target(targets, shape)


def main_output(outputs: object) -> Tensor:
    """The tensor that the loss takes: the output, or the `logits` of a dict or a record."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = (
        outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    )
    if isinstance(logits, Tensor):
        return logits
    raise ValueError(
        f"model: found an output of type {type(outputs).__name__}, expected a tensor, or a dict or "
        "record with logits"
    )


def check_finite(name: str, module: nn.Module) -> None:
    """ValueError where a parameter of the layer `name` has NaN or inf."""
    for tensor in module.parameters(recurse=False):
        if not tensor.isfinite().all():
            raise ValueError(f"layer {name!r}: NaN or inf in its weights, expected finite numbers")


@contextmanager
def hooked(
    model: nn.Module,
    names: Iterable[str],
    *,
    before: Callable[[str, Any], Tensor | None] | None = None,
    after: Callable[[str, Any], Tensor | None] | None = None,
) -> Iterator[None]:
    """Calls before(name, input) and after(name, output) whenever one of these layers runs inside.

    The input is the layer's first argument, or the one named "input". What the functions return
    takes the place of the input or the output; None leaves it. No hook stays on the model.
    """

    def on_input(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            assert before is not None
            value = before(name, args[0] if args else kwargs.get("input"))
            if value is None:
                return None
            return ((value, *args[1:]), kwargs) if args else (args, kwargs | {"input": value})

        return hook

    def on_output(name: str) -> Callable[..., Any]:
        assert after is not None
        return lambda _, __, output: after(name, output)

    handles = []
    try:
        for name in names:
            module = model.get_submodule(name)
            if before is not None:
                handles.append(module.register_forward_pre_hook(on_input(name), with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(on_output(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
