"""Who has waited too long for a gradient, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from lightning_freeze.audit.gradients import GradientWatch, Probe, of_all_held
from lightning_freeze.model.index import ModelIndex


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


# Why there is none


class Towers(nn.Module):
    """Four towers, of which the loss depends on one."""

    def __init__(self) -> None:
        super().__init__()
        names = ("used", "uncalled", "unused", "shut", "detached", "replayed")
        self.towers = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        towers = self.towers
        _ = towers["unused"](x)
        with torch.no_grad():
            shut = towers["shut"](x)
        detached = towers["detached"](x).detach()
        replayed = checkpoint(towers["replayed"], x, use_reentrant=True)
        return towers["used"](x) + shut + detached + replayed


CAUSES = {
    "uncalled": "Its module wasn't called in the batch that was looked at.",
    "unused": "Its module is called, but the loss doesn't depend on its output: the output is "
    "unused or detached.",
    "detached": "Its module is called, but the loss doesn't depend on its output: the output is "
    "unused or detached.",
    "shut": "Its forward pass runs under `torch.no_grad()`.",
    "replayed": "Its forward pass is checkpointed in the reentrant way, which computes gradients "
    "only if an input requires one, and no input of it does.",
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_the_forward_pass_tells_why_there_is_no_gradient() -> None:
    model = Towers()
    names = [f"towers.{name}.weight" for name in CAUSES]
    probe = Probe(ModelIndex.of(model), names)
    model(torch.randn(3, 2)).sum().backward()
    probe.stop()
    assert model.towers["used"].weight.grad is not None
    assert {name: probe.why(f"towers.{name}.weight")[0] for name in CAUSES} == CAUSES
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_module_is_not_hooked_and_a_fresh_parameter_of_it_is_explained() -> None:
    model = nn.ModuleDict({"a": torch.compile(nn.Linear(2, 2), backend="eager")})
    probe = Probe(ModelIndex.of(model), ["a.weight", "a.bias"], fresh=["a.weight"])
    assert not any(module._forward_hooks for module in model.modules())
    assert "after `torch.compile` had made its graph" in probe.why("a.weight")[0]
    assert "torch.compile" not in probe.why("a.bias")[0]


def test_an_optimizer_of_which_nothing_has_a_gradient_is_named() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    index = ModelIndex.of(model)
    first, second = SGD(model["a"].parameters(), lr=1), SGD(model.parameters(), lr=1)
    assert of_all_held(["a.weight", "a.bias"], index, [second, first]) == "SGD"
    assert of_all_held(["a.weight"], index, [second, first]) == ""
