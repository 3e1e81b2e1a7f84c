"""`select`: finds the groups of a model, runs an objective on the data, returns a Selection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .data.batches import Batch, Batches
from .data.compared import class_dim_of, compared
from .data.forward import evaluating, hooked, main_output, run_model
from .data.losses import Criterion, criterion_of
from .data.padding import AUTO
from .graph.costs import costs_of, count_flops, in_samples_of
from .graph.groups import Group
from .graph.unrun import UsedTensors, warn_of_unrun
from .kernels import backend as backends
from .objectives.job import Job
from .objectives.options import Fisher, Imitation, Loss
from .objectives.wide import wide_groups
from .plan import (
    FISHER,
    NETWORK_LOSS,
    OUTPUT_LOSS,
    is_simple,
    judge_of,
    plan,
    rules_of,
    select_layers,
    sizes_within,
)
from .request import Request, Size, check_model, checked_request
from .runtime.checkpoint import Checkpoint
from .runtime.distributed import Ranks, ranks_of
from .runtime.fingerprint import of_fields, of_model, of_versions, same_on_all
from .runtime.free_memory import room
from .runtime.modules import module_of
from .runtime.progress import bars, warn
from .sizes.budget import Budget
from .sizes.kinds import without_kept
from .surgery.copying import check_functions
from .surgery.hf_config import how_saved
from .surgery.layer_selection import LayerSelection
from .surgery.proof import SAMPLES, example_of
from .surgery.selection import Selection
from .surgery.trial_cut import groups_of


def select(
    model: nn.Module,
    data: object,
    *,
    size: Size | Mapping[str, Size] | Budget | None = None,
    steps: int | None = None,
    tolerance: float | None = None,
    round_to: int | None = None,
    layers: str | Sequence[str] | Mapping[str, str] | None = None,
    loss: str | nn.Module | Callable[[Tensor, Tensor], Tensor] = "auto",
    objective: str | Imitation | Loss | Fisher = "auto",
    weights: Literal["auto", "counts", "uniform", "none", "refit"] = "auto",
    replacement: bool | None = None,
    mask: str | None = "auto",
    seed: int = 0,
    backend: Literal["auto", "cpu", "cuda", "reference"] = "auto",
    memory_limit: int | None = None,
    process_group: ProcessGroup | None = None,
    checkpoint: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> Selection:
    """Selects the units to keep, by greedy forward selection.

    Each step adds the unit that lowers the loss most (Ye et al. 2020, arXiv:2003.01794; Wolfe et
    al. 2021, arXiv:2108.00259; eq. (1)). The model is not changed; `prune` cuts it.

    Args:
        model: any nn.Module; it runs in eval mode without gradients
        data: (inputs, targets) tensors, a Dataset, a DataLoader or any iterable of batches; a batch
            is a tuple or a dict, whose targets are under "labels" or "targets". Without targets,
            all layers imitate. For outputs (m, T, C) or, as in torch, (m, C, T), class indices may
            be (m, T): every position is then a sample. Positions with the label -100 have no part
            in the loss. Labels of causal language models are shifted where the model's own loss
            does so. Lists and dicts of targets go to a loss of your own

      How much to keep (default: half the units of every layer)
        size: the number of units to keep: an int, a fraction in (0, 1], a mapping from layer to
            either, or a Budget for the whole model
        steps: the number of greedy steps; a unit may be picked more than once
        tolerance: stop a layer once its loss is at most this fraction above the dense layer's; for
            imitation and gates, once it is at most this fraction of the loss without any unit. With
            `size` or `steps`, a layer stops at whichever comes first
        round_to: round the numbers of channels to multiples of this, or to all of a layer

      What to select and how to judge it
        layers: names of the layers whose outputs are the units; "all": all that can be pruned
            (`greedyprune.layers` lists them) but the dimensions inside attention's heads; None: all
            of these but residual streams and units under a norm. For models that torch.export
            cannot trace: a mapping from such a layer to the layer that takes its units
        loss: "mse", "cross_entropy", "bce_with_logits", a torch.nn loss with a mean
            or a sum, or a function of (outputs, targets), which is slow; "auto": cross_entropy for
            class indices, else mse. Layers that imitate use it only for Imitation(metric="fisher")
        objective: "imitation" of the dense outputs, the model's "loss", or "fisher", a second-order
            approximation of the loss; or Imitation(...), Loss(...), Fisher(...) with options;
            "auto": loss if the consumer is a Linear that gives the model's output, else imitation
        weights: outgoing weights of the kept units: "counts" (the theory's), "uniform", "none"
            (unchanged) or "refit" (least squares); "auto": counts for the loss, else refit.
            Query-key dimensions have no outgoing weights: they are unchanged
        replacement: may a unit be picked again? None: only with `steps`
        mask: the name of the entry in batches that are dicts which says what positions of padded
            sequences count, (m, T) of 1 and 0 (in torch's own "..._key_padding_mask", True hides).
            Hidden positions have no part in any sum, loss or metric. "auto": "attention_mask" where
            there is one, in the form of a tokenizer's; a decoder's positions have theirs in
            "decoder_attention_mask", or else count where they have a label. None: all count
        seed: seed for random candidates, mini-batches, and the labels that metric="fisher" draws

      Where and how it runs
        backend: "auto", "cpu", "cuda" or "reference" (plain torch, float64)
        memory_limit: bytes for the activations and for sums over the data, such as Gram matrices;
            None: half the free memory. Activations that do not fit are computed again in every pass
        process_group: a group of torch.distributed; None: the default group, if there is one. Each
            process brings its own part of the data, and all get the same Selection
        checkpoint: a folder for the progress; after an interruption the same call continues from it
        progress: False hides the progress bars

    Returns:
        the Selection, for `prune`, `refit`, `.at(k)`, `.save(path)`

    Raises:
        ValueError, TypeError: the message is one sentence that names the argument, what was found
            and what was expected
        NotPrunableError: a ValueError; a layer in `layers` can't be pruned, or no layer can

    Example:
        >>> model = torch.nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> inputs, targets = torch.randn(256, 4), torch.randint(3, (256,))
        >>> selection = greedyprune.select(model, (inputs, targets), size=16)
        >>> greedyprune.prune(model, selection)[0].out_features
        16
    """
    ranks = ranks_of(process_group)
    with ranks.together():
        request = checked_request(
            size=size, steps=steps, tolerance=tolerance, round_to=round_to, layers=layers,
            objective=objective, weights=weights, replacement=replacement, seed=seed,
            memory_limit=memory_limit,
        )  # fmt: skip
        return select_on(ranks, model, data, request, loss, backend, checkpoint, progress, mask)


def select_on(
    ranks: Ranks,
    model: nn.Module,
    data: object,
    request: Request,
    loss: object = "auto",
    backend: str = "auto",
    checkpoint: str | PathLike[str] | None = None,
    progress: bool | None = None,
    mask: str | None = AUTO,
) -> Selection:
    """`select` for checked arguments, inside `ranks.together()`."""
    module = module_of(model)
    check_model(module)
    criterion = criterion_of(loss, None)
    batches = Batches(data, module, ranks, mask)
    backends.resolve(backend, batches.on_gpu)
    with evaluating(module):
        first = batches.share_first()
        backend = backends.resolve(backend, batches.on_gpu)
        if loss == "auto":
            criterion = criterion_of(loss, first.targets)
        batches.ignored = criterion.ignored_label
        if first.targets is None and request.objective == "auto":
            request = replace(request, objective="imitation")
        call = _described(request, criterion, backend) | {"mask": repr(mask)}
        processor = {"instruction set (GREEDYPRUNE_ISA)": backends.instruction_set(backend)}
        with same_on_all(ranks, module, call | processor):
            about = dict[str, str]()
            if checkpoint is not None:
                about = call | {"memory_limit": repr(request.memory_limit)} | of_versions()
                about |= {"data's first batch": first.mark} | of_model(module)
            limit = ranks.memory(*_memory(request.memory_limit, batches, backend))
            bar = bars(progress if ranks.rank == 0 else False)
            with Checkpoint(checkpoint, about, ranks, save=_save, load=_load) as folder:
                if request.memory_limit is None:
                    limit = folder.value("memory", lambda: limit)
                job = Job(
                    model=module, batches=batches, criterion=criterion, rules={},
                    weights=request.weights, tolerance=request.tolerance,
                    imitation=request.imitation, loss=request.loss, fisher=request.fisher,
                    traced=request.consumers is None, sized=False,
                    seed=request.seed, memory_limit=limit, backend=backend, bar=bar,
                    checkpoint=folder,
                )  # fmt: skip
                with folder.watching(batches, bar):
                    selection = _selection(job, request, loss_named=loss != "auto")
                folder.tidy()
    return selection


def _selection(job: Job, request: Request, loss_named: bool) -> Selection:
    model, first = job.model, job.batches.first()
    check_functions(model)
    used = UsedTensors()

    def run() -> tuple[object, set[str]]:
        with used:
            return _run_seen(model, first)

    (outputs, output_layers), total, flops = count_flops(model, run)
    few = first if request.consumers is not None else _in_proportion(model, first, total)
    groups, refused = groups_of(model, few, request.layers, request.consumers, request.sized_layers)
    groups = [group.times(in_samples_of(few, first)) for group in groups]
    groups, kept = without_kept(model, groups, request.keep)
    refused = {**refused, **dict.fromkeys(kept, "Budget(keep=...) keeps all its units")}
    warn_of_unrun(model, used, groups, "data")
    if request.consumers is not None:  # no graph tells what follows these layers
        output_layers = _unmoved(model, first, output_layers)
    # One rank's first batch may have NaN, or leave its outputs as they are in an operation after.
    output_layers = set.intersection(*job.ranks.gather("output layers", output_layers))
    groups = [_with_output(model, group, output_layers) for group in groups]
    job = replace(job, wide=wide_groups(job, groups, flops))
    judges = {judge_of(request, group) for group in groups}
    by_loss = bool(judges & {OUTPUT_LOSS, NETWORK_LOSS, FISHER})
    if by_loss or request.imitation.metric == "fisher":
        job = replace(job, criterion=_decided(job.criterion, model, first, outputs, output_layers))
    elif request.trials:
        with suppress(ValueError):  # trials then compare the outputs without probabilities
            criterion = _decided(job.criterion, model, first, outputs, output_layers)
            job = replace(job, criterion=criterion)
    if by_loss:
        _follow_own_loss(job.criterion, job.batches)
        compared(job.criterion, outputs, job.batches.first())  # raises what is wrong with targets
    elif loss_named and request.imitation.metric == "none" and not request.trials:
        reason = "objective='imitation' uses no labels"
        if first.targets is None:
            reason = "the data have no targets"
        elif request.objective == "auto":
            reason = f"{groups[-1].not_output} follows {groups[-1].consumer!r}"
        warn(f"loss: not used, because {reason}: the layers imitate their dense outputs instead")
    costs, report, curves = costs_of(model, groups, total, flops), None, None
    costs = job.ranks.from_rank(0, "costs", costs)  # of the first rank's first batch

    def with_rules(request: Request) -> Job:
        return replace(job, rules=rules_of(request, groups), sized=request.size is not None)

    layers_plan = plan(with_rules(request), request, groups)
    if request.budget is not None:
        sizes, report, curves = sizes_within(job, request, groups, costs)
        request = replace(request, size=sizes, budget=None)
    selected = select_layers(with_rules(request), groups, layers_plan)
    layers = {group.producer: selected[group.producer] for group in groups}
    return Selection(
        layers, costs, report, refused, example_of(model, first), how_saved(model, layers), curves
    )


def _in_proportion(model: nn.Module, batch: Batch, total: int) -> Batch:
    """A few samples of a batch if the FLOPs, `total` of all, are in proportion to their number."""
    few = replace(batch, targets=None).few(SAMPLES)
    try:
        flops = count_flops(model, lambda: run_model(model, few))[1]
    except (ValueError, RuntimeError):  # the model runs on no part of it
        return batch
    return few if flops * in_samples_of(few, batch) == total else batch


def criterion_on(
    model: nn.Module, batches: Batches, criterion: Criterion
) -> tuple[Criterion, bool]:
    """The criterion for this model's outputs, and whether labels are shifted, as the batches are.

    ValueError where the model has a loss of its own that is not the criterion.
    """
    batches.ignored = criterion.ignored_label
    _follow_own_loss(criterion, batches)
    outputs, output_layers = _run_seen(model, batches.first())
    return _decided(criterion, model, batches.first(), outputs, output_layers), batches.shift


def _decided(
    criterion: Criterion, model: nn.Module, first: Batch, outputs: object, output_layers: set[str]
) -> Criterion:
    """The criterion, with the outputs' dimension that holds the classes, as in the first batch.

    output_layers: the Linears whose output is the model's output
    """
    if criterion.kind == "custom":
        return criterion
    shape = tuple(main_output(outputs).shape)
    for name in output_layers:
        if shape and shape[-1] == len(model.get_parameter(f"{name}.weight")):
            return replace(criterion, classes_last=True)
    dim = class_dim_of(criterion, shape, first)
    is_sequence = len(shape) > 2 and dim is not None
    return replace(criterion, classes_last=dim == -1) if is_sequence else criterion


def _follow_own_loss(criterion: Criterion, batches: Batches) -> None:
    """Shifts the labels by one position where the model's own loss does.

    ValueError where the model has a loss of its own that is not the criterion.
    """
    ranks = batches.ranks
    shifts = criterion.kind == "cross_entropy" and batches.own_loss_shifts()
    batches.shift = any(ranks.gather("shifted labels", shifts))


def _described(request: Request, criterion: Criterion, backend: str) -> dict[str, str]:
    """The arguments as texts by name, without the memory limit, which may differ between ranks."""
    texts = of_fields(request) | {"backend": backend, "loss": criterion.kind}
    texts.pop("memory_limit")
    texts |= of_fields(criterion, "the loss's ")
    return texts


def _memory(limit: int | None, batches: Batches, backend: str) -> tuple[int, bool]:
    """The memory limit, and whether all ranks of a machine share it."""
    if limit is not None:
        return limit, False
    if backend == "cuda":
        return room(backends.cuda_device(batches.device)), False
    return room(torch.device("cpu")), True


def _save(path: Path, name: str, layer: LayerSelection) -> None:
    Selection({name: layer}).save(path)


def _load(path: Path) -> Mapping[str, LayerSelection]:
    return Selection.load(path).layers


def _run_seen(
    model: nn.Module, batch: Batch, names: Sequence[str] | None = None,
    change: Callable[[Tensor], Tensor] = lambda output: output,
) -> tuple[object, set[str]]:  # fmt: skip
    """Runs the model with these layers' outputs replaced.

    names: None: all Linears

    Returns the model's output, and the layers whose replaced output equals it.
    """
    if names is None:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    produced: dict[str, tuple[Tensor, int]] = {}

    def replaced(name: str, output: Tensor) -> Tensor:
        output = change(output)
        # Later operations may change it in place, which an inference tensor does not tell.
        untold = output.is_inference()
        produced[name] = (output.clone(), 0) if untold else (output, output._version)
        return output

    with hooked(model, names, after=replaced):
        outputs = run_model(model, batch)
    try:
        main = main_output(outputs).double().flatten()
    except ValueError:  # it only matters where a layer is judged by the model's loss
        return outputs, set()
    equal = {
        name for name, (output, version) in produced.items()
        if output.numel() == main.numel() and (output.is_inference() or output._version == version)
        and torch.equal(output.double().flatten(), main)
    }  # fmt: skip
    return outputs, equal


def _unmoved(model: nn.Module, batch: Batch, names: set[str]) -> set[str]:
    """The Linears whose output is the model's output for other values, too.

    An operation that follows, such as a ReLU, may leave one batch as it is.
    """
    try:
        return names and _run_seen(model, batch, sorted(names), lambda out: -1024 * out - 1024)[1]
    except ValueError:  # the model does not run with such values
        return set()


def _with_output(model: nn.Module, group: Group, output_layers: set[str]) -> Group:
    """The group, with `output` only if its consumer's output is the model's output.

    Otherwise the loss cannot be computed from the layer's features.
    """
    if not group.output:
        return group
    if not is_simple(model, group):
        return replace(group, output=False, not_output="a sum over several features a unit")
    if group.consumer in output_layers:
        return group
    return replace(group, output=False, not_output="another operation or output")
