"""Warnings in `setup`: what a user surely doesn't want, although it can be done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_freeze.callbacks._lightning import rank_zero_warn
from lightning_freeze.checkpoints.origin.find import find_origins
from lightning_freeze.checkpoints.origin.frozen import untouched
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.schedule.schedule import UnfreezeSchedule


def warn_blocked(schedules: Mapping[str, UnfreezeSchedule], by_hand: frozenset[str]) -> None:
    """A schedule whose every later stage names only what the user froze by hand.

    Args:
        schedules: a callback, in words -> its schedule.
        by_hand: names of what was frozen before the fit.
    """
    for callback, schedule in schedules.items():
        later = schedule.ever - schedule.trainable(0)
        if later and later <= by_hand - schedule.claimed:
            rank_zero_warn(
                f"{callback} has nothing to unfreeze: all that its later stages would, "
                f"such as `{min(later)}`, was frozen before the fit (`requires_grad=False`), "
                "and that stays frozen unless a selector names it. Don't freeze it by hand, or "
                "name it in the schedule."
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
