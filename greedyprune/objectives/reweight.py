"""What the kept units' outgoing weights become, and the losses of the network so weighted.

Picks follow eq. (1) whatever the weights. A unit picked c times of k then keeps its outgoing
weights times N c / k ("counts"), N / kept ("uniform") or 1 ("none"), or gets new ones by least
squares ("refit").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.least_squares import factored, ridge
from ..kernels.path import NestedFit, first_picks
from ..surgery.layer_selection import distinct_counts
from .features import InMemory, Streamed
from .memory import check_least_squares
from .moments import squares_of
from .options import DAMPING
from .pointwise import CustomObjective
from .source import Block

CHUNK = 2**22  # entries of outputs that are computed at a time


class Reweighting:
    """The weights and losses of a path whose kept units are weighted otherwise than in the loop.

    mass:  what sums over all samples are divided by
    limit: bytes that least squares may take
    """

    def __init__(
        self, features: InMemory | Streamed, weights: str, mass: float, limit: int
    ) -> None:
        self._features, self._weights = features, weights
        self._mass, self._limit = mass, limit

    def losses(self, order: Tensor) -> tuple[Tensor, NestedFit | None]:
        """The loss after each step of `order` (k,): (k,) float64; and the least squares, if any."""
        fitted = None
        if self._weights == "refit":
            picks = len(first_picks(order))
            check_least_squares(self._features.group.producer, picks, self._limit)
            fitted = self._least_squares(order)
        return self._losses(order, fitted), fitted

    def _least_squares(self, order: Tensor) -> NestedFit:
        """Least squares of the layer's output on the kept units' features, one pass over the data.

        For mse the output is the target itself, for other losses the dense network's output. The
        ridge is towards the dense weights.
        """
        features, units = self._features, first_picks(order)
        rows_of = units.to(features.device)
        gram = torch.zeros(len(units), len(units), dtype=torch.float64, device=features.device)
        right = gram.new_zeros(len(units), features.outputs)
        squares = gram.new_zeros(features.units)
        for block in map(_shown, features.blocks()):
            rows = block.features[rows_of].double()
            wanted = block.target.value if block.target.kind == "mse" else None
            if wanted is None:
                wanted = features.dense_outputs(block.features)
            gram.addmm_(rows, rows.T)
            squares += squares_of(block)
            right.addmm_(rows, (wanted - features.bias[:, None]).T)
        features.ranks.sum("least squares", gram, right, squares)
        added = ridge(squares, DAMPING)  # towards the dense weights
        added = added[rows_of]
        gram.diagonal().add_(added)
        right += added[:, None] * features.outgoing[rows_of].double() / features.units
        factor, dropped = factored(gram)
        solved = torch.linalg.solve_triangular(factor, right, upper=False)
        solved[dropped] = 0
        return NestedFit(units, factor.cpu(), solved.cpu())

    def _losses(self, order: Tensor, fitted: NestedFit | None) -> Tensor:
        features = self._features
        units = first_picks(order).to(features.device)
        custom, blocks = None, iter(features.blocks())
        if isinstance(features, InMemory) and features.criterion.kind == "custom":
            custom, blocks = CustomObjective(features), iter(features.whole())
        # With orthonormal features, earlier coefficients stay when a unit is added.
        factor = None if fitted is None else fitted.factor.to(features.device)
        total = torch.zeros(len(units), dtype=torch.float64, device=features.device)
        scale = torch.ones_like(total)
        if self._weights == "uniform":
            scale = torch.arange(1, len(units) + 1, device=features.device).double().reciprocal()
        directions = features.outgoing[units]
        if self._weights == "none":
            directions = directions / features.units
        elif fitted is not None:
            directions = fitted.solved.to(features.device)
        for block in blocks:
            rows = block.features[units].double()
            if factor is not None:
                rows = torch.linalg.solve_triangular(factor, rows, upper=False)
            chunk = max(1, CHUNK // max(1, features.outputs * rows.shape[1]))
            before = rows.new_zeros(features.outputs, rows.shape[1])
            for i in range(0, len(units), chunk):
                part = slice(i, i + chunk)
                sums = (directions[part, :, None] * rows[part, None, :]).cumsum(0) + before
                before = sums[-1]
                outputs = features.bias[:, None] + scale[part, None, None] * sums
                if custom is None:
                    total[part] += block.target.loss_sum(outputs)
                else:
                    total[part] += total.new_tensor(
                        [custom.outputs_loss(output) for output in outputs]
                    )
        if custom is None:
            features.ranks.sum("losses", total)
            total = total / self._mass
        return total.cpu()[distinct_counts(order) - 1]


def _shown(block: Block) -> Block:
    """The block without the hidden positions that a loss of the user's own is called with."""
    target = block.target
    if target.kind != "custom" or target.weight is None:
        return block
    rows = target.weight.nonzero().flatten().to(block.features.device)
    return Block(block.features[:, rows], target[rows])
