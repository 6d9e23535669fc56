"""A freezing callback whose stages pass when a logged metric stops improving."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from lightning_freeze.arguments import one_of, whole
from lightning_freeze.callbacks._lightning import (
    LightningModule,
    Trainer,
    is_a,
    is_fitting,
    is_overridden,
    rank_zero_warn,
)
from lightning_freeze.callbacks.base import FreezingCallback
from lightning_freeze.callbacks.fit_state import callbacks_of
from lightning_freeze.engine.distributed import from_all_ranks
from lightning_freeze.errors import ArgumentError, ResumeError
from lightning_freeze.schedule.schedule import MetricClock, UnfreezeSchedule


class MetricMonitor:
    """Follows a metric through a fit: one value an epoch, from whichever hook has it.

    Attributes:
        clock: what the metric has come to.
        fed: the last epoch that had a value; -1 before the first.
        pending: the value of a validation inside the present epoch, for its end.
    """

    def __init__(self, monitor: str, clock: MetricClock) -> None:
        self.monitor = monitor
        self.clock = clock
        self.fed = -1
        self.pending: float | None = None
        self._before: Any = None
        self._at_start: Any = None
        # a resume from a validation at an epoch's end runs that end again, without a batch
        self._trained = False
        self._validated = False

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying: without the tensors that it has seen."""
        return {**vars(self), "_before": None, "_at_start": None}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**asdict(self.clock), "fed": self.fed, "pending": self.pending}

    def restore(self, saved: Mapping[str, Any], who: str) -> None:
        """Go on from what a checkpoint has.

        Raises:
            ResumeError: it lacks something.
        """
        for key in ("best", "waited", "stage", "fed"):
            if key not in saved:
                raise ResumeError(
                    f"The state of `{who}` in the checkpoint lacks `metric.{key}`: it was changed, "
                    "or written by another version of lightning-freeze. Resume with that version, "
                    "or load its weights alone: `Model.load_from_checkpoint(path)` and `fit` "
                    "without `ckpt_path`."
                )
        kept = {name: saved[name] for name in ("best", "waited", "stage")}
        self.clock = replace(self.clock, **kept)
        self.fed = saved["fed"]
        self.pending = saved.get("pending")

    def batch_starts(self, trainer: Trainer) -> None:
        """At an epoch's first: remember the metric, to see whether the epoch renews it."""
        if not self._trained:
            self._at_start = trainer.callback_metrics.get(self.monitor)
        self._trained = True

    def validation_starts(self, trainer: Trainer) -> None:
        """Remember the metric, to see whether validation renews it."""
        self._before = trainer.callback_metrics.get(self.monitor)

    def validation_ends(self, trainer: Trainer) -> None:
        """Read a validation metric here: a checkpoint may be saved before the epoch's end."""
        self._validated = True
        value = trainer.callback_metrics.get(self.monitor)
        mean = _mean_of_ranks(None if value is self._before else value)
        if mean is not None:
            self.pending = mean
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._feed(trainer, self.pending)

    def epoch_ends(self, trainer: Trainer) -> None:
        """Read a training metric, or what a validation inside the epoch came to.

        Raises:
            ArgumentError: there is neither, and nothing that is yet to come could log one.
        """
        if self.fed < trainer.current_epoch:
            value = trainer.callback_metrics.get(self.monitor)
            # a validation's stays there in epochs that have none, unless the run was resumed
            mean = _mean_of_ranks(None if value is self._at_start else value)
            if mean is None:
                mean = self.pending
            self._feed(trainer, mean)
            expected = self._validated or not trainer.enable_validation
            if mean is None and self._trained and expected:
                listed = ", ".join(sorted(trainer.callback_metrics)) or "none"
                raise ArgumentError(
                    f"`monitor={self.monitor!r}` was not logged. Metrics that exist: {listed}. "
                    f'Monitor one of these, or call `self.log("{self.monitor}", ...)`.'
                )
        self._trained = self._validated = False

    def _feed(self, trainer: Trainer, value: float | None) -> None:
        if value is not None and self.fed < trainer.current_epoch:
            self.fed = trainer.current_epoch
            self.clock = self.clock.feed(value)
        self.pending = None


def _mean_of_ranks(value: Any) -> float | None:
    """The mean over the ranks that have a value, so that none moves alone."""
    told = from_all_ranks(None if value is None else float(value), "the metric")
    values = [each for each in told if each is not None]
    return sum(values) / len(values) if values else None


