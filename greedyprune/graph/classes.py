"""Sets of entries that stay or go together: a union-find structure with vectorised operations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Classes:
    """Entries by their ids, in classes. A class that can't go is *fixed*, for a reason.

    A note on a class says which operation has made it large.
    """

    def __init__(self) -> None:
        self._parent: Ids = np.empty(0, np.int64)
        self._reasons: dict[int, str] = {}  # by the class's root
        self._notes: dict[int, str] = {}

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
        gone = set[int]()
        while True:
            pairs = np.stack([self.roots(ids).ravel(), self.roots(others).ravel()])
            pairs = pairs[:, pairs[0] != pairs[1]]
            if not pairs.size:
                break
            # A root of several pairs gets the smallest one now, which meets the others next time.
            np.minimum.at(self._parent, pairs.max(0), pairs.min(0))
            self._shorten(np.unique(pairs.max(0)))
            gone.update(pairs.max(0).tolist())
        for texts in (self._reasons, self._notes):
            for root in sorted(gone & texts.keys()):
                texts.setdefault(int(self.roots(np.array(root))), texts[root])
                del texts[root]

    def _shorten(self, ids: Ids) -> None:
        """Makes entries the children of their roots, with half as many steps each time."""
        while True:
            above = self._parent[self._parent[ids]]
            if np.array_equal(above, self._parent[ids]):
                return
            self._parent[ids] = above

    def unite_along(self, ids: Ids, axes: tuple[int, ...], note: str = "") -> None:
        """Makes all entries along these axes one class.

        note: is left on classes that grow
        """
        first = ids[tuple(slice(0, 1) if i in axes else slice(None) for i in range(ids.ndim))]
        grow = first[(self.roots(ids) != self.roots(first)).any(axes, keepdims=True)]
        self.unite(ids, first)
        if note:
            for root in np.unique(self.roots(grow)):
                self._notes[int(root)] = note

    def note(self, one: int) -> str:
        """The last note on a class; "": there is none."""
        return self._notes.get(int(self.roots(np.array(one))), "")

    def fix(self, ids: Ids, reason: str) -> None:
        """Fixes the classes of these entries; a class keeps its first reason."""
        for root in np.unique(self.roots(ids)):
            self._reasons.setdefault(int(root), reason)

    def reasons(self, ids: Ids) -> Iterator[str | None]:
        """Why the class of each entry is fixed; None: it is not."""
        return (self._reasons.get(int(root)) for root in self.roots(ids).ravel())
