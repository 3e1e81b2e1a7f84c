"""`select`: model and data -> features -> objective -> kernel -> Selection."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import _backend, fisher, settings
from .budget import check_uniform, kinds_of, step_of, within_budget
from .costs import costs_of, counted
from .data import Batch, Batches
from .evaluation import bars, evaluating
from .features import LayerData, main_output, run_model, target_of
from .graph import Group
from .imitation import Roots, Sums, bytes_of, collect, losses_of, replayed
from .losses import Criterion, bound, criterion_of
from .objectives import CustomObjective, Solver
from .reference import Path, Rule, Step
from .replay import Replay
from .reweight import distinct_counts, first_picks, losses_along, refit
from .selection import LayerSelection, Selection
from .settings import REPEATS_LIMIT, Settings
from .surgery import masked, masked_weight
from .trial import groups_of


def select(
    model: nn.Module,
    data: object,
    *,
    layers: str | Sequence[str] | Mapping[str, str] | None = None,
    size: int | float | Mapping[str, int | float] | None = None,
    steps: int | None = None,
    tolerance: float | None = None,
    loss: str | nn.Module | Callable[[Tensor, Tensor], Tensor] = "auto",
    objective: str = "auto",
    weights: str = "auto",
    replacement: bool | None = None,
    candidates: int | None = None,
    batch_size: int | None = None,
    shortlist: int | None = None,
    backend: str = "auto",
    seed: int = 0,
    progress: bool | None = None,
    memory_limit: int | None = None,
    sequential: bool = True,
    swaps: int | None = None,
    budget: Mapping[str, float] | None = None,
    round_to: int | None = None,
    uniform: bool = False,
    metric: str = "none",
) -> Selection:
    """Selects the units to keep, by greedy forward selection.

    Step k picks the unit that lowers the loss most (README eq. 1; Ye et al. 2020, arXiv:2003.01794;
    Wolfe et al. 2021, arXiv:2108.00259):

        i_k = argmin_j  L( b + (z + phi_j) / k ),   phi_j = N w_j h_j,   z = sum of those picked

    The model is evaluated in eval mode without gradients; its weights, modes and hooks are left as
    found.

    Args:
        model: any nn.Module with a Linear or convolution whose units feed, through operations that
            keep them apart (elementwise ones, per-channel normalisation, pooling, reshaping,
            attention between heads), others of these
        data: (inputs, targets) tensors, a Dataset, a DataLoader, or any iterable of batches; a
            batch is a tuple or a dict (targets under "labels" or "targets")
        layers: names of the layers whose output units are selected; None finds them all; a mapping
            from producer to consumer names skips the search, for models that can't be traced
        size: distinct units kept: an int, or a float in (0, 1] for a fraction; or a mapping from
            layer name to either. Half the units, where neither size, steps, tolerance nor budget
            is given
        steps: number of greedy steps, when that is to be exact; not together with size
        tolerance: stop a layer once its loss is at most (1 + tolerance) times the dense model's;
            for objective="imitation", at most tolerance times the loss of a layer without units
        loss: "mse", "cross_entropy", "bce_with_logits", the matching torch.nn modules, or any
            callable on (outputs, targets), which takes a slow path; "auto": cross_entropy for class
            indices, mse for floating targets
        objective: "loss" (the model's own), "imitation" (squared error to the consumers' dense
            output); "auto": loss where a Linear that takes one number of each unit is the model's
            output, else imitation
        weights: of the kept units: "counts" (times N c / k, c the times picked), "uniform" (times
            N / kept), "none" (as they are, which the picks of a layer that imitates are for, where
            it keeps each unit once), "refit" (least squares on the kept units: for
            imitation in each step, with a ridge of 1e-4 of the mean square of a feature; for loss
            after the selection); "auto": counts for objective loss, refit for imitation
        replacement: may a unit be picked again? None: with `steps` yes, else no
        candidates: score only this many random candidates a step (Ye et al.: 50); None: all
        batch_size: score each step on a mini-batch of this many samples (Wolfe et al.'s stochastic
            form); the losses reported are still those of all data
        shortlist: with batch_size: score so many of the best on the mini-batch again on all data,
            which costs little and comes close to the full form
        backend: "auto", "cpu", "cuda", "reference" (pure torch in float64)
        seed: of `candidates` and `batch_size`; nothing else is random
        progress: False: no progress bars; else they show for what takes over two seconds
        memory_limit: bytes for the units' activations and the Gram matrix together; what does not
            fit is computed again in every pass over the data; None: half the memory that is free
        sequential: layer by layer, each on what the layers pruned before it give, towards what the
            dense network gives; False: every layer by itself, from one pass through the dense
            network (as where layers are named by hand, and best for batches of many shapes, each
            of which takes a trace)
        swaps: after weights="refit" of a layer that imitates, exchange kept units for dropped ones
            while the error falls, at most so often; None: as often as that helps. From what
            backward elimination leaves, too, and the better is kept. What comes in this way is last
            in `order`. Not with tolerance
        budget: {"flops": 0.6}, {"params": 0.5} or {"latency": 0.7}: what the pruned model may cost,
            as a share of the dense model; flops and latency (on the model's device) of the first
            batch. The sizes k_l of the layers l are those that minimise, under it,

                sum over l of  L_l(k_l) / L_l(0),

            L_l(k) being the squared error that the consumers of layer l imitate their dense output
            with, when it keeps the first k units of its greedy path and all else is dense
        round_to: sizes are rounded to multiples of so many channels, or to all of a layer's units
        uniform: with budget, one size for all layers of a kind: with as many units, between the
            same kinds of modules
        metric: in which a layer that imitates measures its consumers' output errors: "none" (all
            alike) or "fisher" (by what they do to the model's predictions: a backward pass, for
            `loss`, without labels; fisher.py); `losses` are in that metric

    Returns:
        Selection, for `prune`

    Raises:
        ValueError, TypeError: one sentence that names the argument, what was found and expected;
            for a layer that can't be pruned, the operation in the way

    Example:
        >>> model = torch.nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> inputs, targets = torch.randn(256, 4), torch.randint(3, (256,))
        >>> selection = greedyprune.select(model, (inputs, targets), steps=20)
        >>> len(selection.order), selection.counts.sum().item()
        (20, 20)
    """
    chosen = settings.resolve(
        model=model, layers=layers, size=size, steps=steps, tolerance=tolerance,
        objective=objective, weights=weights, replacement=replacement, candidates=candidates,
        batch_size=batch_size, shortlist=shortlist, seed=seed, memory_limit=memory_limit,
        sequential=sequential, swaps=swaps, budget=budget, round_to=round_to, uniform=uniform,
        metric=metric,
    )  # fmt: skip
    batches = Batches(data, model)
    wanted, backend = backend, _backend.resolve(backend, batches.on_gpu)
    criterion = criterion_of(loss, None)
    bar = bars(progress)
    with evaluating(model):
        first = batches.first()
        backend = _backend.resolve(wanted, batches.on_gpu)
        if memory_limit is None and backend == "cuda":
            room = _backend.room(_backend.cuda_device(batches.device))
            chosen = replace(chosen, memory_limit=room)
        (outputs, heads), total, flops = counted(lambda: _first_outputs(model, first))
        if loss == "auto":
            criterion = criterion_of(loss, first.targets)
        groups = [_with_output(model, group, heads) for group in groups_of(model, first, chosen)]
        if any(_objective(chosen.objective, group) == "loss" for group in groups):
            target_of(criterion, outputs, first.targets)  # what is wrong with it shows here
        elif loss != "auto" and chosen.objective == "auto" and chosen.metric == "none":
            warnings.warn(
                f"loss: not used, because {groups[-1].not_output} follows {groups[-1].consumer!r}: "
                "the layers imitate their dense output instead",
                UserWarning,
                stacklevel=2,
            )
        if batches.once and (len(groups) > 1 or chosen.budget is not None):
            what = "a budget" if chosen.budget is not None else f"{len(groups)} layers"
            raise ValueError(
                f"data: found an iterator for {what}, which takes a pass for each layer; "
                "expected a list, Dataset or DataLoader"
            )
        costs, spent = costs_of(model, groups, total, flops), None
        if chosen.budget is not None:
            alone = replace(
                chosen, size=1.0, tolerance=None, replacement=False, swaps=0, round_to=1
            )
            sizes, spent = within_budget(
                model, groups, batches, chosen, costs,
                lambda sums: _select_by_sums(
                    sums, alone.rule(sums.group.producer, sums.group.units), alone, backend, bar
                ), bar,
            )  # fmt: skip
            chosen = replace(chosen, size=sizes)
        rules = {
            group.producer: chosen.rule(
                group.producer, group.units, step_of(group, chosen.round_to)
            ) for group in groups
        }  # fmt: skip
        check_uniform(kinds_of(model, groups, chosen.uniform), rules)
        summed = [
            group for group in groups
            if _objective(chosen.objective, group) == "imitation" and _by_sums(model, group, chosen)
        ]  # fmt: skip
        roots = {}
        if chosen.metric == "fisher" and summed:
            if criterion.kind == "custom":
                raise ValueError(
                    "metric: found 'fisher' with a loss of your own, expected 'mse', "
                    "'cross_entropy' or 'bce_with_logits', which say what the model predicts"
                )
            names = [name for group in summed for name in group.consumers]
            roots = fisher.roots(model, names, batches, criterion.kind, chosen.seed, bar)
        selected = _select_summed(model, summed, batches, rules, roots, chosen, backend, bar)
        if chosen.sequential and 0 < len(selected) < len(groups):
            model = masked(model, Selection(selected))
        for group in groups:
            if group in summed:
                continue
            rule = rules[group.producer]
            own = _objective(chosen.objective, group) == "loss"
            layer_data = LayerData(
                model, group, batches, criterion if own else Criterion("mse"),
                imitation=not own,
                backend=backend, memory_limit=chosen.memory_limit, progress=bar,
            )  # fmt: skip
            try:
                selected[group.producer] = _select_layer(layer_data, rule, chosen, backend, bar)
            finally:
                layer_data.close()
    return Selection({group.producer: selected[group.producer] for group in groups}, costs, spent)


def _select_summed(
    model: nn.Module, groups: Sequence[Group], batches: Batches, rules: Mapping[str, Rule],
    roots: Roots, chosen: Settings, backend: str, bar: Callable[..., Any],
) -> dict[str, LayerSelection]:  # fmt: skip
    """The layers that imitate, in the order of the graph or all from one pass."""

    def select_from(sums: Sums) -> LayerSelection:
        return _select_by_sums(sums, rules[sums.group.producer], chosen, backend, bar)

    if not chosen.sequential or chosen.consumers is not None or len(groups) < 2:
        found = collect(model, groups, batches, chosen.memory_limit, roots, bar) if groups else {}
        return {name: select_from(sums) for name, sums in found.items()}
    replay = Replay(model, batches, chosen.memory_limit)
    order = replay.order([name for group in groups for name in group.consumers])
    selected = {}
    for group in sorted(groups, key=lambda group: min(order[name] for name in group.consumers)):
        layer = select_from(replayed(model, group, replay, roots, bar))
        selected[group.producer] = layer
        for name in sorted(group.consumers, key=order.__getitem__):
            weight = model.get_parameter(f"{name}.weight")
            replay.change(name, weight=masked_weight(weight, layer, name))
    return selected


def _select_layer(
    data: LayerData, rule: Rule, chosen: Settings, backend: str, bar: Callable[..., Any]
) -> LayerSelection:
    if data.criterion.kind == "custom":
        warnings.warn(
            "loss: a function of your own takes the slow path, a call for each candidate and step; "
            "'mse', 'cross_entropy' and 'bce_with_logits' have kernels",
            UserWarning,
            stacklevel=3,
        )
    if chosen.batch_size is not None and data.features is None:
        raise ValueError(
            f"batch_size: the activations do not fit in memory_limit={chosen.memory_limit} bytes, "
            "expected them to: raise the limit or give fewer samples"
        )
    weights = chosen.weights
    if weights == "auto":
        weights = "refit" if data.imitation else "counts"
    # Then the network that the loop evaluates is the one that is kept.
    native = weights == "counts" or (weights == "uniform" and not rule.replacement)
    batches = chosen.batches(rule.steps, data.samples) if chosen.batch_size else None
    if batches is not None:
        data.shuffle(batches.order)
    solver = Solver(data, backend, rule, chosen.memory_limit, batches)
    dense_loss, empty_loss = solver.moments.dense_loss, solver.moments.empty_loss
    if data.criterion.kind == "custom":
        dense_loss = CustomObjective(data).dense_loss()
    enough = -float("inf")
    if chosen.tolerance is not None:
        enough = chosen.tolerance * empty_loss if data.imitation else (
            dense_loss + chosen.tolerance * abs(dense_loss))  # fmt: skip
    whole = rule.draws is None and chosen.batch_size is None

    def path_of(rule: Rule) -> Path:
        with bar(total=rule.steps, desc=f"layer {data.group.producer}: greedy steps") as shown:
            step = _step(shown, enough if native else -float("inf"))
            return solver.run(rule, with_gap=whole and native, step=step)

    if native or chosen.tolerance is None:
        path = path_of(rule)
        losses, fitted = path.losses, None
        if not native:
            fitted = refit(data, path.order) if weights == "refit" else None
            losses = losses_along(data, path.order, weights, fitted, solver.moments.mass)
    else:
        path, losses, fitted = _until(path_of, rule, enough, data, weights, solver.moments.mass)
    _warn_of_repeats(data.group.producer, rule, path.order, chosen)
    if float(losses[-1]) > enough > -float("inf"):
        warnings.warn(
            f"tolerance: layer {data.group.producer!r} ends at {float(losses[-1]):.4g} after "
            f"{len(losses)} steps, above the {enough:.4g} that was asked for",
            UserWarning,
            stacklevel=3,
        )
    certified = (
        whole and weights == "counts" and rule.replacement and data.criterion.kind != "custom"
    )
    return LayerSelection.of_path(
        data.units, path.order, weights,
        None if fitted is None else {data.group.consumer: fitted}, losses=losses,
        gap=path.gap,
        dense_loss=torch.tensor(dense_loss, dtype=torch.float64),
        bound=bound(dense_loss, solver.moments.spread, len(path.order)) if certified else None,
        slices=dict(data.group.slices), outputs={data.group.consumer: data.outputs},
        loss=data.criterion.kind,
        objective="imitation" if data.imitation else "loss",
    )  # fmt: skip


def _by_sums(model: nn.Module, group: Group, chosen: Settings) -> bool:
    """Is the layer selected from sums over its consumers' inputs? Else from its units' features."""
    simple = _is_simple(model, group)
    if chosen.batch_size is not None:
        if not simple:
            raise ValueError(
                f"batch_size: layer {group.producer!r} imitates its dense output from sums over "
                "all samples, expected no batch_size"
            )
        return False
    needed = bytes_of(model, group)
    if needed <= chosen.memory_limit:
        return True
    if simple and chosen.metric == "none":
        return False
    raise ValueError(
        f"memory_limit: found {chosen.memory_limit} bytes, but layer {group.producer!r} needs "
        f"{needed} for the products of its features"
    )


def _is_simple(model: nn.Module, group: Group) -> bool:
    """Does each unit have one feature, that one Linear takes?"""
    consumer = model.get_submodule(group.consumer)
    at = group.slices[f"{group.consumer}.weight"]
    return len(group.consumers) == 1 and type(consumer) is nn.Linear and at.width == 1


def _select_by_sums(
    sums: Sums, rule: Rule, chosen: Settings, backend: str, bar: Callable[..., Any]
) -> LayerSelection:
    group = sums.group
    weights = "refit" if chosen.weights == "auto" else chosen.weights
    native = weights == "counts" or (weights == "uniform" and not rule.replacement)
    gram, moments = sums.moments()
    enough = -float("inf")
    if chosen.tolerance is not None:
        enough = chosen.tolerance * moments.empty_loss
    with bar(total=rule.steps, desc=f"layer {group.producer}: greedy steps") as shown:
        fitted = None
        if weights == "refit":
            path, fitted = sums.refit(
                rule, backend, _step(shown, enough),
                swaps=0 if chosen.tolerance is not None else chosen.swaps,
            )  # fmt: skip
        elif weights == "none" and not rule.replacement:
            path = sums.path_unscaled(gram, moments, rule, backend, _step(shown, -float("inf")))
        else:
            path = sums.path(gram, moments, rule, backend, with_gap=native and rule.draws is None,
                             step=_step(shown, enough if native else -float("inf")))  # fmt: skip
    losses = path.losses
    if not (native or weights == "refit"):
        along = losses_of(first_picks(path.order), weights, gram, moments)
        losses = along[distinct_counts(path.order) - 1]
    reached = (losses <= enough).nonzero()
    k = int(reached[0]) + 1 if len(reached) else len(losses)
    order, gap = path.order[:k], None if path.gap is None else path.gap[:k]
    if not len(reached) and chosen.tolerance is not None:
        warnings.warn(
            f"tolerance: layer {group.producer!r} ends at {float(losses[-1]):.4g} after "
            f"{len(losses)} steps, above the {enough:.4g} that was asked for",
            UserWarning,
            stacklevel=3,
        )
    _warn_of_repeats(group.producer, rule, order, chosen)
    certified = rule.draws is None and weights == "counts" and rule.replacement
    return LayerSelection.of_path(
        group.units, order, weights, fitted, losses=losses[:k], gap=gap,
        dense_loss=torch.tensor(moments.dense_loss, dtype=torch.float64),
        bound=bound(moments.dense_loss, moments.spread, k) if certified else None,
        slices=dict(group.slices), outputs={each.name: each.outputs for each in sums.consumers},
        loss="mse", objective="imitation",
    )  # fmt: skip


def _until(
    path_of: Callable[[Rule], Path], rule: Rule, enough: float, data: LayerData, weights: str,
    mass: float,
) -> tuple[Path, Tensor, Any]:  # fmt: skip
    """Runs longer and longer paths (they are nested) until the reweighted loss is low enough."""
    steps = 32
    while True:
        part = replace(rule, steps=min(steps, rule.steps))
        path = path_of(part)
        fitted = refit(data, path.order) if weights == "refit" else None
        losses = losses_along(data, path.order, weights, fitted, mass)
        reached = (losses <= enough).nonzero()
        if len(reached):
            k = int(reached[0]) + 1
            return Path(path.order[:k], path.losses[:k], None), losses[:k], fitted
        if len(path.order) < part.steps or part.steps == rule.steps:
            return path, losses, fitted
        steps *= 4


def _step(shown: Any, enough: float) -> Step:
    def step(k: int, unit: int, loss: float) -> bool:
        shown.update()
        return loss <= enough

    return step


def _warn_of_repeats(layer: str, rule: Rule, order: Tensor, chosen: Settings) -> None:
    distinct = int(distinct_counts(order)[-1])
    stuck = len(order) == rule.steps and distinct < rule.size
    if chosen.size is not None and rule.replacement and stuck:
        warnings.warn(
            f"layer {layer!r}: after {rule.steps} steps ({REPEATS_LIMIT} times its "
            f"size) repeats left it at {distinct} of {rule.size} distinct units",
            UserWarning,
            stacklevel=4,
        )


def _objective(objective: str, group: Group) -> str:
    if objective == "auto":
        return "loss" if group.output else "imitation"
    if objective == "loss" and not group.output:
        raise ValueError(
            f"objective: found 'loss', but the consumer {group.consumer!r} of layer "
            f"{group.producer!r} is not the model's output ({group.not_output} follows it); "
            "expected 'imitation' or 'auto'"
        )
    return objective


def _first_outputs(model: nn.Module, batch: Batch) -> tuple[object, set[str]]:
    """The model's output, and the Linears whose output it is (not another head's, say)."""
    produced: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: produced.update({name: out}))
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    ]
    try:
        outputs = run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    try:
        main = main_output(outputs).double().flatten()
    except ValueError:  # of no matter where no layer is judged by the model's loss
        return outputs, set()
    return outputs, {n for n, out in produced.items() if torch.equal(out.double().flatten(), main)}


def _with_output(model: nn.Module, group: Group, heads: set[str]) -> Group:
    """The group, whose loss can be the model's own only where its consumer is the output."""
    if not group.output:
        return group
    if not _is_simple(model, group):
        return replace(group, output=False, not_output="a sum over several features a unit")
    if group.consumer in heads:
        return group
    return replace(group, output=False, not_output="another operation or output")
