"""Running the user's model on batches, in eval mode, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import first_line, raised_here
from ..runtime.sparse import are_equal
from .as_written import AUTOCAST_WITHOUT_EFFECT, without_fast_code
from .batch import Batch, samples_of
from .padding import NO_PADDING, Padding


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the model in eval mode, without gradients, autocast, inference mode and torch.compile.

    A forward's own autocast has no effect, either: a trace would hide the layers inside it.
    Attention takes no fast path: with a padding mask, that path needs nested tensors, which have no
    sizes for a trace.

    Inside, fake quantisation keeps its ranges, as batch normalisation its statistics, and
    parameters and buffers that are inference tensors are ordinary ones. Afterwards the
    attributes of all modules (mode, hooks, tensors that a forward keeps), the buffers, the
    parameters' `requires_grad` and torch's random numbers are as before.
    """
    state = State(model)
    devices = {t.device for t in model.parameters()}
    kind = next((device.type for device in devices if device.type != "meta"), "cpu")
    gpus = {device.index for device in devices if device.type == "cuda"}
    if torch.cuda.is_initialized():
        gpus.add(torch.cuda.current_device())
    try:
        model.eval()
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.random.fork_rng(gpus),
            torch.autocast(kind, enabled=False),
            torch.autocast("cpu", enabled=False),
            without_fast_code,
            AUTOCAST_WITHOUT_EFFECT,
        ):
            for module in model.modules():
                if (enabled := module._buffers.get("observer_enabled")) is not None:
                    enabled.zero_()
            yield
    finally:
        state.restore()


class State:
    """What running a model may change, as it is now."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, module.training, dict(vars(module))) for module in model.modules()
        ]
        self._contents: list[tuple[Any, list[Any]]] = [
            (value, list(value.items() if isinstance(value, dict) else value))
            for _, _, attributes in self._modules
            for value in attributes.values() if isinstance(value, (dict, list))
        ]  # fmt: skip
        self._required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        _use_ordinary_tensors(model)  # `restore` puts the old ones back as contents
        with torch.inference_mode(False), torch.no_grad():
            self._buffers = [(b, b.clone()) for b in model.buffers() if not b.is_meta]

    def restore(self) -> None:
        for module, training, attributes in self._modules:
            now = vars(module)
            for name in now.keys() - attributes.keys():
                del now[name]
            for name, value in attributes.items():
                if now.get(name) is not value:
                    now[name] = value
            if module.training != training:  # a ScriptModule's is no attribute of Python
                module.training = training
        for holder, contents in self._contents:
            entries = list(holder.items() if isinstance(holder, dict) else holder)
            if not _are_identical(entries, contents):
                holder.clear()
                (holder.update if isinstance(holder, dict) else holder.extend)(contents)
        for buffer, saved in self._buffers:
            with torch.inference_mode(False), torch.no_grad():
                if buffer.shape != saved.shape:  # as those of quantisation's observers
                    buffer.data = saved
                elif not are_equal(buffer, saved):
                    buffer.copy_(saved)
        for parameter, required in self._required:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


def _use_ordinary_tensors(model: nn.Module) -> None:
    """Replaces inference tensors, with which autograd does not work, by ordinary ones."""
    new: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference():
                        if id(tensor) not in new:
                            ordinary = tensor.detach().clone()
                            if isinstance(tensor, nn.Parameter):
                                ordinary = nn.Parameter(ordinary, tensor.requires_grad)
                            new[id(tensor)] = ordinary
                        tensors[name] = new[id(tensor)]  # type: ignore[assignment]


def _are_identical(now: list[Any], before: list[Any]) -> bool:
    """Do two lists hold the same objects? Entries may be pairs, as those of a dict."""
    return len(now) == len(before) and all(
        a is b or (isinstance(a, tuple) and isinstance(b, tuple) and _are_identical([*a], [*b]))
        for a, b in zip(now, before, strict=True)
    )


def same_outputs(expected: object, outputs: object, padding: Padding = NO_PADDING) -> bool:
    """Are two outputs of a model, of any structure, the same up to rounding?

    Tensors and numbers are compared in tuples, dicts, dataclasses and other objects with
    attributes. Numbers that are infinite or NaN must be so in both. Of integers, which rounding can
    flip where they come from comparisons, one in a hundred may differ. Positions that the padding
    hides are not compared.
    """
    one, other = leaves_of(expected), leaves_of(outputs)
    if padding.hides:
        one, other = ([shown(leaf, padding) for leaf in leaves] for leaves in (one, other))
    return len(one) == len(other) and all(map(_same, one, other))


def shown(leaf: Any, padding: Padding) -> Any:
    """A tensor without the positions that are hidden; other outputs as they are."""
    for mask in (padding.mask, padding.decoder_mask):
        if mask is not None and isinstance(leaf, Tensor) and leaf.shape[:2] == mask.shape:
            return leaf[mask.to(leaf.device)]
    return leaf


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


def shown_output(outputs: object, batch: Batch) -> Tensor:
    """`main_output` without the positions that the batch's padding hides."""
    output: Tensor = shown(main_output(outputs), batch.padding)
    return output


def is_separate(model: nn.Module, batch: Batch, outputs: object = None) -> bool:
    """Are the outputs for some of a batch's samples those for the whole batch?

    They are not where the model has no dimension of samples, combines samples (the nodes of a
    graph, statistics of the batch), or takes inputs without one entry for each sample.

    outputs: the model's, where they are known
    """
    count = samples_of(batch) or 1
    if count == 1:
        return False
    try:
        whole = _by_sample(run_model(model, batch) if outputs is None else outputs, count)
        for samples in (torch.arange(0, count, 2), torch.arange(1, count, 2)):
            part = batch.take(samples)
            expected = [rows[samples.to(rows.device)].flatten(0, 1) for rows in whole]
            parts = _by_sample(run_model(model, part), len(samples))
            actual = [rows.flatten(0, 1) for rows in parts]
            if not whole or not same_outputs(expected, actual, part.padding):
                return False
    except (ValueError, RuntimeError):
        return False
    return True


def _by_sample(outputs: object, samples: int) -> list[Tensor]:
    """The tensors in an output, each (samples, rows of a sample, ...); scalars are left out."""
    tensors = [leaf for leaf in leaves_of(outputs) if isinstance(leaf, Tensor) and leaf.dim()]
    return [tensor.reshape(samples, -1, *tensor.shape[1:]) for tensor in tensors]


def not_run(layer: str) -> ValueError:
    """The error for a batch that takes another route through the model than the first one."""
    return ValueError(
        f"data: a batch does not run {layer!r}, as the first batch does; expected batches that run "
        "the same layers"
    )


def all_finite(values: Tensor) -> bool:
    """Are all entries finite? `isfinite().all()` would make a tensor of their shape first."""
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


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
