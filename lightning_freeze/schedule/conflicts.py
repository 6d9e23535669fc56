"""What several schedules want together, checked before anything is changed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import chain

from lightning_freeze.errors import ConflictError
from lightning_freeze.schedule.plan import merge
from lightning_freeze.schedule.schedule import UnfreezeSchedule

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
    plans = [schedule.plan(0) for schedule in schedules.values()]
    plan = merge(plans, before)
    if not plan.trainable(every):
        labels = ", ".join(schedules)
        by_hand = sorted(plan.frozen.intersection(every).difference(*(p.frozen for p in plans)))
        why = next((s.advice for _, s in listed if s.advice), "")
        if by_hand and not why:
            raise ConflictError(
                f"Nothing is left to train at the start: what {labels} would leave trainable, "
                f"{len(by_hand)} parameters such as `{by_hand[0]}`, were frozen before the fit "
                "(`requires_grad=False`). Don't freeze them by hand, or name them in `trainable` "
                "or in the schedule."
            )
        first = min(
            (stage.at for _, s in listed for stage in s.stages if stage.trainable), default=None
        )
        advice = "leave at least the head trainable, as in `FreezeBackbone()`"
        if first:
            advice = f'name the head at 0, as in `{{0: "classifier", {first}: ...}}`'
        advice = f": {why}." if why else f". Let something train: {advice}."
        raise ConflictError(
            f"Nothing is left to train at the start: {labels} "
            f"{'freezes' if len(listed) == 1 else 'freeze'} all {len(every)} parameters that "
            f"could{advice}"
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
    told = [o.unit == schedule.unit and o.unit in _CLOCKS for o in others]
    known = [other for other, tells in zip(others, told) if tells]
    claimed = frozenset().union(*(s.claimed for s in (schedule, *others)))
    out = frozenset(before) - claimed
    out = out.union(*(other.never for other, tells in zip(others, told) if not tells))
    able = [name for name in names if name not in out]
    clocks = [_Clock(each) for each in (schedule, *known)]
    witness = None  # something that trains; as a rule it still does in the next stage
    for number, (begins, _) in enumerate(schedule.changes, 1):
        at = schedule.stages[number].at
        for clock, stage in zip(clocks, (number, *(other.stage_at(at, at) for other in known))):
            clock.go_to(stage)
        candidates = chain(() if witness is None else (witness,), begins.intersection(able), able)
        witness = next((n for n in candidates if not any(c.freezes(n) for c in clocks)), None)
        if witness is None:
            unit = "stage" if schedule.unit == "metric" else schedule.unit
            raise ConflictError(
                f"Nothing is left to train from {unit} {at} on: {label} freezes again what "
                "trained before, and what it unfreezes then is frozen by another callback, or was "
                "before the fit. Unfreeze something at the same time, or freeze less."
            )


class _Clock:
    """Says whether a schedule freezes a name in a stage, without the set of all that it does."""

    def __init__(self, schedule: UnfreezeSchedule) -> None:
        self._schedule = schedule
        self._turns = {} if schedule.endless else schedule.turns()
        self._stage = 0
        self._frozen: frozenset[str] = frozenset()

    def go_to(self, stage: int) -> None:
        self._stage = stage
        if self._schedule.endless:
            self._frozen = self._schedule.plan(stage).frozen

    def freezes(self, name: str) -> bool:
        if self._schedule.endless:
            return name in self._frozen
        turns = self._turns.get(name)
        return turns is not None and bisect_right(turns, self._stage) % 2 == 0


def _check_pair(
    label: str, schedule: UnfreezeSchedule, other: str, blocker: UnfreezeSchedule
) -> None:
    """One stage that is blocked in part is a wish to keep that part frozen; in whole, a mistake."""
    added = schedule.arrivals()
    never = blocker.never
    blocked = [bool(names) and names <= never for names in added]
    every_later_one = len(blocked) > 1 and all(blocked[1:])
    if blocked[0] or every_later_one or (schedule.claimed and any(blocked)):
        names = sorted(frozenset().union(*(a for a, b in zip(added, blocked) if b)))
        raise ConflictError(
            f"{label} and {other} contradict each other: {label} is to train `{names[0]}`"
            f"{f' and {len(names) - 1} more' if names[1:] else ''}, which {other} freezes for the "
            "whole fit, and a parameter trains only if no callback freezes it. Leave one of the "
            f"callbacks out, or narrow {other}, for example with `trainable=`."
        )
