"""Causes are seen, not guessed: each time two could be suspected, and the right one is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_freeze import freeze
from lightning_freeze.audit import trace as looks
from lightning_freeze.audit.findings import Seen
from lightning_freeze.audit.ledger import Ledger
from lightning_freeze.audit.scene import Average, Scene
from lightning_freeze.audit.trace import Trace
from tests.audit.nets import Net, codes, frozen_net, only


class Decay(SGD):
    """Decays what has no gradient, too, as KellerJordan's Muon does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - 0.1 * group["lr"])


class Watched:
    """A ledger and its notes, and a loop that takes looks as a fit does."""

    def __init__(self, model: Net, *optimizers: Optimizer) -> None:
        self.model = model
        self.optimizers = optimizers
        self.ledger = Ledger(model)
        self.trace = Trace()
        index = self.ledger.index
        self.trace.begin(
            self.ledger.baseline, index.parameters, self.ledger.quiet, looks.FIT, (0, 0)
        )

    def step(
        self,
        during: Callable[[], Any] = lambda: None,
        after: Callable[[], Any] = lambda: None,
        number: int = 0,
    ) -> None:
        """A batch, with something done in the forward pass or behind the update."""
        at = (0, number)
        self.trace.look(looks.START, at)
        self.model(torch.randn(6, 3)).pow(2).sum().backward()
        with torch.no_grad():
            during()
        for optimizer in self.optimizers:
            self.trace.before_update(optimizer, at)
            optimizer.step()
            self.trace.after_update(optimizer, at)
        with torch.no_grad():
            after()
        self.trace.look(looks.END, (0, number + 1))

    def check(self, *averages: Average, flags: bool = False) -> list[Seen]:
        scene = Scene(self.optimizers, self.trace, averages, shared=self.ledger.shared)
        return self.ledger.check(scene, flags=flags)

    def cause(self, *averages: Average) -> str:
        """Why a frozen parameter changed."""
        found = [seen for seen in self.check(*averages) if seen.code == "frozen-changed"]
        return only(found).cause


@pytest.fixture
def model() -> Net:
    net = frozen_net()
    net.body.eval()
    return net


def weight(model: Net) -> nn.Parameter:
    return model.body[0].weight


# Parameters


