"""The audit around any loop, and one look at a model."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_freeze import (
    Finding,
    FrozenWeightsChanged,
    assert_frozen,
    audit_parameters,
    freeze,
    summarize,
)
from lightning_freeze.errors import ArgumentError
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


@pytest.mark.parametrize("fused", [False, True])
def test_assert_frozen_names_the_optimizer_that_moved_it(model: Net, fused: bool) -> None:
    optimizer = AdamW(model.parameters(), lr=0.1, fused=fused)
    weight = model.body[0].weight
    weight.grad = torch.ones_like(weight)
    message = r"body\.0\.weight changed.*AdamW holds it and it has a stale gradient"
    with pytest.raises(FrozenWeightsChanged, match=message), assert_frozen(model):
        optimizer.step()
    with assert_frozen(model):  # control: without the gradient it isn't stepped
        weight.grad = None
        optimizer.step()


def test_assert_frozen_takes_its_hooks_off_even_after_an_error(model: Net) -> None:
    before = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    with pytest.raises(ZeroDivisionError, match="mine"), assert_frozen(model):
        raise ZeroDivisionError("mine")
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == before


def test_assert_frozen_tells_that_another_model_was_trained(model: Net) -> None:
    other = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="another one with the same shapes"), assert_frozen(model):
        step(other, SGD(other.parameters(), lr=0.1))
    with assert_frozen(model):  # control: something else is trained beside it
        step(nn.Linear(3, 1), SGD(nn.Linear(3, 1).parameters(), lr=0.1))


# Around transformers' Trainer


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(row, row + 4), "labels": torch.tensor(row % 2)}


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, num_labels=2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    freeze(model, "bert")
    return model


def fit(model: Any, folder: Path, *callbacks: transformers.TrainerCallback) -> None:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[*callbacks])
    trainer.train()


class Nudge(transformers.TrainerCallback):
    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        model.bert.pooler.dense.bias.data.add_(1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_assert_frozen_guards_the_trainer_of_transformers(tmp_path: Path) -> None:
    model = bert()
    before = fingerprint(model.classifier)
    with assert_frozen(model):
        fit(model, tmp_path)
    assert fingerprint(model.classifier) != before
    message = r"\[frozen-changed\] bert\.pooler\.dense\.bias changed.*through `\.data`"
    with pytest.raises(FrozenWeightsChanged, match=message), assert_frozen(model):
        fit(model, tmp_path, Nudge())


# One look


class Pretrained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)


@pytest.fixture
def pretrained() -> Pretrained:
    model = Pretrained()
    freeze(model, "backbone")
    return model


def looked(model: nn.Module, *optimizers: Optimizer) -> dict[str, Finding]:
    found = audit_parameters(model, optimizers)
    assert len({finding.code for finding in found}) == len(found)
    return {finding.code: finding for finding in found}


def test_one_look_at_a_sound_freeze_finds_nothing(pretrained: Pretrained) -> None:
    assert audit_parameters(pretrained) == []
    assert audit_parameters(pretrained, SGD(pretrained.head.parameters(), lr=0.1)) == []
    assert audit_parameters(pretrained, [SGD(pretrained.parameters(), lr=0.1)]) == []


def test_one_look_finds_what_no_optimizer_holds(pretrained: Pretrained) -> None:
    found = looked(pretrained, SGD(pretrained.backbone.parameters(), lr=0.1))
    assert found["not-in-optimizer"].names == ("head.weight", "head.bias")


def test_one_look_finds_an_optimizer_of_another_model(pretrained: Pretrained) -> None:
    optimizer = AdamW([p for p in copy.deepcopy(pretrained).parameters() if p.requires_grad])
    finding = looked(pretrained, optimizer)["not-in-optimizer"]
    assert finding.names == ("head.weight", "head.bias")
    assert "AdamW holds another of its shape that isn't in the model" in finding.cause


def test_one_look_finds_gradients_and_momentum_of_what_is_frozen(pretrained: Pretrained) -> None:
    pretrained.requires_grad_(True)
    optimizer = AdamW(pretrained.parameters())
    pretrained.head(pretrained.backbone(torch.randn(4, 3))).sum().backward()
    optimizer.step()
    pretrained.backbone.requires_grad_(False)
    found = looked(pretrained, optimizer)
    assert found.keys() == {"stale-gradient", "stale-optimizer-state"}
    assert all(len(finding.names) == 4 for finding in found.values())
    freeze(pretrained, "backbone")
    assert looked(pretrained, optimizer).keys() == {"stale-optimizer-state"}


def test_one_look_finds_a_frozen_batch_norm_that_goes_on_moving(pretrained: Pretrained) -> None:
    pretrained.train()
    assert looked(pretrained)["mode-changed"].names == ("backbone.1",)
    pretrained.backbone[1].requires_grad_(True)
    assert looked(pretrained) == {}


def test_one_look_finds_that_nothing_trains(pretrained: Pretrained) -> None:
    freeze(pretrained, "**")
    assert looked(pretrained).keys() == {"nothing-trainable"}


def test_one_look_finds_frozen_memory_that_trains_under_another_name(
    pretrained: Pretrained,
) -> None:
    pretrained.head.twin = nn.Parameter(pretrained.backbone[0].weight.data)
    finding = looked(pretrained, SGD(pretrained.head.parameters(), lr=0.1))["tie-split"]
    assert finding.names == ("backbone.0.weight", "head.twin")


def test_one_look_finds_a_parameter_in_two_groups(pretrained: Pretrained) -> None:
    optimizer = SGD(pretrained.head.parameters(), lr=0.1)
    optimizer.param_groups[0]["params"].append(pretrained.head.bias)
    finding = looked(pretrained, optimizer)["scheduler-mismatch"]
    assert finding.names == ("head.bias",)
    assert "more than one parameter group of SGD" in finding.message


def test_optimizers_are_taken_as_configure_optimizers_gives_them(pretrained: Pretrained) -> None:
    sgd = SGD(pretrained.head.parameters(), lr=0.1)
    rise = torch.optim.lr_scheduler.StepLR(sgd, 1)
    config = {"scheduler": rise, "interval": "step"}
    bad = SGD(pretrained.backbone.parameters(), lr=0.1)
    for wrap in (
        lambda o: o,
        lambda o: [o],
        lambda o: ([o], [rise]),
        lambda o: ([o], [config]),
        lambda o: {"optimizer": o, "lr_scheduler": config},
        lambda o: [{"optimizer": o}],
        lambda o: ({"optimizer": o, "lr_scheduler": rise},),
    ):
        assert audit_parameters(pretrained, wrap(sgd)) == []
        assert [f.code for f in audit_parameters(pretrained, wrap(bad))] == ["not-in-optimizer"]
        assert summarize(pretrained, wrap(sgd)).rows[-1].lr == 0.1


@pytest.mark.parametrize("wrong", [3, "sgd", {"adam": None}, [3]])
def test_what_is_no_optimizer_is_refused(pretrained: Pretrained, wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="Expected optimizers, got"):
        audit_parameters(pretrained, wrong)
    with pytest.raises(ArgumentError, match="`audit_parameters` got SGD"):
        audit_parameters(SGD(pretrained.parameters(), lr=1), pretrained)  # type: ignore[arg-type]
