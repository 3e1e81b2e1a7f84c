"""The sums over all samples that a selection by features needs, in one pass: eq. (2) and (3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.padding import NO_LABEL, NO_POSITION
from ..kernels import ops
from ..kernels.path import Moments
from ..kernels.products import COPIED_ROWS, add_upper_product, mirror
from ..runtime.resume import Tensors
from .features import InMemory, Streamed
from .source import Block


def moments(features: InMemory | Streamed, backend: str, gram: Tensor | None = None) -> Moments:
    """The sums over all samples that selection and certificate need, in one pass, float64.

    gram: (N, N) float64 zeros, that receive G_ij = <phi_i, phi_j>; None: not wanted
    """
    outgoing, units = features.outgoing, features.units
    streamed = isinstance(features, Streamed)
    sums = Tensors(
        norm=torch.zeros(units, dtype=torch.float64, device=features.device),  # |h_j|^2
        beta=torch.zeros(units, dtype=torch.float64, device=features.device),
        variance=torch.zeros_like(outgoing),  # sum_s weight_s h_j^2, for each output
        numbers=torch.zeros(6, dtype=torch.float64),
        **({} if gram is None or not streamed else {"gram": gram}),
    )
    norm, beta, variance = sums.norm, sums.beta, sums.variance
    if isinstance(features, Streamed):
        features.resumed.hold(sums)
    known = features.extent  # the squares were added up while the features were collected
    for block in features.blocks():
        squares = None
        if known is None:
            squares = squares_of(block)
            norm += squares
        numbers = _add_outputs(features, block, backend, squares, beta, variance)
        sums.numbers += torch.tensor(numbers, dtype=torch.float64)
        if gram is not None and streamed:
            h = block.features.double() if backend == "reference" else block.features
            add_upper_product(gram, h, torch.float64)
    if known is not None:
        norm += known.squares
        if isinstance(features, InMemory) and features.target.weight is None:
            variance += norm[:, None]
    norm = norm * outgoing.square().sum(1)
    features.ranks.sum("moments", norm, beta, variance, sums.numbers)
    count, mass, dense, empty, target_norm, mean_norm = sums.numbers.tolist()
    if mass == 0:
        raise ValueError(NO_POSITION if features.imitation else NO_LABEL)
    spread = 0.0
    if features.criterion.kind != "custom":
        spread = float((variance * outgoing.square()).sum()) / units - mean_norm
        spread = max(0.0, features.criterion.smoothness / 2 * spread / mass)
        dense, empty = dense / mass, empty / mass
    if gram is not None:
        if isinstance(features, InMemory):  # features in memory decide near ties of float32
            add_upper_product(gram, features.features, features.product_dtype)
        _weigh(gram, outgoing)
        features.ranks.sum_upper("Gram matrix", gram)
        mirror(gram)
    return Moments(int(count), mass, norm, beta, target_norm, dense, spread, empty)


def squares_of(block: Block) -> Tensor:
    """|h_j|^2 over a block, (N,) float64."""
    if block.extent is not None:
        return block.extent.squares
    return torch.linalg.vector_norm(block.features, dim=1, dtype=torch.float64).square()


def _add_outputs(
    features: InMemory | Streamed, block: Block, backend: str, squares: Tensor | None,
    beta: Tensor, variance: Tensor,
) -> list[float]:  # fmt: skip
    """Adds a block to beta and variance, in place.

    Returns samples, mass, the sums of losses with all units and without any, |t|^2 and the weighted
    |mean phi|^2.
    """
    outgoing, bias, target = features.outgoing, features.bias, block.target
    h = block.features.double() if backend == "reference" else block.features
    dense, empty, target_norm, mean_norm = 0.0, 0.0, 0.0, 0.0
    if target.kind != "custom":
        wide = h if backend == "cpu" else h.double()  # a GPU may round float32 products to 11 bits
        mean_phi = (outgoing.T / features.units).to(wide.dtype) @ wide
        outputs = bias[:, None] + mean_phi
        dense = float(target.loss_sum(outputs))
        empty = float(target.loss_sum(bias[:, None].expand_as(outputs)))
        if target.weight is None:
            if squares is not None:
                variance += squares[:, None]
            mean_norm = float(mean_phi.double().square().sum())
        else:
            weight = target.weight.expand_as(mean_phi)
            variance += h.double().square() @ weight.T
            mean_norm = float((weight * mean_phi.square()).sum())
    if target.kind == "mse":
        assert target.value is not None
        t = target.value - bias[:, None]
        target_norm = float(t.square().sum())
        beta += ops.candidate_slope(h, outgoing, t, backend=backend)
    return [target.samples, target.mass, dense, empty, target_norm, mean_norm]


def _weigh(gram: Tensor, outgoing: Tensor) -> None:
    """From sums of h_i h_j to G_ij = (w_i . w_j) (h_i . h_j), the upper half."""
    for i in range(0, len(gram), COPIED_ROWS):
        gram[i : i + COPIED_ROWS, i:] *= outgoing[i : i + COPIED_ROWS] @ outgoing[i:].T
