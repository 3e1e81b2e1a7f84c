"""Sets of entries that stay or go together: a union-find structure with vectorised operations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Classes:
    """Entries by their ids, in classes. A class that can't go is *fixed*, for a reason."""

    def __init__(self) -> None:
        self._parent: Ids = np.empty(0, np.int64)
        self._reasons: dict[int, str] = {}  # by the class's root

    def fresh(self, count: int) -> Ids:
        """New entries, each in a class of its own: (count,) int64."""
        start = len(self._parent)
        ids = np.arange(start, start + count)
        self._parent = np.concatenate([self._parent, ids])
        return ids

    def roots(self, ids: Ids) -> Ids:
        """One id for each class, in the shape of `ids`."""
        found = self._parent[ids]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                break
            found = above
        self._parent[ids] = found
        return found

    def unite(self, ids: Ids, others: Ids) -> None:
        """Makes each entry and the other at its place one class; the shapes are broadcast."""
        ids, others = np.broadcast_arrays(ids, others)
        pairs = np.stack([self.roots(ids).ravel(), self.roots(others).ravel()], 1)
        for one, other in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0):
            self._unite(self._root(int(one)), self._root(int(other)))

    def unite_along(self, ids: Ids, axes: tuple[int, ...]) -> None:
        """Makes all entries along these axes one class."""
        first = ids[tuple(slice(0, 1) if i in axes else slice(None) for i in range(ids.ndim))]
        self.unite(ids, first)

    def fix(self, ids: Ids, reason: str) -> None:
        """Fixes the classes of these entries; a class keeps its first reason."""
        for root in np.unique(self.roots(ids)):
            self._reasons.setdefault(int(root), reason)

    def reasons(self, ids: Ids) -> Iterator[str | None]:
        """Why the class of each entry is fixed; None: it is not."""
        return (self._reasons.get(int(root)) for root in self.roots(ids).ravel())

    def _root(self, one: int) -> int:
        while self._parent[one] != one:
            one = int(self._parent[one])
        return one

    def _unite(self, one: int, other: int) -> None:
        if one == other:
            return
        kept, gone = min(one, other), max(one, other)
        self._parent[gone] = kept
        reason = self._reasons.pop(gone, None)
        if reason is not None:
            self._reasons.setdefault(kept, reason)
