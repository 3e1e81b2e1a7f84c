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
        "greedyprune.integrations.transformers needs transformers and accelerate: "
        "pip install 'greedyprune[transformers]'"
    ) from error

STATE = "greedyprune"  # under stateful_callbacks in a checkpoint's trainer_state.json


class PretrainingCallback(TrainerCallback):
    """Calls a monitor's `step` after each of the optimiser's, and ends training when it says so.

    What checks find goes through `trainer.log`: into `state.log_history` and to all that the
    Trainer reports to. Its checkpoints hold the monitor's state.

    Args:
        monitor: of the model that the Trainer trains, with batches as data that this model takes:
            dicts with "labels"
        trainer: the Trainer

    Raises:
        TypeError: no PretrainingMonitor, or no Trainer

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
        if STATE in stored:  # resumed
            self.monitor.load_state_dict(stored[STATE])

    def on_step_end(
        self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        known = len(self.monitor.history)
        with _own_precision(self._trainer.model):
            if self.monitor.step():
                control.should_training_stop = True
        for check in self.monitor.history[known:]:
            due = control.should_log
            self._trainer.log(check.scalars())
            control.should_log = due  # the Trainer's own numbers are still to come
        self._keep(state, control)

    def on_epoch_end(
        self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._keep(state, control)

    def _keep(self, state: TrainerState, control: TrainerControl) -> None:
        stored: Any = state.stateful_callbacks
        if control.should_save:
            stored[STATE] = self.monitor.state_dict()


@contextmanager
def _own_precision(model: object) -> Iterator[None]:
    """Without the forward under autocast that accelerate puts on a model (bf16=True, fp16=True)."""
    own = vars(model)
    patched = own.pop("forward") if "forward" in own and "_original_forward" in own else None
    try:
        yield
    finally:
        if patched is not None:
            own["forward"] = patched
