"""Flags, gradients and modes: `freeze`, `unfreeze`, and plans applied to a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_freeze import fingerprint, freeze, unfreeze
from lightning_freeze.engine.flags import (
    Applier,
    Snapshot,
    can_train,
    frozen_by_user,
    is_batch_norm,
    quiet_modules,
    release,
)
from lightning_freeze.errors import SelectorError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.schedule.plan import FreezePlan


class Net(nn.Module):
    """A body with batch-norm and dropout, and a head; a functional dropout reads its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4)
        )
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(x)))


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def training_modules(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module.training}


def plan_for(model: nn.Module, *prefixes: str, **kwargs: Any) -> FreezePlan:
    frozen = frozenset(n for n, _ in model.named_parameters() if n.startswith(prefixes))
    return FreezePlan(frozen=frozen, **{"quiet": frozen, **kwargs})


def applier_of(model: nn.Module) -> Applier:
    index = ModelIndex.of(model)
    return Applier(index, index.parameters)


# freeze and unfreeze


def test_freeze_turns_off_what_is_named_and_nothing_else() -> None:
    model = Net()
    assert freeze(model, "body.4") == ("body.4.weight", "body.4.bias")
    assert {name for name, flag in flags(model).items() if not flag} == {
        "body.4.weight",
        "body.4.bias",
    }


def test_freeze_drops_the_gradient_of_the_frozen_alone() -> None:
    model = Net()
    model(torch.randn(5, 3)).sum().backward()
    freeze(model, "body")
    assert all(p.grad is None for p in model.body.parameters())
    assert all(p.grad is not None for p in model.head.parameters())


def test_a_frozen_module_stands_still_while_the_rest_moves() -> None:
    model = Net()
    freeze(model, "body")
    before = fingerprint(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).pow(2).sum().backward()
        optimizer.step()
    after = fingerprint(model)
    moved = {name for name in before if after[name] != before[name]}
    assert moved == {"head.weight", "head.bias"}


def test_without_eval_mode_batch_norm_statistics_move() -> None:
    model = Net()
    freeze(model, "body", eval_mode=False)
    before = fingerprint(model)
    model(torch.randn(8, 3))
    after = fingerprint(model)
    assert {name for name in before if after[name] != before[name]} == {
        "body.1.running_mean",
        "body.1.running_var",
        "body.1.num_batches_tracked",
    }


def test_freeze_puts_wholly_frozen_modules_in_eval_with_all_below() -> None:
    model = Net()
    freeze(model, "body")
    assert training_modules(model) == {"", "drop", "head"}


def test_a_module_of_which_something_trains_stays_in_train_mode() -> None:
    model = Net()
    freeze(model, "body.0")
    assert training_modules(model) == set(modes(model)) - {"body.0"}
    freeze(model, ["body.1", "body.4"])
    assert "body" not in training_modules(model)
    assert "body.3" not in training_modules(model)


def test_freezing_everything_puts_the_model_in_eval() -> None:
    model = Net()
    freeze(model, "**")
    assert training_modules(model) == set()


def test_unfreeze_undoes_freeze() -> None:
    model = Net()
    before = (flags(model), modes(model))
    freeze(model, "**")
    assert (flags(model), modes(model)) != before
    unfreeze(model, "**")
    assert (flags(model), modes(model)) == before


def test_unfreeze_leaves_modes_alone_that_freeze_did_not_change() -> None:
    model = Net()
    model.body[1].eval()
    freeze(model, "body")
    unfreeze(model, "body")
    assert training_modules(model) == set(modes(model)) - {"body.1"}


def test_unfreezing_a_part_wakes_that_part() -> None:
    model = Net()
    freeze(model, "**")
    assert unfreeze(model, "head") == ("head.weight", "head.bias")
    assert training_modules(model) >= {"", "head"}
    assert not training_modules(model) & {"body", "body.0", "body.1"}


def test_freezing_twice_is_freezing_once() -> None:
    once, twice = Net(), Net()
    freeze(once, "body")
    freeze(twice, "body")
    freeze(twice, "body")
    assert (flags(once), modes(once)) == (flags(twice), modes(twice))
    unfreeze(twice, "body")
    assert training_modules(twice) == set(modes(twice))


