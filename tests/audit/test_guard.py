"""The audit around any loop."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_freeze import FrozenWeightsChanged, assert_frozen, freeze
from lightning_freeze.fingerprint import fingerprint
from tests.audit.nets import Net, frozen_net, step, tied


@pytest.fixture
def model() -> Net:
    return frozen_net()


def test_assert_frozen_is_silent_while_the_head_moves(model: Net) -> None:
    before = fingerprint(model.head)
    with assert_frozen(model):
        step(model, SGD(model.head.parameters(), lr=0.1))
    assert fingerprint(model.head) != before


def test_assert_frozen_names_what_changed_and_why(model: Net) -> None:
    message = r"\[frozen-changed\] body\.0\.weight changed although frozen.*written in place"
    with (
        pytest.raises(FrozenWeightsChanged, match=message) as caught,
        assert_frozen(model),
        torch.no_grad(),
    ):
        model.body[0].weight.zero_()
    (finding,) = caught.value.findings
    assert (finding.code, finding.names) == ("frozen-changed", ("body.0.weight",))


def test_assert_frozen_watches_buffers(model: Net) -> None:
    model.train()
    message = r"frozen-buffer-changed\] the buffers body\.1"
    with pytest.raises(FrozenWeightsChanged, match=message), assert_frozen(model):
        model(torch.randn(4, 3))


def test_assert_frozen_finds_a_replaced_parameter(model: Net) -> None:
    message = re.escape("[parameter-replaced] body.0.bias is another Parameter object")
    with pytest.raises(FrozenWeightsChanged, match=message), assert_frozen(model):
        model.body[0].bias = nn.Parameter(torch.zeros(4))


def test_assert_frozen_finds_a_split_tie() -> None:
    model = tied()
    freeze(model, "embed")
    with pytest.raises(FrozenWeightsChanged, match="tie-split"), assert_frozen(model):
        model["decoder"].weight = nn.Parameter(model["embed"].weight.detach().clone())


def test_assert_frozen_does_not_mind_another_head(model: Net) -> None:
    with assert_frozen(model):
        model.head = nn.Linear(4, 5)


def test_an_exception_inside_passes_through(model: Net) -> None:
    def failing() -> None:
        model.body[0].weight.data.add_(1)
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"), assert_frozen(model):
        failing()


def test_assert_frozen_leaves_the_model_alone(model: Net) -> None:
    before = [(p.requires_grad, p._version) for p in model.parameters()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with assert_frozen(model):
        pass
    assert [(p.requires_grad, p._version) for p in model.parameters()] == before
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
