"""Stages told by their changes say the same as sets, and thousands of them stay small."""

from __future__ import annotations

import copy
import pickle
import random

import pytest

from lightning_freeze import ConflictError
from lightning_freeze.schedule.conflicts import check_conflicts
from lightning_freeze.schedule.freezing import freeze_groups
from lightning_freeze.schedule.plan import merge
from lightning_freeze.schedule.schedule import UnfreezeSchedule, from_groups
from lightning_freeze.schedule.stages import Stage, stages_of

MANY = 2000


def groups(many: int) -> list[tuple[str, ...]]:
    return [(f"{n}.weight", f"{n}.bias") for n in range(many)]


def empty(layers: list[tuple[str, ...]]) -> UnfreezeSchedule:
    return UnfreezeSchedule(frozenset(name for layer in layers for name in layer), ())


def told(schedule: UnfreezeSchedule) -> int:
    """How many names the changes between the stages hold in all."""
    first, *_ = schedule.stages
    return len(first.trainable) + sum(len(a) + len(r) for a, r in schedule.changes)


@pytest.mark.parametrize("order", ["top_down", "bottom_up"])
def test_thousands_of_stages_hold_each_name_once(order: str) -> None:
    layers = groups(MANY)
    schedule = from_groups(empty(layers), layers, start=1, every=1, layers_per_step=1, order=order)
    assert len(schedule.stages) == MANY
    assert told(schedule) == len(schedule.governed) == 2 * MANY
    assert len(schedule.stages[-1].trainable) == 2 * MANY
    assert len(schedule.stages[MANY // 2].trainable) == MANY + 2


def test_thousands_of_freezings_hold_each_name_twice() -> None:
    layers = groups(MANY)
    schedule = freeze_groups(empty(layers), layers[:-1])
    assert told(schedule) == 2 * len(schedule.governed) - 2
    assert schedule.stages[-1].trainable == set(layers[-1])


def drawn(seed: int) -> list[tuple[int, frozenset[str]]]:
    generator = random.Random(seed)
    names = "abcdefg"
    return [
        (at, frozenset(generator.sample(names, generator.randint(0, len(names)))))
        for at in range(generator.randint(1, 9))
    ]


def by_changes(sets: list[tuple[int, frozenset[str]]]) -> tuple[Stage, ...]:
    before: frozenset[str] = frozenset()
    changes = []
    for at, names in sets:
        changes.append((at, names - before, before - names))
        before = names
    return stages_of(changes)


@pytest.mark.parametrize("seed", range(40))
def test_stages_by_changes_equal_stages_by_sets(seed: int) -> None:
    sets = drawn(seed)
    stages, plain = by_changes(sets), tuple(Stage(at, names) for at, names in sets)
    assert stages == plain
    assert hash(stages) == hash(plain)
    every = frozenset("abcdefg")
    one, other = UnfreezeSchedule(every, stages), UnfreezeSchedule(every, plain)
    assert one.changes == other.changes
    assert one.turns() == other.turns()
    assert one.ever == frozenset().union(*(names for _, names in sets))
    for name, turns in one.turns().items():
        trains = [sum(turn <= n for turn in turns) % 2 == 1 for n in range(len(sets))]
        assert trains == [name in names for _, names in sets]


def test_stages_survive_copies_and_pickles() -> None:
    stages = by_changes(drawn(3))
    assert copy.deepcopy(stages) == stages
    assert pickle.loads(pickle.dumps(stages)) == stages
    assert stages != (*stages[:-1], Stage(99, stages[-1].trainable))
    assert Stage(0, {"a"}) != "a"


def first_empty(schedules: list[UnfreezeSchedule], names: str) -> int | None:
    """The first moment at which nothing trains, worked out stage by stage."""
    moments = sorted({stage.at for schedule in schedules for stage in schedule.stages})
    for at in moments:
        plans = [schedule.plan(schedule.stage_at(at, at)) for schedule in schedules]
        if not merge(plans).trainable(names):
            return at
    return None


@pytest.mark.parametrize("seed", range(60))
def test_a_stage_in_which_nothing_trains_is_found_as_by_looking_at_every_one(seed: int) -> None:
    generator = random.Random(seed)
    names = "abcdefgh"
    sets = [frozenset("a"), *(frozenset(generator.sample(names, 1)) for _ in range(5))]
    every = frozenset(names)
    one = UnfreezeSchedule(every, by_changes([*enumerate(sets), (9, every)]))
    out = frozenset(generator.sample(names[1:], 2))  # from the middle on
    other = UnfreezeSchedule(out, stages_of([(0, out, ()), (3, (), out)]))
    at = first_empty([one, other], names)
    if at is None:
        check_conflicts({"one": one, "other": other}, names, ())
    else:
        with pytest.raises(ConflictError, match=f"left to train from epoch {at} on"):
            check_conflicts({"one": one, "other": other}, names, ())
