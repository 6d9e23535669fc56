"""What loggers get to know of who trains: numbers for all, sentences where there is a place."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_freeze import FreezeBackbone, GradualUnfreeze, TrainableParamAudit
from lightning_freeze.callbacks._loggers import _AT_ONCE
from tests.toys import Toy, loader, trainer

HEAD, BLOCK, ALL = 27, 88, 27 + 3 * 88 + 40
COUNTS = [HEAD, HEAD + BLOCK, HEAD + 2 * BLOCK]
MLFLOW = re.compile(r"[a-zA-Z0-9_/. -]+")


class Plain(Logger):
    """A logger with Lightning's public interface, and nothing else."""

    def __init__(self) -> None:
        self.calls: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "plain"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.calls.append((step, dict(metrics)))

    @property
    def ours(self) -> list[tuple[int | None, dict[str, float]]]:
        return [(step, m) for step, m in self.calls if "freeze/stage" in m]


class Broken(Plain):
    """A logger whose server is gone."""

    tried = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        if "freeze/stage" in metrics:
            self.tried += 1
            raise ConnectionError("the server is gone")


class TwoOptimizers(Toy):
    """As a GAN: both step in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        self.log("train_loss", 1.0)

    def configure_optimizers(self) -> Any:
        low, top = self.backbone.parameters(), self.head.parameters()
        return [torch.optim.SGD(low, lr=0.1), torch.optim.SGD(top, lr=0.1)]


def fit(*loggers: Any, epochs: int = 3, callbacks: Any = None, model: Any = None) -> Any:
    """Three epochs of four steps; a block more trains in each."""
    given = [GradualUnfreeze(lr_decay=0.5)] if callbacks is None else callbacks
    audit = TrainableParamAudit(table=False)
    run = trainer(*given, audit, epochs=epochs, logger=list(loggers), log_every_n_steps=1)
    run.fit(model or Toy(), loader())
    assert audit.findings == []
    return audit


def test_counts_stage_and_rates_are_logged_with_the_step_and_the_epoch_they_hold_from() -> None:
    log = Plain()
    fit(log)
    assert [step for step, _ in log.ours] == [0, 4, 8]
    found = [metrics for _, metrics in log.ours]
    assert [m["epoch"] for m in found] == [0, 1, 2]
    assert [m["freeze/stage"] for m in found] == [0, 1, 2]
    assert [m["freeze/trainable_parameters"] for m in found] == COUNTS
    assert [m["freeze/frozen_parameters"] for m in found] == [ALL - count for count in COUNTS]
    assert [m["freeze/lr/head"] for m in found] == [1e-2] * 3
    assert [m["freeze/lr/backbone.blocks.2"] for m in found] == [0.0, 5e-3, 5e-3]
    assert [m["freeze/lr/backbone.blocks.1"] for m in found] == [0.0, 0.0, 2.5e-3]


def test_nothing_is_logged_in_between() -> None:
    log = Plain()
    fit(log, epochs=1)
    assert len(log.ours) == 1
    assert len(log.calls) > 4  # the user's own, at each step


def test_a_change_within_an_epoch_is_logged_at_its_step() -> None:
    log = Plain()
    fit(log, epochs=1, callbacks=[GradualUnfreeze(start=2, unit="step")])
    assert [step for step, _ in log.ours] == [0, 2, 3]
    assert [m["freeze/stage"] for _, m in log.ours] == [0, 1, 2]
    assert {m["epoch"] for _, m in log.ours} == {0}


def test_the_step_is_the_one_that_other_metrics_have_where_two_optimizers_step() -> None:
    log = Plain()
    fit(log, callbacks=[GradualUnfreeze(start=1)], model=TwoOptimizers())
    assert [step for step, _ in log.ours] == [0, 4, 8]
    assert max(step or 0 for step, m in log.calls if "train_loss" in m) == 11


def test_with_log_metrics_off_or_without_a_logger_nothing_is_logged() -> None:
    log = Plain()
    run = trainer(FreezeBackbone(), TrainableParamAudit(table=False, log_metrics=False), logger=log)
    run.fit(Toy(), loader())
    assert log.ours == []
    assert fit(epochs=1).verdict.startswith("Audit: clean")


def test_every_logger_gets_what_a_single_one_gets(tmp_path: Path) -> None:
    alone, first, second = Plain(), Plain(), Plain()
    fit(alone)
    fit(first, CSVLogger(tmp_path), second)
    assert first.ours == second.ours == alone.ours


def test_only_the_first_process_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Plain()

    class Second(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            monkeypatch.setattr(type(trainer), "is_global_zero", False)

    fit(log, epochs=1, callbacks=[FreezeBackbone(), Second()])
    assert log.ours == []


def test_names_hold_only_what_every_logger_accepts() -> None:
    log = Plain()
    groups = ["backbone.embed", "re:blocks.*norm", "backbone.blocks.*.linear"]
    fit(log, callbacks=[GradualUnfreeze(groups=groups)])
    names = {name for _, metrics in log.calls for name in metrics}
    assert {name for name in names if not MLFLOW.fullmatch(name)} == set()
    assert "freeze/lr/backbone.blocks.1" in names


def test_the_rate_of_each_layer_group_is_logged_as_it_really_is() -> None:
    log, monitor = Plain(), LearningRateMonitor()
    fit(log, callbacks=[GradualUnfreeze(lr_decay=0.5), monitor], epochs=3)
    last = {name: value for _, metrics in log.ours for name, value in metrics.items()}
    assert last["freeze/lr/head"] == 1e-2
    assert last["freeze/lr/backbone.blocks.1"] == 1e-2 * 0.5**2
    assert last["freeze/lr/backbone.embed"] == 0.0  # frozen
    assert set(monitor.lrs) == {"lr-AdamW"}  # Lightning's shows the user's group


def test_csv_gets_numbers_alone_and_a_row_for_each_stage(tmp_path: Path) -> None:
    fit(CSVLogger(tmp_path))
    path = tmp_path / "lightning_logs" / "version_0" / "metrics.csv"
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["freeze/stage"]]
    assert [(row["epoch"], row["step"], row["freeze/stage"]) for row in rows] == [
        ("0.0", "0", "0.0"),
        ("1.0", "4", "1.0"),
        ("2.0", "8", "2.0"),
    ]
    assert [float(row["freeze/trainable_parameters"]) for row in rows] == COUNTS


def test_tensorboard_shows_numbers_and_each_transition_as_text(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(TensorBoardLogger(tmp_path, name="", version=""))
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    counts = events.Scalars("freeze/trainable_parameters")
    assert [(event.step, event.value) for event in counts] == list(zip([0, 4, 8], COUNTS))
    texts = events.Tensors("freeze/transitions/text_summary")
    assert [event.step for event in texts] == [0, 4, 8]
    assert [event.tensor_proto.string_val[0].decode() for event in texts] == [
        "Epoch 0, step 0: `head` trains. 27 of 331 parameters train (8.2 %).",
        "Epoch 1, step 4: `backbone.blocks.2` begins to train. "
        "115 of 331 parameters train (34.7 %).",
        "Epoch 2, step 8: `backbone.blocks.1` begins to train. "
        "203 of 331 parameters train (61.3 %).",
    ]


def test_mlflow_takes_the_numbers_and_keeps_the_transitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    from lightning.pytorch.loggers import MLFlowLogger

    with warnings.catch_warnings():
        # its own; that a name was illegal would be a RuntimeWarning, which stays an error
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        log = MLFlowLogger("x", tracking_uri=(tmp_path / "runs").as_uri())
        groups = ["**.embed", "**.norm", "**.linear"]
        fit(log, callbacks=[GradualUnfreeze(groups=groups), LearningRateMonitor()])
        client, run = log.experiment, log.run_id
        counts = client.get_metric_history(run, "freeze/trainable_parameters")
        data = client.get_run(run).data
    assert [metric.step for metric in counts] == [0, 4, 8]
    assert {"freeze/lr/backbone.blocks.1", "lr-AdamW/_.linear"} <= set(data.metrics)
    assert data.tags["freeze.last_transition"].startswith("Epoch 2, step 8: ")
    (listed,) = tmp_path.rglob("transitions.md")
    lines = listed.read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "- Epoch 0, step 0",
        "- Epoch 1, step 4",
        "- Epoch 2, step 8",
    ]


def test_wandb_takes_the_numbers_and_a_table_of_transitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    from lightning.pytorch.loggers import WandbLogger

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", ResourceWarning)
        log = WandbLogger(project="x", save_dir=str(tmp_path), offline=True)
        fit(log)
        summary = dict(log.experiment.summary)
        wandb.finish()
    assert summary["freeze/trainable_parameters"] == COUNTS[-1]
    assert summary["freeze/lr/head"] == 1e-2
    tables = sorted(tmp_path.rglob("*.table.json"), key=lambda path: path.stat().st_size)
    assert "Epoch 2, step 8: `backbone.blocks.1` begins to train." in tables[-1].read_text()


def test_a_logger_that_fails_costs_one_warning_and_not_the_fit() -> None:
    broken, sound = Broken(), Plain()
    with pytest.warns(UserWarning, match=r"`Broken` couldn't log the numbers .*server is gone"):
        audit = fit(broken, sound)
    assert broken.tried == 1
    assert len(sound.ours) == 3
    assert audit.verdict.startswith("Audit: clean")


def test_a_logger_that_takes_numbers_but_no_text_keeps_its_numbers() -> None:
    class Writer:
        def add_text(self, *args: Any) -> None:
            raise OSError("the disk is full")

    class TensorBoardLogger(Plain):  # by that name, as a subclass of Lightning's has it
        experiment = Writer()

    log = TensorBoardLogger()
    with pytest.warns(UserWarning, match=r"couldn't log the transitions .*the disk is full"):
        fit(log)
    assert [m["freeze/trainable_parameters"] for _, m in log.ours] == COUNTS


class WandbLogger(Plain):
    """Counts how often it gets the list of transitions, and how long it is."""

    def __init__(self) -> None:
        super().__init__()
        self.lists: list[int] = []

    def log_text(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        assert len(columns) == len(data[0])
        self.lists.append(len(data))


def test_the_list_of_very_many_transitions_is_sent_once_an_epoch() -> None:
    blocks = _AT_ONCE + 10
    log, groups = WandbLogger(), [f"backbone.blocks.{i}" for i in range(blocks)]
    callback = GradualUnfreeze(unit="step", groups=groups)
    run = trainer(callback, TrainableParamAudit(table=False), epochs=1, logger=log)
    run.fit(Toy(blocks=blocks), loader(rows=6 * (blocks + 4)))
    assert log.lists[:_AT_ONCE] == list(range(1, _AT_ONCE + 1))
    assert len(log.lists) == _AT_ONCE + 1
    assert log.lists[-1] >= _AT_ONCE + 10


def test_a_resumed_fit_goes_on_counting_stages_and_listing_transitions(tmp_path: Path) -> None:
    def run(epochs: int, log: WandbLogger, path: Any = None) -> None:
        given = trainer(
            GradualUnfreeze(), TrainableParamAudit(table=False), epochs=epochs, logger=log
        )
        given.fit(Toy(), loader(), ckpt_path=path)
        given.save_checkpoint(tmp_path / "last.ckpt")

    whole, first, second = WandbLogger(), WandbLogger(), WandbLogger()
    run(3, whole)
    run(2, first)
    run(3, second, tmp_path / "last.ckpt")
    assert [m["freeze/stage"] for _, m in whole.ours] == [0, 1, 2]
    assert [m["freeze/stage"] for _, m in second.ours][-1] == 2
    assert whole.lists == [1, 2, 3]
    assert second.lists == [3]
