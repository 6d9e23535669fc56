"""Who has waited too long for a gradient, and why."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD

from lightning_freeze.audit.gradients import GradientWatch


def watched(model: nn.Module, dead_after: int) -> tuple[GradientWatch, SGD]:
    watch = GradientWatch(dead_after)
    watch.arm(dict(model.named_parameters()))
    return watch, SGD(model.parameters(), lr=0.1)


def test_a_parameter_without_gradients_is_dead_once() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    watch, optimizer = watched(model, dead_after=3)
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        model["used"](torch.randn(4, 2)).sum().backward()
        found.append(watch.before_step(optimizer))
    assert found == [[], [], ["unused.weight", "unused.bias"], [], []]
    assert watch.alive == {"used.weight", "used.bias"}


def test_a_gradient_in_time_keeps_it_alive() -> None:
    model = nn.Linear(2, 1)
    watch, optimizer = watched(model, dead_after=3)
    assert watch.before_step(optimizer) == []
    assert watch.before_step(optimizer) == []
    model(torch.randn(4, 2)).sum().backward()
    assert [watch.before_step(optimizer) for _ in range(5)] == [[]] * 5
    assert watch.alive == {"weight", "bias"}


def test_steps_of_another_optimizer_do_not_count() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    watch = GradientWatch(2)
    watch.arm(dict(model.named_parameters()))
    first, second = SGD(model["a"].parameters(), lr=1), SGD(model["b"].parameters(), lr=1)
    assert watch.before_step(first) == []
    assert watch.before_step(second) == []
    assert watch.before_step(first) == ["a.weight", "a.bias"]


def test_arming_anew_goes_on_counting() -> None:
    model = nn.Linear(1, 1)
    watch, optimizer = watched(model, dead_after=2)
    watch.before_step(optimizer)
    watch.arm(dict(model.named_parameters()))
    assert watch.before_step(optimizer) == ["weight", "bias"]


def test_what_is_no_longer_armed_is_forgotten() -> None:
    model = nn.Linear(2, 1)
    watch, optimizer = watched(model, dead_after=1)
    model(torch.randn(4, 2)).sum().backward()
    watch.before_step(optimizer)
    watch.arm({"bias": model.bias})
    assert watch.alive == {"bias"}
    optimizer.zero_grad()
    watch.arm(dict(model.named_parameters()))
    assert watch.before_step(optimizer) == ["weight"]
