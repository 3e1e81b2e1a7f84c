"""How much a change inside the network matters to the loss, by products of its derivatives.

- `roots`, for `metric="fisher"`: output errors e of a layer with C outputs count as e^T F e,
  F = sum of g g^T over samples and positions, (C, C), g the derivative of -log p(y | x) in the
  layer's output, y drawn from the model's own predictions: no labels (Martens 2020,
  arXiv:1412.1193, has why not the data's). Each position counts by itself.
- `gates`, for `objective="fisher"`: the loss, with the data's labels, in one gate a unit, for whose
  sake all units and positions of a sample count together (the empirical Fisher information).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Batches, samples_of
from ..data.forward import main_output, run_model, target_of
from ..data.losses import Criterion, loss_of_function, slope_in
from ..graph.groups import Group
from ..graph.unfold import as_columns, by_position, outputs_of
from ..runtime.checkpoint import Checkpoint, Pass, Tensors
from .imitation import Products, Sums

GATES = "gates"
IDENTITY_SHARE = 0.5  # of 0.01 to 0.8 the best on a ResNet-20


class Gates(Products):
    """One gate a unit, times its outgoing weights: how the loss depends on them, to second order.

    u_j(s) is the derivative of the loss of sample s in gate j. What the loss rises by with gates a
    is about half the mean of (sum_j (1 - a_j) u_j)^2: a squared error with features u_j.
    """

    def __init__(self, group: Group) -> None:
        one = torch.ones(1, group.units, dtype=torch.float64)
        super().__init__(GATES, group.units, one, torch.device("cpu"))

    @property
    def mass(self) -> float:
        return 2.0 * self.positions

    def add(self, inputs: Tensor, outputs: Tensor | None = None) -> None:
        """inputs: u (samples, N)."""
        rows = inputs.double().cpu()
        self.gram.addmm_(rows.T, rows)
        self.positions += len(rows)


def gates(
    model: nn.Module, groups: Sequence[Group], batches: Batches, criterion: Criterion,
    bar: Callable[..., Any], checkpoint: Checkpoint,
) -> dict[str, Sums]:  # fmt: skip
    """What every group is selected from by the loss in its gates: all from one backward pass.

    Of several ranks each group's sums are right on its owner only.
    """

    total = Tensors(mass=torch.zeros((), dtype=torch.float64))

    def slope_of(outputs: Tensor, batch: Batch) -> Tensor:
        slope, mass = _loss_slope(criterion, outputs, batch)
        total.mass += mass
        return slope

    found = {group.producer: Gates(group) for group in groups}
    names = [name for group in groups for name in group.consumers]
    resumed = Pass(checkpoint, f"gates {' '.join(names)}")
    resumed.hold(total, *found.values())
    some = resumed.new(bar(batches, "Fisher information"))
    for samples, slopes in _backward(model, names, some, slope_of, inputs=True):
        for group in groups:
            gates = torch.zeros(())
            for name in group.consumers:
                here = group.slices[f"{name}.weight"]
                value, slope = slopes[name]
                each = by_position(model.get_submodule(name), value * slope)
                count = samples if len(each) % samples == 0 else len(each)
                each = each.view(count, -1, here.outer, group.units, here.inner)
                gates = gates + each.sum((1, 2, 4))
            if not gates.isfinite().all():
                raise ValueError(
                    f"layer {group.producer!r}: NaN or inf in the loss's derivative in its "
                    "activations, expected finite numbers"
                )
            found[group.producer].add(gates)
    [mass] = batches.ranks.sum_numbers("mass", float(total.mass))
    if mass == 0:
        raise ValueError("data: every label is ignored, expected at least one that counts")
    for i, own in enumerate(found.values()):
        own.finish(batches.ranks, batches.ranks.owner(i))
        own.gram *= (own.positions / mass) ** 2  # the loss is a mean over all batches
    return {
        group.producer: Sums(
            group, [found[group.producer]],
            {name: outputs_of(model, group, name) for name in group.consumers}, GATES,
        )
        for group in groups
    }  # fmt: skip


def roots(
    model: nn.Module, outputs: Mapping[str, int], batches: Batches, kind: str, seed: int,
    bar: Callable[..., Any],
) -> dict[str, Tensor]:  # fmt: skip
    """The symmetric square root of each layer's metric, (C, C) float64 on the CPU.

    The metric is half the identity, half F in the scale at which its mean diagonal is 1: what the
    layers hand on is no more than a model of the loss.

    outputs: the layers, and how many outputs C each has
    kind: of loss, for what is drawn: "cross_entropy" (a class), "bce_with_logits" (each label),
        "mse" (Gaussian noise around the outputs)
    """
    ranks = batches.ranks
    torch.manual_seed(seed + ranks.rank)  # the caller has forked the generators

    def slope_of(found: Tensor, batch: Batch) -> Tensor:
        return _slope(found, kind, batch.targets)

    sums = {name: torch.zeros(n, n, dtype=torch.float64) for name, n in outputs.items()}
    all_batches = bar(batches, "Fisher information")
    for _, slopes in _backward(model, list(outputs), all_batches, slope_of, inputs=False):
        for name, (_, slope) in slopes.items():
            columns = as_columns(model.get_submodule(name), slope).float()
            sums[name] += (columns @ columns.T).double().cpu()
    ranks.sum("metrics", *sums.values())
    return {name: _root(total) for name, total in sums.items()}


def _backward(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch],
    slope_of: Callable[[Tensor, Batch], Tensor], *, inputs: bool,
) -> Iterator[tuple[int, dict[str, tuple[Tensor, Tensor]]]]:  # fmt: skip
    """Samples of each batch, and each layer's input (or output) with the derivative in it.

    slope_of: the derivative in the model's outputs
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def added(name: str, value: Tensor) -> Tensor:
        change = torch.zeros_like(value, requires_grad=True)  # also where weights are frozen
        total = value + change
        seen[name] = change, total.detach()  # not the value, which may be overwritten later
        return total

    def before(name: str) -> Callable[..., Any]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (added(name, args[0]), *args[1:]), kwargs
            return args, kwargs | {"input": added(name, kwargs["input"])}

        return record

    def after(name: str) -> Callable[..., Tensor]:
        return lambda _, __, output: added(name, output)

    handles = [
        module.register_forward_pre_hook(before(name), with_kwargs=True)
        if inputs
        else module.register_forward_hook(after(name))
        for name in names
        for module in [model.get_submodule(name)]
    ]
    try:
        for batch in batches:
            with torch.enable_grad():
                outputs = main_output(run_model(model, batch))
            slopes = torch.autograd.grad(
                outputs, [seen[name][0] for name in names], slope_of(outputs.detach(), batch),
                materialize_grads=True,
            )  # fmt: skip
            values = {name: (seen[name][1], s) for name, s in zip(names, slopes, strict=True)}
            yield samples_of(batch) or 1, values
    finally:
        for handle in handles:
            handle.remove()


def _loss_slope(criterion: Criterion, outputs: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """The derivative in the outputs of the batch's loss times its mass; the mass.

    A loss of the user's own is taken for a mean over samples.
    """
    target = target_of(criterion, outputs, batch.targets)
    if criterion.function is not None and batch.targets is not None:
        samples = samples_of(batch) or 1
        with torch.enable_grad():
            leaf = outputs.requires_grad_()
            value = loss_of_function(criterion.function, leaf, batch.targets)
            return slope_in(leaf, value) * samples, float(samples)
    columns = outputs.double().reshape(-1, target.outputs).T
    slope = target.gradient(columns).T.reshape(outputs.shape)
    return slope.to(outputs.dtype), target.mass


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
