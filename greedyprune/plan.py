"""Which layer is selected by which objective, in which order, and with which sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from .data.batches import Batch, Batches
from .graph.costs import Cost
from .graph.groups import Group
from .graph.names import module_of_layer, slice_of, weight_of
from .graph.slices import Slice
from .graph.unfold import consumer_window, outputs_of
from .kernels.path import Rule
from .objectives import (
    fisher,
    imitation,
    memory,
    network_loss,
    output_loss,
    output_metric,
    scores,
)
from .objectives.job import Job
from .objectives.layer_products import LayerProducts, collect
from .objectives.memory import WIDEST
from .objectives.quadratic import select_from
from .request import Request
from .runtime.progress import warn
from .size_trials import SizeTrials, held_out_of
from .sizes.budget import Budget, BudgetReport
from .sizes.curves import Curves
from .sizes.kinds import Kinds, KindSizes
from .sizes.knapsack import Numbers
from .sizing import relative_losses, sums_of, within_budget
from .surgery.cut import masked
from .surgery.layer_selection import LayerSelection
from .surgery.selection import MOST_NAMES, Selection

# How a layer is judged:
OUTPUT_LOSS = "output loss"  # by the model's loss; its consumer gives the model's output
NETWORK_LOSS = "network loss"  # by the model's loss, through the layers that follow
IMITATION = "imitation"  # by its consumers' dense outputs, from products of its features
COLUMNS = "imitation by columns"  # the same, from columns of the Gram matrix
FISHER = "fisher"  # by the loss in its gates
SCORES = "attention scores"  # by the scores that its query-key units add up to


def judge_of(request: Request, group: Group) -> str:
    """How a layer is judged, before its memory is known."""
    if group.scores:
        return SCORES
    if request.objective == "fisher":
        return FISHER
    draws_by_gradient = request.loss.draw == "gradient"
    if request.objective != "imitation" and group.output:
        by_network = request.loss.metric is not None or draws_by_gradient
        return NETWORK_LOSS if by_network else OUTPUT_LOSS
    return NETWORK_LOSS if request.objective == "loss" else IMITATION


def rules_of(request: Request, groups: Sequence[Group]) -> dict[str, Rule]:
    """Each layer's rule, by its name; ValueError for sizes that a layer does not allow."""
    _check_tolerance(request, groups)
    sizes, by_loss = request.sizes_of(groups), (OUTPUT_LOSS, NETWORK_LOSS)
    return {
        group.producer: request.rule(
            group, sizes[group.producer], by_loss=judge_of(request, group) in by_loss
        )
        for group in groups
    }


def _check_tolerance(request: Request, groups: Sequence[Group]) -> None:
    """ValueError for a tolerance above 1 where it is a share of something."""
    tolerance = request.tolerance
    if tolerance is None or tolerance <= 1:
        return
    for group in groups:
        whole = "error without any unit"
        if judge_of(request, group) in (OUTPUT_LOSS, NETWORK_LOSS):
            if request.loss.metric is None:
                continue
            whole = "dense model's metric"
        raise ValueError(
            f"tolerance: found {tolerance:g}, expected at most 1: for layer {group.producer!r} it "
            f"is a share of the {whole}"
        )


def _warn_of_rounding(job: Job, request: Request, groups: Sequence[Group]) -> None:
    """Warns of layers that keep all their units because round_to does not fit into them."""
    if request.round_to == 1 or request.size is None:
        return
    exact = replace(request, round_to=1).sizes_alone(groups)
    whole = [
        repr(group.producer)
        for group in groups
        if exact[group.producer] < job.rules[group.producer].size == group.units
    ]
    if whole:
        warn(
            f"round_to: {request.round_to} leaves layers whole, because no smaller multiple is "
            f"nearer to their size: {', '.join(whole[:MOST_NAMES])}"
            + ", ..."
            * (len(whole) > MOST_NAMES)
        )


