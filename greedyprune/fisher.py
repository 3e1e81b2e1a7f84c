"""How much a change of a layer's outputs matters to what the model predicts: its Fisher.

For a layer with C outputs, F = sum of g g^T over samples and positions, (C, C), where g is the
derivative of -log p(y | x) in the layer's output and y is drawn from the model's own predictions
(no labels; Martens 2020, arXiv:1412.1193, has why not the data's). With errors e of the layer,
e^T F e is the second-order model of what they do to the predictions, each position by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .data import Batches
from .features import main_output
from .imitation import as_columns

IDENTITY_SHARE = 0.5  # of 0.01 to 0.8 the best on a ResNet-20


def roots(
    model: nn.Module, names: Sequence[str], batches: Batches, kind: str, seed: int,
    bar: Callable[..., Any],
) -> dict[str, Tensor]:  # fmt: skip
    """The symmetric square root of each layer's metric, (C, C) float64 on the CPU.

    The metric is half the identity, half F in the scale at which its mean diagonal is 1: what the
    layers hand on is no more than a model of the loss.

    kind: of loss, for what is drawn: "cross_entropy" (a class), "bce_with_logits" (each label),
        "mse" (Gaussian noise around the outputs)
    """
    torch.manual_seed(seed)  # the caller has forked the generators
    sums: dict[str, Tensor] = {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., Tensor]:
        def record(module: nn.Module, args: object, output: Tensor) -> Tensor:
            change = torch.zeros_like(output, requires_grad=True)  # also where weights are frozen
            seen[name] = change, output
            return output + change

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        for batch in bar(batches, "Fisher information"):
            with torch.enable_grad():
                outputs = main_output(model(*batch.args, **batch.kwargs))
            drawn = _slope(outputs.detach(), kind, batch.targets)
            found = torch.autograd.grad(outputs, [seen[name][0] for name in names], drawn)
            for name, slope in zip(names, found, strict=True):
                columns = as_columns(model.get_submodule(name), slope).float()
                product = (columns @ columns.T).double().cpu()
                sums[name] = sums[name] + product if name in sums else product
    finally:
        for handle in handles:
            handle.remove()
    return {name: _root(total) for name, total in sums.items()}


def _slope(outputs: Tensor, kind: str, targets: Tensor | None) -> Tensor:
    """The derivative of -log p(y) in the outputs, for y drawn from them."""
    if kind == "mse":
        return torch.randn_like(outputs)
    if kind == "bce_with_logits":
        likely = outputs.sigmoid()
        return likely - torch.bernoulli(likely)
    inside = targets is not None and targets.shape == (len(outputs), *outputs.shape[2:])
    moved = outputs.movedim(1 if inside else -1, -1)
    likely = moved.float().softmax(-1)
    drawn = torch.multinomial(likely.reshape(-1, likely.shape[-1]), 1).view(*likely.shape[:-1], 1)
    slope = likely.scatter_add(-1, drawn, torch.full_like(drawn, -1, dtype=likely.dtype))
    return slope.movedim(-1, 1 if inside else -1).to(outputs.dtype)


def _root(fisher: Tensor) -> Tensor:
    scale = float(fisher.diagonal().mean()) or 1.0  # 1: nothing of the layer is predicted with
    metric = (1 - IDENTITY_SHARE) / scale * fisher
    metric.diagonal().add_(IDENTITY_SHARE)
    values, vectors = torch.linalg.eigh(metric)
    return (vectors * values.sqrt()) @ vectors.T
