"""Sparse tensors (COO, CSR and the other layouts): what torch does for strided tensors only."""

from __future__ import annotations

import torch
from torch import Tensor


def held_tensors(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that hold a tensor's numbers: indices and values of a sparse one."""
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]  # the public ones refuse what is uncoalesced
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def bytes_of(tensor: Tensor) -> int:
    """The memory that a tensor's numbers take."""
    return sum(held.nbytes for held in held_tensors(tensor))


def are_equal(one: Tensor, other: Tensor) -> bool:
    """torch.equal, for tensors of any layout."""
    if one.layout is not other.layout or one.shape != other.shape:
        return False
    pairs = zip(held_tensors(one), held_tensors(other), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def rows_at(tensor: Tensor, rows: Tensor) -> Tensor:
    """tensor[rows], for tensors of any layout; a sparse result is a COO tensor or has the layout.

    rows: (s,) int64
    """
    rows = rows.to(tensor.device)
    if tensor.layout is torch.strided:
        return tensor[rows]
    chosen = as_coo(tensor).index_select(0, rows)
    if tensor.layout is torch.sparse_csr:
        return chosen.to_sparse_csr()
    return chosen.to_sparse_csc() if tensor.layout is torch.sparse_csc else chosen


def as_coo(tensor: Tensor) -> Tensor:
    """A sparse tensor as a coalesced COO tensor whose indices are of all dimensions."""
    if tensor.layout is not torch.sparse_coo:
        tensor = tensor.to_sparse_coo()
    elif tensor.dense_dim():
        tensor = tensor.to_dense().to_sparse_coo()
    return tensor.coalesce()