def test_a_tied_tensor_is_frozen_under_all_its_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "decoder": nn.Linear(2, 3, bias=False)})
    model["decoder"].weight = model["embed"].weight
    assert freeze(model, "decoder") == ("embed.weight",)
    assert not model["embed"].weight.requires_grad
    assert not model["decoder"].weight.requires_grad
    assert unfreeze(model, "embed") == ("embed.weight",)
    assert model["decoder"].weight.requires_grad


def test_an_integer_parameter_is_left_frozen() -> None:
    model = Net()
    model.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert not can_train(model.codes)
    assert "codes" in freeze(model, "**")
    assert unfreeze(model, "**") == tuple(n for n in flags(model) if n != "codes")
    assert not model.codes.requires_grad
    assert all(flag for name, flag in flags(model).items() if name != "codes")


def test_a_complex_parameter_can_train() -> None:
    assert can_train(nn.Parameter(torch.zeros(1, dtype=torch.complex64)))


@pytest.mark.parametrize("function", [freeze, unfreeze])
def test_a_bad_selector_leaves_the_model_as_it_was(function: Callable[..., Any]) -> None:
    model = Net()
    freeze(model, "body.0")
    model(torch.randn(4, 3)).sum().backward()
    before = (flags(model), modes(model), [p.grad is None for p in model.parameters()])
    with pytest.raises(SelectorError, match="No parameter matches `haed`"):
        function(model, ["body.4", "haed"])
    assert (flags(model), modes(model), [p.grad is None for p in model.parameters()]) == before
    function(model, ["body", "head"])
    assert flags(model) != before[0]


def test_freezing_works_on_a_wrapped_model() -> None:
    model = Net()
    freeze(nn.DataParallel(model), "body")
    assert not any(p.requires_grad for p in model.body.parameters())
    assert all(p.requires_grad for p in model.head.parameters())


# Which modules are quiet


def test_batch_norm_is_told_from_other_norms() -> None:
    assert is_batch_norm(nn.BatchNorm2d(1))
    assert is_batch_norm(nn.SyncBatchNorm(1))
    assert not is_batch_norm(nn.LayerNorm(1))
    assert not is_batch_norm(nn.GroupNorm(1, 1))


def test_quiet_modules_are_the_wholly_frozen_and_all_below_them() -> None:
    model = Net()
    index = ModelIndex.of(model)
    assert quiet_modules(index, plan_for(model, "body")) == [
        "body", "body.0", "body.1", "body.2", "body.3", "body.4"
    ]  # fmt: skip
    assert quiet_modules(index, plan_for(model, "body.0")) == ["body.0"]
    assert quiet_modules(index, FreezePlan()) == []


def test_a_lively_batch_norm_stays_in_train_mode_in_a_quiet_body() -> None:
    model = Net()
    index = ModelIndex.of(model)
    frozen = frozenset(n for n in index.parameters if n.startswith("body") and "body.1" not in n)
    plan = FreezePlan(frozen=frozen, quiet=frozen, lively=frozenset({"body.1"}))
    assert quiet_modules(index, plan) == ["body", "body.0", "body.2", "body.3", "body.4"]


def test_a_lively_batch_norm_that_is_frozen_itself_is_quiet() -> None:
    model = Net()
    plan = plan_for(model, "body", lively=frozenset({"body.1"}))
    assert "body.1" in quiet_modules(ModelIndex.of(model), plan)


# Applying plans


def test_applying_a_plan_makes_the_model_what_it_says() -> None:
    model = Net()
    applier = applier_of(model)
    assert applier.apply(plan_for(model, "body"))
    assert flags(model) == {n: n.startswith("head") for n in flags(model)}
    assert training_modules(model) == {"", "drop", "head"}


def test_applying_a_plan_twice_changes_nothing_more() -> None:
    model = Net()
    applier = applier_of(model)
    applier.apply(plan_for(model, "body"))
    before = (flags(model), modes(model))
    assert not applier.apply(plan_for(model, "body"))
    assert (flags(model), modes(model)) == before


def test_a_later_plan_gives_flags_and_modes_back() -> None:
    model = Net()
    before = (flags(model), modes(model))
    applier = applier_of(model)
    applier.apply(plan_for(model, "body"))
    assert applier.apply(FreezePlan())
    assert (flags(model), modes(model)) == before


def test_a_batch_norm_that_was_in_eval_before_the_fit_is_so_after_it() -> None:
    model = Net()
    model.body[1].eval()
    applier = applier_of(model)
    applier.apply(plan_for(model, "body"))
    applier.apply(FreezePlan())
    assert training_modules(model) == set(modes(model)) - {"body.1"}


