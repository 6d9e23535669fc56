"""Follows a metric through a fit: one value an epoch, from whichever hook has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from lightning_freeze.callbacks._lightning import Trainer
from lightning_freeze.callbacks._metric import missing_metric
from lightning_freeze.engine.distributed import from_all_ranks
from lightning_freeze.errors import ResumeError
from lightning_freeze.schedule.schedule import MetricClock


class Following:
    """A metric and the clock that it drives.

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
                raise missing_metric(self.monitor, trainer)
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
