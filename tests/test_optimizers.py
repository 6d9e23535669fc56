"""Groups split once per layer group: small behaviour, without a Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, SequentialLR, StepLR

from lightning_freeze.engine.layout import Layout
from lightning_freeze.engine.optimizers import (
    OptimizerGroups,
    check_supported,
    learning_rates,
    release,
    whole_groups,
)
from lightning_freeze.errors import UnsupportedError
from lightning_freeze.model.index import ModelIndex

NAMES = ("low.weight", "low.bias", "high.weight", "high.bias", "head.weight", "head.bias")
GROUP = {name: name.split(".")[0] for name in NAMES}
LOW = frozenset(NAMES[:2])
DECAY = dict.fromkeys(NAMES[:2], 0.25) | dict.fromkeys(NAMES[2:4], 0.5)


def toy() -> nn.ModuleDict:
    return nn.ModuleDict({"low": nn.Linear(2, 2), "high": nn.Linear(2, 2), "head": nn.Linear(2, 1)})


def split(
    model: nn.Module,
    *optimizers: Optimizer,
    schedulers: tuple[Any, ...] = (),
    lr_scale: dict[str, float] | None = None,
) -> OptimizerGroups:
    return OptimizerGroups(ModelIndex.of(model), optimizers, schedulers, GROUP, lr_scale or {})


def sizes(optimizer: Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def names(optimizer: Optimizer) -> list[str]:
    return [group["name"] for group in optimizer.param_groups]


def step(model: nn.ModuleDict, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    x = torch.randn(3, 2)
    for part in model.values():
        x = part(x)
    x.sum().backward()
    optimizer.step()


def test_one_group_is_split_per_layer_group() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    groups = split(model, optimizer)
    assert names(optimizer) == ["low", "high", "head"]
    assert sizes(optimizer) == [2, 2, 2]
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.01}
    assert {g["momentum"] for g in optimizer.param_groups} == {0.9}
    assert groups.held == set(NAMES)
    assert Layout.of(groups).counts == [[2, 2, 2]]


def test_the_users_groups_keep_their_options() -> None:
    model = toy()
    decayed = [p for n, p in model.named_parameters() if n.endswith("weight")]
    plain = [p for n, p in model.named_parameters() if n.endswith("bias")]
    optimizer = AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "lr": 0.5}], lr=0.1
    )
    split(model, optimizer)
    assert names(optimizer) == ["low/0", "high/0", "head/0", "low/1", "high/1", "head/1"]
    assert [g["lr"] for g in optimizer.param_groups] == [0.1] * 3 + [0.5] * 3
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1] * 3 + [0.01] * 3


def test_freezing_empties_lists_and_unfreezing_fills_them() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    groups = split(model, optimizer)
    groups.sync(LOW)
    assert sizes(optimizer) == [0, 2, 2]
    groups.sync(LOW)
    assert sizes(optimizer) == [0, 2, 2]
    groups.sync(frozenset())
    assert sizes(optimizer) == [2, 2, 2]
    assert optimizer.param_groups[0]["params"][0] is model["low"].weight


def test_what_is_frozen_loses_its_state_and_the_rest_keeps_it() -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    step(model, optimizer)
    split(model, optimizer).sync(LOW)
    assert model["low"].weight not in optimizer.state
    assert optimizer.state[model["head"].weight]["step"] == 1


def test_an_emptied_group_does_not_move_and_others_do() -> None:
    model = toy()
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    split(model, optimizer).sync(LOW)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(NAMES) - LOW


def test_a_factor_scales_the_lr_of_its_group() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.8)
    split(model, optimizer, lr_scale=DECAY)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.4, 0.8]


def test_splitting_twice_scales_once() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.8)
    for _ in range(3):
        split(model, optimizer, lr_scale=DECAY)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.4, 0.8]
    assert names(optimizer) == ["low", "high", "head"]


def test_release_gives_the_users_groups_back() -> None:
    model = toy()
    optimizer = AdamW(model.parameters(), lr=0.8)
    scheduler = StepLR(optimizer, 1)
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    split(model, optimizer, schedulers=(scheduler,), lr_scale=DECAY).sync(LOW)
    assert len(scheduler.base_lrs) == 3
    release(ModelIndex.of(model))
    assert sizes(optimizer) == [6]
    after = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert after == before
    assert scheduler.base_lrs == [0.8]
    assert type(scheduler) is StepLR


def test_release_of_another_model_leaves_it_split() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.8)
    split(model, optimizer)
    release(ModelIndex.of(toy()))
    assert sizes(optimizer) == [2, 2, 2]


def test_param_names_follow_their_parameters() -> None:
    model = toy()
    optimizer = SGD(model.named_parameters(), lr=0.1)
    groups = split(model, optimizer)
    assert [g["param_names"] for g in optimizer.param_groups] == [
        ["low.weight", "low.bias"], ["high.weight", "high.bias"], ["head.weight", "head.bias"]
    ]  # fmt: skip
    groups.sync(LOW)
    assert optimizer.param_groups[0]["param_names"] == []
    release(groups.index)
    assert optimizer.param_groups[0]["param_names"] == list(NAMES)


def test_several_optimizers_are_split_each() -> None:
    model = toy()
    first = SGD(model["low"].parameters(), lr=0.1)
    second = AdamW([*model["high"].parameters(), *model["head"].parameters()], lr=0.2)
    groups = split(model, first, second)
    assert Layout.of(groups).counts == [[2], [2, 2]]
    groups.sync(LOW)
    assert Layout.of(groups).counts == [[0], [2, 2]]
    assert learning_rates(groups.index, [first, second])["low.weight"] == 0.1
    assert learning_rates(groups.index, [first, second])["head.bias"] == 0.2


def test_a_tensor_lr_is_not_shared_between_groups() -> None:
    model = toy()
    optimizer = AdamW(model.parameters(), lr=torch.tensor(0.8), foreach=False)
    split(model, optimizer)
    assert len({g["lr"].data_ptr() for g in optimizer.param_groups}) == 3
    split(model, optimizer, lr_scale=DECAY)
    lrs = [g["lr"] for g in optimizer.param_groups]
    assert [round(float(lr), 6) for lr in lrs] == [0.2, 0.4, 0.8]
    assert len({lr.data_ptr() for lr in lrs}) == 3
    split(model, optimizer, lr_scale=DECAY)
    lrs = [g["lr"] for g in optimizer.param_groups]
    assert [round(float(lr), 6) for lr in lrs] == [0.2, 0.4, 0.8]


def test_group_names_are_unique_and_keep_the_users() -> None:
    model = toy()
    pairs = [{"params": [p], "name": n.split(".")[1]} for n, p in model.named_parameters()]
    optimizer = SGD(pairs, lr=0.1)
    split(model, optimizer)
    assert names(optimizer) == [
        "low/weight", "low/bias", "high/weight", "high/bias", "head/weight", "head/bias"
    ]  # fmt: skip
    same = SGD([{"params": [p], "name": "all"} for p in toy().parameters()], lr=0.1)
    split(model, same)
    assert len(set(names(same))) == 6
    release(ModelIndex.of(model))
    assert names(optimizer) == ["weight", "bias"] * 3


def test_parameters_outside_of_the_model_are_kept_and_never_frozen() -> None:
    model = toy()
    foreign = nn.Parameter(torch.zeros(1))
    optimizer = SGD([*model.parameters(), foreign], lr=0.1)
    groups = split(model, optimizer)
    assert names(optimizer) == ["low", "high", "head", "other"]
    groups.sync(frozenset(NAMES))
    assert sizes(optimizer) == [0, 0, 0, 1]
    assert len(groups.held) == 6


def test_whole_groups_are_those_of_the_user_while_frozen() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    assert len(whole_groups(optimizer)[0]) == 6
    split(model, optimizer).sync(LOW)
    assert [len(group) for group in whole_groups(optimizer)] == [6]


def test_learning_rates_include_what_is_frozen() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.8)
    groups = split(model, optimizer, lr_scale=DECAY)
    groups.sync(LOW)
    assert learning_rates(groups.index, [optimizer])["low.bias"] == 0.2


def test_schedulers_lists_grow_with_the_groups_and_stepping_works() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.8, momentum=0.9)
    inner = [StepLR(optimizer, 1, gamma=0.5), LambdaLR(optimizer, lambda epoch: 1.0)]
    schedulers = (
        SequentialLR(optimizer, inner, milestones=[2]),
        OneCycleLR(optimizer, max_lr=0.8, total_steps=9),
    )
    split(model, optimizer, schedulers=schedulers, lr_scale=DECAY)
    assert len(inner[0].base_lrs) == len(inner[1].lr_lambdas) == 3
    optimizer.step()
    for scheduler in schedulers:
        scheduler.step()
    lrs = [g["lr"] for g in optimizer.param_groups]
    assert lrs == [lrs[2] * 0.25, lrs[2] * 0.5, lrs[2]]


def test_a_scheduler_of_another_optimizer_is_left_alone() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    other = StepLR(SGD(toy().parameters(), lr=0.1), 1)
    split(model, optimizer, schedulers=(other,))
    assert other.base_lrs == [0.1]


def test_lbfgs_is_refused_before_anything_changes() -> None:
    model = toy()
    first = SGD(model["low"].parameters(), lr=0.1)
    lbfgs = LBFGS(model["head"].parameters())
    with pytest.raises(UnsupportedError, match=r"`LBFGS` can't be used.*Use AdamW, SGD or another"):
        split(model, first, lbfgs)
    assert "name" not in first.param_groups[0]
    check_supported([first])


def test_a_subclass_of_a_refused_optimizer_is_refused() -> None:
    class Mine(LBFGS):
        pass

    with pytest.raises(UnsupportedError, match="`Mine` can't be used"):
        check_supported([Mine(toy().parameters())])


def test_a_factor_on_an_optimizer_without_a_learning_rate_is_refused() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(UnsupportedError, match=r"chooses its learning rate itself \(`lr=None`\)"):
        split(model, optimizer, lr_scale=DECAY)
    assert sizes(optimizer) == [6]
    split(model, optimizer)
    assert sizes(optimizer) == [2, 2, 2]


@pytest.mark.parametrize("kind", [SGD, AdamW, Adafactor])
def test_state_dicts_have_one_shape_whatever_is_frozen(kind: Any) -> None:
    model = toy()
    optimizer = kind(model.parameters(), lr=0.1)
    groups = split(model, optimizer)
    shapes = []
    for frozen in (frozenset(NAMES[:4]), LOW, frozenset()):
        groups.sync(frozen)
        step(model, optimizer)
        shapes.append(len(optimizer.state_dict()["param_groups"]))
        optimizer.load_state_dict(optimizer.state_dict())
    assert shapes == [3, 3, 3]
