"""The unfrozen side: what has gradients and doesn't move, and what is left out on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_freeze.audit.findings import Seen
from lightning_freeze.audit.unfrozen import (
    Movement,
    Stuck,
    left_out,
    not_moved,
    without_gradient,
)
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.layer_groups import LayerGroup
from tests.audit.nets import Net, only

GROUPS = [
    LayerGroup("body", ("body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias")),
    LayerGroup("head", ("head.weight", "head.bias")),
]


class Fit:
    """Steps of a model, and who has moved in them."""

    def __init__(self, optimizer: Any, lr: float = 0.1, **options: Any) -> None:
        self.model = Net()
        self.parameters = dict(self.model.named_parameters())
        self.optimizer: Optimizer = optimizer(self.model.parameters(), lr=lr, **options)
        self.movement = Movement()
        self.movement.arm(self.parameters, (0, 0))
        self.steps = 0

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.model(torch.randn(6, 3)).pow(2).sum().backward()
            self.movement.step(self.optimizer)
            self.optimizer.step()
            self.steps += 1

    def check(self, least: int = 3) -> list[Seen]:
        optimizers = [self.optimizer]
        unmoved = self.movement.unmoved(optimizers)
        return not_moved(GROUPS, self.parameters, unmoved, optimizers, least)

    def unmoved(self) -> dict[str, Stuck]:
        return self.movement.unmoved([self.optimizer])


def test_what_moves_is_no_finding_and_is_not_read_again() -> None:
    fit = Fit(SGD)
    assert set(fit.unmoved()) == set(fit.parameters)
    fit.step(3)
    assert fit.check() == []
    assert fit.unmoved() == {}


def test_a_zeroed_gradient_of_one_tensor_is_found_and_named_as_such() -> None:
    fit = Fit(SGD)
    fit.model.head.weight.register_hook(torch.zeros_like)
    fit.step(3)
    seen = only(fit.check())
    assert (seen.code, seen.names) == ("not-updated", ("head.weight",))
    assert seen.message == "head.weight of `head` has gradients, but hasn't moved"
    assert seen.cause == "Its gradient is zero in every element."


def test_the_tensors_of_a_layer_group_are_one_finding() -> None:
    fit = Fit(SGD)
    for parameter in fit.model.head.parameters():
        parameter.register_hook(torch.zeros_like)
    fit.step(3)
    seen = only(fit.check())
    assert seen.names == ("head.weight", "head.bias")
    assert seen.message == "`head` has gradients, but none of its 2 tensors has moved"


def test_it_is_too_early_to_say_before_the_window_is_over() -> None:
    fit = Fit(SGD)
    fit.model.head.weight.register_hook(torch.zeros_like)
    fit.step(2)
    assert fit.check() == []


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_code_that_writes_it_back_is_told_from_a_gradient_of_zeros(optimizer: Any) -> None:
    fit = Fit(optimizer)
    kept = fit.model.head.weight.detach().clone()
    for _ in range(3):
        fit.step()
        fit.model.head.weight.data.copy_(kept)
    assert "some code writes it back" in only(fit.check()).cause


def test_updates_that_are_rounded_away_are_told_of_for_a_whole_group_only() -> None:
    fit = Fit(SGD, lr=1e-12)
    with torch.no_grad():
        for parameter in fit.model.parameters():
            parameter.fill_(1.0)
    fit.movement.arm({}, (0, 0))
    fit.movement.arm(fit.parameters, (0, 0))
    fit.step(3)
    found = fit.check()
    assert [seen.code for seen in found] == ["not-updated"] * 2
    assert all("too small for its precision" in seen.cause for seen in found)
    # control: one tensor alone may have a gradient near zero by nature
    fit.model.head.bias.data.zero_()
    fit.step(1)
    assert [seen.names for seen in fit.check()] == [GROUPS[0].parameters]


def test_a_learning_rate_of_zero_moves_nothing_and_is_no_finding() -> None:
    fit = Fit(SGD, lr=0.0)
    fit.step(5)
    assert fit.check() == []


def test_what_has_moved_once_is_not_waited_for_again_unless_it_was_frozen() -> None:
    fit = Fit(SGD)
    fit.step(3)
    assert fit.unmoved() == {}
    fit.movement.arm(fit.parameters, (1, 3))
    assert fit.unmoved() == {}
    fit.movement.arm({}, (1, 3))
    fit.movement.arm(fit.parameters, (2, 6))
    assert set(fit.unmoved()) == set(fit.parameters)
    assert {stuck.steps for stuck in fit.unmoved().values()} == {0}


def test_only_steps_above_a_learning_rate_of_zero_count() -> None:
    fit = Fit(SGD, lr=0.0)
    fit.step(4)
    fit.optimizer.param_groups[0]["lr"] = 0.1  # as a scheduler has it that has just stepped
    assert fit.check() == []
    fit.model.head.weight.register_hook(torch.zeros_like)
    fit.step(3)
    assert only(fit.check()).names == ("head.weight",)
    assert fit.movement.due(3) is False


def test_it_is_looked_at_while_gradients_are_there() -> None:
    fit = Fit(SGD)
    fit.model.head.weight.register_hook(torch.zeros_like)
    fit.step(2)
    assert not fit.movement.due(3)
    fit.step(1)
    assert fit.movement.due(3)
    fit.optimizer.zero_grad()  # as Lightning does before a validation
    assert fit.check() == []


def test_missing_gradients_are_one_finding_for_each_group_and_cause() -> None:
    why = {"body.0.weight": ("A.", "a"), "body.0.bias": ("A.", "a"), "head.bias": ("B.", "b")}
    found = without_gradient(GROUPS, list(why), 7, why.__getitem__)
    assert [(seen.names, seen.cause) for seen in found] == [
        (("body.0.weight", "body.0.bias"), "A."),
        (("head.bias",), "B."),
    ]
    assert "2 tensors of `body` had no gradient for 7 optimizer steps" in found[0].message


# Left out on purpose


class Pretrained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(3, 4), nn.Linear(4, 2)


def omitted(model: nn.Module, *parameters: nn.Parameter) -> frozenset[str]:
    index = ModelIndex.of(model)
    groups = [LayerGroup(path, index.within(index.modules[path])) for path, _ in index.children("")]
    return left_out(index, groups, set(map(id, parameters)), managed=False)


def test_a_backbone_in_no_optimizer_is_frozen_by_omission_and_a_head_is_not() -> None:
    model = Pretrained()
    assert omitted(model, *model.head.parameters()) == {"backbone.weight", "backbone.bias"}
    assert omitted(model, *model.backbone.parameters()) == set()


def test_a_bias_beside_a_weight_that_trains_is_left_out_on_purpose() -> None:
    model = Pretrained()
    assert omitted(model, model.backbone.weight, *model.head.parameters()) == {"backbone.bias"}


def test_nobody_leaves_everything_out_on_purpose() -> None:
    model = Pretrained()
    assert omitted(model, nn.Parameter(torch.zeros(1))) == set()


def test_counts_of_earlier_changes_are_kept_only_while_something_waits_since_then() -> None:
    fit = Fit(SGD, lr=1e-3)
    for change in range(1, 30):  # as where layers are drawn anew again and again
        fit.step()
        fit.unmoved()
        fit.movement.arm({}, (0, change))
        fit.movement.arm(fit.parameters, (0, change))
    assert list(fit.movement._before) == [29]
    fit.model.head.weight.register_hook(torch.zeros_like)
    fit.step(2)
    fit.movement.arm(fit.parameters, (0, 31))
    assert only(fit.check(2)).names == ("head.weight",)  # it still counts from 29
