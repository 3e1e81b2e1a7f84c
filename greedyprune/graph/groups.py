"""A group: units that are removed together, and all that removing them needs to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .slices import Entries, Slice
from .windows import Window

# Dimensions inside attention's heads, in the names of their groups: "attn.qkv[query-key]".
QUERY_KEY, VALUE = "[query-key]", "[value]"


@dataclass(frozen=True)
class Scores:
    """A product of queries and keys that sums over the dimensions of heads.

    places: (N, w) int64, the dimensions that belong to each unit where heads are not yet matched
    heads:  which of the group's heads each head of the product is: int64, of a shape that is
            broadcast to that of the product without its last two dimensions
    """

    places: Tensor
    heads: Tensor


@dataclass(frozen=True)
class Group:
    """Units that are removed together.

    producers:     the layers and embeddings whose outputs are the units, in the order they run in
    consumers:     the layers that sum over the units
    units:         how many there are
    slices:        the parameters and buffers with entries of the units, and where; for a consumer
                   where the units are its inputs
    also:          those of them that hold the units along a second dimension, and where: the
                   weights of layers that both read and write a stream
    output:        the only consumer's output is the model's output
    not_output:    the operation between the consumer and the model's output; "" if there is none
    may_hold_size: operations whose arguments may hold the number of units as a constant
    sizes:         attributes that these may come from, as "module.attribute" or with "[i]", and
                   which of the entries that they count are of which unit. Cutting sets them where
                   the group can't be cut otherwise (surgery/trials.py)
    products:      the matrix products of each unit by itself (attention's), and the FLOPs of all
    windows:       how the consumers that are convolutions go over their inputs; those that are not
                   listed run as torch's own modules do
    flops:         the FLOPs of the layers that do not run as a call of their module, by weight
    repeated:      a consumer runs several times in one forward pass
    inner:         consumers whose inputs a hook on their module does not see (calls.py)
    mixed:         those of them whose derivatives it does not see either
    stream:        the units are sums of several layers' outputs, as along a residual connection
    tied:          weights that take the units and stay: tables of embeddings that linear maps have,
                   too, the `weight_hh` of recurrent layers, and all parameters of query-key units.
                   The error of such a map does not count. Zeros mask units in it
    norms:         norms and convolutions over the units: without some, the others change
    share:         the groups, with this one, that the code needs in one share of their units
    part:          "" or, of dimensions inside attention's heads, QUERY_KEY or VALUE
    heads:         of how many heads a unit inside heads has a dimension. Which dimensions of the
                   heads make a unit is free (`matched`): the entries of each unit in a Slice are
                   those of the first head, then those of the second, and so on
    scores:        the products that sum over query-key units, by the names of their nodes. No layer
                   takes these units: they have no consumers
    rescaled:      parameters that cutting multiplies, because the code divides the scores by the
                   root of the number of units; () if it does not
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    units: int
    slices: Mapping[str, Slice]
    output: bool
    not_output: str = ""
    may_hold_size: tuple[str, ...] = ()
    sizes: Mapping[str, Slice] = field(default_factory=dict)
    also: Mapping[str, Slice] = field(default_factory=dict)
    products: Mapping[str, int] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)
    repeated: bool = False
    inner: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    stream: bool = False
    norms: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    share: tuple[str, ...] = ()
    part: str = ""
    heads: int = 1
    scores: Mapping[str, Scores] = field(default_factory=dict)
    rescaled: tuple[str, ...] = ()

    def times(self, factor: Fraction) -> Group:
        """The group with the FLOPs of this many times the samples."""
        products = {name: int(amount * factor) for name, amount in self.products.items()}
        flops = {name: int(amount * factor) for name, amount in self.flops.items()}
        return replace(self, products=products, flops=flops)

    @property
    def left_out(self) -> str:
        """Why the group is only selected where it is asked for; "": it always is."""
        if self.part:
            return "it is a size of attention's heads, which its name selects"
        if self.share:
            others = [repr(name) for name in self.share if name != self.producer]
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            what = f"it has to keep one share of its units with {others[0]}{more}; "
            return f"{what}layers='all' or a list of all their names selects them"
        over = "convolution" if ".conv" in "".join(self.norms[:1]) else "norm"
        what = f"a {over} goes over its units ({self.norms[0]})" if self.norms else ""
        if self.stream:
            what = "it gives a residual stream"
        return f"{what}, which its name or layers='all' selects" if what else ""

    @property
    def producer(self) -> str:
        """The first producer, by which the group is known; inside heads, with the part of these."""
        return self.producers[0] + self.part

    def matched(self, order: Tensor) -> Group:
        """The group with other dimensions of the heads in one unit.

        order: (heads, N) int64: which of its dimensions each head has in each unit, by the units
               that these are in now
        """
        slices, also = (
            {name: _matched(at, order) for name, at in places.items()}
            for places in (self.slices, self.also)
        )
        return replace(self, slices=slices, also=also)

    def rolled(self, by: int) -> Group:
        """The group with each head's dimensions moved `by` further than the ones before."""
        units = torch.arange(self.units)
        return self.matched(torch.stack([units.roll(by * head) for head in range(self.heads)]))

    @property
    def takers(self) -> str:
        """What takes the units, for messages."""
        return repr(self.consumers[0]) if self.consumers else "the attention scores"

    @property
    def consumer(self) -> str:
        """The first consumer."""
        return self.consumers[0]

    @property
    def without_units(self) -> Entries:
        """What is left of each tensor where all units go."""
        return {(name, at.dim): at.rest() for name, at in self.places}

    @property
    def cut(self) -> dict[str, Any]:
        """What cutting needs to know, by the names of LayerSelection's attributes."""
        places = {"slices": self.slices, "also": self.also, "sizes": self.sizes}
        others = {
            "tied": self.tied, "share": self.share, "part": self.part, "rescaled": self.rescaled
        }  # fmt: skip
        return {name: dict(value) for name, value in places.items()} | others

    @property
    def places(self) -> list[tuple[str, Slice]]:
        """Every tensor with entries of the units, and where; some tensors twice."""
        return [*self.slices.items(), *self.also.items()]


def _matched(at: Slice, order: Tensor) -> Slice:
    heads, units = order.shape
    of_heads = at.places.view(units, heads, -1)
    places = torch.stack([of_heads[order[head], head] for head in range(heads)], 1)
    return Slice(at.dim, places.flatten(1), at.size)
