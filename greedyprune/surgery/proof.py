"""The proof that a pruned model computes what the masked one does, on a batch of a few samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data.batches import Batch, placed
from ..data.forward import evaluating, run_model, same_outputs
from ..graph.executor import GraphExecutor
from ..graph.export import without_cache
from ..graph.networks import tensors_of
from ..graph.slices import Entries

SAMPLES = 2  # that a Selection keeps for the proof
SEEDS = (0, 1)  # of the random numbers that a forward draws


def example_of(model: nn.Module, batch: Batch) -> Batch:
    """A few samples of a batch, as a copy; the whole batch if the model runs on no part of it."""
    inputs = replace(batch, targets=None)
    try:
        few = inputs.few(SAMPLES)
        if few is not inputs:
            run_model(model, few)
    except (ValueError, RuntimeError):  # NotImplementedError is one: no samples of a sparse tensor
        return inputs
    return few


def prove(
    model: nn.Module, changed: Mapping[str, Tensor], small: nn.Module, example: Batch,
    left: Entries,
) -> None:  # fmt: skip
    """ValueError unless the pruned model gives the outputs of the dense one with other weights.

    The dense model itself runs, with the new weights in its own tensors for a moment. So everything
    that holds its modules or tensors, in whatever way, uses the new weights. It is left as it was.
    Nothing is compared if the model can't run on the example, or draws random numbers that decide
    its output.

    Where a norm goes over units of which some go, the dense model's graph is run, with that norm
    over the units that are left. Nothing is compared if the graph can't be run in pieces.

    changed: by the names of the dense model's parameters and buffers: their new values
    small: the pruned model
    left: what is left of each dimension that is cut
    """
    example = placed(example, model)
    example = replace(example, kwargs=without_cache(model, example.kwargs), targets=None)
    values = _all_values(model, changed)
    with evaluating(model), evaluating(small):
        try:
            with holding(model, values):
                expected, other = (_outputs(model, example, seed) for seed in SEEDS)
        except ValueError:
            return
        reason = "its outputs differ"
        try:
            outputs = _outputs(small, example, SEEDS[0])
            padding = example.padding
            if same_outputs(expected, outputs, padding) or not same_outputs(
                expected, other, padding
            ):
                return
            if _same_in_float64(model, values, small, example):
                return
            if same_with_norms(model, values, small, example, left):
                return
        except ValueError as error:
            reason = f"it fails: {error}".replace("data: the model", "the model")
    raise ValueError(
        f"model: pruned, it does not compute what it does with the units masked ({reason}); "
        "expected functions and attributes that use its own modules' tensors and not their sizes"
    )


def _same_in_float64(
    model: nn.Module, values: Mapping[str, Tensor], small: nn.Module, example: Batch
) -> bool:
    """Are the outputs the same where rounding can't be the reason for a difference?

    False for models that can't run in float64, such as those with a `.float()`.
    """
    example = example.to(torch.float64)
    pruned = {name: tensor.data for name, tensor in tensors_of(small).items()}
    try:
        with holding(model, _in_float64(values)), holding(small, _in_float64(pruned)):
            expected, outputs = (_outputs(m, example, SEEDS[0]) for m in (model, small))
    except ValueError:
        return False
    return same_outputs(expected, outputs, example.padding)


def _all_values(model: nn.Module, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new values of all tensors, each by one of its names."""
    names_of: dict[int, str] = {}
    tensors = tensors_of(model)
    for name, tensor in tensors.items():
        if id(tensor) not in names_of or name in changed:
            names_of[id(tensor)] = name
    return {name: changed.get(name, tensors[name].data) for name in names_of.values()}


def same_with_norms(
    model: nn.Module, changed: Mapping[str, Tensor], small: nn.Module, example: Batch,
    left: Entries, known: dict[bool, GraphExecutor] | None = None,
) -> bool:  # fmt: skip
    """Are the outputs the same where norms go over the units that are left? False without norms.

    Arguments as for `prove`.

    known: executors of the dense model, by whether they are in float64; new ones are added
    """
    known = {} if known is None else known
    whole = _all_values(model, changed)
    pruned = {name: tensor.data for name, tensor in tensors_of(small).items()}
    # Where float32 was not enough before, it is tried last.
    for is_double in (True, False) if True in known else (False, True):
        batch = example.to(torch.float64) if is_double else example
        values = [_in_float64(each) if is_double else each for each in (whole, pruned)]
        errors = suppress(ValueError, RuntimeError)  # it can't run in float64
        with holding(model, values[0]), holding(small, values[1]), errors:
            executor = known.get(is_double)
            if executor is None:
                other = known.get(not is_double)
                graph = other.graph if other and not other.graph.names_dtypes else None
                executor = known[is_double] = GraphExecutor(model, batch, graph=graph)
            if not executor.has_norms(left):
                return False
            outputs = _outputs(small, batch, SEEDS[0])
            if same_outputs(_outputs_of(executor, model, batch, left), outputs, example.padding):
                return True
            if is_double and False in known and known[False].graph is executor.graph:
                # Its constants may be those of the other precision, as torch.finfo gives them.
                executor = known[is_double] = GraphExecutor(model, batch)
                expected = _outputs_of(executor, model, batch, left)
                if same_outputs(expected, outputs, example.padding):
                    return True
    return False


def _outputs_of(executor: GraphExecutor, model: nn.Module, batch: Batch, left: Entries) -> object:
    return executor.outputs(executor.inputs(batch), tensors_of(model), 0, left)


def _in_float64(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.double() if v.is_floating_point() else v for n, v in values.items()}


def _outputs(model: nn.Module, example: Batch, seed: int) -> object:
    torch.manual_seed(seed)  # `evaluating` restores the random state
    return run_model(model, example)


@contextmanager
def holding(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model's parameters and buffers hold these values; they stay the same objects.

    cuDNN warns that the weights of recurrent modules are not in one piece of memory meanwhile.
    """
    tensors = tensors_of(model)
    saved = [(tensors[name], tensors[name].data) for name in values]
    try:
        for name, value in values.items():
            tensors[name].data = value
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "RNN module weights are not part of single")
            yield
    finally:
        for tensor, value in saved:
            tensor.data = value
