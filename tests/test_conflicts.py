"""Callbacks that cancel each other, and nothing left to train: said before anything changes."""

from __future__ import annotations

import re

import pytest

from lightning_freeze.errors import ConflictError, FreezeError
from lightning_freeze.schedule.conflicts import check_conflicts
from lightning_freeze.schedule.schedule import Stage, UnfreezeSchedule

NAMES = ("embed", "low", "high", "head")
BACKBONE = frozenset({"embed", "low", "high"})
EVERY = frozenset(NAMES)


def schedule(
    governed: frozenset[str], *stages: tuple[int, str], claimed: str = ""
) -> UnfreezeSchedule:
    return UnfreezeSchedule(
        governed,
        tuple(Stage(at, frozenset(names.split())) for at, names in stages),
        claimed=frozenset(claimed.split()),
    )


FREEZE = schedule(BACKBONE, (0, ""))
TOP = schedule(BACKBONE, (0, "high"))
RELEASE = schedule(BACKBONE, (0, ""), (3, "embed low high"))
GRADUAL = schedule(EVERY, (0, "head"), (1, "head high"), (2, "head high low"), (3, " ".join(NAMES)))


def test_one_callback_that_leaves_something_is_fine() -> None:
    for only in (FREEZE, TOP, RELEASE, GRADUAL):
        check_conflicts({"only": only}, NAMES, ())


def test_two_callbacks_that_agree_are_fine() -> None:
    check_conflicts({"FreezeBackbone()": RELEASE, "GradualUnfreeze()": GRADUAL}, NAMES, ())
    low = schedule(frozenset({"embed"}), (0, ""))
    check_conflicts({"FreezeBackbone('embed')": low, "GradualUnfreeze()": GRADUAL}, NAMES, ())


def test_a_schedule_that_another_callback_blocks_wholly_is_refused() -> None:
    message = re.escape(
        "GradualUnfreeze() and FreezeBackbone() contradict each other: GradualUnfreeze() is to "
        "train `embed` and 2 more, which FreezeBackbone() freezes for the whole fit, and a "
        "parameter trains only if no callback freezes it. Leave one of the callbacks out, or "
        "narrow FreezeBackbone(), for example with `trainable=`."
    )
    with pytest.raises(ConflictError, match=message):
        check_conflicts({"GradualUnfreeze()": GRADUAL, "FreezeBackbone()": FREEZE}, NAMES, ())


def test_the_order_of_callbacks_does_not_matter() -> None:
    with pytest.raises(ConflictError, match=r"^GradualUnfreeze\(\) and FreezeBackbone\(\) contra"):
        check_conflicts({"FreezeBackbone()": FREEZE, "GradualUnfreeze()": GRADUAL}, NAMES, ())


def test_a_stage_that_a_selector_names_must_not_be_blocked_wholly() -> None:
    stages = ((0, "head"), (1, "head low"), (2, "head low high"))
    claiming = schedule(EVERY, *stages, claimed="head high low")
    blocker = schedule(frozenset({"embed", "low"}), (0, ""))
    with pytest.raises(ConflictError, match="A is to train `low`, which B freezes for the whole"):
        check_conflicts({"A": claiming, "B": blocker}, NAMES, ())


def test_a_stage_that_is_blocked_in_part_keeps_that_part_frozen() -> None:
    claiming = schedule(EVERY, (0, "head"), (1, "head low high embed"), claimed=" ".join(NAMES))
    check_conflicts({"A": claiming, "B": schedule(frozenset({"embed"}), (0, ""))}, NAMES, ())


def test_a_regular_schedule_may_be_blocked_in_part() -> None:
    check_conflicts({"A": GRADUAL, "B": schedule(frozenset({"embed"}), (0, ""))}, NAMES, ())


def test_nothing_left_to_train_is_refused() -> None:
    message = re.escape(
        "Nothing is left to train at the start: FreezeBackbone('**') freezes all 4 parameters "
        "that could. Let something train: leave at least the head trainable, as in "
        "`FreezeBackbone()`."
    )
    with pytest.raises(ConflictError, match=message):
        check_conflicts({"FreezeBackbone('**')": schedule(EVERY, (0, ""))}, NAMES, ())


def test_a_schedule_that_begins_late_is_told_to_name_the_head() -> None:
    late = schedule(EVERY, (0, ""), (2, "head"), claimed="head")
    with pytest.raises(ConflictError, match=re.escape('`{0: "classifier", 2: ...}`')):
        check_conflicts({"GradualUnfreeze": late}, NAMES, ())


def test_several_callbacks_that_freeze_all_together_are_named() -> None:
    head = schedule(frozenset({"head"}), (0, ""))
    with pytest.raises(ConflictError, match="at the start: A, B freeze all 4 parameters"):
        check_conflicts({"A": FREEZE, "B": head}, NAMES, ())


def test_what_the_user_froze_counts_as_frozen() -> None:
    with pytest.raises(ConflictError, match="Nothing is left to train"):
        check_conflicts({"A": FREEZE}, NAMES, before=("head",))
    check_conflicts({"A": FREEZE}, NAMES, before=("embed",))


def test_a_claim_frees_what_the_user_froze() -> None:
    claiming = schedule(EVERY, (0, "head"), claimed="head")
    check_conflicts({"A": claiming}, NAMES, before=NAMES)


def test_a_conflict_is_a_freeze_error() -> None:
    with pytest.raises(FreezeError, match="Nothing is left"):
        check_conflicts({"A": schedule(EVERY, (0, ""))}, NAMES, ())
