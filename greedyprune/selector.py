"""`select`: model and data -> features -> objective -> kernel -> Selection."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from . import _backend, fisher, paths, settings
from .budget import check_uniform, kinds_of, step_of, within_budget
from .checkpoint import Checkpoint, Steps, mark_of
from .costs import Budget, Cost, costs_of, counted
from .data import Batch, Batches, joined
from .distributed import ALONE, Ranks, ranks_of, unwrapped
from .evaluation import bars, evaluating
from .features import LayerData, main_output, run_model, target_of
from .fingerprint import of_call, of_model, same_on_all
from .graph import Group
from .imitation import Roots, Sums, bytes_of, collect, replayed
from .layouts import outputs_of
from .losses import Criterion, criterion_of
from .network import Network
from .reference import Rule
from .replay import Replay
from .selection import LayerSelection, Selection
from .settings import Settings
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
    screen: int | None = None,
    backend: str = "auto",
    seed: int = 0,
    progress: bool | None = None,
    memory_limit: int | None = None,
    sequential: bool = True,
    swaps: int | None = None,
    budget: Mapping[str, float] | None = None,
    round_to: int | None = None,
    uniform: bool = False,
    metric: str | Callable[[Tensor, Tensor], float] = "none",
    damping: float = 1e-4,
    process_group: ProcessGroup | None = None,
    parallel: str = "data",
    checkpoint: str | PathLike[str] | None = None,
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
        tolerance: stop a layer once its loss is at most (1 + tolerance) times what it is with all
            of the layer's units; for objective="imitation" and "fisher", at most tolerance times
            the loss of the layer without units
        loss: "mse", "cross_entropy", "bce_with_logits", the matching torch.nn modules, or any
            callable on (outputs, targets), which takes a slow path; "auto": cross_entropy for class
            indices, mse for floating targets
        objective: "loss" (the model's own; for an inner layer every candidate is a run of the
            network from there on), "imitation" (squared error to the consumers' dense output),
            "fisher" (the loss's second-order model in a gate for each unit, all layers from one
            backward pass through the dense network, samples along the first dimension and the
            loss a mean over them; fisher.py); "auto": loss where a Linear that
            takes one number of each unit is the model's output, else imitation
        weights: of the kept units: "counts" (times N c / k, c the times picked), "uniform" (times
            N / kept), "none" (as they are, which the picks of a layer that imitates are for, where
            it keeps each unit once), "refit" (least squares on the kept units: for imitation in
            each step, for loss after the picks, for fisher of the gates); "auto": counts for
            objective loss, else refit
        damping: of weights="refit": the ridge, as a share of the mean square of a feature
        replacement: may a unit be picked again? None: with `steps` yes, else no
        candidates: score only this many random candidates a step (Ye et al.: 50); None: all
        batch_size: score each step on a mini-batch of this many samples (Wolfe et al.'s stochastic
            form); the losses reported are still those of all data
        shortlist: with batch_size: score so many of the best on the mini-batch again on all data,
            which costs little and comes close to the full form
        screen: for objective="loss" inside a network: run it for only so many candidates, those
            that its derivative puts first (a backward pass a step)
        backend: "auto", "cpu", "cuda", "reference" (pure torch in float64)
        seed: of `candidates` and `batch_size`; nothing else is random
        progress: False: no progress bars; else they show for what takes over two seconds
        memory_limit: bytes for the units' activations and the Gram matrix together; what does not
            fit is computed again in every pass over the data; None: half the memory that is free
        sequential: layer by layer, each on what the layers pruned before it give, towards what the
            dense network gives; False: every layer by itself, from one pass through the dense
            network (as layers that imitate are where they are named by hand; best for batches of
            many shapes, each of which takes a trace)
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
            `loss`, without labels; fisher.py); `losses` are in that metric. For objective="loss", a
            function of all outputs and targets of which more is better, that `tolerance` is of: a
            layer is done once it is at least (1 - tolerance) times what it is with all units

        process_group: of torch.distributed; None: the default one, where it is initialised. All its
            ranks call with the same model (or the DistributedDataParallel around it) and arguments,
            and all get the Selection that one process finds on all their data, rank after rank
        parallel: over those ranks: "data", each brings its own part; "units", all have the same
            data and share the work; "none", this process is by itself

        checkpoint: a folder that what is found is kept in as it comes: finished layers, sums over
            the data, steps that take a pass; the same call goes on from there after it was killed,
            to the same Selection. The data must come in the same order again

    Returns:
        Selection, for `prune`

    Raises:
        ValueError, TypeError: one sentence that names the argument, what was found and expected;
            for a layer that can't be pruned, the operation in the way; on all ranks, whichever
            found it

    Example:
        >>> model = torch.nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> inputs, targets = torch.randn(256, 4), torch.randint(3, (256,))
        >>> selection = greedyprune.select(model, (inputs, targets), steps=20)
        >>> len(selection.order), selection.counts.sum().item()
        (20, 20)
    """
    ranks = ranks_of(process_group, parallel)
    spread, peers = (ranks, ALONE) if parallel == "data" else (ALONE, ranks)
    with ranks.together():
        inner = unwrapped(model)
        chosen = settings.resolve(
            model=inner, layers=layers, size=size, steps=steps, tolerance=tolerance,
            objective=objective, weights=weights, replacement=replacement, candidates=candidates,
            batch_size=batch_size, shortlist=shortlist, screen=screen, seed=seed,
            memory_limit=memory_limit, sequential=sequential, swaps=swaps, budget=budget,
            round_to=round_to, uniform=uniform, metric=metric, damping=damping,
        )  # fmt: skip
        criterion = criterion_of(loss, None)
        batches = Batches(data, inner, spread, peers)
        _backend.resolve(backend, batches.on_gpu)
        with evaluating(inner):
            first = batches.share_first()
            backend = _backend.resolve(backend, batches.on_gpu)
            if loss == "auto":
                criterion = criterion_of(loss, first.targets)
            call = of_call(chosen, criterion, backend)
            with same_on_all(ranks, inner, call):
                limit = ranks.memory(*_memory(memory_limit, chosen, batches, backend))
                kept = Checkpoint()
                if checkpoint is not None:
                    about = call | {"parallel": parallel, "data": mark_of(first)}
                    about |= {"memory_limit": repr(memory_limit)} | of_model(inner)
                    kept = Checkpoint(checkpoint, about, ranks)
                    limit = limit if memory_limit else kept.number("memory", lambda: limit)
                task = Task(
                    batches, criterion, {}, replace(chosen, memory_limit=limit), backend,
                    bars(progress if ranks.rank == 0 else False), kept,
                )  # fmt: skip
                selection = _select(inner, task, named=loss != "auto")
                kept.tidy()
    return selection