class MetricDriven(FreezingCallback):
    """Counts stages by the clock, or by a metric if `monitor` names one.

    An `EarlyStopping` that would end the fit because its patience is exhausted lets the next stage
    begin instead, as long as there is one, with its patience anew.
    """

    def __init__(self, monitor: str | None, mode: str, patience: int, min_delta: float) -> None:
        super().__init__()
        self.monitor = monitor
        self.mode = one_of(mode, "mode", ("min", "max"))
        self.patience = whole(patience, "patience", least=1)
        if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)) or min_delta < 0:
            raise ArgumentError(f"`min_delta` is {min_delta!r}. Write a number from 0.")
        self.min_delta = float(min_delta)
        self._metric = self._new_monitor()
        self._stopped_before = False
        self._told = False

    def _new_monitor(self) -> MetricMonitor | None:
        if self.monitor is None:
            return None
        return MetricMonitor(self.monitor, MetricClock(self.mode, self.patience, self.min_delta))

    def stage(self, schedule: UnfreezeSchedule, epoch: int, step: int) -> int:
        """The number of the stage now: by the clock, or by the metric."""
        if self._metric is not None:
            return min(self._metric.clock.stage, len(schedule.stages) - 1)
        return super().stage(schedule, epoch, step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments against the model; nothing freezes yet."""
        if is_fitting(trainer):
            if not self.goes_on(trainer):
                self._metric = self._new_monitor()
            self._stopped_before = self._told = False
        super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """The stage, and what the metric has been so far."""
        state = super().state_dict()
        if state and self._metric is not None:
            state["metric"] = self._metric.state()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what the metric has been so far."""
        if state.get("metric") and self._metric is not None:
            self._metric.restore(state["metric"], self.state_key)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Unfreeze what is due."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._metric is not None:
            self._metric.batch_starts(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metric, to see whether validation renews it."""
        if self._metric is not None and self._validating(trainer):
            self._stopped_before = bool(trainer.should_stop)
            self._metric.validation_starts(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a validation metric."""
        if self._metric is not None and self._validating(trainer):
            self._metric.validation_ends(trainer)
            self._keep_going(trainer, pl_module, "on_validation_end")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a training metric."""
        if self._metric is not None:
            if not self._in_last_stage():
                self._metric.epoch_ends(trainer)
            self._keep_going(trainer, pl_module, "on_train_epoch_end")

    @staticmethod
    def _validating(trainer: Trainer) -> bool:
        return is_fitting(trainer) and not trainer.sanity_checking

    def _in_last_stage(self) -> bool:
        fit = self._fit
        if fit is None or self._metric is None or self not in fit.schedules:
            return True
        return self._metric.clock.stage >= len(fit.schedules[self].stages) - 1

    def _keep_going(self, trainer: Trainer, module: LightningModule, hook: str) -> None:
        """Where a stopper's patience ends while stages are to come, begin the next one instead."""
        fit, metric = self._fit, self._metric
        if fit is None or metric is None or self not in fit.stages:
            return
        # a stage that begins with the next batch anyway
        due = self.stage(fit.schedules[self], 0, 0) > fit.stages[self]
        if self._in_last_stage() and not due:
            return
        callbacks = callbacks_of(trainer)
        for place, stopper in enumerate(callbacks):
            if not is_a(stopper, "EarlyStopping"):
                continue
            # at an epoch's end, Lightning calls stoppers behind all other callbacks
            if hook == "on_validation_end" and place < callbacks.index(self):
                if self._stopped_before or not _is_out_of_patience(trainer, stopper):
                    continue
                trainer.should_stop, stopper.wait_count, stopper.stopped_epoch = False, 0, 0
            elif not trainer.should_stop and _would_stop(stopper, trainer, module, hook):
                stopper.wait_count = -1  # it has yet to count this epoch
            else:
                continue
            if not due:
                metric.clock = replace(metric.clock, waited=0, stage=metric.clock.stage + 1)
                due = True
            if not self._told:
                self._told = True
                rank_zero_warn(
                    f"{self.state_key}: EarlyStopping({stopper.monitor!r}) would end the fit "
                    f"early, at epoch {trainer.current_epoch}. While stages are to come, the next "
                    "begins instead, with its patience anew; after the last one it stops the fit."
                )


def _is_out_of_patience(trainer: Trainer, stopper: Any) -> bool:
    return bool(trainer.should_stop and stopper.wait_count >= stopper.patience)


def _would_stop(stopper: Any, trainer: Trainer, module: LightningModule, hook: str) -> bool:
    """Whether a stopper is about to end the fit because its patience is exhausted.

    A copy is asked, so that thresholds, values that aren't finite, and a subclass's own rules stop
    the fit as ever.
    """
    before, trainer.should_stop = trainer.should_stop, False
    trial = copy.copy(stopper)
    trial.verbose = False
    try:
        getattr(trial, hook)(trainer, module)
        return trial.wait_count > stopper.wait_count and _is_out_of_patience(trainer, trial)
    finally:
        trainer.should_stop = before


def check_can_be_logged(monitor: str, trainer: Trainer) -> None:
    """Raise where it is certain that nothing logs `monitor`; else the first validation decides.

    Raises:
        ArgumentError: it is a metric of validation, and this run has none.
    """
    module = trainer.lightning_module
    validates = is_overridden("validation_step", module) and trainer.limit_val_batches != 0
    if monitor.startswith("val") and not validates:
        raise ArgumentError(
            f"`monitor={monitor!r}` is never logged: this run has no validation. Give the module a "
            "`validation_step` and the fit validation data, or monitor a training metric."
        )
