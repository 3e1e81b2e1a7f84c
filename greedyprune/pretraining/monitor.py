"""`PretrainingMonitor`: how much pre-training is enough (Wolfe et al. 2021, arXiv:2108.00259).

While a network trains, the monitor prunes a copy of it at fixed intervals. A stopping rule then
decides from the results so far whether more pre-training helps.
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import distributed, nn

from ..data.batches import Batches
from ..data.forward import evaluating
from ..data.losses import Criterion, Metric, criterion_of
from ..data.padding import AUTO
from ..data.random_state import RepeatedPasses, preserving_random_state
from ..kernels import backend as backends
from ..plan import rules_of
from ..request import check_model, checked_request
from ..runtime.arguments import is_int, is_number
from ..runtime.distributed import ALONE
from ..runtime.modules import module_of
from ..runtime.progress import bars
from ..selector import criterion_on, select, select_on
from ..surgery.cut import prune
from ..surgery.selection import Selection
from ..surgery.trial_cut import groups_of
from . import views
from .evaluate import loss_and_metric, metric_of
from .history import Check, LayerCheck
from .stopping import stopping_rule

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

STEPS = 200  # greedy steps where no option says how many: as in both papers
STOPPING_OPTIONS = ("size", "tolerance")  # options of `select` that say how many
REFUSED_OPTIONS = ("process_group", "checkpoint")  # a check runs in one process
T = TypeVar("T")


class Writer(Protocol):
    """torch.utils.tensorboard.SummaryWriter, or any other object with its `add_scalar`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