def _memory(
    given: int | None, chosen: Settings, batches: Batches, backend: str
) -> tuple[int, bool]:
    """The memory limit, and whether all ranks on a machine have it together."""
    if given is None and backend == "cuda":
        return _backend.room(_backend.cuda_device(batches.device)), False
    return chosen.memory_limit, given is None


def _select(model: nn.Module, task: Task, named: bool) -> Selection:
    """named: did the caller name a loss?"""
    batches, chosen, first = task.batches, task.chosen, task.batches.first()
    (outputs, heads), total, flops = counted(lambda: _first_outputs(model, first))
    groups = [_with_output(model, group, heads) for group in groups_of(model, first, chosen)]
    ways = {group.producer: _way(model, group, chosen) for group in groups}
    if set(ways.values()) & {"output", "network", "fisher"}:
        target_of(task.criterion, outputs, first.targets)  # what is wrong with it shows here
    elif named and chosen.objective == "auto" and chosen.metric == "none":
        warnings.warn(
            f"loss: not used, because {groups[-1].not_output} follows {groups[-1].consumer!r}: "
            "the layers imitate their dense output instead",
            UserWarning,
            stacklevel=3,
        )
    _check_passes(batches, ways, chosen)
    costs, spent = costs_of(model, groups, total, flops), None
    costs = task.ranks.from_rank(0, "costs", costs)  # of its first batch
    if chosen.budget is not None:
        sizes, spent = _sizes(model, groups, costs, task)
        chosen = replace(chosen, size=sizes)
    rules = {
        group.producer: chosen.rule(group.producer, group.units, step_of(group, chosen.round_to))
        for group in groups
    }
    check_uniform(kinds_of(model, groups, chosen.uniform), rules)
    selected = _selected(model, groups, ways, task._replace(rules=rules, chosen=chosen))
    return Selection({group.producer: selected[group.producer] for group in groups}, costs, spent)


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

    def each(
        self, ranks: Ranks, names: Sequence[str], sums: Mapping[str, Sums]
    ) -> dict[str, LayerSelection]:
        """Layers that do not wait for one another, shared out to the ranks."""
        known = self.checkpoint.finished

        def layer(name: str) -> LayerSelection:
            return known(name) or self.from_sums(sums[name])

        return ranks.each(names, layer, self.checkpoint.finish)

    def finished(self, names: Sequence[str]) -> dict[str, LayerSelection]:
        """All of these layers, where an earlier run finished them."""
        found = {name: layer for name in names if (layer := self.checkpoint.finished(name))}
        return found if len(found) == len(names) else {}


