"""The ways to select the layers of a model, each with what it needs, as memory and data allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from .budget import step_of, within_budget
from .data.batches import Batches, joined
from .data.losses import Criterion
from .graph.costs import BudgetReport, Cost
from .graph.groups import Group
from .graph.replay import Replay
from .graph.unfold import outputs_of
from .kernels.path import Rule
from .objectives import fisher, memory, paths
from .objectives.features import LayerData
from .objectives.imitation import Roots, Sums, collect, replayed
from .objectives.memory import (
    Bytes,
    check_fits,
    check_least_squares,
    least_squares,
    needed_by,
    turns,
)
from .objectives.network_loss import Network
from .objectives.options import Settings
from .runtime.checkpoint import Checkpoint, Steps
from .runtime.distributed import Ranks
from .surgery.cut import masked, masked_weight
from .surgery.selection import LayerSelection, Selection


class Task(NamedTuple):
    """What selecting any layer takes beside the model."""

    batches: Batches
    criterion: Criterion
    rules: Mapping[str, Rule]
    chosen: Settings
    backend: str
    bar: Callable[..., Any]
    checkpoint: Checkpoint

    @property
    def ranks(self) -> Ranks:
        return self.batches.ranks if self.batches.ranks.size > 1 else self.batches.peers

    def from_sums(self, sums: Sums) -> LayerSelection:
        rule, loss = self.rules[sums.group.producer], self.criterion.kind
        return paths.from_sums(sums, rule, self.chosen, self.backend, self.bar, loss)

    def needed(self, model: nn.Module, groups: Sequence[Group]) -> dict[str, Bytes]:
        rules, chosen = self.rules, self.chosen
        return {g.producer: needed_by(model, g, rules[g.producer], chosen) for g in groups}

    def turns(self, model: nn.Module, groups: Sequence[Group], held: int = 0) -> list[list[Group]]:
        """The groups whose sums fit in memory together; held: bytes that something else takes."""
        found = turns(groups, self.needed(model, groups), self.chosen.memory_limit - held)
        if len(found) > 1 and self.batches.once:
            together = sum(each.together for each in self.needed(model, groups).values())
            raise ValueError(
                f"memory_limit: found {self.chosen.memory_limit} bytes, but all {len(groups)} "
                f"layers from one pass over an iterator need up to {together}; expected that, or a "
                "list, Dataset or DataLoader"
            )
        return found

    def each(
        self, ranks: Ranks, turns: Sequence[Sequence[Group]],
        sums_of: Callable[[Sequence[Group]], dict[str, Sums]],
    ) -> dict[str, LayerSelection]:  # fmt: skip
        """Layers that do not wait for one another, shared out to the ranks."""
        selected: dict[str, LayerSelection] = {}
        known = self.checkpoint.finished
        for some in turns:
            names = [group.producer for group in some]
            unknown = any(known(name) is None for name in names)
            sums = sums_of(some) if unknown else {}

            def layer(name: str, sums: Mapping[str, Sums] = sums) -> LayerSelection:
                return known(name) or self.from_sums(sums[name])

            selected |= ranks.each(names, layer, self.checkpoint.finish)
            sums.clear()  # before the next turn's
        return selected


def way_of(model: nn.Module, group: Group, chosen: Settings) -> str:
    """What a layer is judged by: the model's "output", features or sums to imitate, ...

    "output":   the model's loss, from the units' features
    "network":  the model's loss, through the layers that follow
    "features", "sums": its consumers' dense output, from the units' features or sums over products
    "fisher":   gates
    """
    if chosen.objective == "fisher":
        return "fisher"
    if chosen.objective != "imitation" and group.output and chosen.own_metric is None:
        return "output"
    if chosen.objective == "loss":
        return "network"
    simple = is_simple(model, group)
    if chosen.batch_size is not None:
        if not simple:
            raise ValueError(
                f"batch_size: layer {group.producer!r} imitates its dense output from sums over "
                "all samples, expected no batch_size"
            )
        return "features"
    needed = needed_by(model, group, rule_of(group, chosen), chosen).together
    if simple and chosen.metric == "none" and needed > chosen.memory_limit:
        return "features"
    return "sums"


def rule_of(group: Group, chosen: Settings) -> Rule:
    return chosen.rule(group.producer, group.units, step_of(group, chosen.round_to))


def is_simple(model: nn.Module, group: Group) -> bool:
    """Does each unit have one feature, that one Linear takes?"""
    consumer = model.get_submodule(group.consumer)
    at = group.slices[f"{group.consumer}.weight"]
    return len(group.consumers) == 1 and type(consumer) is nn.Linear and at.width == 1


def check_memory(
    model: nn.Module, groups: Sequence[Group], ways: Mapping[str, str], chosen: Settings
) -> None:
    """ValueError where a layer takes more than there is."""
    held = memory.of_metrics(model, [g for g in groups if ways[g.producer] == "sums"], chosen)
    for group in groups:
        way, rule = ways[group.producer], rule_of(group, chosen)
        if way in ("sums", "fisher") or (way == "network" and chosen.weights == "refit"):
            check_fits(model, group, rule, chosen, held)
        elif way in ("output", "features"):
            fitted = _fitted(group, rule, chosen, way == "output")
            check_least_squares(group.producer, fitted, chosen.memory_limit)


def _fitted(group: Group, rule: Rule, chosen: Settings, own: bool) -> int:
    """How many units get least squares after all picks; own: by the model's loss?"""
    refit = chosen.weights == "refit" or (chosen.weights == "auto" and not own)
    known = refit and chosen.tolerance is None
    return rule.most(group.units) if known else 0


