"""What several schedules want together, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_freeze.errors import ConflictError
from lightning_freeze.plan import FreezePlan, merge
from lightning_freeze.schedule import UnfreezeSchedule

_CLOCKS = ("epoch", "step")


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
            this one has no effect; or nothing trains at the start, or later in a schedule that
            freezes again what has trained.
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
        raise ConflictError(
            f"Nothing is left to train at the start: {labels} "
            f"{'freezes' if len(listed) == 1 else 'freeze'} all {len(every)} parameters that "
            f"could. Let something train: {advice}."
        )
    for label, schedule in listed:
        if schedule.refreezes:
            _check_later(
                label, schedule, [s for _, s in listed if s is not schedule], every, before
            )


def _check_later(
    label: str,
    schedule: UnfreezeSchedule,
    others: list[UnfreezeSchedule],
    names: list[str],
    before: Iterable[str],
) -> None:
    """Where layers freeze again, a stage may be left in which nothing trains.

    What another schedule freezes at that moment is known where both go by one clock; otherwise it
    counts only what it never unfreezes.
    """
    for number, stage in list(enumerate(schedule.stages))[1:]:
        plans = [schedule.plan(number)]
        for other in others:
            known = other.unit == schedule.unit and other.unit in _CLOCKS
            plan = other.plan(other.stage_at(stage.at, stage.at))
            plans.append(plan if known else FreezePlan(frozen=other.never, claimed=other.claimed))
        if not merge(plans, before).trainable(names):
            unit = "stage" if schedule.unit == "metric" else schedule.unit
            raise ConflictError(
                f"Nothing is left to train from {unit} {stage.at} on: {label} freezes again what "
                "trained before, and what it unfreezes then is frozen by another callback, or was "
                "before the fit. Unfreeze something at the same time, or freeze less."
            )


def _check_pair(
    label: str, schedule: UnfreezeSchedule, other: str, blocker: UnfreezeSchedule
) -> None:
    """One stage that is blocked in part is a wish to keep that part frozen; in whole, a mistake."""
    added = schedule.arrivals()
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
