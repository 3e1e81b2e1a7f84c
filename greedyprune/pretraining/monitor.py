"""How much pre-training is enough: pruning on trial while a network trains (Wolfe et al. 2021)."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import distributed, nn

from ..data.batches import Batches
from ..data.forward import evaluating
from ..data.losses import Criterion, Metric, criterion_of
from ..data.random_state import Passes, undisturbed
from ..kernels import backend as backends
from ..plan import NETWORK_LOSS, OUTPUT_LOSS, judge_of
from ..request import check_model, checked_request
from ..runtime.arguments import is_int, is_number
from ..runtime.distributed import ALONE, unwrapped
from ..selector import select, select_on
from ..surgery.cut import prune
from ..surgery.selection import Selection
from ..surgery.trial_cut import groups_of
from .evaluate import measure, metric_of
from .history import Check, LayerCheck
from .stopping import rule_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

STEPS = 200  # greedy steps where no option says when to stop: the papers'
NOT_TAKEN = ("process_group", "checkpoint")  # arguments of `select` that are not taken
SIZES = ("size", "tolerance")  # the options of select that do
T = TypeVar("T")


class Writer(Protocol):
    """torch.utils.tensorboard.SummaryWriter, or anything with its add_scalar."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


class PretrainingMonitor:
    """Prunes on trial every so many iterations, and says when more pre-training no longer pays.

        for inputs, targets in loader:
            ...
            optimizer.step()
            if monitor.step():
                break
        small = greedyprune.prune(model, monitor.selection)

    A check runs `select`, prunes a copy, and runs the dense and the pruned network on the data. It
    changes nothing that training sees: not the model, its gradients, modes or buffers, nor the
    state of torch's, Python's and NumPy's global random numbers and of a DataLoader's generators
    (a Dataset with a generator of its own is not known). All passes over the data draw the same
    random numbers, so that checks can be compared. Exact for a network with one hidden layer; a
    deep one is pruned layer by layer, as by `select`.

    Under torch.distributed the first process checks, with its part of the data, and all get what it
    found: call `step` on every process.

    Args:
        model: the module that is trained; of one that torch.compile, DistributedDataParallel or
            DataParallel wraps, the module inside
        data: what `select` looks at, with targets; tensors, a Dataset, a DataLoader or a list: some
            thousand training samples, say. No iterator, which can be gone through once
        steps: greedy steps of each selection; None: 200 where neither size nor tolerance is given
        every: iterations from one check to the next
        held_out: data to measure losses and metrics on; None: `data`
        stop: "plateau": the pruned loss has not fallen for `patience` checks; {"loss": x}: it is at
            most x; {"metric": x}: the pruned network's metric is at least x; {"share": x}: at least
            x times the dense network's; of several in one mapping, all. A share alone may hold at
            once: early in training a pruned network can be ahead of the dense one. "never"; or a
            function of the history that returns a bool, or the reason as text
        patience: checks in a row without a new lowest loss, as in Lightning's EarlyStopping
        min_delta: a loss counts as lower if it is by this share of the lowest so far: relative,
            like the threshold of torch's ReduceLROnPlateau
        metric: "auto": accuracy for cross_entropy and bce_with_logits (there of every output), none
            for others; a function of outputs and targets, all samples at once, to a number, of
            which more is better; None: none
        max_overhead: the share of the training time that checks may take. One that would go beyond
            (if it takes as long as the last) is left out; the first never is. None: no limit
        writer: a SummaryWriter for the curves
        options: further arguments of `select`, but its `metric` and what is for several processes
            and runs: `layers`, `size`, `loss`, ...

    Attributes:
        selection: the newest Selection; None before the first check and after load_state_dict
        reason: why pre-training should stop, one sentence; None while it should go on
        history: the checks so far, list of Check
        iteration: calls of `step` so far
        skipped: checks left out for `max_overhead`
        metric_name: "accuracy", or "metric" for one's own

    Raises:
        ValueError, TypeError: one sentence on the argument that is wrong, at once; from a check,
            what `select` raises: where weights have become NaN, say

    Example:
        >>> model = torch.nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> data = torch.randn(256, 4), torch.randint(3, (256,))
        >>> monitor = greedyprune.PretrainingMonitor(model, data, steps=20, every=2, patience=1)
        >>> [monitor.step() for _ in range(3)]
        [False, False, False]
        >>> monitor.check().iteration, monitor.step()
        (3, True)
    """

    def __init__(
        self,
        model: nn.Module,
        data: object,
        *,
        steps: int | None = None,
        every: int = 250,
        held_out: object = None,
        stop: str | Mapping[str, float] | Callable[[list[Check]], bool | str | None] = "plateau",
        patience: int = 3,
        min_delta: float = 0.01,
        metric: str | Metric | None = "auto",
        max_overhead: float | None = 0.05,
        writer: Writer | None = None,
        **options: Any,
    ) -> None:
        if not is_int(every) or every < 1:
            raise ValueError(f"every: found {every!r}, expected an int of at least 1 (iterations)")
        if max_overhead is not None and not (is_number(max_overhead) and max_overhead > 0):
            raise ValueError(
                f"max_overhead: found {max_overhead!r}, expected a share above 0, or None"
            )
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer: found {type(writer).__name__}, expected a SummaryWriter")
        for name in NOT_TAKEN:
            if name in options:
                raise ValueError(
                    f"{name}: found {options[name]!r}, expected none: the first process checks, by "
                    "itself, and anew each time"
                )
        if steps is None and not any(options.get(name) is not None for name in SIZES):
            steps = STEPS
        self._model, self._options = _unwrapped(model), {"steps": steps, **options}
        self._data = Passes(data)
        self._held_out = None if held_out is None else _held_out(lambda: Passes(held_out))
        self._every, self._max_overhead, self._writer = every, max_overhead, writer
        self._metric = metric
        self._criterion = self._try()
        self.metric_name = self._metric if isinstance(self._metric, str) else "metric"
        self._stop = rule_of(stop, patience, min_delta, self._metric is not None)
        self.history: list[Check] = []
        self.selection: Selection | None = None
        self.reason: str | None = None
        self.iteration = self.skipped = 0
        self._trained = 0.0  # seconds, until the clock was last started
        self._clock: float | None = None  # when that was, plus the seconds of checks since

    @property
    def training_seconds(self) -> float:
        """Since the first `step`, without the checks."""
        if self._clock is None:
            return self._trained
        return self._trained + time.perf_counter() - self._clock

    @property
    def overhead(self) -> float:
        """Seconds of checks as a share of those of training; infinite before there are any."""
        spent, trained = sum(check.seconds for check in self.history), self.training_seconds
        return spent / trained if trained else math.inf

    def step(self) -> bool:
        """Counts an iteration, and checks if it is time to; True once training may stop."""
        if self._clock is None:
            self._clock = time.perf_counter()
        self.iteration += 1
        if self.reason is None and self.iteration % self._every == 0:
            if self._on_first(self._affordable):
                self.check()
            else:
                self.skipped += 1
        return self.reason is not None

    def check(self) -> Check:
        """Checks now, whatever `every` and `max_overhead` say: before training, or at its end."""
        check, self.selection = self._on_first(self._measured)
        if self._clock is not None:
            self._clock += check.seconds
        self.history.append(check)
        if self.reason is None:
            self.reason = self._on_first(lambda: self._stop(self.history))
        if self._writer is not None:
            for tag, value in check.scalars().items():
                self._writer.add_scalar(tag, value, check.iteration)
        return check

    def state_dict(self) -> dict[str, Any]:
        """The history and where the monitor is, in plain numbers, texts and lists.

        For torch.save (also with weights_only=True) or JSON. Without `selection`, which is for
        weights that training leaves behind: after load_state_dict it is None until a check.
        """
        return {
            "iteration": self.iteration, "skipped": self.skipped, "reason": self.reason,
            "training_seconds": self.training_seconds,
            "history": [asdict(check) for check in self.history],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken; the arguments are not part of it."""
        missing = {"iteration", "skipped", "reason", "training_seconds", "history"} - {*state}
        if missing:
            raise ValueError(
                f"state: found no {sorted(missing)[0]!r}, expected what state_dict gave"
            )
        self.history = [Check.of_state(each) for each in state["history"]]
        self.iteration, self.skipped = state["iteration"], state["skipped"]
        self.reason, self.selection = state["reason"], None
        self._trained, self._clock = state["training_seconds"], None

    def summary(self) -> Table:
        """A rich table, a row a check: `rich.print(monitor.summary())`.

        Losses and metrics are of whole networks; gap and bound, where they are known, of the
        selection on `data`. What single layers lose: `history[-1].layers`, `selection.summary()`.
        """
        from .views import summary

        return summary(self, "data" if self._held_out is None else "held_out")

    def plot(self) -> Figure:
        """A figure: dense and pruned loss against the iterations; beside it their metrics.

        ImportError without matplotlib (`pip install greedyprune[plot]`).
        """
        from .views import plot

        return plot(self, "data" if self._held_out is None else "held-out data")

    def _try(self) -> Criterion:
        """What a check would refuse shows here, from the first batch; and the metric is known."""
        inspect.signature(select).bind(self._model, self._data, **self._options)
        given = {"loss": "auto", "backend": "auto", "progress": None} | self._options
        unchecked = ("loss", "backend", "progress")
        request = checked_request(**{n: v for n, v in given.items() if n not in unchecked})
        check_model(self._model)
        self._request, self._rest = request, {name: given[name] for name in unchecked}
        batches = Batches(self._data, self._model)
        with undisturbed(self._generators()), evaluating(self._model):
            first = batches.first()
            backends.resolve(given["backend"], batches.on_gpu)
            criterion = criterion_of(given["loss"], first.targets)
            self._metric = metric_of(self._metric, criterion)
            measure(self._model, [first], criterion, self._metric)
            if self._held_out is not None:
                held_out = Batches(self._held_out, self._model)
                _held_out(lambda: measure(self._model, [held_out.first()], criterion, self._metric))
            for group in groups_of(
                self._model, first, request.layers, request.consumers, request.sized_layers
            ):
                judge = judge_of(request, group)
                request.rule(group, by_loss=judge in (OUTPUT_LOSS, NETWORK_LOSS))
        return criterion

    def _generators(self) -> list[torch.Generator]:
        return self._data.generators + ([] if self._held_out is None else self._held_out.generators)

    def _affordable(self) -> bool:
        if self._max_overhead is None or not self.history:
            return True
        seconds = [check.seconds for check in self.history]
        return sum(seconds) + seconds[-1] <= self._max_overhead * self.training_seconds

    def _measured(self) -> tuple[Check, Selection]:
        if torch.cuda.is_initialized():  # what training has under way is not the check's time
            torch.cuda.synchronize()
        trained, start = self.training_seconds, time.perf_counter()
        source = self._data if self._held_out is None else self._held_out
        with undisturbed(self._generators()):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "loss: not used")  # it is, for what is measured
                selection = select_on(ALONE, self._model, self._data, self._request, **self._rest)
            dense, pruned = (
                measure(model, Batches(source, model), self._criterion, self._metric)
                for model in (self._model, prune(self._model, selection))
            )
        return Check(
            self.iteration, time.perf_counter() - start, trained, *dense, *pruned,
            tuple(LayerCheck.of(*item) for item in selection.layers.items()),
        ), selection  # fmt: skip

    def _on_first(self, compute: Callable[[], T]) -> T:
        """What the first process computes, on all of them."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return compute()
        found: list[Any] = [compute() if distributed.get_rank() == 0 else None]
        distributed.broadcast_object_list(found)
        return found[0]


def _unwrapped(model: object) -> nn.Module:
    """The module that a compiled or parallel one wraps; its parameters are the same."""
    inner = unwrapped(model)
    while isinstance(compiled := getattr(inner, "_orig_mod", None), nn.Module):
        inner = unwrapped(compiled)
    return inner


def _held_out(compute: Callable[[], T]) -> T:
    """An error about data is one about held_out."""
    try:
        return compute()
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("data:", "held_out:", 1)) from error
