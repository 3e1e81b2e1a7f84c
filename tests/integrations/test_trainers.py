"""The monitor inside Lightning's and Hugging Face's Trainer, in small runs of the real Trainers."""

from __future__ import annotations

import csv
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import greedyprune
from greedyprune import PretrainingMonitor

lightning = pytest.importorskip("lightning.pytorch")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from greedyprune.integrations import lightning as with_lightning  # noqa: E402
from greedyprune.integrations import transformers as with_transformers  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:::lightning"),
]
LAYER = "bert.encoder.layer.0.intermediate.dense"
MONITOR_OPTIONS = {"steps": 6, "every": 4, "max_overhead": None, "stop": "never"}


def history_without_seconds(monitor: PretrainingMonitor) -> list[greedyprune.Check]:
    return [replace(check, seconds=0, training_seconds=0) for check in monitor.history]


# ---------------------------------------------------------------- Lightning


def samples() -> tuple[Tensor, Tensor]:
    sampler = torch.Generator().manual_seed(2)
    x = torch.randn(96, 6, generator=sampler)
    return x, (x[:, 0] + x[:, 1] > 0).long()


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def fit(
    folder: Path, *, monitored: bool = True, whole: bool = False, resume: str | None = None,
    epochs: int = 3, callbacks: list = (), trainer_options: dict | None = None, **monitor_options,
) -> tuple[Module, PretrainingMonitor | None, lightning.Trainer]:  # fmt: skip
    """Trains with Lightning.

    whole: does the monitor get the LightningModule, rather than the network in it?
    resume: the path of a checkpoint to start from
    """
    module, monitor, callbacks = Module(), None, list(callbacks)
    if monitored:
        model = module if whole else module.network
        monitor = PretrainingMonitor(model, samples(), **(MONITOR_OPTIONS | monitor_options))
        callbacks.append(with_lightning.PretrainingCallback(monitor))
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=callbacks, default_root_dir=folder,
        logger=lightning.loggers.CSVLogger(folder, version=""), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(callbacks[:-1]),
        **(trainer_options or {}),
    )  # fmt: skip
    torch.manual_seed(1)
    loader = DataLoader(TensorDataset(*samples()), 12, shuffle=True)
    trainer.fit(module, loader, ckpt_path=resume)
    return module, monitor, trainer


@pytest.mark.parametrize(
    ("whole", "options"), [(False, {}), (True, {}), (False, {"precision": "bf16-mixed"})],
    ids=["network", "module", "bfloat16"],
)  # fmt: skip
def test_lightning_trains_the_same(tmp_path: Path, whole: bool, options: dict) -> None:
    plain, _, _ = fit(tmp_path / "plain", monitored=False, trainer_options=options)
    module, monitor, trainer = fit(tmp_path / "monitored", whole=whole, trainer_options=options)
    assert [check.iteration for check in monitor.history] == [4, 8, 12, 16, 20, 24]
    for name, value in plain.state_dict().items():
        assert module.state_dict()[name].equal(value)
    assert trainer.global_step == 24
    assert module.training == plain.training


def test_lightning_logs_and_stops(tmp_path: Path) -> None:
    module, monitor, trainer = fit(tmp_path, epochs=20, stop={"loss": 0.6})
    assert "the pruned network's loss" in monitor.reason
    assert trainer.global_step == monitor.iteration == monitor.history[-1].iteration < 160
    small = greedyprune.prune(module.network, monitor.selection)
    assert small[0].out_features == monitor.history[-1].kept
    with (tmp_path / "lightning_logs" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["greedyprune/loss"]]
    assert [int(row["step"]) for row in rows] == [check.iteration for check in monitor.history]
    for row, check in zip(rows, monitor.history, strict=True):
        assert float(row["greedyprune/loss"]) == check.loss
        assert float(row["greedyprune/dense_metric"]) == check.dense_metric
    logged = float(trainer.callback_metrics["greedyprune/loss"])
    assert logged == pytest.approx(monitor.history[-1].loss)


def test_lightning_counts_steps_of_the_optimizer(tmp_path: Path) -> None:
    _, monitor, trainer = fit(tmp_path, trainer_options={"accumulate_grad_batches": 2})
    assert trainer.global_step == monitor.iteration == 12
    assert [check.iteration for check in monitor.history] == [4, 8, 12]


def test_lightning_resumes(tmp_path: Path) -> None:
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1)
    _, expected, _ = fit(tmp_path, callbacks=[saving])
    _, resumed, _ = fit(tmp_path, resume=str(tmp_path / "epoch=0-step=8.ckpt"))
    assert [check.iteration for check in resumed.history] == [4, 8, 12, 16, 20, 24]
    assert resumed.history[:2] == expected.history[:2]  # the checks before the checkpoint


