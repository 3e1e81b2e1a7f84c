"""The loss's derivatives inside a network: a backward pass for each batch, without parameters'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..data.forward import hooked, main_output, run_model


def derivatives(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch],
    slope: Callable[[Tensor, Batch], Tensor], *, inputs: bool,
) -> Iterator[tuple[Batch, dict[str, tuple[Tensor, Tensor]]]]:  # fmt: skip
    """Each batch, and each layer's input (or output) with the derivative in it.

    slope:  the derivative in the model's outputs: slope(outputs, batch)
    inputs: of the layers' inputs, rather than their outputs
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def add_zeros(name: str, value: Tensor) -> Tensor:
        zeros = torch.zeros_like(value, requires_grad=True)  # works where weights are frozen, too
        total = value + zeros
        seen[name] = zeros, total.detach()  # not the value, which may be overwritten later
        return total

    hooks = {"before": add_zeros} if inputs else {"after": add_zeros}
    with hooked(model, names, **hooks):
        for batch in batches:
            with torch.enable_grad():
                outputs = main_output(run_model(model, batch))
            slopes = torch.autograd.grad(
                outputs, [seen[name][0] for name in names], slope(outputs.detach(), batch),
                materialize_grads=True,
            )  # fmt: skip
            values = {name: (seen[name][1], s) for name, s in zip(names, slopes, strict=True)}
            yield batch, values
