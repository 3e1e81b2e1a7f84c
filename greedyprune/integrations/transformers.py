"""`PretrainingMonitor` as a callback of Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..pretraining.monitor import PretrainingMonitor

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
except ImportError as error:
    raise ImportError(
        "greedyprune.integrations.transformers needs transformers and accelerate; install the "
        "extra: pip install '.[transformers]' in the checkout"
    ) from error

STATE_KEY = "greedyprune"  # in `stateful_callbacks` of a checkpoint's trainer_state.json


class PretrainingCallback(TrainerCallback):
    """Calls the monitor's `step` after every optimiser step; ends training when it returns True.

    The results of each check are logged by `trainer.log`. So they are in `state.log_history`, and
    in every service that the Trainer reports to. The Trainer's checkpoints hold the monitor's
    state.

    Args:
        monitor: a monitor of the Trainer's model. Its data are batches for this model: dicts with
            "labels"
        trainer: the Trainer

    Raises:
        TypeError: `monitor` is not a PretrainingMonitor, or `trainer` is not a Trainer

    Example:
        monitor = greedyprune.PretrainingMonitor(model, batches, size=0.5)
        trainer.add_callback(PretrainingCallback(monitor, trainer))
    """

    def __init__(self, monitor: PretrainingMonitor, trainer: Trainer) -> None:
        if not isinstance(monitor, PretrainingMonitor):
            raise TypeError(
                f"monitor: found {type(monitor).__name__}, expected a PretrainingMonitor"
            )
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"trainer: found {type(trainer).__name__}, expected a transformers.Trainer"
            )
        self.monitor, self._trainer = monitor, trainer

    def on_train_begin(
        self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stored: Any = state.stateful_callbacks
        if STATE_KEY in stored:  # training resumes from a checkpoint
            self.monitor.load_state_dict(stored[STATE_KEY])

    def on_step_end(
        self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        earlier_checks = len(self.monitor.history)
        with _without_autocast(self._trainer.model):
            if self.monitor.step():
                control.should_training_stop = True
        for check in self.monitor.history[earlier_checks:]:
            should_log = control.should_log
            self._trainer.log(check.scalars())
            control.should_log = should_log  # `log` resets it; the Trainer's own log is still due
        self._store(state, control)

    def on_epoch_end(
        self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._store(state, control)

    def _store(self, state: TrainerState, control: TrainerControl) -> None:
        stored: Any = state.stateful_callbacks
        if control.should_save:
            stored[STATE_KEY] = self.monitor.state_dict()


@contextmanager
def _without_autocast(model: object) -> Iterator[None]:
    """Takes away the autocast that accelerate wraps around `model.forward` for bf16 and fp16."""
    attributes = vars(model)
    wrapped = "forward" in attributes and "_original_forward" in attributes
    autocast_forward = attributes.pop("forward") if wrapped else None
    try:
        yield
    finally:
        if autocast_forward is not None:
            attributes["forward"] = autocast_forward