def _way(model: nn.Module, group: Group, chosen: Settings) -> str:
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
    simple = _is_simple(model, group)
    if chosen.batch_size is not None:
        if not simple:
            raise ValueError(
                f"batch_size: layer {group.producer!r} imitates its dense output from sums over "
                "all samples, expected no batch_size"
            )
        return "features"
    needed = bytes_of(model, group)
    if needed <= chosen.memory_limit:
        return "sums"
    if simple and chosen.metric == "none":
        return "features"
    raise ValueError(
        f"memory_limit: found {chosen.memory_limit} bytes, but layer {group.producer!r} needs "
        f"{needed} for the products of its features"
    )


def _is_simple(model: nn.Module, group: Group) -> bool:
    """Does each unit have one feature, that one Linear takes?"""
    consumer = model.get_submodule(group.consumer)
    at = group.slices[f"{group.consumer}.weight"]
    return len(group.consumers) == 1 and type(consumer) is nn.Linear and at.width == 1


def _check_passes(batches: Batches, ways: Mapping[str, str], chosen: Settings) -> None:
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


def _sizes(
    model: nn.Module, groups: Sequence[Group], costs: Mapping[str, Cost], task: Task
) -> tuple[dict[str, int], Budget]:
    """The sizes for a budget, from whole paths of layers by themselves."""
    chosen = replace(task.chosen, size=1.0, tolerance=None, replacement=False, swaps=0, round_to=1)
    rules = {g.producer: chosen.rule(g.producer, g.units) for g in groups}
    whole = task._replace(chosen=chosen, rules=rules)
    batches = task.batches.dealt()

    def found() -> tuple[dict[str, int], dict[str, Any]]:
        gates = None
        if chosen.objective == "fisher":
            gates = fisher.gates(model, groups, batches, task.criterion, task.bar, task.checkpoint)
        sizes, spent = within_budget(
            model, groups, batches, task.chosen, costs, whole.from_sums, gates, task.bar,
            task.checkpoint,
        )  # fmt: skip
        return sizes, asdict(spent)

    sizes, spent = task.checkpoint.number("sizes", found)
    return sizes, Budget(**spent)


def _selected(
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
    data = LayerData(
        model, group, task.batches, task.criterion if own else Criterion("mse"),
        imitation=not own, backend=task.backend, memory_limit=task.chosen.memory_limit,
        progress=task.bar, checkpoint=task.checkpoint,
    )  # fmt: skip
    try:
        rule, steps = task.rules[group.producer], Steps(task.checkpoint, group.producer)
        return paths.from_features(data, rule, task.chosen, task.backend, task.bar, steps)
    finally:
        data.close()


def _from_gates(model: nn.Module, groups: Sequence[Group], task: Task) -> dict[str, LayerSelection]:
    batches, names = task.batches.dealt(), [group.producer for group in groups]
    if found := task.finished(names):
        return found
    sums = fisher.gates(model, groups, batches, task.criterion, task.bar, task.checkpoint)
    return task.each(batches.ranks, names, sums)


def _from_sums(model: nn.Module, groups: Sequence[Group], task: Task) -> dict[str, LayerSelection]:
    """The layers that imitate, in the order of the graph or all from one pass."""
    batches, chosen, bar, checkpoint = (
        task.batches.dealt(), task.chosen, task.bar, task.checkpoint
    )  # fmt: skip
    ranks, roots = batches.ranks, _roots(model, groups, task._replace(batches=batches))
    task = task._replace(criterion=Criterion("mse"))
    if not chosen.sequential or chosen.consumers is not None or len(groups) < 2:
        names = [group.producer for group in groups]
        if known := task.finished(names):
            return known
        sums = collect(model, groups, batches, chosen.memory_limit, roots, bar, checkpoint,
                       owned=True)  # fmt: skip
        return task.each(ranks, names, sums)
    replay = Replay(model, batches, chosen.memory_limit)
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
    network = Network(
        model, batches, task.criterion, chosen.memory_limit, task.bar,
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
            found = collect(now, [group], batches, chosen.memory_limit, {}, task.bar)
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
