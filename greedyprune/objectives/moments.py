"""The sums over all samples that a selection needs, in one pass: README eq. 2 and eq. 3."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.path import Moments
from ..kernels.products import COPIED_ROWS, add_upper_product, mirror
from ..runtime.checkpoint import Tensors
from .features import LayerData


def moments(data: LayerData, backend: str, gram: Tensor | None = None) -> Moments:
    """The sums over all samples that selection and certificate need, in one pass, float64.

    gram: (N, N) float64 zeros, to receive G_ij = <phi_i, phi_j>, or (n, N), for this rank's part of
        the units as rows, where others have the rest; None: not wanted
    """
    out, bias, n = data.outgoing, data.bias, data.units
    own = data.peers.part(n) if data.peers.size > 1 else None
    sums = Tensors(
        norm=torch.zeros(n, dtype=torch.float64, device=data.device),  # |h_j|^2
        beta=torch.zeros(n, dtype=torch.float64, device=data.device),
        variance=torch.zeros_like(out),  # sum_s weight_s h_j^2, for each output
        numbers=torch.zeros(6, dtype=torch.float64),
        **({} if gram is None or data.features is not None else {"gram": gram}),
    )
    norm, beta, variance = sums.norm, sums.beta, sums.variance
    if data.features is None:
        data.resumed.hold(sums)
    known = data.extent  # where the squares were added up while the features were collected
    for block in data.blocks():
        h, target = block.features, block.target
        dense, empty, target_norm, mean_norm = 0.0, 0.0, 0.0, 0.0
        if known is None:
            if block.extent is not None:
                squares = block.extent.squares
            else:
                squares = torch.linalg.vector_norm(h, dim=1, dtype=torch.float64).square()
            norm += squares
        if backend == "reference":
            h = h.double()
        if target.kind != "custom":
            wide = (
                h if backend == "cpu" else h.double()
            )  # a GPU may round float32 products to 11 bits
            mean_phi = (out.T / n).to(wide.dtype) @ wide
            outputs = bias[:, None] + mean_phi
            dense = float(target.loss_sum(outputs))
            empty = float(target.loss_sum(bias[:, None].expand_as(outputs)))
            if target.weight is None:
                if known is None:
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
            beta += ops.candidate_slope(h, out, t, backend=backend)
        if gram is not None and own is not None:
            gram.addmm_(h[own].double(), h.double().T)
        elif gram is not None and data.features is None:
            add_upper_product(gram, h, torch.float64)
        sums.numbers += torch.tensor(
            [target.samples, target.mass, dense, empty, target_norm, mean_norm],
            dtype=torch.float64,
        )
    if known is not None:
        norm += known.squares
        if data.target is not None and data.target.weight is None:
            variance += norm[:, None]
    norm = norm * out.square().sum(1)
    data.ranks.sum("moments", norm, beta, variance, sums.numbers)
    count, mass, dense, empty, target_norm, mean_norm = sums.numbers.tolist()
    if mass == 0:
        raise ValueError("data: every label is ignored, expected at least one that counts")
    spread = 0.0
    if data.criterion.kind != "custom":
        spread = float((variance * out.square()).sum()) / n - mean_norm
        spread = max(0.0, data.criterion.smoothness / 2 * spread / mass)
        dense, empty = dense / mass, empty / mass
    if gram is not None and own is not None:
        gram *= out[own] @ out.T
    elif gram is not None:
        if data.features is not None:
            # They decide what float32 leaves open; features that were not kept can't.
            add_upper_product(gram, data.features, data.product_dtype)
        _weigh(gram, out)
        data.ranks.sum_upper("Gram matrix", gram)
        mirror(gram)
    return Moments(int(count), mass, norm, beta, target_norm, dense, spread, empty)


def _weigh(gram: Tensor, outgoing: Tensor) -> None:
    """From sums of h_i h_j to G_ij = (w_i . w_j) (h_i . h_j), the upper half."""
    for i in range(0, len(gram), COPIED_ROWS):
        gram[i : i + COPIED_ROWS, i:] *= outgoing[i : i + COPIED_ROWS] @ outgoing[i:].T
