"""Normalisations over units: their statistics change where units go.

A LayerNorm over a residual stream divides all units by what all units give together. So do norms
that are written out, such as `x / x.square().mean(-1, keepdim=True).sqrt()`. In a pruned network
only the units that are left have a part in these statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .nodes import operation

# They subtract the mean or divide by the spread of some dimensions; group_norm with one group.
NORMS = {"layer_norm", "rms_norm", "group_norm"}
# A norm that is written out takes these along its dimension, by which argument names it.
STATISTICS = {
    "mean": 1, "var": 1, "std": 1, "var_mean": 1, "linalg_vector_norm": 2, "norm": 2,
}  # fmt: skip


def over_entries(
    node: fx.Node, args: tuple[Any, ...], options: dict[str, Any], dim: int, left: Tensor
) -> Any:
    """A norm or a statistic over some entries of one dimension of its input; 0 at the others.

    args, options: the values of the node's arguments
    dim:           a dimension of the input, which the node takes statistics of
    left:          (K,) int64, the entries that are left
    """
    op, target = operation(node), node.target
    inputs, rest = args[0], list(args[1:])
    left = left.to(inputs.device)
    assert callable(target)
    if op in NORMS:
        along = 0
        if op != "group_norm":
            along = dim - (inputs.dim() - len(rest[0]))
            rest[0] = [len(left) if i == along else size for i, size in enumerate(rest[0])]
        rest = [
            value.index_select(along, left) if isinstance(value, Tensor) else value
            for value in rest
        ]  # fmt: skip
    result: Any = target(inputs.index_select(dim, left), *rest, **options)
    if op in STATISTICS:
        return result
    return torch.zeros_like(inputs, dtype=result.dtype).index_copy(dim, left, result)
