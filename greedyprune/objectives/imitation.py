"""Imitation: a layer's units are judged by the dense outputs of the layers that take them.

In a network pruned layer by layer, a consumer's inputs come from the network pruned so far, and its
targets from the dense network (graph/replay.py). A consumer that runs several times in a forward
pass, with the same weights, gets the inputs and targets of all its uses from the dense network.
Without sequential, one pass through the dense network serves all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ..data.positions import Draws
from ..graph.groups import QUERY_KEY, Group
from ..graph.names import weight_name
from ..graph.replay import BothInputs, Replay
from ..runtime.resume import Pass
from ..surgery.cut import masked_weight, without_query_keys
from ..surgery.layer_selection import LayerSelection
from ..surgery.remaining import entries_left
from .job import Job
from .layer_products import LayerProducts, Roots, collect
from .memory import imitation_bytes, metric_bytes, turns
from .options import MOST_SWAPS
from .quadratic import select_from, select_in_turns


def select_layer(job: Job, group: Group, products: LayerProducts) -> LayerSelection:
    """Selects a layer's units by the squared error to its consumers' dense outputs."""
    swaps = MOST_SWAPS if job.imitation.swaps is None else job.imitation.swaps
    return select_from(
        job, products, swaps=0 if job.tolerance is not None else swaps,
        damping=job.imitation.damping,
    )  # fmt: skip


def select_layers(job: Job, groups: Sequence[Group], roots: Roots) -> dict[str, LayerSelection]:
    """Selects layers one after the other, or all from one pass through the dense network.

    roots: of the consumers' metrics, by name; none for metric="none"
    """
    if job.imitation.sequential and job.traced and (len(groups) > 1 or job.before):
        return _in_sequence(job, groups, roots)
    return _from_one_pass(job, groups, roots)


def _from_one_pass(job: Job, groups: Sequence[Group], roots: Roots) -> dict[str, LayerSelection]:
    """Layers from the dense network, shared out to the ranks; each turn takes a pass."""
    limit = job.memory_limit - metric_bytes(job, groups)
    needed = [imitation_bytes(job, group) for group in groups]

    def products_of(turn: Sequence[Group]) -> dict[str, LayerProducts]:
        return collect(
            job.model, turn, job.batches, roots, job.bar, job.checkpoint, owned=True,
            halves=job.refits, exact=job.imitation.exact_losses, wide=job.wide,
        )  # fmt: skip

    in_memory = turns(groups, needed, limit, once=job.batches.once)
    return select_in_turns(job, in_memory, products_of, select_layer)


def _in_sequence(job: Job, groups: Sequence[Group], roots: Roots) -> dict[str, LayerSelection]:
    """Layers in the order of the graph, each in the network pruned so far."""
    largest = max(imitation_bytes(job, group).together for group in groups)
    limit = job.memory_limit - metric_bytes(job, groups) - largest
    replay = Replay(job.model, job.batches, limit)
    place = replay.order([name for group in groups for name in group.consumers])
    selected = dict[str, LayerSelection]()
    before = [*job.before.values()]
    tied = [name for layer in before if layer.part == QUERY_KEY for name in layer.tied]
    if tied:
        parameters = {name: job.model.get_parameter(name) for name in tied}
        replay.change_all({n: without_query_keys(p, n, before) for n, p in parameters.items()})
    for group in sorted(groups, key=replay.start_of):
        layer = job.checkpoint.finished(group.producer)
        if layer is None:
            if group.repeated:  # from the dense network, since its uses are many places in it
                products = collect(
                    job.model, [group], job.batches, roots, job.bar, job.checkpoint,
                    halves=job.refits, exact=job.imitation.exact_losses, wide=job.wide,
                )[group.producer]  # fmt: skip
            else:
                products = _replayed(job, group, replay, roots)
            layer = job.ranks.on_first(group.producer, partial(select_layer, job, group, products))
        selected[group.producer] = job.checkpoint.finish(group.producer, layer)
        replay.keep_only(entries_left([*before, *selected.values()]))
        for name in sorted(group.consumers, key=place.__getitem__):
            weight = masked_weight(replay.weight(name), layer, name)
            tensor = weight_name(job.model, name)
            replay.change(name, {tensor: without_query_keys(weight, tensor, before)})
    return selected


def _replayed(job: Job, group: Group, replay: Replay, roots: Roots) -> LayerProducts:
    """One group's products: inputs from the network pruned so far, targets from the dense one."""
    weights = {name: replay.weight(name) for name in group.consumers}
    products = LayerProducts.of_consumers(
        job.model, group, roots, given=True, halves=job.refits, weights=weights,
        samples=0 if job.imitation.exact_losses else job.batches.samples,
        wide=group.producer in job.wide,
    )  # fmt: skip
    by_name = {consumer.name: consumer for consumer in products.consumers}
    resumed = Pass(job.checkpoint, group.producer)
    resumed.hold(*products.consumers)

    def add(name: str, inputs: BothInputs, draws: Draws, mask: Tensor | None) -> None:
        by_name[name].add(inputs.pruned, draws, mask, inputs)

    replay.visit(group.consumers, add, job.bar, resumed, group.without_units)
    for consumer in products.consumers:
        consumer.finish(replay.ranks)
    return products
