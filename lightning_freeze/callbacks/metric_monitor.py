"""A freezing callback whose stages pass when a logged metric stops improving."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from lightning_freeze.arguments import one_of, whole
from lightning_freeze.callbacks._lightning import (
    LightningModule,
    Trainer,
    is_fitting,
    rank_zero_warn,
)
from lightning_freeze.callbacks.base import FreezingCallback
from lightning_freeze.callbacks.early_stopping import (
    hold,
    is_exhausted,
    release,
    save_own_patience,
    stoppers_of,
)
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
        awaited: the epoch that has ended and has no value yet, as the module may log one in its own
            `on_train_epoch_end`, which comes behind those of callbacks; None where it has.
    """

    def __init__(self, monitor: str, clock: MetricClock) -> None:
        self.monitor = monitor
        self.clock = clock
        self.fed = -1
        self.pending: float | None = None
        self.awaited: int | None = None
        self._must_come = False
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
            self._feed(trainer.current_epoch, self.pending)

    def epoch_ends(self, trainer: Trainer) -> None:
        """Read a training metric, or what a validation inside the epoch came to."""
        if self.fed < trainer.current_epoch:
            # a validation's stays there in epochs that have none, unless the run was resumed
            mean = self._renewed(trainer)
            mean = self.pending if mean is None else mean
            self._feed(trainer.current_epoch, mean)
            if mean is None and self._trained:
                self.awaited = trainer.current_epoch
                self._must_come = self._validated or not trainer.enable_validation
        self._trained = self._validated = False

    def read_late(self, trainer: Trainer, *, last: bool) -> None:
        """Read a metric of an epoch that has ended.

        Args:
            trainer: has the metrics.
            last: whether there won't be another hook that could log it.

        Raises:
            ArgumentError: it isn't there, although all that could log it has run.
        """
        if self.awaited is None:
            return
        mean = self._renewed(trainer)
        if mean is not None:
            self._feed(self.awaited, mean)
        elif last and self._must_come:
            listed = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ArgumentError(
                f"`monitor={self.monitor!r}` was not logged. Metrics that exist: {listed}. "
                f'Monitor one of these, or call `self.log("{self.monitor}", ...)`.'
            )
        if last or mean is not None:
            self.awaited = None

    def _renewed(self, trainer: Trainer) -> float | None:
        value = trainer.callback_metrics.get(self.monitor)
        return _mean_of_ranks(None if value is self._at_start else value)

    def _feed(self, epoch: int, value: float | None) -> None:
        if value is not None and self.fed < epoch:
            self.fed = epoch
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
    begin instead, as long as there is one. Each stage has the whole patience; the best score stays,
    so that a stage that brings nothing ends after so many checks, and so does the last.
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
        self._begin()

    def _begin(self) -> None:
        self._begun = 0  # the stage in which the stoppers count
        self._checked = True  # whether they may have counted since they were looked at
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
        if is_fitting(trainer) and not self.goes_on(trainer):
            self._metric = self._new_monitor()
            self._begin()
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
            self._begun = state["stage"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold the stoppers: some resumes begin with an epoch's end."""
        super().on_train_start(trainer, pl_module)
        self._hold_stoppers(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze what is due."""
        if self._metric is not None:
            self._metric.read_late(trainer, last=True)
            self._follow_stoppers(trainer)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Unfreeze what is due."""
        if self._metric is not None:
            self._follow_stoppers(trainer)
            self._metric.batch_starts(trainer)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metric, to see whether validation renews it."""
        if self._metric is not None and self._validating(trainer):
            self._metric.validation_starts(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a validation metric."""
        if self._metric is not None and self._validating(trainer):
            self._checked = True
            self._metric.validation_ends(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a training metric."""
        self._checked = True
        if self._metric is not None and self._metric.clock.stage < self._last_stage:
            self._metric.epoch_ends(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A metric that was never logged is told of, however short the fit."""
        if self._metric is not None:
            self._metric.read_late(trainer, last=True)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save what the module has logged in its own `on_train_epoch_end`, too."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        state = (checkpoint.get("callbacks") or {}).get(self.state_key)
        if self._metric is not None and state:
            self._metric.read_late(trainer, last=False)
            state["metric"] = self._metric.state()
        save_own_patience(trainer, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no trace."""
        super().teardown(trainer, pl_module, stage)
        self._release_stoppers(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no trace."""
        super().on_exception(trainer, pl_module, exception)
        self._release_stoppers(trainer)

    @staticmethod
    def _validating(trainer: Trainer) -> bool:
        return is_fitting(trainer) and not trainer.sanity_checking

    @property
    def _last_stage(self) -> int:
        fit = self._fit
        if fit is None or self._metric is None or self not in fit.schedules:
            return -1
        return len(fit.schedules[self].stages) - 1

    def _follow_stoppers(self, trainer: Trainer) -> None:
        """Where a stopper's patience has ended while stages are to come, begin the next one."""
        metric, stoppers = self._metric, stoppers_of(trainer)
        if metric is None or not stoppers or self._begun >= self._last_stage:
            return
        if self._checked:
            self._checked = False
            spent = [place for place, stopper in enumerate(stoppers) if is_exhausted(stopper)]
            # what a stopper counts may differ between ranks: any of them would end the fit
            spent = sorted({place for each in from_all_ranks(spent, "stoppers") for place in each})
            if spent:
                self._tell(trainer, stoppers[spent[0]])
            if spent and metric.clock.stage == self._begun:
                metric.clock = replace(metric.clock, waited=0, stage=metric.clock.stage + 1)
        if metric.clock.stage != self._begun:
            self._begun = metric.clock.stage
            for stopper in stoppers:
                stopper.wait_count = 0
        self._hold_stoppers(trainer)

    def _hold_stoppers(self, trainer: Trainer) -> None:
        ours = [
            callback for callback in callbacks_of(trainer) if isinstance(callback, MetricDriven)
        ]
        to_come = any(callback._begun < callback._last_stage for callback in ours)
        for stopper in stoppers_of(trainer):
            (hold if to_come else release)(stopper)

    @staticmethod
    def _release_stoppers(trainer: Trainer) -> None:
        for stopper in stoppers_of(trainer):
            release(stopper)

    def _tell(self, trainer: Trainer, stopper: Any) -> None:
        if not self._told:
            self._told = True
            rank_zero_warn(
                f"{self.state_key}: EarlyStopping({stopper.monitor!r}) would end the fit early, "
                f"before epoch {trainer.current_epoch}. While stages are to come, the next begins "
                "instead, with its patience anew; after the last one it stops the fit."
            )


def check_can_be_logged(monitor: str, trainer: Trainer) -> None:
    """Raise where it is certain that nothing logs `monitor`; else the first validation decides.

    Raises:
        ArgumentError: it is a metric of validation, and this run has none.
    """
    if re.match(r"val(id|idation)?([^a-z]|$)", monitor) and not trainer.enable_validation:
        raise ArgumentError(
            f"`monitor={monitor!r}` is never logged: this run has no validation. Give the module a "
            "`validation_step` and the fit validation data, or monitor a training metric."
        )
