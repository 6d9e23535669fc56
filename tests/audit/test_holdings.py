"""Who holds what: optimizers, groups, schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, ReduceLROnPlateau, StepLR

from lightning_freeze import freeze
from lightning_freeze.audit.holdings import check_optimizers
from lightning_freeze.names import ModelIndex
from tests.audit.nets import Net, frozen_net, only


@pytest.fixture
def model() -> Net:
    return frozen_net()


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_what_is_in_no_optimizer_is_found(model: Net) -> None:
    index = ModelIndex.of(model)
    optimizer = SGD([model.head.weight], lr=0.1)
    seen = only(check_optimizers(index, trainable(model), [optimizer], []))
    assert (seen.code, seen.names) == ("not-in-optimizer", ("head.bias",))
    assert check_optimizers(index, ["head.weight"], [optimizer], []) == []


def test_what_was_left_out_on_purpose_is_no_finding(model: Net) -> None:
    index = ModelIndex.of(model)
    optimizer = SGD([model.head.weight], lr=0.1)
    found = check_optimizers(
        index, trainable(model), [optimizer], [], lambda name: name != "head.bias"
    )
    assert found == []


def test_a_loop_without_optimizers_is_not_judged(model: Net) -> None:
    assert check_optimizers(ModelIndex.of(model), trainable(model), [], []) == []


def test_nothing_trainable_is_found(model: Net) -> None:
    freeze(model, "head")
    index = ModelIndex.of(model)
    seen = only(check_optimizers(index, trainable(model), [SGD(model.parameters(), lr=1)], []))
    assert (seen.code, seen.names) == ("nothing-trainable", ())


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: StepLR(o, 1),
    "LambdaLR": lambda o: LambdaLR(o, lambda epoch: 1.0),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o),
    "ChainedScheduler": lambda o: ChainedScheduler([StepLR(o, 1)]),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_that_does_not_know_a_group_is_found(model: Net, kind: str) -> None:
    optimizer = SGD([model.head.weight], lr=0.1)
    scheduler = SCHEDULERS[kind](optimizer)
    index = ModelIndex.of(model)
    assert check_optimizers(index, ["head.weight"], [optimizer], [scheduler]) == []
    optimizer.add_param_group({"params": [model.head.bias]})
    seen = only(check_optimizers(index, ["head.weight"], [optimizer], [scheduler]))
    assert seen.code == "scheduler-mismatch"
    assert "knows 1 parameter groups, its optimizer has 2" in seen.message
