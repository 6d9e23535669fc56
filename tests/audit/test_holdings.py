"""Who holds what: optimizers, groups, schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, ReduceLROnPlateau, StepLR

from lightning_freeze import freeze
from lightning_freeze.audit.holdings import check_optimizers, hidden
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.layer_groups import LayerGroup
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


# Why something is in no optimizer


def missing_cause(model: Net, optimizer: Optimizer, started: ModelIndex | None = None) -> str:
    index = ModelIndex.of(model)
    started = index if started is None else started
    held = frozenset(name for name in started.parameters if name.startswith("head"))
    found = check_optimizers(
        index, trainable(model), [optimizer], [], started=started, once_held=held
    )
    return only(found).cause


def test_what_was_never_held_came_later_or_was_dropped_are_told_apart(model: Net) -> None:
    started = ModelIndex.of(model)
    model.late = nn.Linear(7, 1)
    optimizer = SGD(model.head.parameters(), lr=0.1)
    assert "`configure_optimizers` leaves it out" in missing_cause(model, optimizer)
    assert "added to the model after" in missing_cause(model, optimizer, started)
    model.late = nn.Linear(7, 1)
    known = ModelIndex.of(model)
    model.late = nn.Linear(7, 1)
    assert "It is another Parameter than when the fit" in missing_cause(model, optimizer, known)
    del model.late
    optimizer = SGD(model.head.parameters(), lr=0.1)
    optimizer.param_groups[0]["params"].pop()
    assert "its group was emptied or removed" in missing_cause(model, optimizer)


def test_an_orphan_in_the_optimizer_is_the_cause_if_its_shape_is_what_is_missing(
    model: Net,
) -> None:
    strange = nn.Parameter(torch.zeros(2, 4))
    assert "SGD holds another of its shape" in missing_cause(
        model, SGD([strange, model.head.bias], lr=0.1)
    )
    other = nn.Parameter(torch.zeros(3, 3))
    assert "of its shape" not in missing_cause(model, SGD([other, model.head.bias], lr=0.1))
    meta = nn.Parameter(torch.zeros(2, 4, device="meta"))
    assert "one on the meta device" in missing_cause(model, SGD([meta, model.head.bias], lr=0.1))


def test_what_an_optimizer_holds_beside_the_model_is_no_finding(model: Net) -> None:
    beside = nn.Parameter(torch.zeros(3, 3))
    optimizer = SGD([*model.head.parameters(), beside], lr=0.1)
    assert check_optimizers(ModelIndex.of(model), trainable(model), [optimizer], []) == []


def test_what_is_missing_is_one_finding_for_each_layer_group() -> None:
    model = Net()
    groups = [LayerGroup("a", ("body.0.weight", "body.0.bias")), LayerGroup("b", ("head.weight",))]
    optimizer = SGD([model.head.bias], lr=0.1)
    found = check_optimizers(ModelIndex.of(model), trainable(model), [optimizer], [], groups=groups)
    assert [seen.names for seen in found] == [
        ("body.0.weight", "body.0.bias"),
        ("body.1.weight", "body.1.bias"),
        ("head.weight",),
    ]


def test_a_module_in_a_plain_dict_is_found_once_it_has_a_gradient(model: Net) -> None:
    model.head.extra = {"x": nn.Linear(2, 2)}
    optimizer = SGD(model.head.parameters(), lr=0.1)
    assert hidden(model, [optimizer]) == []
    model.head.extra["x"](torch.ones(1, 2)).sum().backward()
    seen = only(hidden(model, [optimizer]))
    assert seen.names == ("head.extra['x'].weight", "head.extra['x'].bias")
    assert "`extra` is a plain dict" in seen.cause
    assert hidden(model, [SGD(model.head.extra["x"].parameters(), lr=0.1)]) == []
