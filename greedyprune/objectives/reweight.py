"""What the kept units' outgoing weights become, and the losses of the network so weighted.

Picks follow README eq. 1 whatever the weights. A unit picked c times of k then keeps its outgoing
weights times N c / k ("counts"), N / kept ("uniform") or 1 ("none"), or gets new ones by least
squares ("refit").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.least_squares import factored
from ..kernels.path import Refit
from ..surgery.selection import distinct_counts, first_picks
from .features import LayerData
from .output_loss import CustomObjective


def refit(data: LayerData, order: Tensor) -> Refit:
    """Least squares of the layer's output on the kept units' features, one pass over the data.

    The output is the target itself for mse, and the dense network's output for other losses.
    """
    units = first_picks(order)
    here = units.to(data.device)
    gram = torch.zeros(len(units), len(units), dtype=torch.float64, device=data.device)
    right = torch.zeros(len(units), data.outputs, dtype=torch.float64, device=data.device)
    for block in data.blocks():
        rows = block.features[here].double()
        wanted = block.target.value if block.target.kind == "mse" else None
        if wanted is None:
            wanted = data.dense_outputs(block.features)
        gram.addmm_(rows, rows.T)
        right.addmm_(rows, (wanted - data.bias[:, None]).T)
    data.ranks.sum("least squares", gram, right)
    factor, dropped = factored(gram)
    solved = torch.linalg.solve_triangular(factor, right, upper=False)
    solved[dropped] = 0
    return Refit(units, factor.cpu(), solved.cpu())


def losses_along(
    data: LayerData, order: Tensor, weights: str, fitted: Refit | None, mass: float
) -> Tensor:
    """The loss after each step of `order` for "uniform", "none" or "refit": (k,) float64."""
    units = first_picks(order).to(data.device)
    custom = CustomObjective(data) if data.criterion.kind == "custom" else None
    total = torch.zeros(len(units), dtype=torch.float64, device=data.device)
    scale = torch.ones(len(units), dtype=torch.float64, device=data.device)
    if weights == "uniform":
        scale = torch.arange(1, len(units) + 1, device=data.device).double().reciprocal()
    sources = data.blocks() if custom is None else data.whole()
    for block in sources:
        rows = block.features[units].double()
        directions = data.outgoing[units]
        if weights == "none":
            directions = directions / data.units
        elif fitted is not None:  # orthonormal features: earlier coefficients stay
            rows = torch.linalg.solve_triangular(fitted.factor.to(data.device), rows, upper=False)
            directions = fitted.solved.to(data.device)
        chunk = max(1, 2**22 // max(1, data.outputs * rows.shape[1]))
        before = torch.zeros(data.outputs, rows.shape[1], dtype=torch.float64, device=data.device)
        for i in range(0, len(units), chunk):
            part = slice(i, i + chunk)
            sums = (directions[part, :, None] * rows[part, None, :]).cumsum(0) + before
            before = sums[-1]
            outputs = data.bias[:, None] + scale[part, None, None] * sums
            if custom is None:
                total[part] += block.target.loss_sum(outputs)
            else:
                total[part] += total.new_tensor([custom.outputs_loss(f) for f in outputs])
    if custom is None:
        data.ranks.sum("losses", total)
    losses = total / (1.0 if custom is not None else mass)
    return losses.cpu()[distinct_counts(order) - 1]
