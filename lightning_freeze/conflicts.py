"""What several schedules want together, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_freeze.errors import ConflictError
from lightning_freeze.plan import merge
from lightning_freeze.schedule import UnfreezeSchedule


def check_conflicts(
    schedules: Mapping[str, UnfreezeSchedule], names: Iterable[str], before: Iterable[str]
) -> None:
    """Raise where callbacks cancel each other, or leave nothing to train.

    Args:
        schedules: label of a callback -> its schedule.
        names: all parameters of the model that can train.
        before: names that the user froze before the fit.

    Raises:
        ConflictError: one callback never unfreezes what another's schedule unfreezes, so that
            this one has no effect; or nothing trains at the start.
    """
    listed = list(schedules.items())
    for position, (label, schedule) in enumerate(listed):
        for other, blocker in listed[:position] + listed[position + 1 :]:
            _check_pair(label, schedule, other, blocker)
    every = list(names)
    plan = merge([schedule.plan(0) for schedule in schedules.values()], before)
    if not plan.trainable(every):
        labels = ", ".join(schedules)
        first = min(
            (stage.at for _, s in listed for stage in s.stages if stage.trainable), default=None
        )
        advice = "leave at least the head trainable, as in `FreezeBackbone()`"
        if first:
            advice = f'name the head at 0, as in `{{0: "classifier", {first}: ...}}`'
        why = next((s.advice for _, s in listed if s.advice), "")
        advice = f": {why}." if why else f". Let something train: {advice}."
        raise ConflictError(
            f"Nothing is left to train at the start: {labels} "
            f"{'freezes' if len(listed) == 1 else 'freeze'} all {len(every)} parameters that "
            f"could{advice}"
        )


def _check_pair(
    label: str, schedule: UnfreezeSchedule, other: str, blocker: UnfreezeSchedule
) -> None:
    """One stage that is blocked in part is a wish to keep that part frozen; in whole, a mistake."""
    added = [schedule.stages[0].trainable & schedule.governed]
    for earlier, later in zip(schedule.stages, schedule.stages[1:]):
        added.append(later.trainable - earlier.trainable)
    blocked = [bool(names) and names <= blocker.never for names in added]
    every_later_one = len(blocked) > 1 and all(blocked[1:])
    if blocked[0] or every_later_one or (schedule.claimed and any(blocked)):
        names = sorted(frozenset().union(*(a for a, b in zip(added, blocked) if b)))
        raise ConflictError(
            f"{label} and {other} contradict each other: {label} is to train `{names[0]}`"
            f"{f' and {len(names) - 1} more' if names[1:] else ''}, which {other} freezes for the "
            "whole fit, and a parameter trains only if no callback freezes it. Leave one of the "
            f"callbacks out, or narrow {other}, for example with `trainable=`."
        )