def test_train_called_by_others_is_undone_when_the_module_runs() -> None:
    model = Net()
    applier = applier_of(model)
    applier.apply(plan_for(model, "body"))
    before = fingerprint(model.body)
    model.train()
    model(torch.randn(8, 3))
    assert fingerprint(model.body) == before
    assert training_modules(model) == {"", "drop", "head"}
    # the control: without guards the statistics move
    applier.stop()
    model.train()
    model(torch.randn(8, 3))
    assert fingerprint(model.body) != before


def test_guards_are_not_piled_up_and_are_taken_off() -> None:
    model = Net()
    applier = applier_of(model)
    for _ in range(3):
        applier.apply(plan_for(model, "body"))
    assert len(model.body._forward_pre_hooks) == 1
    assert not model.body[0]._forward_pre_hooks
    applier.stop()
    assert not model.body._forward_pre_hooks


def test_reassert_puts_frozen_modules_back_in_eval() -> None:
    model = Net()
    applier = applier_of(model)
    applier.apply(plan_for(model, "body"))
    model.train()
    applier.reassert()
    assert training_modules(model) == {"", "drop", "head"}


def test_a_plan_without_quiet_leaves_modes_alone() -> None:
    model = Net()
    applier_of(model).apply(plan_for(model, "body", quiet=frozenset()))
    assert training_modules(model) == set(modes(model))
    assert not model.body[0].weight.requires_grad


def test_a_users_train_override_is_not_called() -> None:
    class Stubborn(Net):
        def train(self, mode: bool = True) -> Stubborn:
            raise AssertionError("train() was called")

    model = Stubborn()
    applier = applier_of(model)
    applier.apply(plan_for(model, "body"))
    applier.apply(FreezePlan())
    freeze(model, "**")
    unfreeze(model, "**")
    assert training_modules(model) == set(modes(model))


def test_a_model_that_was_left_in_eval_is_woken_where_it_trains() -> None:
    model = nn.ModuleDict({"net": Net(), "other": Net()}).eval()
    index = ModelIndex.of(model)
    trained = [name for name in index.parameters if name.startswith("net")]
    applier = Applier(index, trained)
    assert "net.body.1" in applier.woken
    assert "net.drop" in applier.woken
    assert not any(path.startswith("other") for path in applier.woken)
    assert not any(module.training for module in model["other"].modules())
    assert all(module.training for module in model["net"].modules())


def test_a_single_batch_norm_in_eval_was_somebodys_decision() -> None:
    model = Net()
    model.body[1].eval()
    assert applier_of(model).woken == ()
    assert not model.body[1].training


def test_the_plan_is_told_from_the_user() -> None:
    model = Net()
    freeze(model, "body.0")
    index = ModelIndex.of(model)
    Applier(index, index.parameters).apply(plan_for(model, "body"))
    assert frozen_by_user(index) == {"body.0.weight", "body.0.bias"}


def test_release_undoes_the_plan_and_not_the_user() -> None:
    model = Net()
    freeze(model, "body.0")
    index = ModelIndex.of(model)
    applier = Applier(index, index.parameters)
    applier.apply(plan_for(model, "body"))
    applier.stop()
    release(index)
    assert {n for n, flag in flags(model).items() if not flag} == {"body.0.weight", "body.0.bias"}
    release(index, claimed=["body.0.bias"])
    assert {n for n, flag in flags(model).items() if not flag} == {"body.0.weight"}


def test_a_snapshot_restores_flags_and_modes() -> None:
    model = Net()
    model.body[3].eval()
    freeze(model, "body.0")
    index = ModelIndex.of(model)
    before = (flags(model), modes(model))
    snapshot = Snapshot.of(index)
    unfreeze(model, "**")
    freeze(model, "head")
    assert (flags(model), modes(model)) != before
    snapshot.restore(index)
    assert (flags(model), modes(model)) == before


def test_forward_pre_hooks_of_the_user_survive() -> None:
    model = Net()
    calls: list[str] = []
    model.body.register_forward_pre_hook(lambda module, args: calls.append("user"))
    applier = applier_of(model)
    applier.apply(plan_for(model, "body"))
    applier.stop()
    model(torch.randn(4, 3))
    assert calls == ["user"]
