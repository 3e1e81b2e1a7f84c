"""A network as the executor runs it: its tensors, and the values between two of its nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..runtime.sparse import bytes_of
from .slices import Entries

# The values of nodes that have run and are still needed: tensors, or tuples of them.
Values = dict[fx.Node, Any]


class Network(NamedTuple):
    """A network that an executor runs: the model with other weights, or without some units.

    tensors: parameters and buffers by name
    left:    what is left of each dimension that is cut. The tensors have their whole size; only the
             norms over units and the recurrences need to know
    used:    by the name of a weight, the input channels (n,) int64 of which its layer has weights
             other than zero; layers that are not named use all
    """

    tensors: Mapping[str, Tensor]
    left: Entries = MappingProxyType({})
    used: Mapping[str, Tensor] = MappingProxyType({})


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, by every name that they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def is_new(value: object, operands: object) -> bool:
    """Is a value a tensor in memory of its own, not that of an operand?"""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    memory = value.untyped_storage().data_ptr()
    others = (other for other in tree_leaves(operands) if isinstance(other, Tensor))
    return all(
        other.layout is torch.strided and other.untyped_storage().data_ptr() != memory
        for other in others
    )


def bytes_held(values: Sequence[Values]) -> int:
    """The memory of all tensors among these values, each counted once."""
    tensors = {
        id(value): value
        for value in tree_leaves([list(nodes.values()) for nodes in values])
        if isinstance(value, Tensor)
    }
    return sum(map(bytes_of, tensors.values()))
