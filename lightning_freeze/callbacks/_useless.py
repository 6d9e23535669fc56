"""Warnings in `setup`: what a user surely doesn't want, although it can be done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import ceil, inf
from typing import Any

from lightning_freeze.callbacks._lightning import Trainer, is_a, rank_zero_warn
from lightning_freeze.callbacks.early_stopping import stoppers_of
from lightning_freeze.checkpoints.origin.find import find_origins
from lightning_freeze.checkpoints.origin.frozen import untouched
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.schedule.schedule import UnfreezeSchedule


def warn_blocked(schedules: Mapping[str, UnfreezeSchedule], by_hand: frozenset[str]) -> None:
    """A schedule whose first stage, or every later one, names only what the user froze by hand.

    Args:
        schedules: a callback, in words -> its schedule.
        by_hand: names of what was frozen before the fit.
    """
    for callback, schedule in schedules.items():
        others = by_hand - schedule.claimed
        first = schedule.trainable(0) & schedule.governed
        later = schedule.ever - schedule.trainable(0)
        if first and first <= others:
            rank_zero_warn(
                f"{callback} is to leave `{min(first)}` trainable, and the model froze it before "
                "the fit (`requires_grad=False`): that stays frozen unless a selector names it. "
                "Don't freeze it by hand, or name it in `trainable` or in the schedule."
            )
        if later and later <= others:
            rank_zero_warn(
                f"{callback} has nothing to unfreeze: all that its later stages would, "
                f"such as `{min(later)}`, was frozen before the fit (`requires_grad=False`), "
                "and that stays frozen unless a selector names it. Don't freeze it by hand, or "
                "name it in the schedule."
            )


def warn_left_out(schedules: Mapping[str, UnfreezeSchedule], held: frozenset[str]) -> None:
    """A stage of which nothing is in an optimizer: `configure_optimizers` left it out.

    Args:
        schedules: a callback, in words -> its schedule.
        held: names of what the optimizers hold, frozen or not.
    """
    for callback, schedule in schedules.items():
        asked = [names & schedule.governed for names in schedule.arrivals()]
        out = [names for names in asked if names and names.isdisjoint(held)]
        if out and held:
            missing = sorted(frozenset().union(*out))
            rank_zero_warn(
                f"{callback} is to train `{missing[0]}`"
                f"{f' and {len(missing) - 1} more' if missing[1:] else ''}, but "
                "`configure_optimizers` gives them to no optimizer, so they never will. Give the "
                "optimizer all that is to train at some time, as in `self.parameters()`."
            )


def warn_unreached(trainer: Trainer, schedules: Mapping[str, UnfreezeSchedule]) -> None:
    """Stages that lie beyond the end of the fit, or beyond a stopper's patience.

    Args:
        trainer: has `max_epochs`, `max_steps` and the stoppers.
        schedules: a callback, in words -> its schedule.
    """
    if trainer.fast_dev_run:  # type: ignore[union-attr]
        return
    ends = {"epoch": trainer.max_epochs, "step": trainer.max_steps}
    for callback, schedule in schedules.items():
        if schedule.unit in ends and not schedule.endless:
            _warn_beyond(callback, schedule, ends[schedule.unit])
        if schedule.unit == "epoch" and not schedule.endless:
            _warn_stopped(callback, schedule, trainer)


def _warn_stopped(callback: str, schedule: UnfreezeSchedule, trainer: Trainer) -> None:
    """A stopper that is less patient than a stage is long, before something that is to train."""
    pairs = zip(pairwise(schedule.stages), schedule.arrivals()[1:])
    longest = max((after.at - before.at for (before, after), names in pairs if names), default=0)
    every, part = trainer.check_val_every_n_epoch, trainer.val_check_interval
    if every is None or not isinstance(part, float):
        return  # how many checks an epoch has isn't known
    for stopper in stoppers_of(trainer):
        if longest > stopper.patience * every * part:
            rank_zero_warn(
                f"{callback} has a stage of {longest} epochs, and "
                f"EarlyStopping({stopper.monitor!r}) may end the fit after {stopper.patience} "
                "checks without improvement: later stages may never come. Use "
                f"`GradualUnfreeze(monitor={stopper.monitor!r})`, which begins the next stage "
                f"instead, or a `patience` of {ceil(longest / (every * part))} and more."
            )


def warn_unreached_by_batches(trainer: Trainer, schedules: Mapping[str, UnfreezeSchedule]) -> None:
    """The same where steps and epochs have to be compared, once an epoch's batches are known."""
    run: Any = trainer
    unsure = any(is_a(cb, kind) for cb in run.callbacks for kind in _CHANGE_STEPS)
    if unsure or run.fast_dev_run or not run.lightning_module.automatic_optimization:
        return
    steps = trainer.estimated_stepping_batches
    batches = trainer.num_training_batches / trainer.accumulate_grad_batches
    if not 0 < steps < inf:
        return
    for callback, schedule in schedules.items():
        if schedule.endless:
            continue
        if schedule.unit == "step" and trainer.max_steps == -1:
            _warn_beyond(callback, schedule, int(steps))
        elif schedule.unit == "epoch" and trainer.max_steps != -1 and batches < inf:
            epochs = ceil(steps / batches)
            if trainer.max_epochs is None or trainer.max_epochs < 0 or epochs < trainer.max_epochs:
                _warn_beyond(callback, schedule, epochs)


# they change what a step or the length of a fit is while it runs
_CHANGE_STEPS = ("LearningRateFinder", "BatchSizeFinder", "GradientAccumulationScheduler")


def _warn_beyond(callback: str, schedule: UnfreezeSchedule, end: int | None) -> None:
    late = [stage.at for stage in schedule.stages if stage.at and end is not None]
    late = [at for at in late if end is not None and 0 <= end <= at]
    if late:
        rank_zero_warn(
            f"{callback}: {len(late)} of its {len(schedule.stages)} stages are never reached. The "
            f"first of these begins at {schedule.unit} {late[0]}, and the fit ends with "
            f"{schedule.unit} {(end or 0) - 1}. Raise `max_epochs` or `max_steps`, or begin sooner."
        )


def warn_frozen(schedules: Mapping[Any, UnfreezeSchedule], fresh: Iterable[str]) -> None:
    """What is re-initialised, and never trains."""
    never = _never(schedules)
    useless = [name for name in fresh if name in never]
    if useless:
        rank_zero_warn(
            f"`ReinitTopLayers` gives `{useless[0]}`"
            f"{f' and {len(useless) - 1} more' if useless[1:] else ''} random values, but they "
            "stay frozen for the whole fit. Let them train: raise `trainable_layers`, or "
            "name them in `trainable`."
        )


def warn_random(schedules: Mapping[Any, UnfreezeSchedule], index: ModelIndex) -> None:
    """What was in no checkpoint, and is frozen all the same: it can't learn."""
    never = _never(schedules)
    frozen = [name for name in index.parameters if name in never]
    if frozen and (new := untouched(index, find_origins(index), frozen)):
        rank_zero_warn(
            f"`{new[0]}`{f' and {len(new) - 1} more' if new[1:] else ''} stay frozen for the "
            "whole fit, but were missing in the checkpoint that `from_pretrained` read: they "
            "hold random values. Let them train (name "
            f"`{new[0].rpartition('.')[0]}` in `trainable`, or in the schedule), or load them."
        )


def _never(schedules: Mapping[Any, UnfreezeSchedule]) -> frozenset[str]:
    return frozenset().union(*(schedule.never for schedule in schedules.values()))
