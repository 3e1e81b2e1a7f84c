"""The loss's derivatives inside a network: a backward pass for each batch, without parameters'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..data.forward import hooked, main_output, not_run, run_model

# By the names of layers, for each of their uses: the input (or output) and the derivative in it.
Derivatives = dict[str, list[tuple[Tensor, Tensor]]]


def derivatives(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch],
    slope: Callable[[Tensor, Batch], Tensor], *, inputs: bool,
) -> Iterator[tuple[Batch, Derivatives]]:  # fmt: skip
    """Each batch, and each layer's inputs (or outputs) with the derivatives in them.

    slope:  the derivative in the model's outputs: slope(outputs, batch)
    inputs: of the layers' inputs, rather than their outputs
    """
    seen: Derivatives = {}

    def add_zeros(name: str, value: Tensor) -> Tensor:
        zeros = torch.zeros_like(value, requires_grad=True)  # works where weights are frozen, too
        total = value + zeros
        # Not the value itself, which may be overwritten later.
        seen.setdefault(name, []).append((zeros, total.detach()))
        return total

    hooks = {"before": add_zeros} if inputs else {"after": add_zeros}
    with hooked(model, names, **hooks):
        for batch in batches:
            seen.clear()
            with torch.enable_grad():
                outputs = main_output(run_model(model, batch))
            for name in names:
                if name not in seen:
                    raise not_run(name)
            uses = [(name, *use) for name in names for use in seen[name]]
            slopes = torch.autograd.grad(
                outputs, [zeros for _, zeros, _ in uses], slope(outputs.detach(), batch),
                materialize_grads=True,
            )  # fmt: skip
            values: Derivatives = {}
            for (name, _, value), derivative in zip(uses, slopes, strict=True):
                values.setdefault(name, []).append((value, derivative))
            yield batch, values
