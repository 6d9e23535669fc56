"""Sabotage: an act -> code, names and cause; under a callback, by hand and in a plain loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_freeze import (
    Finding,
    FreezeBackbone,
    FrozenWeightsChanged,
    TrainableParamAudit,
    assert_frozen,
    freeze,
)
from tests.toys import Toy, loader, seeded, trainer

Act = Callable[[Any], Any]
WEIGHT = ("backbone.embed.weight",)
BIAS = ("backbone.embed.bias",)
MEAN = ("backbone.blocks.1.norm.running_mean",)
VARIANCE = ("backbone.blocks.1.norm.running_var",)
# what a cause says
SEEN = "written in place by other code"
SILENT = "through `.data`"
EXCHANGED = "Its memory was exchanged"
WROTE = "Some code wrote to it"
ASSIGNED = "Some code assigned another tensor to it"
AT_STEP = 6


def weight(model: Any) -> Tensor:
    return model.backbone.embed.weight  # type: ignore[no-any-return]


def norm(model: Any) -> Any:
    return model.backbone.blocks[1].norm


def exchange(make: Callable[[Tensor], Tensor]) -> Act:
    def act(model: Any) -> None:
        weight(model).data = make(weight(model).detach())

    return act


def one_element(model: Any) -> None:
    weight(model)[2, 1] += 1.0


def last_bit(model: Any) -> None:
    row = weight(model)[0]
    row.copy_(torch.nextafter(row, torch.full_like(row, 9.0)))


def through_numpy(model: Any) -> None:
    weight(model).detach().numpy()[0, 0] += 1.0


def rows_change_places(model: Any) -> None:
    weight(model).copy_(weight(model).flip(0).clone())


def from_vector(model: Any) -> None:
    frozen = list(model.backbone.embed.parameters())
    vector_to_parameters(parameters_to_vector(frozen) * 1.01, frozen)


def load(model: Any) -> None:
    embed = model.backbone.embed
    embed.load_state_dict({"weight": embed.weight * 2, "bias": embed.bias.clone()})


def assign_mean(model: Any) -> None:
    norm(model).running_mean = norm(model).running_mean + 1.0


ACTS: dict[str, tuple[Act, str, tuple[str, ...], str]] = {
    "add": (lambda m: weight(m).add_(1e-3), "frozen-changed", WEIGHT, SEEN),
    "multiply": (lambda m: weight(m).mul_(1.01), "frozen-changed", WEIGHT, SEEN),
    "zero": (lambda m: weight(m).zero_(), "frozen-changed", WEIGHT, SEEN),
    "clamp": (lambda m: weight(m).clamp_(-1e-3, 1e-3), "frozen-changed", WEIGHT, SEEN),
    "lerp": (lambda m: weight(m).lerp_(torch.ones(8, 4), 0.1), "frozen-changed", WEIGHT, SEEN),
    "initialise": (lambda m: nn.init.normal_(weight(m)), "frozen-changed", WEIGHT, SEEN),
    "one element": (one_element, "frozen-changed", WEIGHT, SEEN),
    "the last bit": (last_bit, "frozen-changed", WEIGHT, SEEN),
    "signs": (lambda m: weight(m).neg_(), "frozen-changed", WEIGHT, SEEN),
    "a NaN": (lambda m: weight(m)[0, 0].fill_(torch.nan), "frozen-changed", WEIGHT, SEEN),
    "rows change places": (rows_change_places, "frozen-changed", WEIGHT, SEEN),
    "a view": (lambda m: weight(m).t()[0].add_(1.0), "frozen-changed", WEIGHT, SEEN),
    "a detached tensor": (lambda m: weight(m).detach().add_(1.0), "frozen-changed", WEIGHT, SEEN),
    "several at once": (
        lambda m: torch._foreach_add_([weight(m), m.backbone.embed.bias], 1.0),
        "frozen-changed",
        WEIGHT + BIAS,
        SEEN,
    ),
    "the bias alone": (lambda m: m.backbone.embed.bias.add_(1.0), "frozen-changed", BIAS, SEEN),
    "load_state_dict": (load, "frozen-changed", WEIGHT, SEEN),
    "data": (lambda m: weight(m).data.add_(1e-3), "frozen-changed", WEIGHT, SILENT),
    "data of one element": (lambda m: weight(m).data[0].zero_(), "frozen-changed", WEIGHT, SILENT),
    "numpy": (through_numpy, "frozen-changed", WEIGHT, SILENT),
    "data assigned": (exchange(lambda t: t + 1), "frozen-changed", WEIGHT, EXCHANGED),
    "rounded to half": (exchange(lambda t: t.half().float()), "frozen-changed", WEIGHT, EXCHANGED),
    "from a vector": (from_vector, "frozen-changed", WEIGHT + BIAS, EXCHANGED),
    "statistics": (
        lambda m: norm(m).running_mean.add_(1.0),
        "frozen-buffer-changed",
        MEAN,
        WROTE,
    ),
    "a variance": (
        lambda m: norm(m).running_var.mul_(2.0),
        "frozen-buffer-changed",
        VARIANCE,
        WROTE,
    ),
    "statistics assigned": (assign_mean, "frozen-buffer-changed", MEAN, ASSIGNED),
}


class Sabotage(Callback):
    """Acts once, behind the batch of one step."""

    def __init__(self, act: Act) -> None:
        self.act = act

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == AT_STEP:
            with torch.no_grad():
                self.act(module)


def nothing(_: Any) -> None:
    pass


def in_a_fit(model: Any, act: Act, *callbacks: Callback) -> list[Finding]:
    audit = TrainableParamAudit(table=False, on_violation="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(*callbacks, Sabotage(act), audit, epochs=3).fit(model, loader())
    return audit.findings


def suite(act: Act) -> list[Finding]:
    return in_a_fit(seeded(Toy), act, FreezeBackbone())


def by_hand(act: Act) -> list[Finding]:
    model = seeded(Toy)
    model.backbone.requires_grad_(False).eval()
    model.configure = lambda m: torch.optim.SGD(m.head.parameters(), lr=0.1)
    return in_a_fit(model, act)


def plain_loop(act: Act) -> list[Finding]:
    model = seeded(Toy)
    freeze(model, "backbone")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [*loader(), *loader()]
    try:
        with assert_frozen(model):
            for step, (x, y) in enumerate(batches, 1):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                if step == AT_STEP:
                    with torch.no_grad():
                        act(model)
    except FrozenWeightsChanged as error:
        return list(error.findings)
    return []


SETTINGS = {"suite": suite, "by hand": by_hand, "plain loop": plain_loop}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("act", ACTS)
def test_an_act_is_found_once_with_code_names_and_cause(act: str, setting: str) -> None:
    do, code, names, cause = ACTS[act]
    (finding,) = SETTINGS[setting](do)
    assert (finding.code, finding.names, finding.count) == (code, names, 1)
    assert cause in finding.cause
    hidden = setting == "plain loop" or cause in (SILENT, EXCHANGED)
    assert hidden or "Sabotage.on_train_batch_end" in finding.cause


class Innocent(Callback):
    """Has a hook in the same place, and does nothing in it."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        pass


def test_whoever_runs_in_the_window_is_named_however_many_there_are() -> None:
    kinds = [type(f"Innocent{number}", (Innocent,), {}) for number in range(5)]
    for kind in kinds:
        kind.on_train_batch_end = lambda self, *_: None  # type: ignore[attr-defined]
    act = ACTS["add"][0]
    (finding,) = in_a_fit(seeded(Toy), act, FreezeBackbone(), *(kind() for kind in kinds))
    assert "`Sabotage.on_train_batch_end`" in finding.cause
    assert all(f"`{kind.__name__}.on_train_batch_end`" in finding.cause for kind in kinds)


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_act_is_no_finding(setting: str) -> None:
    assert SETTINGS[setting](nothing) == []


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("act", ["add", "data", "statistics", "data assigned"])
def test_the_same_run_gives_the_same_findings_word_for_word(act: str, setting: str) -> None:
    told = [[str(f) for f in SETTINGS[setting](ACTS[act][0])] for _ in range(3)]
    assert told[0] == told[1] == told[2] != []