def check_passes(batches: Batches, ways: Mapping[str, str], chosen: Settings) -> None:
    why = ""
    if chosen.budget is not None:
        why = "a budget, which takes a pass for each layer"
    elif "network" in ways.values():
        why = "objective='loss' inside a network, which takes a pass for each candidate"
    elif len(ways) > 1 and set(ways.values()) != {"fisher"}:
        why = f"{len(ways)} layers, which takes a pass for each layer"
    if batches.once and why:
        raise ValueError(
            f"data: found an iterator for {why}; expected a list, Dataset or DataLoader"
        )


def sizes_within(
    model: nn.Module, groups: Sequence[Group], costs: Mapping[str, Cost], task: Task
) -> tuple[dict[str, int], BudgetReport]:
    """The sizes for a budget, from whole paths of layers by themselves."""
    chosen = replace(task.chosen, size=1.0, tolerance=None, replacement=False, swaps=0, round_to=1)
    if chosen.objective != "fisher":
        chosen = replace(chosen, objective="imitation")
    rules = {g.producer: chosen.rule(g.producer, g.units) for g in groups}
    for group in groups:  # however it is judged afterwards
        check_fits(model, group, rules[group.producer], chosen)
    whole = task._replace(chosen=chosen, rules=rules)
    batches = task.batches.dealt()

    def sums_of(some: Sequence[Group]) -> dict[str, Sums]:
        if chosen.objective == "fisher":
            return fisher.gates(model, some, batches, task.criterion, task.bar, task.checkpoint)
        return collect(
            model, some, batches, {}, task.bar, task.checkpoint, "for a budget ", owned=True
        )

    def found() -> tuple[dict[str, int], dict[str, Any]]:
        sizes, spent = within_budget(
            model, groups, batches, task.chosen, costs, whole.turns(model, groups), sums_of,
            whole.from_sums,
        )  # fmt: skip
        return sizes, asdict(spent)

    sizes, spent = task.checkpoint.number("sizes", found)
    return sizes, BudgetReport(**spent)


def selected_by(
    model: nn.Module, groups: Sequence[Group], ways: Mapping[str, str], task: Task
) -> dict[str, LayerSelection]:
    selected: dict[str, LayerSelection] = {}
    for way, select_from in _TOGETHER.items():
        some = [group for group in groups if ways[group.producer] == way]
        if some:
            selected |= select_from(model, some, task)
    if task.chosen.sequential and 0 < len(selected) < len(groups):
        model = masked(model, Selection(selected))
    for group in groups:
        if group.producer not in selected:
            own = ways[group.producer] == "output"
            layer = task.checkpoint.finished(group.producer)
            layer = layer or _from_features(model, group, own, task)
            selected[group.producer] = task.checkpoint.finish(group.producer, layer)
    return selected


def _from_features(model: nn.Module, group: Group, own: bool, task: Task) -> LayerSelection:
    rule, chosen = task.rules[group.producer], task.chosen
    left = chosen.memory_limit - least_squares(_fitted(group, rule, chosen, own))
    chosen = replace(chosen, memory_limit=max(1, left))
    data = LayerData(
        model, group, task.batches, task.criterion if own else Criterion("mse"),
        imitation=not own, backend=task.backend, memory_limit=chosen.memory_limit,
        progress=task.bar, checkpoint=task.checkpoint,
    )  # fmt: skip
    try:
        steps = Steps(task.checkpoint, group.producer)
        return paths.from_features(data, rule, chosen, task.backend, task.bar, steps)
    finally:
        data.close()


