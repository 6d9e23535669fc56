"""Schedules: what a user wrote, the stages that come of it, and the clocks."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_freeze.arguments import positive
from lightning_freeze.errors import ArgumentError, FreezeError, ScheduleError
from lightning_freeze.schedule.entries import Entry, parse_schedule
from lightning_freeze.schedule.schedule import (
    MetricClock,
    Stage,
    UnfreezeSchedule,
    from_entries,
    from_groups,
)

NAMES = ("embed", "low", "high", "head")
EMPTY = UnfreezeSchedule(governed=frozenset(NAMES), stages=())


def pick(selector: str) -> tuple[str, ...]:
    """A stand-in for selectors: a name, or `**`."""
    return NAMES if selector == "**" else tuple(n for n in NAMES if n in selector.split("+"))


def regular(**kwargs: Any) -> UnfreezeSchedule:
    options = {"start": 1, "every": 1, "layers_per_step": 1, "order": "top_down"}
    return from_groups(EMPTY, [(name,) for name in NAMES], **{**options, **kwargs})


def trains(schedule: UnfreezeSchedule, epoch: int, step: int = 0) -> set[str]:
    plan = schedule.plan(schedule.stage_at(epoch, step))
    return set(NAMES) - plan.frozen


# What a user writes


def test_a_schedule_is_sorted_and_its_values_are_tuples() -> None:
    assert parse_schedule({3: "**", 0: "head", 1: ["low", "high"]}) == (
        Entry(0, ("head",)),
        Entry(1, ("low", "high")),
        Entry(3, ("**",)),
    )


def test_epochs_may_be_text_as_in_json() -> None:
    assert parse_schedule({"1": "a", " 0 ": "b"}) == (Entry(0, ("b",)), Entry(1, ("a",)))


def test_a_value_may_carry_a_factor() -> None:
    (entry,) = parse_schedule({2: {"unfreeze": ["low"], "lr_scale": 0.5}})
    assert entry == Entry(2, ("low",), 0.5)


def test_a_value_may_be_a_callable() -> None:
    (entry,) = parse_schedule({0: pick})
    assert entry.selectors == (pick,)


def test_parsing_leaves_the_users_mapping_alone() -> None:
    written: dict[Any, Any] = {1: {"unfreeze": ["a"], "lr_scale": 2}, 0: "b"}
    parse_schedule(written)
    assert written == {1: {"unfreeze": ["a"], "lr_scale": 2}, 0: "b"}
    assert list(written) == [1, 0]


@pytest.mark.parametrize("as_text", [True, False])
def test_a_yaml_file_means_the_same_as_a_mapping(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text(
        '0: classifier\n1: [layer.10, layer.11]\n3: {unfreeze: ["**.größe"], lr_scale: 0.5}\n',
        encoding="utf-8",
    )
    expected = parse_schedule(
        {
            0: "classifier",
            1: ["layer.10", "layer.11"],
            3: {"unfreeze": ["**.größe"], "lr_scale": 0.5},
        }
    )
    assert parse_schedule(str(path) if as_text else path) == expected


HOW = (
    "A schedule maps an epoch to selectors, as in "
    '`{0: "classifier", 1: ["layer.10", "layer.11"], 3: "**"}`; a value may also be '
    '`{"unfreeze": [...], "lr_scale": 0.5}`.'
)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({}, "`schedule` is {}. " + HOW),
        ({-1: "a"}, "`schedule` has the epoch -1. Epochs count from 0."),
        ({"-2": "a"}, "`schedule` has the epoch -2. Epochs count from 0."),
        ({1.5: "a"}, "`schedule` has the key 1.5, which is not an epoch. " + HOW),
        ({True: "a"}, "`schedule` has the key True, which is not an epoch. " + HOW),
        ({"start": "a"}, "`schedule` has the key 'start', which is not an epoch. " + HOW),
        ({"--1": "a"}, "`schedule` has the key '--1', which is not an epoch. " + HOW),
        ({"²": "a"}, "`schedule` has the key '²', which is not an epoch. " + HOW),
        ({None: "a"}, "`schedule` has the key None, which is not an epoch. " + HOW),
        ({1: "a", "1": "b"}, "`schedule` names epoch 1 twice. Write one list for it."),
        ({0: []}, "`schedule` has [] at epoch 0. " + HOW),
        ({0: ""}, "`schedule` has [''] at epoch 0. " + HOW),
        ({0: None}, "`schedule` has None at epoch 0. " + HOW),
        ({0: 3}, "`schedule` has 3 at epoch 0. " + HOW),
        ({0: ["a", 3]}, "`schedule` has ['a', 3] at epoch 0. " + HOW),
        ({0: {"unfreeze": []}}, "`schedule` has [] at epoch 0. " + HOW),
        ({0: {"lr_scale": 2}}, "`schedule` has no key `unfreeze` at epoch 0. " + HOW),
        (
            {0: {"unfreeze": "a", "lr": 1}},
            "`schedule` has the unknown key `lr` at epoch 0. " + HOW,
        ),
        (
            {0: {"unfreeze": "a", 3: 1, "x": 1}},
            "`schedule` has the unknown key `3` at epoch 0. " + HOW,
        ),
        (
            {0: {"unfreeze": "a", "lr_scale": 0}},
            "`lr_scale` at epoch 0 of `schedule` is 0. It is a factor on the learning rate and "
            "must be above 0; to keep something from training, don't unfreeze it.",
        ),
        (
            {0: "a", 2: ["b", "a"]},
            "`schedule` names `a` at 0 and 2. Schedules are cumulative: what is unfrozen stays "
            "so. Name each layer group once.",
        ),
        (
            {1: ["a", "a"]},
            "`schedule` names `a` twice at 1. Schedules are cumulative: what is unfrozen stays "
            "so. Name each layer group once.",
        ),
        (
            {1: "re:("},
            "`schedule` has `re:(` at epoch 1, which is not a regular expression: ",
        ),
    ],
)
def test_a_wrong_schedule_is_refused_in_words(schedule: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)):
        parse_schedule(schedule)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"The schedule file `.*s\.yaml` is None\. A schedule maps an epoch"),
        ("- a\n- b\n", r"The schedule file `.*` is \['a', 'b'\]\. A schedule maps"),
        ("classifier\n", r"The schedule file `.*` is 'classifier'\."),
        ("0: [a\n", r"The schedule file `.*` is not valid YAML: while parsing"),
        ("1: a\n1: b\n", r"The schedule file `.*` is not valid YAML: the key 1 stands twice"),
        ("1: {unfreeze: a, unfreeze: b}\n", r"the key 'unfreeze' stands twice"),
        ("? [1, 2]\n: a\n", r"The schedule file `.*` is not valid YAML: .*unhashable key"),
        ("!!python/object/apply:os.getcwd []\n", r"is not valid YAML: could not determine a cons"),
        ("first: a\n", r"The schedule file `.*` has the key 'first', which is not an epoch"),
        ("0: a\n2: [a]\n", r"The schedule file `.*` names `a` at 0 and 2"),
    ],
)
def test_a_wrong_yaml_file_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ScheduleError, match=re.compile(message, re.DOTALL)):
        parse_schedule(path)


def test_a_yaml_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    message = r"The schedule file `.*none\.yaml` can't be read: No such file or directory\."
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(tmp_path / "none.yaml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ScheduleError, match="is not valid YAML"):
        parse_schedule(path)


def test_a_schedule_error_is_an_argument_and_a_value_error() -> None:
    for kind in (ArgumentError, ValueError, FreezeError):
        with pytest.raises(kind, match="Epochs count from 0"):
            parse_schedule({-1: "a"})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "2", None, 1e9])
def test_a_factor_must_be_a_finite_number_above_0(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`lr_decay` is .*must be above 0"):
        positive(value, "lr_decay")
    assert positive(1 / 2.6, "lr_decay") == 1 / 2.6


# From entries to stages


def test_entries_become_cumulative_stages() -> None:
    schedule = from_entries(EMPTY, parse_schedule({0: "head", 2: "high", 5: "**"}), pick)
    assert [trains(schedule, epoch) for epoch in (0, 1, 2, 4, 5, 99)] == [
        {"head"},
        {"head"},
        {"head", "high"},
        {"head", "high"},
        set(NAMES),
        set(NAMES),
    ]
    assert schedule.claimed == set(NAMES)


def test_before_the_first_entry_nothing_trains() -> None:
    schedule = from_entries(EMPTY, parse_schedule({2: "head"}), pick)
    assert schedule.stages[0] == Stage(0, frozenset())
    assert trains(schedule, 1) == set()
    assert trains(schedule, 2) == {"head"}
    assert schedule.never == {"embed", "low", "high"}


def test_a_factor_applies_to_what_its_entry_newly_unfreezes() -> None:
    written = {0: "head", 1: {"unfreeze": "head+high", "lr_scale": 0.5}}
    schedule = from_entries(EMPTY, parse_schedule(written), pick)
    assert schedule.lr_scale["high"] == 0.5
    assert schedule.lr_scale["head"] == 1.0
    assert "low" not in schedule.lr_scale


def test_a_factor_multiplies_what_was_there() -> None:
    decayed = UnfreezeSchedule(governed=frozenset(NAMES), stages=(), lr_scale={"high": 0.5})
    entries = parse_schedule({0: {"unfreeze": "high", "lr_scale": 0.5}})
    assert from_entries(decayed, entries, pick).lr_scale == {"high": 0.25}


def test_an_entry_that_unfreezes_nothing_new_is_refused() -> None:
    message = re.escape(
        "`schedule` unfreezes `high` at 2, but it trains since 0 (`head+high`). Schedules are "
        "cumulative: name each layer group once."
    )
    with pytest.raises(ScheduleError, match=message):
        from_entries(EMPTY, parse_schedule({0: "head+high", 2: "high"}), pick)


def test_an_entry_may_overlap_with_an_earlier_one() -> None:
    schedule = from_entries(EMPTY, parse_schedule({0: "head", 1: "head+high"}), pick)
    assert trains(schedule, 1) == {"head", "high"}


# Regular schedules


def test_the_head_trains_first_and_the_top_group_follows() -> None:
    schedule = regular()
    assert [trains(schedule, epoch) for epoch in range(5)] == [
        {"head"},
        {"head", "high"},
        {"head", "high", "low"},
        set(NAMES),
        set(NAMES),
    ]
    assert schedule.claimed == frozenset()


def test_bottom_up_unfreezes_the_lowest_first() -> None:
    schedule = regular(order="bottom_up")
    assert trains(schedule, 1) == {"head", "embed"}
    assert trains(schedule, 2) == {"head", "embed", "low"}


@pytest.mark.parametrize(
    ("kwargs", "starts"),
    [
        ({}, [0, 1, 2, 3]),
        ({"start": 2}, [0, 2, 3, 4]),
        ({"every": 3}, [0, 1, 4, 7]),
        ({"layers_per_step": 2}, [0, 1, 2]),
        ({"layers_per_step": 99}, [0, 1]),
        ({"start": 0}, [0, 1, 2]),
        ({"start": 5, "every": 10, "layers_per_step": 2}, [0, 5, 15]),
    ],
)
def test_stages_begin_where_the_arguments_say(kwargs: Any, starts: list[int]) -> None:
    schedule = regular(**kwargs)
    assert [stage.at for stage in schedule.stages] == starts
    assert schedule.stages[-1].trainable == set(NAMES)
    assert schedule.never == frozenset()


def test_start_0_trains_the_top_group_with_the_head() -> None:
    assert trains(regular(start=0), 0) == {"head", "high"}


def test_steps_count_where_the_unit_is_step() -> None:
    schedule = UnfreezeSchedule(EMPTY.governed, regular(start=10).stages, unit="step")
    assert trains(schedule, epoch=99, step=9) == {"head"}
    assert trains(schedule, epoch=0, step=10) == {"head", "high"}


def test_a_frozen_parameter_is_quiet_only_with_eval_mode() -> None:
    stages = regular().stages
    assert UnfreezeSchedule(EMPTY.governed, stages).plan(0).quiet == {"embed", "low", "high"}
    loud = UnfreezeSchedule(EMPTY.governed, stages, eval_mode=False).plan(0)
    assert loud.quiet == frozenset()
    assert loud.frozen == {"embed", "low", "high"}


def test_a_schedule_says_nothing_of_what_it_does_not_govern() -> None:
    schedule = UnfreezeSchedule(frozenset({"low"}), (Stage(0, frozenset()),))
    assert schedule.plan(0).frozen == {"low"}


# Properties

SCHEDULES = st.builds(
    regular,
    start=st.integers(0, 9),
    every=st.integers(1, 4),
    layers_per_step=st.integers(1, 5),
    order=st.sampled_from(["top_down", "bottom_up"]),
)
WRITTEN = st.permutations(NAMES).flatmap(
    lambda order: st.lists(st.integers(0, 12), min_size=1, max_size=len(NAMES), unique=True).map(
        lambda epochs: dict(zip(epochs, order))
    )
)


@given(SCHEDULES, st.integers(0, 40), st.integers(0, 40))
def test_what_trains_only_grows(schedule: UnfreezeSchedule, first: int, second: int) -> None:
    early, late = sorted((first, second))
    assert trains(schedule, early) <= trains(schedule, late)
    assert schedule.stage_at(early, 0) <= schedule.stage_at(late, 0)


@given(WRITTEN, st.integers(0, 20))
def test_a_written_schedule_is_the_union_of_its_entries_so_far(
    written: dict[int, str], epoch: int
) -> None:
    schedule = from_entries(EMPTY, parse_schedule(written), pick)
    assert trains(schedule, epoch) == {name for at, name in written.items() if at <= epoch}


@given(SCHEDULES, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 999)), max_size=10))
def test_the_stage_depends_on_the_clock_alone(
    schedule: UnfreezeSchedule, clocks: list[tuple[int, int]]
) -> None:
    first = [schedule.stage_at(*clock) for clock in clocks]
    assert [schedule.stage_at(*clock) for clock in reversed(clocks)] == first[::-1]
    assert all(0 <= stage < len(schedule.stages) for stage in first)
    assert schedule.stage_at(0, 0) == 0


@given(SCHEDULES, st.integers(0, 99))
def test_frozen_and_trainable_share_out_what_is_governed(
    schedule: UnfreezeSchedule, stage: int
) -> None:
    plan = schedule.plan(stage)
    trainable = schedule.stages[min(stage, len(schedule.stages) - 1)].trainable
    assert plan.frozen | trainable == schedule.governed
    assert not plan.frozen & trainable


@given(SCHEDULES)
def test_stages_begin_at_0_and_at_different_times(schedule: UnfreezeSchedule) -> None:
    starts = [stage.at for stage in schedule.stages]
    assert starts[0] == 0
    assert starts == sorted(set(starts))


# The clock that reads a metric


def run(clock: MetricClock, values: list[float]) -> list[int]:
    stages = []
    for value in values:
        clock = clock.feed(value)
        stages.append(clock.stage)
    return stages


def test_a_stage_passes_when_the_metric_stalls_for_patience_epochs() -> None:
    assert run(MetricClock("min", patience=2), [1.0, 0.9, 0.9, 0.95, 0.8, 0.8, 0.8]) == [
        0, 0, 0, 1, 1, 1, 2
    ]  # fmt: skip


def test_max_mode_waits_for_a_rise() -> None:
    assert run(MetricClock("max"), [0.5, 0.6, 0.6, 0.7]) == [0, 0, 1, 1]


def test_a_gain_of_no_more_than_min_delta_is_none() -> None:
    assert run(MetricClock("min", min_delta=0.25), [1.0, 0.75, 0.5]) == [0, 1, 1]


def test_nan_is_no_improvement_and_never_the_best() -> None:
    assert run(MetricClock("min", patience=2), [math.nan, math.nan, 1.0, math.nan]) == [0, 1, 1, 1]
    assert MetricClock().feed(math.nan).best is None


def test_the_best_value_outlives_a_stage() -> None:
    clock = MetricClock("min", patience=1).feed(0.5).feed(0.6)
    assert (clock.stage, clock.best, clock.waited) == (1, 0.5, 0)


def test_feeding_returns_a_new_clock() -> None:
    clock = MetricClock()
    clock.feed(1.0)
    assert clock == MetricClock()


@given(st.lists(st.floats(width=32), max_size=30), st.integers(1, 4))
def test_a_metric_clock_counts_up_by_at_most_one(values: list[float], patience: int) -> None:
    stages = [0, *run(MetricClock("min", patience), values)]
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(stages))
    assert stages[-1] <= len(values) // patience


@given(st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=20))
def test_max_mode_mirrors_min_mode(values: list[float]) -> None:
    mirrored = [-value for value in values]
    assert run(MetricClock("min"), values) == run(MetricClock("max"), mirrored)