def plan(job: Job, request: Request, groups: Sequence[Group]) -> dict[str, str]:
    """How each layer is judged, by its name.

    Raises:
        ValueError: a layer that takes more memory than there is, data that give too few passes, or
            an option that none of the layers can use
    """
    _warn_of_rounding(job, request, groups)
    judges = {group.producer: judge_of(request, group) for group in groups}
    imitating = [group for group in groups if judges[group.producer] == IMITATION]
    held = memory.metric_bytes(job, imitating)
    for group in groups:
        judge = judges[group.producer]
        _check_derivatives(request, group, judge)
        if group.part and request.objective not in ("auto", "imitation"):
            raise ValueError(
                f"objective: found {request.objective!r} for {group.producer!r}, but dimensions "
                "inside heads are judged by imitation only; expected 'imitation'"
            )
        if judge == IMITATION and _fits_by_columns(job, group, len(imitating)):
            judges[group.producer] = COLUMNS
        elif judge == IMITATION:
            memory.check_imitation(job, group, held)
        elif judge == FISHER:
            memory.check_bytes(group, memory.gates_bytes(job, group), job.memory_limit)
        elif judge == NETWORK_LOSS and job.weights == "refit":
            memory.check_bytes(group, memory.refit_bytes(job, group), job.memory_limit)
        elif judge == OUTPUT_LOSS:
            units = memory.refitted_units(job, group, imitation=False)
            memory.check_least_squares(group.producer, units, job.memory_limit)
    _check_passes(job.batches, judges, request.budget)
    if request.imitation.swaps:
        _check_swaps(job, imitating, request.imitation.swaps)
    return judges


def _check_derivatives(request: Request, group: Group, judge: str) -> None:
    """ValueError where a hook does not see the derivatives in a consumer that are wanted."""
    by_metric = judge == IMITATION and request.imitation.metric == "fisher"
    if group.mixed and (judge == FISHER or by_metric):
        option = "objective: found 'fisher'" if judge == FISHER else "metric: found 'fisher'"
        raise ValueError(
            f"{option}, but {group.mixed[0]!r}, which takes the units of layer "
            f"{group.producer!r}, is no call of a module that does only its linear map; expected "
            "objective='imitation' without a metric, or other layers"
        )


def _fits_by_columns(job: Job, group: Group, imitating: int) -> bool:
    """Must, and may, a layer imitate by columns of its Gram matrix?

    It must where its products take more memory than there is. It may where columns give the same
    picks and losses: with the theory's weights, all errors alike, one consumer that takes one
    feature of each unit, and the dense network's inputs.
    """
    dense_inputs = not job.imitation.sequential or not job.traced or imitating < 2
    same = job.weights in ("counts", "uniform") and job.imitation.metric == "none" and dense_inputs
    too_large = memory.imitation_bytes(job, group).together > job.memory_limit
    return too_large and same and is_simple(job.model, group)


def is_simple(model: nn.Module, group: Group) -> bool:
    """Is each unit one feature, and are these all the inputs of one Linear, which runs once?"""
    if len(group.consumers) != 1 or group.repeated or group.inner:
        return False
    at = slice_of(group.slices, group.consumer)
    is_linear = isinstance(module_of_layer(model, group.consumer), nn.Linear)
    return is_linear and at == Slice.regular(1, group.units)


def _check_passes(batches: Batches, judges: Mapping[str, str], budget: Budget | None) -> None:
    why = ""
    if budget is not None:
        why = "a budget, which takes a pass for each layer"
    elif NETWORK_LOSS in judges.values():
        why = "objective='loss' inside a network, which takes a pass for each candidate"
    elif len(judges) > 1 and set(judges.values()) != {FISHER}:
        why = f"{len(judges)} layers, which take a pass each"
    if batches.once and why:
        raise ValueError(
            f"data: found an iterator for {why}; expected a list, Dataset or DataLoader"
        )


def _check_swaps(job: Job, groups: Sequence[Group], swaps: int) -> None:
    for group in groups:
        for name in group.consumers:
            weight = weight_of(job.model, name)
            width = weight.numel() // outputs_of(job.model, group, name) // group.units
            if group.producer in job.wide:
                raise ValueError(
                    f"swaps: found {swaps}, but {name!r} takes {width * group.units} features of "
                    f"layer {group.producer!r}, too many for exchanges; expected swaps=None, which "
                    "exchanges no such units"
                )
            if width > WIDEST:
                raise ValueError(
                    f"swaps: found {swaps}, but a unit of layer {group.producer!r} has {width} "
                    f"features in {name!r}; expected at most {WIDEST}, or swaps=None, which "
                    "exchanges no such units"
                )


