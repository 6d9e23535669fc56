"""Schedules in which layers freeze again, and those that follow a rule of a paper."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_freeze.errors import ArgumentError, ConflictError, ScheduleError
from lightning_freeze.schedule.conflicts import check_conflicts
from lightning_freeze.schedule.entries import Entry, parse_schedule
from lightning_freeze.schedule.rules import AllAtOnce, OneByOne, RandomLayers
from lightning_freeze.schedule.schedule import UnfreezeSchedule, from_entries

NAMES = ("embed", "low", "high", "head")
GROUPS = [(name,) for name in NAMES]
EMPTY = UnfreezeSchedule(governed=frozenset(NAMES), stages=())


def pick(selector: str) -> tuple[str, ...]:
    return NAMES if selector == "**" else tuple(n for n in NAMES if n in selector.split("+"))


def written(schedule: dict[Any, Any]) -> UnfreezeSchedule:
    return from_entries(EMPTY, parse_schedule(schedule), pick)


def trains(schedule: UnfreezeSchedule, epoch: int, step: int = 0) -> set[str]:
    return set(NAMES) - schedule.plan(schedule.stage_at(epoch, step)).frozen


# `freeze` in an entry


def test_an_entry_freezes_first_and_unfreezes_then() -> None:
    alone = {0: "head", 1: {"freeze": "**", "unfreeze": "low"}, 3: {"freeze": "low"}, 4: "**"}
    with pytest.raises(ConflictError, match="Nothing is left to train from epoch 3 on"):
        check_conflicts({"A": written(alone)}, NAMES, ())
    alone[3] = {"freeze": "low", "unfreeze": ["high", "head"]}
    schedule = written(alone)
    assert [trains(schedule, epoch) for epoch in range(6)] == [
        {"head"}, {"low"}, {"low"}, {"high", "head"}, set(NAMES), set(NAMES)
    ]  # fmt: skip
    assert schedule.refreezes
    assert schedule.claimed == schedule.ever == set(NAMES)
    assert schedule.never == frozenset()
    check_conflicts({"A": schedule}, NAMES, ())


def test_a_schedule_may_start_with_everything_and_freeze_from_the_bottom() -> None:
    schedule = written({0: "**", 1: {"freeze": "embed"}, 2: {"freeze": ["low", "high"]}})
    assert [len(trains(schedule, epoch)) for epoch in range(4)] == [4, 3, 1, 1]
    assert schedule.ever == set(NAMES)


def test_a_cumulative_schedule_freezes_nothing_again() -> None:
    schedule = written({0: "head", 1: "high", 2: "**"})
    assert not schedule.refreezes
    assert not schedule.endless
    assert schedule.arrivals() == [{"head"}, {"high"}, {"embed", "low"}]


def test_parsed_entries_hold_what_freezes() -> None:
    assert parse_schedule({1: {"freeze": "a", "unfreeze": ["b"], "lr_scale": 2}}) == (
        Entry(1, ("b",), 2.0, ("a",)),
    )
    assert parse_schedule({0: "a", 2: {"freeze": "a"}, 3: "a"})[2] == Entry(3, ("a",))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({0: {"freeze": "head"}}, "`schedule` freezes `head` at 0, but nothing of it trains then."),
        (
            {0: "head", 1: {"freeze": "low", "unfreeze": "high"}},
            "`schedule` freezes `low` at 1, but nothing of it trains then.",
        ),
        (
            {0: "head", 1: {"freeze": "head"}, 2: {"freeze": "head", "unfreeze": "low"}},
            "`schedule` freezes `head` at 2, but nothing of it trains then.",
        ),
        (
            {0: "head", 1: {"freeze": "head", "unfreeze": ["low", "head"]}},
            "`schedule` freezes and unfreezes `head` at 1. Leave one of them out.",
        ),
        (
            {0: "head", 1: {"freeze": "head", "unfreeze": "low"}, 2: "low"},
            "`schedule` names `low` at 1 and 2. Schedules are cumulative",
        ),
        (
            {0: "low+head", 1: {"freeze": "head", "unfreeze": "high"}, 2: "low"},
            "`schedule` unfreezes `low` at 2, but it trains since 0 (`low+head`).",
        ),
        ({0: "head", 1: {"freeze": []}}, "`schedule` has [] at epoch 1."),
        ({0: "head", 1: {"freeze": None}}, "`schedule` has None at epoch 1."),
        ({0: "head", 1: {"freeze": "re:("}}, "`schedule` has `re:(` at epoch 1, which is not a"),
        (
            {0: "head", 1: {"freeze": "head", "lr_scale": 2}},
            "`schedule` has `lr_scale` at epoch 1, where nothing unfreezes.",
        ),
        (
            {
                0: "head",
                1: {"freeze": "**", "unfreeze": "low", "lr_scale": 0.5},
                2: {"unfreeze": "high", "freeze": "low"},
                3: {"unfreeze": "low", "lr_scale": 2},
            },
            "`schedule` gives `low` the `lr_scale` 2 at 3, but it trained with 0.5 before.",
        ),
    ],
)
def test_a_freeze_that_means_nothing_is_refused(schedule: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)):
        written(schedule)


def test_what_trains_again_keeps_its_factor() -> None:
    schedule = written(
        {0: "head", 1: {"freeze": "**", "unfreeze": "low", "lr_scale": 0.5}, 2: {"unfreeze": "**"}}
    )
    assert schedule.lr_scale == {"head": 1.0, "low": 0.5, "embed": 1.0, "high": 1.0}


def test_what_each_tensor_does_is_told_with_every_turn() -> None:
    told = written({0: "head", 2: {"freeze": "**", "unfreeze": "low"}, 5: "**"}).tell()
    assert told == {
        "head": "trains from the start and is frozen from epoch 2 and trains from epoch 5",
        "low": "trains from epoch 2",
        "high": "trains from epoch 5",
        "embed": "trains from epoch 5",
    }
    assert written({1: "head"}).tell()["low"] == "stays frozen"


def test_a_later_stage_without_anything_to_train_is_refused_before_the_fit() -> None:
    schedule = written({0: "head", 1: {"freeze": "head", "unfreeze": "low"}})
    check_conflicts({"A": schedule}, NAMES, ())
    body = UnfreezeSchedule(frozenset({"embed", "low"}), written({0: "embed"}).stages)
    with pytest.raises(ConflictError, match=r"A and B contradict each other|from epoch 1 on"):
        check_conflicts({"A": schedule, "B": body}, NAMES, ())


# Presets


def test_all_at_once_trains_everything_from_the_start() -> None:
    schedule = AllAtOnce().fill(EMPTY, GROUPS)
    assert trains(schedule, 0) == set(NAMES)
    assert schedule.claimed == frozenset()


def test_chain_thaw_trains_the_head_then_each_layer_alone_then_all() -> None:
    schedule = OneByOne().fill(EMPTY, GROUPS)
    assert [trains(schedule, epoch) for epoch in range(6)] == [
        {"head"}, {"embed"}, {"low"}, {"high"}, set(NAMES), set(NAMES)
    ]  # fmt: skip
    assert schedule.refreezes


def lisa(**options: Any) -> Any:
    from dataclasses import replace

    options = {"layers": 1, "every": 3, **options}
    return RandomLayers(**options).fill(replace(EMPTY, unit="step"), [("low",), ("high",)])


def test_random_layers_are_drawn_every_few_steps_and_the_rest_always_trains() -> None:
    schedule = lisa()
    seen = [trains(schedule, epoch=9, step=step) for step in range(60)]
    assert all({"embed", "head"} < names and len(names) == 3 for names in seen)
    assert all(len(set(map(frozenset, seen[i : i + 3]))) == 1 for i in range(0, 60, 3))
    assert len(set(map(frozenset, seen))) == 2
    assert schedule.endless
    assert schedule.refreezes
    assert schedule.never == frozenset()
    assert [stage.at for stage in schedule.stages[:3]] == [0, 3, 6]
    assert schedule.stages[2].trainable == schedule.trainable(2)


def test_draws_are_uniform_and_differ_by_seed() -> None:
    counts = Counter(tuple(RandomLayers(2, 1, 5).drawn(stage, 6)) for stage in range(3000))
    assert len(counts) == 15  # all pairs of 6
    assert min(counts.values()) > 120
    assert max(counts.values()) < 290
    other = [RandomLayers(2, 1, 6).drawn(stage, 6) for stage in range(50)]
    assert other != [RandomLayers(2, 1, 5).drawn(stage, 6) for stage in range(50)]


@given(st.integers(0, 10**9), st.integers(0, 99))
def test_a_draw_far_ahead_needs_no_earlier_one(stage: int, seed: int) -> None:
    drawn = RandomLayers(3, 1, seed).drawn(stage, 12)
    assert drawn == RandomLayers(3, 1, seed).drawn(stage, 12)
    assert len(set(drawn)) == 3
    assert set(drawn) <= set(range(12))


def test_ranks_with_other_seeds_tell_other_things() -> None:
    assert lisa().tell()["low"] != lisa(seed=1).tell()["low"]
    assert lisa().tell()["head"] == lisa(seed=1).tell()["head"] == "trains from the start"


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"`layers=3` is beyond the 2 layers"):
        lisa(layers=3)
    assert not lisa(layers=2).refreezes
