"""AutoFreeze's rule: norms in, a decision out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_freeze.engine.gradient_norms import GradientNorms
from lightning_freeze.schedule.autofreeze import GradientClock, change, percentile_of, settled

numbers = st.floats(0, 1e6)
changes = st.lists(st.none() | numbers | st.just(math.inf), min_size=1, max_size=14)
percentiles = st.floats(0, 100, exclude_min=True)


@given(st.lists(numbers, min_size=1, max_size=14), percentiles)
def test_the_percentile_is_that_of_numpy(values: list[float], percentile: float) -> None:
    expected = np.percentile(values, percentile)
    assert math.isclose(percentile_of(values, percentile), expected, rel_tol=1e-9, abs_tol=1e-9)


@given(changes, percentiles)
def test_what_settles_is_below_and_the_next_is_not(
    values: list[float | None], percentile: float
) -> None:
    count = settled(values, percentile)
    assert 0 <= count < len(values)
    known = [value for value in values if value is not None]
    if not known:
        assert count == 0
        return
    threshold = percentile_of(known, percentile)
    assert all(value < threshold for value in values[:count] if value is not None)
    assert next(value for value in values[count:] if value is not None) >= threshold
    assert count == 0 or values[count - 1] is not None


@given(st.lists(numbers, min_size=2, max_size=12, unique=True), percentiles, percentiles)
def test_a_higher_percentile_never_freezes_less(
    values: list[float], one: float, other: float
) -> None:
    low, high = sorted((one, other))
    assert settled(values, low) <= settled(values, high)


@given(
    st.integers(1, 8).flatmap(
        lambda n: st.lists(
            st.lists(st.none() | numbers, min_size=n, max_size=n), min_size=1, max_size=8
        )
    ),
    percentiles,
)
def test_a_frozen_layer_never_comes_back_and_one_is_always_left(
    intervals: list[list[float | None]], percentile: float
) -> None:
    clock = GradientClock(percentile)
    for norms in intervals:
        after = clock.feed(norms)
        assert clock.frozen <= after.frozen < len(norms)
        # what is frozen already has no say
        noise = [1e3] * clock.frozen + norms[clock.frozen :]
        assert clock.feed(noise).frozen == after.frozen
        clock = after


def test_the_decision_is_that_of_the_authors_loop() -> None:
    before, now, active = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0], [9.0, 7.6, 6.3, 5.9, 2.0, 1.0], 1
    ratios = {i: abs(before[i] - now[i]) / before[i] if i >= active else 0.0 for i in range(6)}
    threshold = np.percentile(list(ratios.values())[active:], 50)
    expected = next(i for i in ratios if ratios[i] >= threshold)
    clock = GradientClock(50.0, tuple(before), active).feed(now)
    assert clock.frozen == expected == 2


def test_the_first_interval_decides_nothing() -> None:
    assert GradientClock(100.0).feed([1.0, 2.0, 3.0]).frozen == 0
    assert GradientClock(100.0).feed([1.0, 2.0, 3.0]).feed([1.0, 2.0, 4.0]).frozen == 2


def test_a_layer_that_had_no_gradient_before_does_not_freeze() -> None:
    assert change(None, 1.0) == change(0.0, 1.0) == math.inf
    assert settled([0.1, math.inf, 0.2, 0.3], 99) == 1


def layers() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(3, 2), nn.Linear(2, 2), nn.Embedding(5, 2, sparse=True)]  # type: ignore[list-item]


def norms_of(made: list[nn.Linear]) -> tuple[GradientNorms, set[int]]:
    held = {id(p) for layer in made for p in layer.parameters()}
    return GradientNorms([list(layer.parameters()) for layer in made]), held


def norm_of(layer: nn.Module) -> float:
    grads = [p.grad.to_dense().double() for p in layer.parameters() if p.grad is not None]
    return float(torch.cat([grad.flatten() for grad in grads]).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_norms_are_means_over_steps_of_each_layers_norm(dtype: torch.dtype) -> None:
    made = [layer.to(dtype) for layer in layers()]
    norms, held = norms_of(made)
    expected = []
    for step in range(2):
        torch.manual_seed(step)
        for layer in made[:2]:
            for p in layer.parameters():
                p.grad = torch.randn(p.shape).mul(300).to(dtype)  # squares overflow float16
        made[2](torch.tensor([1, 1, step])).sum().backward()
        expected.append([norm_of(layer) for layer in made])
        norms.read(held, scale=4.0)
        made[2].weight.grad = None
    assert norms.means() == pytest.approx([sum(e) / 8 for e in zip(*expected)], rel=1e-5)


def test_norms_leave_out_what_is_not_finite_not_held_or_below_the_first() -> None:
    made = layers()
    norms, held = norms_of(made)
    for layer in made[:2]:
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
    norms.read(held)
    whole = norms.means()
    assert whole[0] == pytest.approx(8**0.5)
    assert whole[2] is None  # no gradient
    made[0].weight.grad[0, 0] = torch.inf  # type: ignore[index]
    norms.read(held)
    norms.read(set())
    norms.read(held, first=1)
    assert norms.means()[:2] == pytest.approx(whole[:2])
    assert norms.state()["steps"] == [1.0, 3.0, 0.0]
    other, _ = norms_of(made)
    other.restore(norms.state())
    assert other.means() == norms.means()
    norms.clear()
    assert norms.means() == [None, None, None]
