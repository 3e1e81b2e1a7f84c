"""Gates: units are judged by the loss's second-order model in one gate for each unit.

A gate a_j multiplies unit j's outgoing weights, and u_j(s) is the derivative of the loss of sample
s in it, with the data's labels. The loss rises with gates a by about half the mean of
(sum_j (1 - a_j) u_j)^2 (eq. (5)): a squared error with features u_j, whose Gram matrix is the
empirical Fisher information. One backward pass serves all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..data.batches import Batch, samples_of
from ..data.compared import compared
from ..data.losses import Criterion, loss_of_function, slope_in
from ..data.padding import NO_LABEL, counted
from ..data.positions import NO_DRAWS, Draws
from ..graph.groups import Group
from ..graph.names import slice_of
from ..graph.replay import BothInputs
from ..graph.unfold import by_position, consumer_window, input_positions, outputs_of
from ..runtime.resume import Pass, Tensors
from ..surgery.layer_selection import LayerSelection
from .derivatives import Derivatives, derivatives
from .job import Job
from .layer_products import LayerProducts
from .memory import gates_bytes, turns
from .options import MOST_SWAPS
from .products import Products
from .quadratic import select_from, select_in_turns

GATES = "gates"


def select_layer(job: Job, group: Group, products: LayerProducts) -> LayerSelection:
    """Selects a layer's units by the loss in their gates."""
    return select_from(
        job, products, swaps=MOST_SWAPS if job.tolerance is None else 0,
        damping=job.fisher.damping, loss=job.criterion.kind,
    )  # fmt: skip


def select_layers(job: Job, groups: Sequence[Group]) -> dict[str, LayerSelection]:
    """Selects all layers from the dense network, shared out to the ranks."""
    needed = [gates_bytes(job, group) for group in groups]
    in_memory = turns(groups, needed, job.memory_limit, once=job.batches.once)
    return select_in_turns(job, in_memory, partial(gate_products, job), select_layer)


class Gates(Products):
    """The products of one layer's gates: a unit has the single feature u_j."""

    def __init__(self, group: Group) -> None:
        one = torch.ones(1, group.units, dtype=torch.float64)
        super().__init__(GATES, group.units, one, torch.device("cpu"))

    @property
    def mass(self) -> float:
        return 2.0 * self.positions

    def add(
        self, inputs: Tensor, draws: Draws = NO_DRAWS, mask: Tensor | None = None,
        both: BothInputs | None = None,
    ) -> None:  # fmt: skip
        """inputs: u (samples, N)."""
        rows = inputs.double().cpu()
        self.sums[0].gram.addmm_(rows.T, rows)
        self.sums[0].positions += len(rows)


def gate_products(job: Job, groups: Sequence[Group]) -> dict[str, LayerProducts]:
    """Every group's products of gates, by the name of its layer, from one backward pass.

    With several ranks, a group's sums are complete only on its owner.
    """
    ranks, total = job.ranks, Tensors(mass=torch.zeros((), dtype=torch.float64))

    def slope(outputs: Tensor, batch: Batch) -> Tensor:
        derivative, mass = _loss_slope(job.criterion, outputs, batch)
        total.mass += mass
        return derivative

    by_layer = {group.producer: Gates(group) for group in groups}
    names = [name for group in groups for name in group.consumers]
    resumed = Pass(job.checkpoint, f"gates {' '.join(names)}")
    resumed.hold(total, *by_layer.values())
    batches = resumed.new(job.bar(job.batches, "Fisher information"))
    for batch, values in derivatives(job.model, names, batches, slope, inputs=True):
        for group in groups:
            by_layer[group.producer].add(_gate_slopes(job, group, batch, values))
    [mass] = ranks.sum_numbers("mass", float(total.mass))
    if mass == 0:
        raise ValueError(NO_LABEL)
    for i, gates in enumerate(by_layer.values()):
        gates.finish(ranks, ranks.owner(i))
        scale = job.criterion.scale(mass)  # 1 where the loss is a mean over all batches
        gates.gram.mul_(scale * (gates.positions / mass) ** 2)
    return {
        group.producer: LayerProducts(
            group, [by_layer[group.producer]],
            {name: outputs_of(job.model, group, name) for name in group.consumers}, GATES,
        )
        for group in groups
    }  # fmt: skip


def _gate_slopes(job: Job, group: Group, batch: Batch, values: Derivatives) -> Tensor:
    """u (samples, N): the derivatives in a group's gates, from those in its consumers' inputs.

    A gate multiplies its unit at every use of a consumer. Hidden positions add nothing, and samples
    that the loss does not count are left out.
    """
    total, samples = torch.zeros(()), samples_of(batch) or 1
    kept = _counted_samples(job.criterion, batch)
    for name in group.consumers:
        at, window = slice_of(group.slices, name), consumer_window(job.model, group, name)
        for inputs, derivative in values[name]:
            products = by_position(window, inputs * derivative)
            rows = counted(batch.padding.of(name), input_positions(window, inputs))
            if rows is not None:
                hidden = ~rows.reshape(-1, 1).to(products.device)
                products = products.masked_fill(hidden, 0)  # they may be NaN
            count = samples if len(products) % samples == 0 else len(products)
            products = products[:, at.places.flatten().to(products.device)]
            products = products.view(count, -1, group.units, at.width).sum((1, 3))
            total = total + products
    if kept is not None and len(kept) == len(total):
        total = total[kept.to(total.device)]
    if not total.isfinite().all():
        raise ValueError(
            f"layer {group.producer!r}: NaN or inf in the loss's derivative in its "
            "activations, expected finite numbers"
        )
    return total


def _counted_samples(criterion: Criterion, batch: Batch) -> Tensor | None:
    """Which samples have a position that the loss counts: (m,) bool; None: all."""
    samples, labels = samples_of(batch) or 1, batch.targets
    shown = counted(batch.padding.outputs, (samples,))
    is_labels = isinstance(labels, Tensor) and not labels.is_floating_point()
    if criterion.kind != "cross_entropy" or not is_labels or len(labels) != samples:
        return shown
    labelled = (labels != criterion.ignore_index).reshape(samples, -1).any(1)
    return labelled if shown is None else labelled & shown.to(labelled.device)


def _loss_slope(criterion: Criterion, outputs: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """The derivative, in the outputs, of the batch's loss times its mass; and the mass.

    A custom loss counts as a mean over samples.
    """
    found = compared(criterion, outputs, batch)
    with torch.enable_grad():
        leaf = outputs.requires_grad_()
        if criterion.function is not None:
            shown = _counted_samples(criterion, batch)
            samples = (samples_of(batch) or 1) if shown is None else int(shown.sum())
            if not samples:  # a mean over no positions would be NaN
                return torch.zeros_like(outputs), 0.0
            value = loss_of_function(criterion.function, leaf, batch.targets)
            return slope_in(leaf, value) * samples, float(samples)
        columns = found.columns(leaf)
        slope = found.target.gradient(columns.detach())
        [derivative] = torch.autograd.grad(columns, leaf, slope)
    return derivative.to(outputs.dtype), found.target.mass
