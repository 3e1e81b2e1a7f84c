"""Running the user's model on batches, in eval mode, and leaving it as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import first_line, raised_here
from .batches import Batch
from .losses import Criterion, Target


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the model in eval mode, without gradients and without autocast.

    Afterwards the modes of all modules, the buffers and torch's random numbers are as before.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next((t.device.type for t in model.parameters()), "cpu")
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


def alike(expected: Tensor, actual: Tensor) -> bool:
    """Are two floating-point outputs the same up to rounding?"""
    rounding = 0.02 if torch.finfo(expected.dtype).bits == 16 else 1e-4
    return expected.shape == actual.shape and (
        float((actual - expected).abs().max()) <= rounding * (float(expected.abs().max()) or 1.0)
    )


def run_model(model: nn.Module, batch: Batch) -> object:
    """The model's output on a batch; ValueError, with the reason, where the model raises.

    Errors that this package raises while the model runs, in a hook, pass unchanged.
    """
    try:
        return model(*batch.args, **batch.kwargs)
    except Exception as error:
        if raised_here(error):
            raise
        raise ValueError(f"data: the model can't run on a batch ({first_line(error)})") from error


@contextmanager
def traceable(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Around a trace of the model on a batch: ValueError, with the reason, where torch raises.

    It names the data if the model can't run on the batch, and else the model.
    """
    run_model(model, batch)
    try:
        yield
    except Exception as error:
        if raised_here(error):
            raise
        reason = first_line(error)
        raise ValueError(f"model: torch.export can't trace it ({reason})") from error


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
