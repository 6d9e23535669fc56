"""A freezing callback whose stages pass when a logged metric stops improving."""

from __future__ import annotations

from typing import Any

from lightning_freeze.arguments import one_of, whole
from lightning_freeze.callbacks._following import Following
from lightning_freeze.callbacks._lightning import LightningModule, Trainer
from lightning_freeze.callbacks._metric import missing_metric
from lightning_freeze.callbacks.base import FreezingCallback
from lightning_freeze.engine.distributed import from_all_ranks
from lightning_freeze.errors import ArgumentError
from lightning_freeze.schedule.schedule import MetricClock, UnfreezeSchedule


class MetricDriven(FreezingCallback):
    """Counts stages by the clock, or by a metric if `monitor` names one."""

    def __init__(self, monitor: str | None, mode: str, patience: int, min_delta: float) -> None:
        super().__init__()
        self.monitor = monitor
        self.mode = one_of(mode, "mode", ("min", "max"))
        self.patience = whole(patience, "patience", least=1)
        if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)) or min_delta < 0:
            raise ArgumentError(f"`min_delta` is {min_delta!r}. Write a number from 0.")
        self.min_delta = float(min_delta)
        self._following = self._new_following()

    def _new_following(self) -> Following | None:
        if self.monitor is None:
            return None
        return Following(self.monitor, MetricClock(self.mode, self.patience, self.min_delta))

    def stage(self, schedule: UnfreezeSchedule, epoch: int, step: int) -> int:
        """The number of the stage now: by the clock, or by the metric."""
        if self._following is not None:
            return min(self._following.clock.stage, len(schedule.stages) - 1)
        return super().stage(schedule, epoch, step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments against the model; nothing freezes yet."""
        if trainer.state.fn == "fit" and not self.goes_on(trainer):
            self._following = self._new_following()
        super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """The stage, and what the metric has been so far."""
        state = super().state_dict()
        if state and self._following is not None:
            state["metric"] = self._following.state()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what the metric has been so far."""
        if state.get("metric") and self._following is not None:
            self._following.restore(state["metric"], self.state_key)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Unfreeze what is due."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._following is not None:
            self._following.batch_starts(trainer)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first batch: a validation metric that validation doesn't log is a mistake."""
        if self.monitor is None or not self.monitor.startswith(("val", "dev", "eval")):
            return
        if not any(from_all_ranks(self.monitor in trainer.callback_metrics, "the sanity check")):
            raise missing_metric(self.monitor, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metric, to see whether validation renews it."""
        if self._following is not None and self._validating(trainer):
            self._following.validation_starts(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a validation metric."""
        if self._following is not None and self._validating(trainer):
            self._following.validation_ends(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a training metric."""
        if self._following is not None and not self._done():
            self._following.epoch_ends(trainer)

    @staticmethod
    def _validating(trainer: Trainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking

    def _done(self) -> bool:
        fit = self._fit
        if fit is None or self._following is None or self not in fit.schedules:
            return True
        return self._following.clock.stage >= len(fit.schedules[self].stages) - 1