# ---------------------------------------------------------------- Hugging Face


def sentences() -> list[dict[str, Tensor]]:
    sampler = torch.Generator().manual_seed(2)
    tokens = torch.randint(30, (64, 7), generator=sampler)
    return [{"input_ids": row, "labels": (row[0] > 14).long()} for row in tokens]


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=8,
    ))  # fmt: skip


def run(
    folder: Path, *, monitored: bool = True, resume: str | None = None,
    training: dict | None = None, **monitor_options,
) -> tuple[nn.Module, PretrainingMonitor | None, transformers.Trainer]:  # fmt: skip
    """Trains with Hugging Face's Trainer.

    resume: the path of a checkpoint to start from; training: further TrainingArguments
    """
    model, monitor = bert(), None
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, use_cpu=True,
        report_to=[], disable_tqdm=True, learning_rate=5e-3, logging_steps=4,
        **{"save_strategy": "no", "num_train_epochs": 2, **(training or {})},
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=sentences())
    if monitored:
        batches = DataLoader(sentences(), 32)
        options = {"size": 0.5, "every": 8, "max_overhead": None, "stop": "never", "layers": LAYER}
        monitor = PretrainingMonitor(model, batches, **(options | monitor_options))
        trainer.add_callback(with_transformers.PretrainingCallback(monitor, trainer))
    trainer.train(resume_from_checkpoint=resume)
    return model, monitor, trainer


def test_hugging_face_trains_the_same(tmp_path: Path) -> None:
    plain, _, plain_trainer = run(tmp_path, monitored=False)
    model, monitor, trainer = run(tmp_path)
    assert [check.iteration for check in monitor.history] == [8, 16]
    for name, value in plain.state_dict().items():
        assert model.state_dict()[name].equal(value)
    logged = [entry for entry in trainer.state.log_history if "greedyprune/loss" in entry]
    assert [entry["step"] for entry in logged] == [8, 16]
    assert [entry["greedyprune/loss"] for entry in logged] == [c.loss for c in monitor.history]
    for name in ("loss", "grad_norm"):  # the Trainer's own logs are the same
        plain_log, log = (
            [entry[name] for entry in t.state.log_history if name in entry]
            for t in (plain_trainer, trainer)
        )
        assert plain_log == log != []
    small = greedyprune.prune(model, monitor.selection)
    assert small.config.intermediate_size == monitor.history[-1].kept == 12


def test_hugging_face_stops(tmp_path: Path) -> None:
    _, monitor, trainer = run(tmp_path, stop=lambda history: True)
    assert trainer.state.global_step == monitor.iteration == 8
    assert monitor.reason


def test_hugging_face_resumes(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 8}
    _, expected, _ = run(tmp_path, training=saving)
    _, resumed, _ = run(tmp_path / "again", resume=str(tmp_path / "checkpoint-8"))
    assert resumed.iteration == 16
    assert history_without_seconds(resumed) == history_without_seconds(expected)
    assert resumed.history[0] == expected.history[0]  # from the checkpoint: with its seconds


def test_hugging_face_in_bfloat16(tmp_path: Path) -> None:
    """Checks run in the precision of the weights, and training is still the same."""
    training = {"bf16": True, "num_train_epochs": 1}
    plain, _, _ = run(tmp_path, monitored=False, training=training)
    model, monitor, _ = run(tmp_path, training=training)
    for name, value in plain.state_dict().items():
        assert model.state_dict()[name].equal(value)
    fresh = bert()
    fresh.load_state_dict(model.state_dict())
    check = PretrainingMonitor(fresh, DataLoader(sentences(), 32), size=0.5, layers=LAYER).check()
    assert monitor.history[-1].loss == pytest.approx(check.loss, rel=1e-6)


# ---------------------------------------------------------------- bad input


def test_arguments_of_the_wrong_type(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="monitor: found int, expected a PretrainingMonitor"):
        with_lightning.PretrainingCallback(3)
    _, monitor, _ = fit(tmp_path, epochs=1)
    with pytest.raises(TypeError, match="monitor: found int, expected a PretrainingMonitor"):
        with_transformers.PretrainingCallback(3, None)
    with pytest.raises(TypeError, match=r"trainer: found NoneType, expected a transformers\.Tr"):
        with_transformers.PretrainingCallback(monitor, None)


@pytest.mark.parametrize(
    ("module", "framework"),
    [(with_lightning, "lightning.pytorch"), (with_transformers, "transformers")],
)
def test_without_the_framework(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, framework: str
) -> None:
    monkeypatch.setitem(sys.modules, framework, None)
    extra = framework.partition(".")[0]
    with pytest.raises(ImportError, match=rf"pip install '\.\[{extra}\]' in the checkout"):
        importlib.reload(module)
