"""What each logger can do with a number and with a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_freeze.callbacks._lightning import Trainer, is_a, rank_zero_warn
from lightning_freeze.report.transitions import Transition

_TAG = "freeze/transitions"
# what takes the whole list each time gets it at each change up to here, then once an epoch
_AT_ONCE = 50


class Loggers:
    """Sends one fit's numbers and transitions to a trainer's loggers, from rank 0.

    Every logger gets numbers, through Lightning's own interface. A sentence goes where there is a
    place for it: as text to TensorBoard, as a table to W&B, as an artifact and a tag to MLflow.
    What a logger fails to take costs a warning, not the fit, and isn't sent to it again.
    """

    def __init__(self) -> None:
        self._failed: list[tuple[Any, str]] = []
        self._behind = False

    def numbers(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Log numbers at the present step, with the epoch as Lightning logs it.

        Args:
            trainer: whose loggers these are.
            metrics: name -> value; names hold only what every logger accepts.
        """
        told = {**metrics, "epoch": float(trainer.current_epoch)}
        for logger in self._willing(trainer):
            # each its own: loggers add a prefix or an epoch to what they are given
            self._try(logger, "log_metrics", dict(told), step=logged_step(trainer))

    def tell(self, trainer: Trainer, changes: Sequence[Transition], total: int) -> None:
        """Log the last of a fit's transitions as text.

        Args:
            trainer: whose loggers these are.
            changes: all so far.
            total: elements of the whole model.
        """
        step = logged_step(trainer)
        for logger in self._willing(trainer):
            if is_a(logger, "TensorBoardLogger"):
                self._try(logger, "experiment.add_text", _TAG, changes[-1].to_text(total), step)
        self._behind = len(changes) > _AT_ONCE
        if not self._behind:
            self._list(trainer, changes, total)

    def catch_up(self, trainer: Trainer, changes: Sequence[Transition], total: int) -> None:
        """At an epoch's end: log the list of transitions where it is behind."""
        if self._behind:
            self._behind = False
            self._list(trainer, changes, total)

    def _list(self, trainer: Trainer, changes: Sequence[Transition], total: int) -> None:
        sentences = [change.to_text(total) for change in changes]
        for logger in self._willing(trainer):
            if is_a(logger, "WandbLogger"):
                rows = [[c.epoch, c.step, text] for c, text in zip(changes, sentences)]
                self._try(logger, "log_text", _TAG, ["epoch", "step", "transition"], rows)
            elif is_a(logger, "MLFlowLogger"):
                self._try(_Run(logger), "write", sentences)

    @staticmethod
    def _willing(trainer: Trainer) -> list[Any]:
        return list(trainer.loggers) if trainer.is_global_zero else []

    def _try(self, logger: Any, method: str, *args: Any, **kwargs: Any) -> None:
        """Call a method, unless it failed before."""
        key = (getattr(logger, "logger", logger), method)
        if key in self._failed:
            return
        try:
            found = logger
            for part in method.split("."):
                found = getattr(found, part)
            found(*args, **kwargs)
        except Exception as error:  # whatever a server or a disk comes up with
            self._failed.append(key)
            what = "log the numbers" if method == "log_metrics" else "log the transitions"
            rank_zero_warn(
                f"`{type(key[0]).__name__}` couldn't {what} of who trains: {error!r}. They aren't "
                "sent to it again in this fit; the audit goes on. With "
                "`TrainableParamAudit(log_metrics=False)` nothing is logged."
            )


class _Run:
    """A run in MLflow."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def write(self, sentences: Sequence[str]) -> None:
        """The list as an artifact, the last sentence as a tag beside the run's name."""
        client, run = self.logger.experiment, self.logger.run_id
        client.log_text(run, "".join(f"- {text}\n" for text in sentences), f"{_TAG}.md")
        client.set_tag(run, "freeze.last_transition", sentences[-1])


def logged_step(trainer: Trainer) -> int:
    """The step that Lightning stamps what `self.log` logs with.

    It isn't `global_step` where several optimizers step in one batch.
    """
    loop = getattr(trainer.fit_loop, "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))