def test_an_optimizer_that_holds_it_is_not_to_blame_for_a_write_in_place(model: Net) -> None:
    watched = Watched(model, AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    watched.step(after=lambda: weight(model).add_(1))
    assert watched.cause() == (
        "It was written in place by other code, between the optimizer's update and the batch's end."
    )


def test_nor_for_a_write_through_data(model: Net) -> None:
    watched = Watched(model, AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    watched.step(after=lambda: weight(model).data.add_(1))
    assert "through `.data`" in watched.cause()


def test_the_optimizer_that_moves_it_is_named_and_not_the_one_that_leaves_it_alone(
    model: Net,
) -> None:
    watched = Watched(model, AdamW(model.parameters(), lr=0.1), Decay([weight(model)], lr=0.1))
    watched.step()
    assert watched.cause().startswith("Decay holds it: weight decay and momentum move what has no")


def test_a_stale_gradient_is_not_to_blame_while_no_optimizer_steps_it(model: Net) -> None:
    weight(model).grad = torch.ones(4, 3)
    watched = Watched(model, SGD(model.head.parameters(), lr=0.1))
    watched.step(during=lambda: weight(model).mul_(2))
    assert watched.cause() == (
        "It was written in place by other code, in the forward or backward pass of a batch."
    )


@pytest.mark.parametrize("fused", [False, True])
def test_a_stale_gradient_is_to_blame_if_the_optimizer_steps_it(model: Net, fused: bool) -> None:
    watched = Watched(model, AdamW(model.parameters(), lr=0.1, fused=fused))
    weight(model).grad = torch.ones(4, 3)
    watched.step()
    assert watched.cause().startswith("AdamW holds it and it has a stale gradient, which each")


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_of_zeros_is_told_from_a_stale_one(model: Net, fused: bool) -> None:
    watched = Watched(model, AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=fused))
    weight(model).grad = torch.zeros(4, 3)
    watched.step()
    assert watched.cause().startswith("AdamW holds it and it has a stale gradient of zeros: weight")


def test_a_flag_that_was_on_is_to_blame_for_the_step_even_if_it_is_off_again(model: Net) -> None:
    watched = Watched(model, AdamW(model.parameters(), lr=0.1))
    weight(model).requires_grad = True
    watched.step(after=lambda: freeze(model, "body.0.weight"))
    assert watched.cause().startswith("`requires_grad` was True for a time: other code turned it")


def test_a_flag_that_is_on_is_not_to_blame_for_a_write_through_data(model: Net) -> None:
    watched = Watched(model, SGD(model.head.parameters(), lr=0.1))
    weight(model).requires_grad = True
    watched.step(after=lambda: weight(model).data.add_(1))
    assert "through `.data`" in watched.cause()


def test_memory_that_was_exchanged_is_told_from_memory_that_was_written(model: Net) -> None:
    watched = Watched(model, SGD(model.head.parameters(), lr=0.1))
    ones = nn.utils.parameters_to_vector(model.body.parameters()).mul(2)
    watched.step(after=lambda: nn.utils.vector_to_parameters(ones, model.body.parameters()))
    assert watched.cause().startswith("Its memory was exchanged: `.data` was assigned anew")


def test_a_trainable_tensor_in_the_same_memory_is_to_blame_rather_than_a_holder(
    model: Net,
) -> None:
    model.twin = nn.Parameter(weight(model).data)
    assert model.twin.data_ptr() == weight(model).data_ptr()
    watched = Watched(model, SGD(model.parameters(), lr=0.1))
    model.twin.grad = torch.ones(4, 3)
    watched.step()
    found = watched.check()
    assert codes(found) == {"tie-split", "frozen-changed"}
    assert watched.cause().startswith("It shares its memory with `twin`, which trains")
    tie = only([seen for seen in found if seen.code == "tie-split"])
    assert tie.names == ("body.0.weight", "twin")


def test_a_partner_that_nothing_moves_is_not_to_blame_for_a_write(model: Net) -> None:
    model.twin = nn.Parameter(weight(model).data)
    optimizer = SGD([{"params": [model.twin], "lr": 0.0}], lr=0.0)
    watched = Watched(model, optimizer)
    watched.step(after=lambda: weight(model).add_(1))
    assert "written in place by other code" in watched.cause()


def test_memory_shared_with_what_no_optimizer_holds_is_no_finding(model: Net) -> None:
    model.twin = nn.Parameter(weight(model).data)
    watched = Watched(model, SGD(model.head.parameters(), lr=0.1))
    watched.step()
    assert watched.check() == []


def ema(model: Net, **states: bool) -> Average:
    return Average("EMAWeightAveraging", copy.deepcopy(model), **states)


def test_an_average_that_was_taken_of_the_change_is_not_to_blame_for_it(model: Net) -> None:
    watched = Watched(model, AdamW(model.parameters(), lr=0.1))
    weight(model).grad = torch.ones(4, 3)
    watched.step()
    assert watched.cause(ema(model)).startswith("AdamW holds it and it has a stale gradient")


def test_an_average_that_cannot_have_been_written_back_yet_is_not_to_blame(model: Net) -> None:
    watched = Watched(model, AdamW(model.head.parameters(), lr=0.1))
    watched.step(after=lambda: weight(model).data.add_(1))
    assert "through `.data`" in watched.cause(ema(model, written=False))
    assert watched.cause(ema(model)).startswith("`EMAWeightAveraging` averages weights and writes")


def test_an_average_whose_copy_has_drifted_is_named_before_it_is_written_back(model: Net) -> None:
    watched = Watched(model, AdamW(model.head.parameters(), lr=0.1))
    average = ema(model, written=False)
    assert watched.check(average) == []
    with torch.no_grad():
        average.tensors()["body.0.weight"].mul_(1 + 1e-7)
    watched.step()
    seen = only(watched.check(average))
    assert (seen.code, seen.names) == ("frozen-changed", ("body.0.weight",))
    assert seen.message.startswith("the copy of body.0.weight that `EMAWeightAveraging` keeps")


def test_what_was_seen_being_written_is_dated(model: Net) -> None:
    watched = Watched(model, SGD(model.head.parameters(), lr=0.1))
    watched.step(number=0)
    watched.step(number=1, after=lambda: weight(model).add_(1))
    watched.step(number=2)
    assert only(watched.check()).since == (0, 1)


# Buffers


def buffer_cause(watched: Watched, *averages: Average) -> str:
    found = [seen for seen in watched.check(*averages) if seen.code == "frozen-buffer-changed"]
    return only(found).cause


def test_batch_norm_in_train_mode_is_not_to_blame_if_it_took_in_no_batch(model: Net) -> None:
    watched = Watched(model)
    model.body.train()
    model.body[1].running_mean.add_(1)
    assert buffer_cause(watched).startswith("Some code wrote to it")
    model(torch.randn(6, 3))
    assert "batch-norm is in train mode" in buffer_cause(watched)


def test_batch_norm_that_was_in_train_mode_for_a_time_is_found_out_by_its_count(
    model: Net,
) -> None:
    watched = Watched(model)
    model.body.train()
    model(torch.randn(6, 3))
    model.body.eval()
    assert "it was in train mode for a time" in buffer_cause(watched)


def test_a_buffer_that_was_assigned_is_told_from_one_that_was_written(model: Net) -> None:
    watched = Watched(model)
    model.body[1].running_mean = torch.ones(4)
    assert buffer_cause(watched).startswith("Some code assigned another tensor to it")
    watched = Watched(model, SGD(model.head.parameters(), lr=0.1))
    watched.step(after=lambda: model.body[1].running_mean.add_(1))
    assert buffer_cause(watched) == (
        "Some code wrote to it, between the optimizer's update and the batch's end."
    )


def test_weight_averaging_that_resets_statistics_is_named(model: Net) -> None:
    model.body[1].num_batches_tracked.add_(7)
    watched = Watched(model)
    module = model.body[1]
    module.running_mean = torch.zeros(4).add(0.5)
    module.num_batches_tracked.mul_(0)
    average = Average("StochasticWeightAveraging", copy.deepcopy(model))
    assert buffer_cause(watched, average).startswith("`StochasticWeightAveraging` resets the stat")
    assert not buffer_cause(watched).startswith("`Stochastic")


@pytest.mark.parametrize("old", [False, True])
def test_spectral_norm_is_named_and_not_other_code(old: bool) -> None:
    model = Net()
    if old:
        nn.utils.spectral_norm(model.body[0])
    else:
        nn.utils.parametrizations.spectral_norm(model.body[0])
    freeze(model, "body", eval_mode=False)
    model.body[1].eval()
    watched = Watched(model)
    model(torch.randn(4, 3))
    assert buffer_cause(watched).startswith("Spectral norm estimates it anew in every forward")
    model.body.eval()
    control = Watched(model)
    model(torch.randn(4, 3))
    assert control.check() == []


# Flags, modes, gradients


def flag_seen(watched: Watched) -> Seen:
    return only([seen for seen in watched.check(flags=True) if seen.code == "flag-changed"])


def test_flags_that_flipped_together_are_traced_to_one_call(model: Net) -> None:
    watched = Watched(model)
    watched.trace.look_at_flags(looks.START, (0, 3))
    model.body[0].requires_grad_(True)
    watched.trace.look_at_flags(looks.END, (0, 4))
    seen = flag_seen(watched)
    assert seen.names == ("body.0.weight", "body.0.bias")
    assert seen.cause == (
        "Other code set it to True, in a batch: all of `body.0` "
        "at once, as one `requires_grad_()` on it does."
    )
    assert seen.since == (0, 3)


def test_flags_that_flipped_at_different_times_are_two_findings(model: Net) -> None:
    watched = Watched(model)
    model.body[0].weight.requires_grad_(True)
    watched.trace.look_at_flags(looks.END, (0, 4))
    watched.trace.look_at_flags(looks.VALIDATION, (0, 4))
    model.body[0].bias.requires_grad_(True)
    watched.trace.look_at_flags(looks.VALIDATED, (0, 4))
    found = [seen for seen in watched.check(flags=True) if seen.code == "flag-changed"]
    assert {seen.names: "during validation" in seen.cause for seen in found} == {
        ("body.0.weight",): False,
        ("body.0.bias",): True,
    }


def test_a_train_call_on_the_whole_model_is_told_from_one_on_a_part(model: Net) -> None:
    model.eval()
    watched = Watched(model)
    model.body.train()
    part = only(watched.check(flags=True)).cause
    model.train()
    whole = only(watched.check(flags=True)).cause
    assert "on it or on a module around it" in part
    assert "on the whole model" in whole


def gradient_cause(model: Net, *optimizers: Optimizer) -> str:
    watched = Watched(model, *optimizers)
    return only([seen for seen in watched.check() if seen.code == "stale-gradient"]).cause


def test_a_stale_gradient_is_told_by_what_holds_it_and_by_its_values(model: Net) -> None:
    weight(model).grad = torch.ones(4, 3)
    assert "no `zero_grad` clears it" in gradient_cause(model, SGD(model.head.parameters(), lr=1))
    assert "SGD, which holds it, steps it" in gradient_cause(model, SGD(model.parameters(), lr=1))
    weight(model).grad = torch.zeros(4, 3)
    assert "It is all zeros" in gradient_cause(model, SGD(model.parameters(), lr=1))


# Replaced parameters


def replaced_cause(before: Net, change: Callable[[Net], Any]) -> str:
    ledger = Ledger(before)
    change(before)
    found = [seen for seen in ledger.check() if seen.code == "parameter-replaced"]
    return found[0].cause


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


def _assign(model: Net) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def _wrap(model: Net) -> None:
    model.body[0] = Lora(model.body[0])


def _parametrize(model: Net) -> None:
    nn.utils.parametrizations.weight_norm(model.body[0])


def _resize(model: Net) -> None:
    model.body[0].weight = nn.Parameter(torch.zeros(4, 5))


def _exchange(model: Net) -> None:
    model.body[0] = nn.Linear(3, 4)


def _delete(model: Net) -> None:
    del model.body[1]


REPLACED = {
    "assigned": (_assign, "It was assigned anew, as `load_state_dict(assign=True)` does"),
    "wrapped": (_wrap, "under another name now, such as `body.0.base_layer.weight`"),
    "parametrized": (_parametrize, "is computed from others now"),
    "resized": (_resize, "of another shape, (4, 5) instead of (4, 3)"),
    "exchanged": (_exchange, "Its module was replaced by another Linear"),
    "deleted": (_delete, "`body.1` isn't in the model any more"),
}


@pytest.mark.parametrize("how", REPLACED)
def test_how_a_parameter_was_replaced_is_told(model: Net, how: str) -> None:
    change, cause = REPLACED[how]
    assert cause in replaced_cause(model, change)
