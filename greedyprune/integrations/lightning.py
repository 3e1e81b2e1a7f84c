"""`PretrainingMonitor` as a callback of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..pretraining.monitor import PretrainingMonitor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "greedyprune.integrations.lightning needs Lightning; install the extra: "
        "pip install '.[lightning]' in the checkout"
    ) from error


class PretrainingCallback(Callback):
    """Calls the monitor's `step` after every optimiser step; ends training when it returns True.

    The results of each check go to the Trainer's loggers at once, at the step of the check. They
    also go into `trainer.callback_metrics` ("greedyprune/loss", ...), where other callbacks such as
    ModelCheckpoint read them. The Trainer's checkpoints hold the monitor's state. The Trainer's
    `min_epochs` and `min_steps` still hold.

    Args:
        monitor: a monitor of the LightningModule, or of a network in it that takes the monitor's
            data

    Raises:
        TypeError: `monitor` is not a PretrainingMonitor

    Example:
        monitor = greedyprune.PretrainingMonitor(module.network, data)
        trainer = lightning.Trainer(callbacks=[PretrainingCallback(monitor)])
    """

    def __init__(self, monitor: PretrainingMonitor) -> None:
        if not isinstance(monitor, PretrainingMonitor):
            raise TypeError(
                f"monitor: found {type(monitor).__name__}, expected a PretrainingMonitor"
            )
        self.monitor = monitor
        self._optimizer_steps = 0  # so far

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._optimizer_steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        if trainer.global_step == self._optimizer_steps:  # gradients are accumulated
            return
        self._optimizer_steps = trainer.global_step
        earlier_checks = len(self.monitor.history)
        if self.monitor.step():
            trainer.should_stop = True
        for check in self.monitor.history[earlier_checks:]:
            # log_dict alone would reach the loggers only every log_every_n_steps.
            for logger in trainer.loggers:
                logger.log_metrics(check.scalars(), step=trainer.global_step)
            pl_module.log_dict(check.scalars(), logger=False, on_step=True, rank_zero_only=True)

    def state_dict(self) -> dict[str, Any]:
        return self.monitor.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.monitor.load_state_dict(state_dict)
