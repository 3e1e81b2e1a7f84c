"""Query-key dimensions: units inside attention's heads, judged by the attention scores.

The scores of a head are q k^T, a sum over its dimensions. A unit i contributes q_i k_i^T, where q_i
and k_i are a dimension's entries for all tokens. With phi_i = N q_i k_i^T this is eq. (2): the loss
is the squared error of the scores, over all pairs of tokens, samples and heads, as a share of their
squares; of units of several attentions, the mean of the shares. The products of the contributions
need no scores:

    <q_i k_i^T, q_j k_j^T> = <q_i, q_j> <k_i, k_j>

Pairs that a causal mask hides count, too. No layer takes the units, so there are no weights to
solve for: the kept units stay as they are. The dense network gives queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.padding import Padding
from ..graph.executors import GraphExecutors
from ..graph.groups import Group, Scores
from ..graph.networks import tensors_of
from ..graph.queries import Given, visit_queries
from ..runtime.resume import Pass
from ..surgery.layer_selection import LayerSelection
from .job import Job
from .layer_products import LayerProducts
from .products import Products
from .quadratic import select_from, select_in_turns

BLOCK = 2**24  # entries of the products of queries, or of keys, that are held at a time


class ScoreProducts(Products):
    """The products of the units' contributions to one product of queries and keys.

    A unit has a feature of each of the group's heads. Products of different heads are 0.

    name: of the product's node in the graph
    """

    def __init__(self, group: Group, name: str, scores: Scores, device: torch.device) -> None:
        ones = torch.ones(1, group.units * group.heads, dtype=torch.float64)
        super().__init__(name, group.units, ones, device)
        self.layer, self._scores = group.producer, scores

    def add_scores(self, of_queries: Given, of_keys: Given, padding: Padding) -> None:
        """Adds one batch: queries (..., T, d) and keys (..., S, d); ValueError for NaN or inf."""
        query, key = (
            _without_padding(given, padding, self._scores.heads) for given in (of_queries, of_keys)
        )
        if not (query.isfinite().all() and key.isfinite().all()):
            raise ValueError(
                f"layer {self.layer!r}: NaN or inf in its activations on the data, expected finite "
                "numbers"
            )
        shape = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        units, width = self._scores.places.shape
        places = self._scores.places.flatten().to(query.device)
        query, key = (
            each[..., places].expand(*shape, -1, -1).reshape(-1, each.shape[-2], len(places))
            for each in (query, key)
        )
        head_of = _expanded(self._scores.heads, shape).to(query.device)
        gram = self.sums[0].gram.view(units, -1, units, self.width)
        of_heads = gram.diagonal(dim1=1, dim2=3)  # (units, units, heads)
        at_once = max(1, BLOCK // len(places) ** 2)
        for queries, keys, heads in zip(
            *(each.split(at_once) for each in (query, key, head_of)), strict=True
        ):
            queries, keys = queries.double(), keys.double()
            products = (queries.mT @ queries) * (keys.mT @ keys)
            products = products.view(-1, units, width, units, width).sum((2, 4))
            of_heads.index_add_(2, heads, products.permute(1, 2, 0))
        self.sums[0].positions += len(query) * query.shape[-2] * key.shape[-2]


def _expanded(heads: Tensor, shape: Sequence[int]) -> Tensor:
    """The head of each product, flat. A dimension may hold the heads of more or fewer samples."""
    for dim, size in enumerate(shape):
        if heads.shape[dim] not in (1, size):
            times = [1] * heads.dim()
            times[dim] = -(-size // heads.shape[dim])
            heads = heads.repeat(times).narrow(dim, 0, size)
    return heads.expand(*shape).flatten()


def select_layers(job: Job, groups: Sequence[Group]) -> dict[str, LayerSelection]:
    """Selects query-key units of all groups from one pass through the dense network."""

    def products_of(turn: Sequence[Group]) -> dict[str, LayerProducts]:
        return collect(job, turn)

    def select_layer(job: Job, group: Group, products: LayerProducts) -> LayerSelection:
        return select_from(job, products, swaps=0, damping=0.0)

    return select_in_turns(job, [groups], products_of, select_layer)


def collect(job: Job, groups: Sequence[Group], purpose: str = "") -> dict[str, LayerProducts]:
    """The products of every group by the name of its layer, each on the rank that owns it.

    purpose: tells a checkpoint these sums from others of the same layers
    """
    ranks, device = job.batches.ranks, next(job.model.parameters()).device
    every = [
        LayerProducts(
            group,
            [ScoreProducts(group, name, scores, device) for name, scores in group.scores.items()],
            {},
        )
        for group in groups
    ]
    sums = {each.name: each for products in every for each in products.consumers}
    resumed = Pass(job.checkpoint, purpose + " ".join(group.producer for group in groups))
    resumed.hold(*sums.values())
    executors, tensors = GraphExecutors(job.model), tensors_of(job.model)
    for batch in resumed.new(job.bar(job.batches, "attention scores")):

        def add(name: str, query: Given, key: Given, padding: Padding = batch.padding) -> None:
            products = sums[name]
            assert isinstance(products, ScoreProducts)
            products.add_scores(query, key, padding)

        visit_queries(executors.of(batch), batch, tensors, sums, add)
    collected = dict[str, LayerProducts]()
    for i, products in enumerate(every):
        owner = ranks.owner(i)
        for each in products.consumers:
            each.finish(ranks, owner)
        if owner == ranks.rank:
            collected[products.group.producer] = products
    return collected


def _without_padding(given: Given, padding: Padding, heads: Tensor) -> Tensor:
    """Queries or keys (..., T, d) with zeros for tokens that the mask of their layers hides.

    A dimension of its own holds the samples, or they are in one dimension with the heads.

    heads: as in `Scores`
    """
    tensor, decoders = given.tensor, padding.decoder_layers or frozenset()
    mask = padding.decoder_mask if given.layers & decoders else padding.mask
    if mask is None or mask.shape[1] != tensor.shape[-2]:
        return tensor
    samples, shape = len(mask), [1] * tensor.dim()
    shape[-2] = tensor.shape[-2]
    alone = [dim for dim, size in enumerate(heads.shape) if size == 1]
    dims = [dim for dim in alone if tensor.shape[dim] == samples]
    if dims:
        shape[dims[0]] = samples
    elif len(tensor) % samples == 0 and heads.dim() == 1:
        times, shape[0] = len(tensor) // samples, len(tensor)
        of_one_head = len(heads) > 1 and bool(heads[0] == heads[1])  # samples after each other
        mask = mask.repeat(times, 1) if of_one_head else mask.repeat_interleave(times, 0)
    else:
        return tensor
    return tensor.masked_fill(~mask.view(shape), 0)