class PretrainingMonitor:
    """Prunes copies of a network while it trains; says when more pre-training no longer helps.

        for inputs, targets in loader:
            ...
            optimizer.step()
            if monitor.step():
                break
        small = greedyprune.prune(model, monitor.selection)

    Every `every` iterations the monitor makes a check: it runs `select`, prunes a copy of the
    network, and measures the loss of the dense and of the pruned network. In a network with one
    hidden layer, units are picked by the network's own loss. A deep network is pruned layer by
    layer, as by `select`.

    A check does not affect training. The model's parameters, gradients, modes and buffers stay the
    same. So does the state of the global random number generators of torch, Python and NumPy, and
    of the generators of a DataLoader. (A generator inside a Dataset is not protected.) All passes
    over the data draw the same random numbers, so that checks can be compared with one another.

    Under torch.distributed, call `step` on every process. The first process makes the checks, on
    its own part of the data, and sends the result to the others.

    Args:
        model: the module in training. Of a module wrapped by torch.compile, DistributedDataParallel
            or DataParallel, the module inside is used.
        data: the inputs and targets that `select` uses: tensors, a Dataset, a DataLoader or a list.
            A few thousand training samples are enough. An iterator is refused, because every check
            needs a pass of its own.
        steps: the number of greedy steps of each selection. None: 200, unless size or
            tolerance is given
        every: iterations from one check to the next
        held_out: the data to measure losses and metrics on. None: `data`
        stop: the rule that ends pre-training. One of:

            - "plateau": the pruned network's loss has had no new lowest value for `patience` checks
            - {"loss": x}: the pruned network's loss is at most x
            - {"metric": x}: the pruned network's metric is at least x; for accuracy x is in [0, 1]
            - {"share": x}: the pruned network's metric is at least x times the dense network's,
              with x in (0, 1]. By itself this can hold at the first check: early in training a
              pruned network can be ahead of the dense one
            - a mapping with several of these: all of them hold
            - "never"
            - a function of the history that returns a bool, or the reason to stop as a str
        patience: for "plateau": how many checks in a row may pass without a new lowest loss, as in
            Lightning's EarlyStopping
        min_delta: for "plateau": a loss is a new lowest if it is below the lowest so far by more
            than this share of it. The threshold is relative, as in torch's ReduceLROnPlateau.
        metric: "auto": accuracy for cross_entropy and for bce_with_logits (there over all outputs),
            no metric for other losses. Or a function of all outputs and all targets that returns a
            number, which should be high. None: no metric
        max_overhead: the time that checks may take, as a share of the training time. A check is
            left out if it would exceed the share, assuming that it takes as long as the last one.
            The first check is never left out. None: no limit
        writer: a SummaryWriter, for the curves
        options: further arguments of `select`, such as `layers`, `size` and `loss`, but not
            `process_group` and `checkpoint`

    Attributes:
        selection: the newest Selection. None before the first check and after load_state_dict
        reason: why pre-training should stop, in one sentence. None while it should go on
        history: the checks so far, a list of Check
        iteration: how often `step` has been called
        skipped: how many checks `max_overhead` has left out
        metric_name: "accuracy", or "metric" for your own function

    Raises:
        ValueError, TypeError: a wrong argument, reported at once in one sentence. A check raises
            the errors of `select`, for example when weights have become NaN.

    Example:
        >>> model = torch.nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> data = torch.randn(256, 4), torch.randint(3, (256,))
        >>> monitor = greedyprune.PretrainingMonitor(model, data, steps=20, every=2, patience=1)
        >>> [monitor.step() for _ in range(3)]
        [False, False, False]
        >>> monitor.check().iteration, monitor.step()
        (3, True)

    Source: Wolfe et al., "How much pre-training is enough to discover a good subnetwork?",
    arXiv:2108.00259.
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
        for name in REFUSED_OPTIONS:
            if name in options:
                raise ValueError(
                    f"{name}: found {options[name]!r}, expected none: the first process alone "
                    "makes the checks, and a check is not resumed"
                )
        if steps is None and not any(options.get(name) is not None for name in STOPPING_OPTIONS):
            steps = STEPS
        self._model, self._options = module_of(model), {"steps": steps, **options}
        self._data = RepeatedPasses(data)
        self._held_out: RepeatedPasses | None = None
        if held_out is not None:
            self._held_out = _about_held_out(lambda: RepeatedPasses(held_out))
        self._every, self._max_overhead, self._writer = every, max_overhead, writer
        self._metric = metric
        self._criterion = self._check_arguments()
        self.metric_name = self._metric if isinstance(self._metric, str) else "metric"
        self._stop = stopping_rule(stop, patience, min_delta, self._metric)
        self.history: list[Check] = []
        self.selection: Selection | None = None
        self.reason: str | None = None
        self.iteration = self.skipped = 0
        # Seconds of training = those up to the last load_state_dict + (now - the clock). Every
        # check moves the clock forward by the seconds that it took.
        self._earlier_seconds = 0.0
        self._clock: float | None = None

    @property
    def training_seconds(self) -> float:
        """Seconds since the first `step`, without the checks."""
        if self._clock is None:
            return self._earlier_seconds
        return self._earlier_seconds + time.perf_counter() - self._clock

    @property
    def overhead(self) -> float:
        """The seconds of checks as a share of the seconds of training; infinite before training."""
        return self._check_seconds / trained if (trained := self.training_seconds) else math.inf

    @property
    def _check_seconds(self) -> float:
        return sum(check.seconds for check in self.history)

    def step(self) -> bool:
        """Counts one iteration, and makes a check if one is due. True: training may stop."""
        if self._clock is None:
            self._clock = time.perf_counter()
        self.iteration += 1
        if self.reason is None and self.iteration % self._every == 0:
            if self._on_first_process(self._is_affordable):
                self.check()
            else:
                self.skipped += 1
        return self.reason is not None

    def check(self) -> Check:
        """Makes a check now, whatever `every` and `max_overhead` are.

        This is useful before training and at its end.
        """
        check, self.selection = self._on_first_process(self._run_check)
        if self._clock is not None:
            self._clock += check.seconds
        self.history.append(check)
        if self.reason is None:
            self.reason = self._on_first_process(lambda: self._stop(self.history))
        if self._writer is not None:
            for tag, value in check.scalars().items():
                self._writer.add_scalar(tag, value, check.iteration)
        return check

    def state_dict(self) -> dict[str, Any]:
        """The history and the progress of the monitor, in plain numbers, strings and lists.

        It can be written by torch.save (and read with weights_only=True) or as JSON. `selection` is
        not part of it, because training has since changed the weights that it was made for. After
        load_state_dict it is None until the next check.
        """
        return {
            "iteration": self.iteration, "skipped": self.skipped, "reason": self.reason,
            "training_seconds": self.training_seconds,
            "history": [asdict(check) for check in self.history],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned; the monitor's arguments are not part of it."""
        missing = {"iteration", "skipped", "reason", "training_seconds", "history"} - {*state}
        if missing:
            raise ValueError(
                f"state: found no {sorted(missing)[0]!r}, expected the result of state_dict"
            )
        self.history = [Check.of_state(check) for check in state["history"]]
        self.iteration, self.skipped = state["iteration"], state["skipped"]
        self.reason, self.selection = state["reason"], None
        self._earlier_seconds, self._clock = state["training_seconds"], None

    def summary(self) -> Table:
        """A rich table with a row for each check: `rich.print(monitor.summary())`.

        Losses and metrics are those of whole networks. The gap and the bound, if they are known,
        are those of the selection on `data`. The losses of single layers are in
        `history[-1].layers` and in `selection.summary()`.
        """
        measured_on = "data" if self._held_out is None else "held_out"
        return views.summary(self.history, self.metric_name, measured_on, self._notes())

    def _notes(self) -> Iterator[str]:
        """What the summary says below the table: the time that checks took, and the decision."""
        share = f": {self.overhead:.1%}" if self.iteration else ""
        yield (
            f"checks: {len(self.history)}, left out: {self.skipped}; {self._check_seconds:.1f} s "
            f"beside {self.training_seconds:.1f} s of training{share}"
        )
        yield f"stop: {self.reason}" if self.reason else f"iteration {self.iteration}: go on"

    def plot(self) -> Figure:
        """A figure of the dense and the pruned network's loss over the iterations.

        A second panel shows the metric, if there is one. ImportError without matplotlib (install
        the extra: `pip install '.[plot]'` in the checkout).
        """
        measured_on = "data" if self._held_out is None else "held-out data"
        return views.plot(self.history, self.metric_name, measured_on, self.reason)

    def _check_arguments(self) -> Criterion:
        """Raises at once, on the first batch, what a check would raise; also sets the metric."""
        inspect.signature(select).bind(self._model, self._data, **self._options)
        given = {"loss": "auto", "backend": "auto", "progress": None, "mask": AUTO} | self._options
        unchecked = ("loss", "backend", "progress", "mask")
        request = checked_request(**{n: v for n, v in given.items() if n not in unchecked})
        check_model(self._model)
        bars(given["progress"])  # raises for anything but True, False and None
        self._request, self._rest = request, {name: given[name] for name in unchecked}
        self._mask = given["mask"]
        batches = Batches(self._data, self._model, mask=self._mask)
        with preserving_random_state(self._generators()), evaluating(self._model):
            first = batches.first()
            backends.resolve(given["backend"], batches.on_gpu)
            criterion = criterion_of(given["loss"], first.targets)
            self._metric = metric = metric_of(self._metric, criterion)
            criterion, self._shift = criterion_on(self._model, batches, criterion)
            loss_and_metric(self._model, [batches.first()], criterion, metric)
            if self._held_out is not None:
                _about_held_out(
                    lambda: loss_and_metric(
                        self._model, [self._measured(self._model, criterion).first()], criterion,
                        metric,
                    )
                )  # fmt: skip
            groups, _ = groups_of(
                self._model, first, request.layers, request.consumers, request.sized_layers
            )
            rules_of(request, groups)
        return criterion

    def _measured(self, model: nn.Module, criterion: Criterion) -> Batches:
        """The data that losses and metrics are measured on, as this model takes them."""
        source = self._data if self._held_out is None else self._held_out
        batches = Batches(source, model, mask=self._mask)
        batches.ignored, batches.shift = criterion.ignored_label, self._shift
        return batches

    def _generators(self) -> list[torch.Generator]:
        return self._data.generators + ([] if self._held_out is None else self._held_out.generators)

    def _is_affordable(self) -> bool:
        """Does one more check keep within `max_overhead` if it takes as long as the last one?"""
        if self._max_overhead is None or not self.history:
            return True
        seconds = self._check_seconds + self.history[-1].seconds
        return seconds <= self._max_overhead * self.training_seconds

    def _run_check(self) -> tuple[Check, Selection]:
        if torch.cuda.is_initialized():  # the check's time must not include training's GPU work
            torch.cuda.synchronize()
        trained, start = self.training_seconds, time.perf_counter()
        with preserving_random_state(self._generators()):
            with warnings.catch_warnings():
                # Layers that imitate do not use the loss; here the whole network's loss uses it.
                warnings.filterwarnings("ignore", "loss: not used")
                selection = select_on(ALONE, self._model, self._data, self._request, **self._rest)
            (dense_loss, dense_metric), (loss, metric) = (
                loss_and_metric(
                    model, self._measured(model, self._criterion), self._criterion, self._metric
                )
                for model in (self._model, prune(self._model, selection))
            )
        check = Check(
            iteration=self.iteration, seconds=time.perf_counter() - start,
            training_seconds=trained, dense_loss=dense_loss, dense_metric=dense_metric, loss=loss,
            metric=metric,
            layers=tuple(LayerCheck.of(name, layer) for name, layer in selection.layers.items()),
        )  # fmt: skip
        return check, selection

    def _on_first_process(self, compute: Callable[[], T]) -> T:
        """Computes on the first process, and returns the result on all of them."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return compute()
        result: list[Any] = [compute() if distributed.get_rank() == 0 else None]
        distributed.broadcast_object_list(result)
        return result[0]


def _about_held_out(compute: Callable[[], T]) -> T:
    """Calls `compute`, which reads `held_out`; its errors about "data" then name "held_out"."""
    try:
        return compute()
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("data:", "held_out:", 1)) from error