def sizes_within(
    job: Job, request: Request, groups: Sequence[Group], costs: Mapping[str, Cost]
) -> tuple[dict[str, int], BudgetReport, Curves]:
    """The sizes for a budget, from whole paths of layers by themselves."""
    assert request.budget is not None
    budget, by_gates = request.budget, request.objective == "fisher"
    held, batches = list[Batch](), job.batches
    if budget.trials:
        held, batches = held_out_of(job.model, job.batches)
    whole = replace(request, size=1.0, budget=None, replacement=False, round_to=1)
    job = replace(
        job, batches=batches, tolerance=None, imitation=replace(job.imitation, swaps=0),
        rules={g.producer: whole.rule(g, g.units, by_loss=False) for g in groups},
    )  # fmt: skip
    turns = list[list[Group]]()
    for part in (
        [group for group in groups if group.scores], [group for group in groups if not group.scores]
    ):  # fmt: skip
        needed = [
            memory.gates_bytes(job, group, swaps=False) if by_gates
            else memory.imitation_bytes(job, group)
            for group in part
        ]  # fmt: skip
        for group, size in zip(part, needed, strict=True):  # however it is judged afterwards
            memory.check_bytes(group, size, job.memory_limit)
        turns += memory.turns(part, needed, job.memory_limit, once=job.batches.once)
    damping = job.fisher.damping if by_gates else job.imitation.damping
    kind = job.criterion.kind if by_gates else "mse"

    def products_of(turn: Sequence[Group]) -> dict[str, LayerProducts]:
        if by_gates:
            return fisher.gate_products(job, turn)
        purpose = "for a budget "
        if turn[0].scores:
            return scores.collect(job, turn, purpose)
        return collect(
            job.model, turn, job.batches, {}, job.bar, job.checkpoint, purpose, owned=True,
            halves=job.refits, exact=job.imitation.exact_losses, wide=job.wide,
        )  # fmt: skip

    def path_of(products: LayerProducts) -> LayerSelection:
        return select_from(job, products, swaps=0, damping=damping, loss=kind)

    def values(kinds: Kinds, sizes_of: KindSizes) -> list[Numbers]:
        losses = dict[str, Tensor]()
        trials = SizeTrials(job, budget, held, kinds, sizes_of) if held else None
        for turn in turns:
            products = products_of(turn)

            def path(
                name: str, products: dict[str, LayerProducts] = products
            ) -> tuple[Tensor, LayerSelection | None]:
                path = path_of(products[name])  # first: damping needs both halves' sums apart
                return relative_losses(products[name], path), path if trials else None

            for name, (of_layer, whole) in job.ranks.each([g.producer for g in turn], path).items():
                losses[name] = of_layer
                if trials and whole is not None:
                    trials.add(name, whole, of_layer)
        return trials.curves() if trials else sums_of(kinds, sizes_of, losses)

    def compute() -> tuple[dict[str, int], dict[str, Any], dict[str, Any]]:
        sizes, report, curves = within_budget(
            budget, job.model, groups, job.batches, costs, request.round_to, values
        )
        return sizes, asdict(report), curves.as_json()

    sizes, report, curves = job.checkpoint.value("sizes", compute)
    return sizes, BudgetReport(**report), Curves.of_json(curves)


def select_layers(
    job: Job, groups: Sequence[Group], judges: Mapping[str, str]
) -> dict[str, LayerSelection]:
    """Selects all layers: those inside the network first, those that give its output last."""
    by_judge = {
        judge: [group for group in groups if judges[group.producer] == judge]
        for judge in dict.fromkeys(judges.values())
    }
    selected: dict[str, LayerSelection] = {}
    for judge, select in _TOGETHER.items():
        if judge in by_judge:
            selected |= select(replace(job, before=selected), by_judge[judge])
    sequential = job.imitation.sequential and job.loss.sequential
    if sequential and by_judge.get(OUTPUT_LOSS) and selected:
        job = replace(job, model=masked(job.model, Selection(selected)))
    return selected | _one_by_one(job, by_judge.get(OUTPUT_LOSS, []))


def _imitation(job: Job, groups: Sequence[Group]) -> dict[str, LayerSelection]:
    roots: dict[str, Tensor] = {}
    if job.imitation.metric == "fisher":
        names = [(group, name) for group in groups for name in group.consumers]
        outputs = {name: outputs_of(job.model, group, name) for group, name in names}
        windows = {name: consumer_window(job.model, group, name) for group, name in names}
        roots = output_metric.roots(job, outputs, windows)
    return imitation.select_layers(job, groups, roots)


def _one_by_one(
    job: Job, groups: Sequence[Group], *, imitation: bool = False
) -> dict[str, LayerSelection]:
    """Layers from their features; imitation: by their consumers' dense outputs."""
    selected = {}
    for group in groups:
        layer = job.checkpoint.finished(group.producer)
        layer = layer or output_loss.select_layer(job, group, imitation=imitation)
        selected[group.producer] = job.checkpoint.finish(group.producer, layer)
    return selected


_TOGETHER: Mapping[str, Callable[[Job, Sequence[Group]], dict[str, LayerSelection]]] = {
    SCORES: scores.select_layers,
    FISHER: fisher.select_layers,
    IMITATION: _imitation,
    COLUMNS: partial(_one_by_one, imitation=True),
    NETWORK_LOSS: network_loss.select_layers,
}
