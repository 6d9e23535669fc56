"""A freezing callback whose stages pass when a logged metric stops improving."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_freeze.arguments import one_of, whole
from lightning_freeze.callbacks._freezing import FreezingCallback
from lightning_freeze.callbacks._metric import missing_metric
from lightning_freeze.distributed import from_all_ranks
from lightning_freeze.errors import ArgumentError
from lightning_freeze.schedule import MetricClock, UnfreezeSchedule


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
        self._clock = self._new_clock()
        self._fed = -1
        self._seen_before: Any = None
        # a resume from a validation at an epoch's end runs that end again, without a batch
        self._trained = False

    def _new_clock(self) -> MetricClock:
        return MetricClock(self.mode, self.patience, self.min_delta)

    def stage(self, schedule: UnfreezeSchedule, epoch: int, step: int) -> int:
        """The number of the stage now: by the clock, or by the metric."""
        if self.monitor is not None:
            return min(self._clock.stage, len(schedule.stages) - 1)
        return super().stage(schedule, epoch, step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments against the model; nothing freezes yet."""
        if trainer.state.fn == "fit":
            self._clock = self._new_clock()
            self._fed = -1
        super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """The stage, and what the metric has been so far."""
        state = super().state_dict()
        if state and self.monitor is not None:
            state["metric"] = {**asdict(self._clock), "fed": self._fed}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what the metric has been so far."""
        saved = dict(state.get("metric") or {})
        if saved and self.monitor is not None:
            self._fed = saved.pop("fed")
            kept = {name: saved[name] for name in ("best", "waited", "stage")}
            self._clock = replace(self._new_clock(), **kept)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Unfreeze what is due."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._trained = True

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first batch: a validation metric that validation doesn't log is a mistake."""
        if self.monitor is None or not self.monitor.startswith(("val", "dev", "eval")):
            return
        if not any(from_all_ranks(self.monitor in trainer.callback_metrics)):
            raise missing_metric(self.monitor, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metric, to see whether validation renews it."""
        if self.monitor is not None and not trainer.sanity_checking:
            self._seen_before = trainer.callback_metrics.get(self.monitor)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a validation metric here: a checkpoint may be saved before the epoch's end."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._feed(trainer, None if value is self._seen_before else value)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a training metric."""
        epoch = trainer.current_epoch
        if self.monitor is None or self._fed >= epoch or self._done():
            return
        fed = self._feed(trainer, trainer.callback_metrics.get(self.monitor))
        if not fed and self._trained and (epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            raise missing_metric(self.monitor, trainer)
        self._trained = False

    def _done(self) -> bool:
        session = self._session
        if session is None or self not in session.schedules:
            return True
        return self._clock.stage >= len(session.schedules[self].stages) - 1

    def _feed(self, trainer: Trainer, value: Any) -> bool:
        """Go by the mean over the ranks that logged a value, so that none moves alone.

        Returns:
            Whether any did.
        """
        if self._fed >= trainer.current_epoch:
            return True
        told = from_all_ranks(None if value is None else float(value))
        values = [each for each in told if each is not None]
        if values:
            self._fed = trainer.current_epoch
            self._clock = self._clock.feed(sum(values) / len(values))
        return bool(values)
