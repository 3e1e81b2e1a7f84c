"""The time of a forward pass as a function of the layers' sizes, measured."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from .data.as_written import as_deployed
from .data.batches import Batch
from .data.forward import hooked, run_model
from .graph.costs import Cost, blocks_of
from .graph.networks import tensors_of
from .sizes.kinds import Kinds, sizes_in_one_share
from .surgery.cut import cut_to

SHARES = (1.0, 0.75, 0.5, 0.25)  # of every layer's units, where latencies are measured
SECONDS, RUNS = 2.0, 5  # measuring takes at least so long, and so many runs of each model


Deploy = Callable[[nn.Module], Callable[..., object]]


def latency_of(model: nn.Module, kinds: Kinds, batch: Batch, deploy: Deploy | None = None) -> Cost:
    """Nanoseconds: a module's time is modelled as a constant and a part in proportion to its sizes.

    That part is the slope of a line through the module's times in models cut to a few shares of all
    sizes. Groups that cut other entries of its weights, as after a concatenation, have parts of it
    by the numbers of these entries. All parts are then scaled to the time that the whole model
    gains.

    deploy: `Budget.deploy`; the modules' times are always those of the model itself
    """
    groups = [group for kind in kinds for group in kind]
    sizes_of = [sizes_in_one_share(kind, 1) for kind in kinds]
    cut = [
        {
            group.producer: size
            for kind, sizes in zip(kinds, sizes_of, strict=True)
            for group, size in zip(kind, sizes[max(1, round(share * len(sizes))) - 1], strict=True)
        }
        for share in SHARES
    ]
    owners = dict[str, Counter[tuple[str, ...]]]()  # for each module the entries of its blocks
    for name in dict.fromkeys(name for group in groups for name in group.slices):
        blocks = owners.setdefault(name.rpartition(".")[0], Counter())
        blocks.update(blocks_of(groups, name, tensors_of(model)[name].shape))
    models = [cut_to(model, groups, widths) for widths in cut]
    by_module = medians(models, batch, sorted(owners))
    whole = [times[""] for times in medians(models, batch, deploy=deploy)]  # last: may change them
    units = {group.producer: group.units for group in groups}
    parts: Counter[tuple[str, ...]] = Counter()
    for name, blocks in owners.items():
        total = blocks.total()
        shares = [
            sum(
                entries / total * math.prod(w[layer] / units[layer] for layer in layers)
                for layers, entries in blocks.items()
            )
            for w in cut
        ]
        slope = float(np.polyfit(shares, [times[name] for times in by_module], 1)[0])
        for layers, entries in blocks.items():
            parts[layers] += max(0, round(slope * entries / total))
    dense = round(whole[0])
    foreseen = dense - Cost(dense, units, parts).at(cut[-1])
    scale = max(0.0, whole[0] - whole[-1]) / max(1, foreseen)
    return Cost(dense, units, {layers: round(scale * t) for layers, t in parts.items()})


def medians(
    models: Sequence[nn.Module], batch: Batch, modules: Sequence[str] = (),
    deploy: Deploy | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Nanoseconds of each model (by the name "") and of its modules, over interleaved runs.

    deploy: `Budget.deploy`, for models as a whole; it may change the models
    """
    runners = [_runner(model, batch, deploy) for model in models]
    times: list[dict[str, list[float]]] = [{} for _ in models]
    begun = time.perf_counter()
    runs = 0
    with as_deployed():
        while runs <= RUNS or time.perf_counter() - begun < SECONDS:
            for model, run, into in zip(models, runners, times, strict=True):
                for name, elapsed in _timed(model, run, modules).items():
                    if runs:  # the first one warms up
                        into.setdefault(name, []).append(elapsed)
            if not runs:
                begun = time.perf_counter()
            runs += 1
    return [{name: median(runs) for name, runs in into.items()} for into in times]


def _runner(model: nn.Module, batch: Batch, deploy: Deploy | None) -> Callable[[], object]:
    """What is timed."""
    if deploy is None:
        return partial(run_model, model, batch)
    with as_deployed():
        deployed = deploy(model)
    if not callable(deployed):
        raise TypeError(
            f"deploy: your function returned {type(deployed).__name__}, expected a function of the "
            "batch, such as a model"
        )
    return partial(deployed, *batch.args, **batch.kwargs)


def _timed(model: nn.Module, run: Callable[[], object], modules: Sequence[str]) -> dict[str, float]:
    begun: dict[str, float] = {}
    elapsed = dict.fromkeys(modules, 0.0)

    def start(name: str, _: Tensor) -> None:
        begun[name] = _now()

    def stop(name: str, _: Tensor) -> None:
        elapsed[name] += _now() - begun[name]

    with hooked(model, modules, before=start, after=stop):
        before = _now()
        run()
        elapsed[""] = _now() - before
    return elapsed


def _now() -> float:
    """Nanoseconds, once the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter_ns()
