"""Schedules in which everything trains at first, and layers freeze. No torch, no model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Union

from lightning_freeze.errors import ScheduleError
from lightning_freeze.schedule.entries import HOW, Entry, parse_schedule, read_schedule
from lightning_freeze.schedule.schedule import UnfreezeSchedule
from lightning_freeze.schedule.stages import Stage, stages_of

_Change = tuple[int, Iterable[str], Iterable[str]]

_HOW = (
    "A schedule of what freezes maps an epoch to selectors, as in "
    '`{1: "embeddings", 2: ["layer.0", "layer.1"]}`; a value may also be `{"freeze": [...]}`.'
)


def parse_freezing(schedule: Union[Mapping[Any, Any], str, os.PathLike[str]]) -> tuple[Entry, ...]:
    """Read a schedule of what freezes, as a mapping or as the path of a YAML file.

    Args:
        schedule: epoch -> selectors, or epoch -> `{"freeze": selectors}`, cumulative.

    Returns:
        One `Entry` per epoch, sorted.

    Raises:
        ScheduleError: as `parse_schedule`, or a value unfreezes.

    Example:
        >>> [(entry.at, entry.freeze) for entry in parse_freezing({2: "low", 1: {"freeze": "in"}})]
        [(1, ('in',)), (2, ('low',))]
    """
    origin = "`schedule`"
    if isinstance(schedule, (str, os.PathLike)):
        origin = f"The schedule file `{os.fspath(schedule)}`"
        schedule = read_schedule(Path(schedule))
    if not isinstance(schedule, Mapping) or not schedule:
        raise ScheduleError(f"{origin} is {schedule!r}. {_HOW}")
    for at, value in schedule.items():
        wrong = {"unfreeze", "lr_scale"}.intersection(value if isinstance(value, Mapping) else ())
        if wrong:
            raise ScheduleError(
                f"{origin} has `{min(wrong)}` at {at}, but everything trains at first, and what "
                f"has frozen stays so. {_HOW} To unfreeze, use `GradualUnfreeze`."
            )
    written = {
        at: value if isinstance(value, Mapping) else {"freeze": value}
        for at, value in schedule.items()
    }
    try:
        return parse_schedule(written)
    except ScheduleError as error:
        told = str(error).replace(HOW, _HOW).replace("no key `unfreeze`", "no key `freeze`")
        raise ScheduleError(told.replace("`schedule`", origin, 1)) from None


def freeze_entries(
    schedule: UnfreezeSchedule,
    entries: Iterable[Entry],
    select: Callable[[Any], Iterable[str]],
) -> UnfreezeSchedule:
    """Fill in the stages that a user's entries describe.

    Args:
        schedule: governs what may freeze; its stages are replaced.
        entries: from `parse_freezing`.
        select: selector -> names of parameters.

    Raises:
        ScheduleError: a selector names only what is frozen already.
    """
    changes: list[_Change] = [(0, schedule.governed, ())]
    since: dict[str, tuple[int, Any]] = {}
    for entry in entries:
        frozen: set[str] = set()
        for selector in entry.freeze:
            chosen = set(select(selector))
            if chosen <= since.keys():
                at, by = since[min(chosen)]
                raise ScheduleError(
                    f"`schedule` freezes `{selector}` at {entry.at}, but it is frozen since {at} "
                    f"(`{by}`). Schedules are cumulative: name each layer group once."
                )
            since |= dict.fromkeys(chosen - since.keys(), (entry.at, selector))
            frozen |= chosen
        changes.append((entry.at, (), frozen))
    return replace(schedule, stages=_without_idle_start(changes))


def freeze_groups(
    schedule: UnfreezeSchedule,
    groups: Sequence[tuple[str, ...]],
    *,
    start: int = 1,
    every: int = 1,
    layers_per_step: int = 1,
) -> UnfreezeSchedule:
    """The stages of a regular schedule: `layers_per_step` layer groups at a time, from the bottom.

    Args:
        schedule: its stages are replaced.
        groups: names per layer group, bottom to top.
        start: epoch or step of the first freezing.
        every: epochs or steps between two.
        layers_per_step: layer groups per freezing.

    Example:
        >>> empty = UnfreezeSchedule(frozenset({"low", "high", "head"}), ())
        >>> filled = freeze_groups(empty, [("low",), ("high",)], every=2)
        >>> [(stage.at, sorted(stage.trainable)) for stage in filled.stages]
        [(0, ['head', 'high', 'low']), (1, ['head', 'high']), (3, ['head'])]
    """
    changes: list[_Change] = [(0, schedule.governed, ())]
    for number, position in enumerate(range(0, len(groups), layers_per_step)):
        frozen = chain(*groups[position : position + layers_per_step])
        changes.append((start + every * number, (), frozen))
    return replace(schedule, stages=_without_idle_start(changes))


def _without_idle_start(changes: Iterable[_Change]) -> tuple[Stage, ...]:
    """Where something freezes at 0, there is no moment at which all trains."""
    stages = stages_of(changes)
    return stages[1:] if stages[1:] and stages[1].at == 0 else stages
