"""The ledger without a Trainer: each check by itself, and a control that stays silent."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_freeze import freeze
from lightning_freeze.audit.ledger import Declared, Ledger
from lightning_freeze.audit.scene import Average, Scene
from lightning_freeze.fingerprint import fingerprint
from lightning_freeze.model.index import ModelIndex
from tests.audit.nets import Net, around, codes, frozen_net, look, only, step, tied


@pytest.fixture
def model() -> Net:
    return frozen_net()


# Frozen weights


def test_a_healthy_fit_is_silent_while_the_head_moves(model: Net) -> None:
    ledger = Ledger(model)
    optimizer = AdamW(model.head.parameters(), lr=0.1)
    head = fingerprint(model.head)
    for _ in range(3):
        step(model, optimizer)
        assert ledger.check(around(ledger, optimizer)) == []
    assert fingerprint(model.head) != head


def test_a_write_in_place_is_found(model: Net) -> None:
    ledger = Ledger(model)
    with torch.no_grad():
        model.body[0].weight.add_(1)
    seen = only(ledger.check())
    assert (seen.code, seen.names) == ("frozen-changed", ("body.0.weight",))
    assert seen.cause == "No optimizer wrote it: it was written in place by other code."


def test_a_write_through_data_is_found_and_told_from_one_in_place(model: Net) -> None:
    ledger = Ledger(model)
    model.body[0].bias.data.add_(1)
    seen = only(ledger.check())
    assert seen.names == ("body.0.bias",)
    assert "its version didn't change: it was written through `.data`" in seen.cause


def test_a_write_and_its_undoing_is_no_change(model: Net) -> None:
    ledger = Ledger(model)
    with torch.no_grad():
        model.body[0].weight.neg_().neg_()
    assert ledger.check() == []


def test_a_change_of_the_last_bit_is_found(model: Net) -> None:
    ledger = Ledger(model)
    model.body[0].weight.data.view(torch.int32)[0, 0] ^= 1
    assert codes(ledger.check()) == {"frozen-changed"}


def test_weight_decay_on_a_zero_gradient_is_blamed_on_the_stale_gradient(model: Net) -> None:
    ledger = Ledger(model)
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for parameter in model.body.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step_without_backward(optimizer)
    found = ledger.check(around(ledger, optimizer))
    assert codes(found) == {"frozen-changed", "stale-gradient", "stale-optimizer-state"}
    changed = next(seen for seen in found if seen.code == "frozen-changed")
    assert changed.cause.startswith("AdamW holds it and it has a stale gradient")


def step_without_backward(optimizer: Optimizer) -> None:
    optimizer.step()


def test_an_optimizer_that_decays_what_has_no_gradient_is_blamed(model: Net) -> None:
    class Decay(SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.9)

    ledger = Ledger(model)
    optimizer = Decay(model.parameters(), lr=0.1)
    step_without_backward(optimizer)
    changed = next(s for s in ledger.check(around(ledger, optimizer)) if s.code == "frozen-changed")
    assert changed.cause.startswith("Decay holds it: weight decay and momentum move")
    control = Ledger(model)
    step_without_backward(Decay(model.head.parameters(), lr=0.1))
    assert control.check() == []


def test_code_that_turns_a_flag_on_is_blamed(model: Net) -> None:
    ledger = Ledger(model)
    model.body[0].weight.requires_grad = True
    step(model, SGD(model.parameters(), lr=0.1))
    optimizer = SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    found = ledger.check(around(ledger, optimizer))
    assert codes(found) == {"frozen-changed", "flag-changed"}
    changed = next(seen for seen in found if seen.code == "frozen-changed")
    assert changed.cause == ("`requires_grad` is True: other code turned it on, and SGD holds it.")


def test_an_average_is_blamed_only_if_its_copy_has_just_these_bytes(model: Net) -> None:
    ledger = Ledger(model)
    copy_of = copy.deepcopy(model)
    with torch.no_grad():
        model.body[0].weight.mul_(1 + 1e-6)
    scene = Scene(averages=[Average("EMAWeightAveraging", copy_of)])
    seen = only(ledger.check(scene))
    assert "written in place by other code" in seen.cause
    copy_of.body[0].weight.data.copy_(model.body[0].weight)
    seen = only(ledger.check(scene))
    assert seen.cause.startswith("`EMAWeightAveraging` averages weights and writes the average")


def test_tensors_of_one_cause_are_one_finding(model: Net) -> None:
    ledger = Ledger(model)
    with torch.no_grad():
        for parameter in model.body.parameters():
            parameter.add_(1)
    seen = only(ledger.check())
    assert len(seen.names) == 4
    assert seen.message == (
        "body.0.weight, body.0.bias, body.1.weight, body.1.bias changed although frozen"
    )


# Buffers and modes


def test_batch_norm_in_train_mode_is_blamed_for_its_statistics(model: Net) -> None:
    model.body.train()
    ledger = Ledger(model)
    model(torch.randn(8, 3))
    seen = only(ledger.check())
    assert seen.code == "frozen-buffer-changed"
    assert set(seen.names) == {
        "body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"
    }  # fmt: skip
    assert "batch-norm is in train mode" in seen.cause


def test_a_buffer_that_some_code_wrote_is_found(model: Net) -> None:
    ledger = Ledger(model)
    model.body[1].running_mean.add_(1)
    seen = only(ledger.check())
    assert (seen.code, seen.names) == ("frozen-buffer-changed", ("body.1.running_mean",))
    assert seen.cause == "Some code wrote to it."


def test_a_buffer_of_what_trains_may_move() -> None:
    model = Net()
    freeze(model, "head")
    ledger = Ledger(model)
    before = fingerprint(model)
    model(torch.randn(8, 3))
    assert fingerprint(model) != before
    assert ledger.check() == []


def test_a_buffer_that_is_not_saved_may_be_recomputed(model: Net) -> None:
    model.body[0].register_buffer("cache", torch.zeros(1), persistent=False)
    model.body[0].register_buffer("table", torch.zeros(1))
    ledger = Ledger(model)
    model.body[0].cache.add_(1)
    assert ledger.check() == []
    model.body[0].table.add_(1)
    assert codes(ledger.check()) == {"frozen-buffer-changed"}


def test_train_on_a_frozen_module_is_found_at_its_top(model: Net) -> None:
    ledger = Ledger(model)
    model.train()
    seen = only(ledger.check())
    assert (seen.code, seen.names) == ("mode-changed", ("body",))
    assert "called `train()`" in seen.cause
    assert ledger.check(flags=False) == []


def test_a_frozen_module_that_was_in_train_mode_from_the_start_is_no_change() -> None:
    model = Net()
    freeze(model, "body", eval_mode=False)
    ledger = Ledger(model)
    model.train()
    assert ledger.check() == []


# Flags


def test_a_flag_turned_on_is_found(model: Net) -> None:
    ledger = Ledger(model)
    model.body[0].bias.requires_grad = True
    seen = only(ledger.check())
    assert (seen.code, seen.names) == ("flag-changed", ("body.0.bias",))
    assert "requires a gradient although it was declared frozen" in seen.message
    assert ledger.check(flags=False) == []


def test_a_flag_turned_off_is_found(model: Net) -> None:
    ledger = Ledger(model)
    model.head.bias.requires_grad = False
    seen = only(ledger.check())
    assert (seen.code, seen.names) == ("flag-changed", ("head.bias",))
    assert "requires no gradient although it was declared trainable" in seen.message


def test_a_new_trainable_tensor_in_a_frozen_module_is_found(model: Net) -> None:
    ledger = Ledger(model)
    model.extra = nn.Linear(1, 1)
    assert ledger.check() == []
    model.body.add_module("lora", nn.Linear(4, 4))
    seen = only(ledger.check())
    assert (seen.code, seen.names) == ("flag-changed", ("body.lora.weight", "body.lora.bias"))
    assert "new trainable parameter in a frozen module" in seen.message


def test_an_integer_parameter_that_cannot_train_is_no_finding(model: Net) -> None:
    model.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    ledger = Ledger(model, Declared(frozenset(n for n, _ in model.body.named_parameters("body"))))
    assert ledger.check() == []


# What is declared


def test_an_explicit_declaration_that_nothing_is_frozen_is_kept(model: Net) -> None:
    ledger = Ledger(model, Declared(frozenset()))
    assert ledger.declared.frozen == frozenset()
    seen = only(ledger.check())
    assert seen.code == "flag-changed"
    assert len(seen.names) == 4


def test_without_a_declaration_the_flags_are_it(model: Net) -> None:
    declared = Ledger(model).declared
    assert declared == Declared.by_flags(ModelIndex.of(model))
    assert declared.frozen == {f"body.{n}" for n, _ in model.body.named_parameters()}
    assert declared.quiet == declared.still == ("body", "body.0", "body.1")


def test_a_ledger_counts_tensors_and_gives_their_digests(model: Net) -> None:
    ledger = Ledger(model)
    assert len(ledger.baseline) == 4 + 3
    body = {f"body.{name}": digest for name, digest in fingerprint(model.body).items()}
    assert ledger.digests() == body


def test_what_stays_frozen_keeps_its_first_baseline(model: Net) -> None:
    ledger = Ledger(model)
    model.body[0].weight.data.add_(1)
    ledger.declare(Declared.by_flags(ledger.index))
    assert codes(ledger.check()) == {"frozen-changed"}


def test_what_unfreezes_may_move_and_what_freezes_is_watched_from_then(model: Net) -> None:
    ledger = Ledger(model)
    freeze(model, "head")
    model.body.requires_grad_(True)
    ledger.declare(Declared.by_flags(ledger.index))
    model.body[0].weight.data.add_(1)
    assert ledger.check() == []
    model.head.weight.data.add_(1)
    assert codes(ledger.check()) == {"frozen-changed"}


# Ties and identity


def test_a_split_tie_is_found() -> None:
    model = tied()
    ledger = Ledger(model)
    assert ledger.check() == []
    model["decoder"].weight = nn.Parameter(model["embed"].weight.detach().clone())
    seen = only(ledger.check())
    assert (seen.code, seen.names) == ("tie-split", ("embed.weight", "decoder.weight"))


def test_a_tied_frozen_tensor_is_watched_under_all_names() -> None:
    model = tied()
    freeze(model, "embed")
    ledger = Ledger(model)
    model["decoder"].weight.data.add_(1)
    assert only(ledger.check()).names == ("embed.weight",)


def test_a_replaced_parameter_is_found_even_with_equal_bytes(model: Net) -> None:
    ledger = Ledger(model)
    model.head.load_state_dict(model.head.state_dict())
    assert ledger.check() == []
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    seen = only(ledger.check())
    assert (seen.code, seen.names) == ("parameter-replaced", ("head.weight",))
    assert "optimizers still hold" not in seen.cause
    old = ledger.index.parameters["head.weight"]
    seen = only(ledger.check(around(ledger, SGD([old], lr=0.1))))
    assert "optimizers still hold the old one" in seen.cause


def test_a_parameter_that_is_gone_is_found(model: Net) -> None:
    ledger = Ledger(model)
    del model.head
    assert only(ledger.check()).names == ("head.weight", "head.bias")


def test_a_frozen_parameter_loaded_by_assignment_is_found(model: Net) -> None:
    ledger = Ledger(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    found = ledger.check()
    assert codes(found) == {"parameter-replaced"}


# Stale gradients and state


def test_a_gradient_on_a_frozen_tensor_is_found(model: Net) -> None:
    ledger = Ledger(model)
    model.body[0].bias.grad = torch.zeros(4)
    seen = only(ledger.check())
    assert (seen.code, seen.names) == ("stale-gradient", ("body.0.bias",))


def test_momentum_of_a_frozen_tensor_in_an_optimizer_is_found() -> None:
    model = Net()
    optimizer = AdamW(model.parameters())
    step(model, optimizer)
    freeze(model, "body")
    ledger = Ledger(model)
    seen = only(ledger.check(around(ledger, optimizer)))
    assert seen.code == "stale-optimizer-state"
    assert len(seen.names) == 4
    for parameter in model.body.parameters():
        optimizer.state.pop(parameter)
    assert ledger.check(around(ledger, optimizer)) == []


def test_a_frozen_tensor_in_an_optimizer_without_momentum_is_no_finding(model: Net) -> None:
    optimizer = SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    assert look(model, optimizer) == []
