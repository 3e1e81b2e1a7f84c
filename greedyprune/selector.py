"""`select`: model and data -> features -> objective -> kernel -> Selection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .budget import check_uniform, kinds_of
from .data.batches import Batch, Batches
from .data.forward import evaluating, main_output, run_model, target_of
from .data.losses import criterion_of
from .graph.costs import costs_of, counted
from .graph.groups import Group
from .kernels import backend as _backend
from .objectives import options as settings
from .objectives.options import Settings
from .plan import (
    Task,
    check_memory,
    check_passes,
    is_simple,
    rule_of,
    selected_by,
    sizes_within,
    way_of,
)
from .runtime.checkpoint import Checkpoint, mark_of
from .runtime.distributed import ALONE, ranks_of, unwrapped
from .runtime.fingerprint import of_call, of_functions, of_model, of_versions, same_on_all
from .runtime.free_memory import room
from .runtime.progress import bars, warn
from .surgery.selection import Selection
from .surgery.trial_cut import groups_of


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
        memory_limit: bytes for the units' activations, the sums over them and what choosing takes,
            together (beside a batch, and blocks of some 64 MB); what does not fit is computed again
            in every pass over the data; None: half the memory that is free
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
            here = {"the processor (GREEDYPRUNE_ISA)": _backend.instruction_set(backend)}
            if peers.size > 1:
                here["data's first batch, with parallel='units'"] = mark_of(first)
            with same_on_all(ranks, inner, call | here):
                limit = ranks.memory(*_memory(memory_limit, chosen, batches, backend))
                about = dict[str, str]()
                if checkpoint is not None:
                    about = call | {"parallel": parallel, "data's first batch": mark_of(first)}
                    about |= {"memory_limit": repr(memory_limit)} | of_model(inner)
                    about |= of_functions(chosen, criterion) | of_versions()
                with Checkpoint(checkpoint, about, ranks) as kept:
                    limit = limit if memory_limit else kept.number("memory", lambda: limit)
                    bar = bars(progress if ranks.rank == 0 else False)
                    with kept.watching(batches, bar):
                        task = Task(
                            batches, criterion, {}, replace(chosen, memory_limit=limit), backend,
                            bar, kept,
                        )  # fmt: skip
                        selection = _select(inner, task, named=loss != "auto")
                    kept.tidy()
    return selection


def _memory(
    given: int | None, chosen: Settings, batches: Batches, backend: str
) -> tuple[int, bool]:
    """The memory limit, and whether all ranks on a machine have it together."""
    if given is None and backend == "cuda":
        return room(_backend.cuda_device(batches.device)), False
    return chosen.memory_limit, given is None


def _select(model: nn.Module, task: Task, named: bool) -> Selection:
    """named: did the caller name a loss?"""
    batches, chosen, first = task.batches, task.chosen, task.batches.first()
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    (outputs, found), total, flops = counted(
        lambda: _outputs(model, first, linears, lambda out: out)
    )
    sized = chosen.size if isinstance(chosen.size, Mapping) else ()
    groups = groups_of(model, first, chosen.layers, chosen.consumers, sized)
    if chosen.consumers is not None:  # no graph says what follows them
        found = set.intersection(*task.ranks.gather("outputs", _heads(model, first, found)))
    groups = [_with_output(model, group, found) for group in groups]
    ways = {group.producer: way_of(model, group, chosen) for group in groups}
    if set(ways.values()) & {"output", "network", "fisher"}:
        target_of(task.criterion, outputs, first.targets)  # what is wrong with it shows here
    elif named and chosen.objective == "auto" and chosen.metric == "none":
        warn(
            f"loss: not used, because {groups[-1].not_output} follows {groups[-1].consumer!r}: "
            "the layers imitate their dense output instead",
        )
    check_passes(batches, ways, chosen)
    check_memory(model, groups, ways, chosen)
    costs, spent = costs_of(model, groups, total, flops), None
    costs = task.ranks.from_rank(0, "costs", costs)  # of its first batch
    if chosen.budget is not None:
        sizes, spent = sizes_within(model, groups, costs, task)
        chosen = replace(chosen, size=sizes, budget=None)
    rules = {group.producer: rule_of(group, chosen) for group in groups}
    check_uniform(kinds_of(model, groups, chosen.uniform), rules)
    selected = selected_by(model, groups, ways, task._replace(rules=rules, chosen=chosen))
    return Selection({group.producer: selected[group.producer] for group in groups}, costs, spent)


def _outputs(
    model: nn.Module, batch: Batch, names: Iterable[str], changed: Callable[[Tensor], Tensor]
) -> tuple[object, set[str]]:
    """The model's output with other outputs of these layers, and which of those it is."""
    produced: dict[str, Tensor] = {}

    def hook(name: str, out: Tensor) -> Tensor:
        out = changed(out)
        produced[name] = out.clone()  # what follows may change it in place
        return out

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, n=name: hook(n, out))
        for name in names
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


def _heads(model: nn.Module, batch: Batch, found: set[str]) -> set[str]:
    """Those Linears whose output is the model's whatever it is: what follows, a ReLU, say, may
    happen to change nothing on this batch."""
    try:
        return found and _outputs(model, batch, found, lambda out: -1024 * out - 1024)[1]
    except ValueError:  # it does not run on these
        return set()


def _with_output(model: nn.Module, group: Group, heads: set[str]) -> Group:
    """The group, whose loss can be the model's own only where its consumer is the output."""
    if not group.output:
        return group
    if not is_simple(model, group):
        return replace(group, output=False, not_output="a sum over several features a unit")
    if group.consumer in heads:
        return group
    return replace(group, output=False, not_output="another operation or output")
