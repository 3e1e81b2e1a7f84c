"""Where tensors hold the units of a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# What is left of dimensions of tensors: the entries, (K,) int64 ascending, by tensor and dimension.
Entries = Mapping[tuple[str, int], Tensor]


class NotPrunableError(ValueError):
    """A ValueError: no unit of a layer can be removed. The message names the layer and says why."""


@dataclass(frozen=True, eq=False)
class Slice:
    """Where a tensor holds the units: which entries of its dimension `dim` belong to which unit.

    places: (N, w) int64: the w entries of each of N units, in ascending order
    size:   of the whole dimension; its other entries belong to no unit of the group
    """

    dim: int
    places: Tensor
    size: int

    @classmethod
    def regular(cls, dim: int, units: int, outer: int = 1, inner: int = 1) -> Slice:
        """The whole dimension, of size outer * units * inner."""
        size = outer * units * inner
        places = torch.arange(size).view(outer, units, inner)
        return cls(dim, places.transpose(0, 1).reshape(units, outer * inner), size)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Slice)
            and (self.dim, self.size) == (other.dim, other.size)
            and torch.equal(self.places, other.places)
        )

    def __hash__(self) -> int:
        return hash((self.dim, self.size, self.places.shape))

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.places)

    @property
    def width(self) -> int:
        """The number of entries of one unit along `dim`."""
        return self.places.shape[1]

    @property
    def neighbours(self) -> int:
        """How many neighbouring entries a unit has, as a head has in a projection; 1: none."""
        together = (self.places[0].diff() != 1).nonzero()
        return 1 + int(together[0]) if len(together) else self.width

    def entries(self, kept: Tensor) -> Tensor:
        """The entries of the units `kept`, (K,) int64, in their order along `dim`: (K * w,)."""
        return self.places[kept.cpu()].flatten().sort().values

    def rest(self) -> Tensor:
        """The entries that belong to no unit of the group: (R,) int64."""
        return self.stays(torch.arange(0)).nonzero().flatten()

    def without(self, kept: Tensor) -> Tensor:
        """The entries of the whole dimension but those of the units that are not `kept`."""
        return self.stays(kept).nonzero().flatten()

    def without_units(self, kept: Tensor) -> Tensor:
        """The entries of the units that are not `kept`: the ones that go."""
        return (~self.stays(kept)).nonzero().flatten()

    def stays(self, kept: Tensor) -> Tensor:
        """Which entries of the whole dimension are not of a unit that goes: (size,) bool."""
        stays = torch.ones(self.size, dtype=torch.bool)
        stays[self.places.flatten()] = False
        stays[self.entries(kept)] = True
        return stays