def _from_gates(model: nn.Module, groups: Sequence[Group], task: Task) -> dict[str, LayerSelection]:
    batches = task.batches.dealt()

    def sums_of(some: Sequence[Group]) -> dict[str, Sums]:
        return fisher.gates(model, some, batches, task.criterion, task.bar, task.checkpoint)

    return task.each(batches.ranks, task.turns(model, groups), sums_of)


def _from_sums(model: nn.Module, groups: Sequence[Group], task: Task) -> dict[str, LayerSelection]:
    """The layers that imitate, in the order of the graph or all from one pass."""
    batches, chosen, bar, checkpoint = (
        task.batches.dealt(), task.chosen, task.bar, task.checkpoint
    )  # fmt: skip
    ranks, roots = batches.ranks, _roots(model, groups, task._replace(batches=batches))
    task = task._replace(criterion=Criterion("mse"))
    metrics = memory.of_metrics(model, groups, chosen)
    if not chosen.sequential or chosen.consumers is not None or len(groups) < 2:

        def sums_of(some: Sequence[Group]) -> dict[str, Sums]:
            return collect(model, some, batches, roots, bar, checkpoint, owned=True)

        return task.each(ranks, task.turns(model, groups, metrics), sums_of)
    most = max(each.together for each in task.needed(model, groups).values())
    replay = Replay(model, batches, chosen.memory_limit - metrics - most)
    order = replay.order([name for group in groups for name in group.consumers])
    selected = {}
    for group in sorted(groups, key=lambda group: min(order[name] for name in group.consumers)):
        layer = checkpoint.finished(group.producer)
        if layer is None:
            found = replayed(model, group, replay, roots, bar, checkpoint)
            layer = ranks.on_first(group.producer, partial(task.from_sums, found))
        selected[group.producer] = checkpoint.finish(group.producer, layer)
        for name in sorted(group.consumers, key=order.__getitem__):
            weight = model.get_parameter(f"{name}.weight")
            replay.change(name, weight=masked_weight(weight, layer, name))
    return selected


def _roots(model: nn.Module, groups: Sequence[Group], task: Task) -> Roots:
    if task.chosen.metric == "none":
        return {}
    if task.criterion.kind == "custom":
        raise ValueError(
            "metric: found 'fisher' with a loss of your own, expected 'mse', "
            "'cross_entropy' or 'bce_with_logits', which say what the model predicts"
        )
    outputs = {name: outputs_of(model, g, name) for g in groups for name in g.consumers}
    kind, seed = task.criterion.kind, task.chosen.seed
    return fisher.roots(model, outputs, task.batches, kind, seed, task.bar)


def _from_network(
    model: nn.Module, groups: Sequence[Group], task: Task
) -> dict[str, LayerSelection]:
    """By the whole network's loss, in the order of the graph; reference: in float64."""
    batches, chosen = task.batches, task.chosen
    refitted = 0
    if chosen.weights == "refit":
        refitted = max(each.together for each in task.needed(model, groups).values())
    network = Network(
        model, batches, task.criterion, chosen.memory_limit - refitted, task.bar,
        traced=chosen.consumers is None,
    )  # fmt: skip
    if task.backend == "reference":
        exact = network.exact()
        if exact is None:
            raise ValueError(
                "backend: found 'reference', which runs the network in float64, expected another: "
                "the model can't run in float64"
            )
        network, model = exact, exact.model
        batches = batches.of(model)
    samples = None if chosen.batch_size is None else joined(batches)
    selected: dict[str, LayerSelection] = {}
    for group in sorted(groups, key=lambda group: network.first_of(group.consumers)[0]):
        sums, name, kept = None, group.producer, task.checkpoint
        layer = kept.finished(name)
        if layer is None and chosen.weights == "refit":
            now = masked(model, Selection(selected if chosen.sequential else {}))
            found = collect(now, [group], batches, {}, task.bar)
            sums = found[name]
        if layer is None:
            layer = paths.from_network(
                network, group, task.rules[name], chosen, samples, sums, task.bar, Steps(kept, name)
            )
        selected[name] = kept.finish(name, layer)
        if chosen.sequential:
            network.change(network.weights_of(layer))
    return selected


_TOGETHER = {"fisher": _from_gates, "sums": _from_sums, "network": _from_network}
