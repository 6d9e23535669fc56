"""Slices: each step a share of its time, and after a round everything was compared."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_freeze.audit.baseline import Baseline
from lightning_freeze.audit.rolling import Pace, Rolling
from lightning_freeze.digests import CHUNK

LARGE = CHUNK // 4  # elements of float32 in a chunk


def baseline(*sizes: int) -> tuple[Baseline, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.randn(size), requires_grad=False) for size in sizes]
    places = [(str(i), parameter) for i, parameter in enumerate(parameters)]
    return Baseline.of(places, (0, 0), parts=True), parameters


def rounds(rolling: Rolling, seconds: float, most: int = 10_000) -> tuple[set[int], int]:
    """Advance until a round is over; returns what was found and the steps it took."""
    found: set[int] = set()
    for step in range(1, most):
        found.update(rolling.advance(seconds))
        if rolling.steps_per_round:
            return found, step
    raise AssertionError("no round ended")


def test_with_time_enough_one_step_is_a_round() -> None:
    rolling = Rolling(baseline(3, LARGE * 3 + 1, 0, 5)[0])
    assert rounds(rolling, 1.0) == (set(), 1)
    assert rolling.steps_per_round == 1


def test_without_time_nothing_is_compared() -> None:
    rolling = Rolling(baseline(3, 4)[0])
    assert [rolling.advance(0.0) for _ in range(5)] == [[]] * 5
    assert rolling.steps_per_round == 0


@given(st.integers(0, 3), st.sampled_from([0, 17, LARGE, LARGE * 2 + 3]))
@settings(max_examples=12)
def test_whatever_changes_is_found_within_a_round(which: int, where: int) -> None:
    kept, parameters = baseline(LARGE * 2 + 4, 5, LARGE * 3, 40)
    rolling = Rolling(kept)
    where = min(where, parameters[which].numel() - 1)
    parameters[which].data.view(torch.int32)[where] ^= 1
    found, steps = rounds(rolling, 3e-4)
    assert found == {which}
    assert steps >= 1
    parameters[which].data.view(torch.int32)[where] ^= 1
    rolling.steps_per_round = 0
    assert rounds(rolling, 3e-4)[0] == set()


def test_the_same_bytes_in_another_shape_are_found_in_a_large_tensor() -> None:
    kept, (parameter,) = baseline(LARGE * 2)
    parameter.data = parameter.data.view(2, -1)
    assert rounds(Rolling(kept), 3e-4)[0] == {0}


def test_a_large_tensor_that_lies_elsewhere_or_crosswise_is_read_as_a_whole() -> None:
    parameter = nn.Parameter(torch.randn(600, 1000).t(), requires_grad=False)
    kept = Baseline.of([("0", parameter)], (0, 0), parts=True)
    rolling = Rolling(kept)
    assert rounds(rolling, 1.0)[0] == set()
    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    assert rolling.advance(1.0) == []
    parameter.data[7, 7] += 1
    assert rolling.advance(1.0) == [0]


def test_a_round_is_spread_over_steps_in_proportion_to_their_time() -> None:
    kept, _ = baseline(*[LARGE * 4] * 6)
    _, quick = rounds(Rolling(kept), 5e-3)
    _, slow = rounds(Rolling(kept), 4e-4)
    assert quick < slow


def test_a_round_that_has_not_ended_is_told_from_how_far_it_came() -> None:
    kept, _ = baseline(*[LARGE * 4] * 30)
    rolling = Rolling(kept)
    assert rolling.expected_round == 0
    for _ in range(4):
        rolling.advance(2e-4)
    assert rolling.steps_per_round == 0
    guess = rolling.expected_round
    assert guess > 4
    _, steps = rounds(rolling, 2e-4)
    assert 0.3 < guess / (steps + 4) < 3


def test_a_slice_keeps_to_its_time() -> None:
    kept, _ = baseline(*[LARGE * 4] * 6, *[7] * 300)
    rolling = Rolling(kept)
    rounds(rolling, 1e-3)  # it has learnt how fast this machine reads
    took = []
    for _ in range(30):
        began = time.perf_counter()
        rolling.advance(1e-3)
        took.append(time.perf_counter() - began)
    assert sorted(took)[15] < 1.5e-3


def test_a_pace_earns_a_share_and_saves_no_more_than_a_hundred_steps() -> None:
    pace = Pace(0.01)
    for _ in range(1000):
        pace.step(1.0)
    assert pace.credit == pytest.approx(1.0)
    pace.spend(1.5)
    assert pace.credit == pytest.approx(-0.5)
    pace.step(1.0)
    assert pace.credit == pytest.approx(-0.49)


def test_a_step_that_was_held_up_earns_no_more_than_two() -> None:
    pace = Pace(0.01)
    for _ in range(5):
        pace.step(1.0)
    pace.step(60.0)
    assert pace.credit == pytest.approx(0.07)


def test_another_baseline_is_begun_from_its_start() -> None:
    rolling = Rolling(baseline(LARGE * 4, 3)[0])
    rolling.advance(3e-4)
    kept, parameters = baseline(2)
    rolling.begin(kept)
    parameters[0].data.add_(1)
    assert rolling.advance(1.0) == [0]
