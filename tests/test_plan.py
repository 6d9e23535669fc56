"""Plans are values; merging them is a union of what is frozen."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_freeze.schedule.plan import FreezePlan, merge

NAMES = st.frozensets(st.sampled_from("abcdef"))
PLANS = st.builds(
    FreezePlan,
    frozen=NAMES,
    quiet=NAMES,
    lively=NAMES,
    claimed=NAMES,
    lr_scale=st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([0.25, 0.5, 2.0, 4.0])),
)


def test_a_parameter_trains_only_if_no_plan_freezes_it() -> None:
    merged = merge([FreezePlan(frozen=frozenset("ab")), FreezePlan(frozen=frozenset("bc"))])
    assert merged.trainable("abcd") == ("d",)


def test_trainable_keeps_the_order_that_it_is_given() -> None:
    assert FreezePlan(frozen=frozenset("b")).trainable(["d", "b", "a"]) == ("d", "a")


def test_what_the_user_froze_stays_frozen_in_its_own_mode() -> None:
    merged = merge([FreezePlan()], before="ab")
    assert merged.frozen == {"a", "b"}
    assert merged.quiet == set()


def test_a_claim_of_any_plan_overrides_what_the_user_froze() -> None:
    merged = merge([FreezePlan(claimed=frozenset("a")), FreezePlan()], before="ab")
    assert merged.frozen == {"b"}


def test_a_claim_does_not_override_another_plan() -> None:
    merged = merge([FreezePlan(claimed=frozenset("a")), FreezePlan(frozen=frozenset("a"))])
    assert merged.frozen == {"a"}


def test_lr_factors_multiply() -> None:
    plans = [FreezePlan(lr_scale={"a": 0.5}), FreezePlan(lr_scale={"a": 0.5, "b": 2.0})]
    assert merge(plans).lr_scale == {"a": 0.25, "b": 2.0}


def test_no_plans_freeze_nothing() -> None:
    assert merge([]) == FreezePlan()


def test_a_plan_cannot_be_written_to() -> None:
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'frozen'"):
        FreezePlan().frozen = frozenset("a")


@given(PLANS, NAMES)
def test_merging_one_plan_without_a_past_changes_nothing(plan: FreezePlan, names: set[str]) -> None:
    assert merge([plan]) == plan


@given(st.lists(PLANS, max_size=4), NAMES)
def test_merging_does_not_depend_on_the_order_of_callbacks(
    plans: list[FreezePlan], before: frozenset[str]
) -> None:
    assert merge(plans, before) == merge(plans[::-1], before)


@given(PLANS, PLANS, PLANS)
def test_merging_is_associative(a: FreezePlan, b: FreezePlan, c: FreezePlan) -> None:
    assert merge([merge([a, b]), c]) == merge([a, merge([b, c])]) == merge([a, b, c])


@given(st.lists(PLANS, min_size=1, max_size=4), NAMES)
def test_more_callbacks_never_train_more(plans: list[FreezePlan], before: frozenset[str]) -> None:
    fewer, more = merge(plans[:-1], before), merge(plans, before)
    newly_claimed = plans[-1].claimed
    assert fewer.frozen - newly_claimed <= more.frozen
