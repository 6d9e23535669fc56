"""Schedules of what freezes: from entries, from groups, from files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_freeze import ScheduleError, SelectorError, UnfreezeSchedule
from lightning_freeze.schedule.freezing import freeze_entries, freeze_groups, parse_freezing
from lightning_freeze.schedule.schedule import from_groups

NAMES = frozenset({"embed", "low", "high", "head"})
EMPTY = UnfreezeSchedule(NAMES, ())


def frozen(schedule: UnfreezeSchedule) -> list[tuple[int, set[str]]]:
    return [(stage.at, set(NAMES - stage.trainable)) for stage in schedule.stages]


def filled(written: object) -> UnfreezeSchedule:
    return freeze_entries(EMPTY, parse_freezing(written), lambda s: [s] if s != "**" else NAMES)  # type: ignore[arg-type]


def test_entries_add_up_in_each_form() -> None:
    written = {"3": ["low", "high"], 1: "embed", 5: {"freeze": "**"}}
    expected = [(0, set()), (1, {"embed"}), (3, {"embed", "low", "high"}), (5, set(NAMES))]
    assert frozen(filled(written)) == expected
    assert frozen(filled({0: "embed"})) == [(0, {"embed"})]


def test_a_file_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "freeze.yaml"
    path.write_text("1: embed\n3: {freeze: [low]}\n")
    assert parse_freezing(path) == parse_freezing({1: "embed", 3: "low"})
    path.write_text("1: {unfreeze: low}\n")
    with pytest.raises(ScheduleError, match=r"^The schedule file `.*freeze.yaml` has `unfreeze` a"):
        parse_freezing(str(path))


@pytest.mark.parametrize(
    ("written", "match"),
    [
        ({}, r"`schedule` is \{\}. A schedule of what freezes maps an epoch to selectors"),
        ({-1: "low"}, r"has the epoch -1. Epochs count from 0"),
        ({"two": "low"}, r"has the key 'two', which is not an epoch. A schedule of what freezes"),
        ({1: {"unfreeze": "low"}}, r"has `unfreeze` at 1, but everything trains at first"),
        ({1: {"freeze": "low", "lr_scale": 2}}, r"has `lr_scale` at 1, but everything trains"),
        ({1: {"frieze": "low"}}, r"has the unknown key `frieze` at epoch 1"),
        ({1: {}}, r"has no key `freeze` at epoch 1"),
        ({1: []}, r"has \[\] at epoch 1. A schedule of what freezes"),
        ({1: "re:("}, r"has `re:\(` at epoch 1, which is not a regular expression"),
        ({1: "low", 2: "low"}, r"freezes `low` at 2, but it is frozen since 1 \(`low`\)"),
        ({1: ["low", "low"]}, r"freezes `low` at 1, but it is frozen since 1"),
    ],
)
def test_what_is_wrong_is_told(written: object, match: str) -> None:
    with pytest.raises(ScheduleError, match=match):
        filled(written)


@given(
    st.integers(1, 9), st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 40)
)
def test_freezing_is_the_mirror_of_unfreezing(
    count: int, start: int, every: int, layers_per_step: int, clock: int
) -> None:
    body = [(f"layer.{i}",) for i in range(count)]
    names = frozenset(["head"]).union(*body)
    empty = UnfreezeSchedule(names, ())
    times = {"start": start, "every": every, "layers_per_step": layers_per_step}
    down = freeze_groups(empty, body, **times)
    up = from_groups(empty, [*body, ("head",)], order="bottom_up", **times)
    now = down.plan(down.stage_at(clock, 0)).frozen
    assert now == names - up.plan(up.stage_at(clock, 0)).frozen - {"head"}
    assert down.refreezes or len(down.stages) == 1
    assert down.ever | now | {"head"} == names


def test_selectors_that_match_nothing_are_passed_on() -> None:
    def nothing(_: object) -> list[str]:
        raise SelectorError("No parameter matches")

    with pytest.raises(SelectorError, match="No parameter matches"):
        freeze_entries(EMPTY, parse_freezing({1: "x"}), nothing)
