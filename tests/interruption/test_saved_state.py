"""A resume from a checkpoint whose state of ours is older, newer, damaged or of other groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_freeze import FreezeBackbone, GradualUnfreeze, ResumeError, TrainableParamAudit
from tests.interruption.test_rules import audit, first, second
from tests.toys import Toy, changed, trainable

HEAD = {"head.weight", "head.bias"}


def altered(path: Path, kind: str, alter: Callable[[dict[str, Any]], Any]) -> Path:
    """A checkpoint with another state of one callback."""
    content = torch.load(path, weights_only=True)
    [key] = [key for key in content["callbacks"] if key.startswith(kind)]
    alter(content["callbacks"][key])
    torch.save(content, path)
    return path


def without(*keys: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: [state.pop(key) for key in keys]


# Which tensors a group holds


def parts(*names: str) -> FreezeBackbone:
    return FreezeBackbone("backbone", trainable=[f"backbone.blocks.0.{name}" for name in names])


def test_other_tensors_of_the_same_number_are_refused(tmp_path: Path) -> None:
    path = first(tmp_path, parts("linear", "norm.weight"))
    with pytest.raises(
        ResumeError,
        match=r"would freeze 1 parameters again, such as `backbone.blocks.0.norm.weight`",
    ):
        second(path, parts("linear", "norm.bias"))
    watch, _ = second(path, parts("linear", "norm.weight"))  # control: the same
    assert watch.batches == 8


def by(pick: Callable[[str], bool]) -> Any:
    """Two groups of the user's own, with other options."""

    def configure(module: nn.Module) -> Any:
        named = list(module.named_parameters())
        fast = [p for name, p in named if pick(name)]
        slow = [p for name, p in named if not pick(name)]
        groups = [{"params": fast, "lr": 0.1}, {"params": slow, "lr": 0.001}]
        return {"optimizer": torch.optim.AdamW(groups)}

    return configure


def test_frozen_groups_that_are_of_another_group_of_the_user_are_refused(tmp_path: Path) -> None:
    """torch would take the learning rates of the checkpoint's groups, and say nothing."""
    path = first(tmp_path, GradualUnfreeze(start=3), configure=by(lambda n: "embed" in n))
    swapped = by(lambda n: "embed" in n or "blocks.0" in n)
    with pytest.raises(ResumeError, match=r"hold \[\[2, 14\]\] tensors, .* \[\[6, 10\]\]"):
        second(path, GradualUnfreeze(start=3), configure=swapped)
    same = by(lambda n: "embed" in n)
    watch, _ = second(path, GradualUnfreeze(start=3), configure=same)  # control
    assert watch.batches == 8


def test_groups_that_hold_other_tensors_of_the_same_number_are_refused(tmp_path: Path) -> None:
    """torch restores by place: each would get the moments of another tensor."""
    path = first(tmp_path, GradualUnfreeze(), configure=by(lambda n: "blocks.0" in n))
    with pytest.raises(
        ResumeError,
        match=r"holds `\S*blocks.1.linear.weight` where the checkpoint's holds `\S*0.lin",
    ):
        second(path, GradualUnfreeze(), configure=by(lambda n: "blocks.1" in n))
    watch, _ = second(path, GradualUnfreeze(), configure=by(lambda n: "blocks.0" in n))  # control
    assert watch.batches == 8


class Renamed(Toy):
    """Has another name for its head, and knows how to read the older one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.top = self.head
        del self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.top(self.backbone(x))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k.replace("head.", "top."): v for k, v in weights.items()}


def test_a_renamed_layer_goes_on_where_the_module_reads_its_older_name(tmp_path: Path) -> None:
    path = first(tmp_path, GradualUnfreeze(), audit())
    watching = audit()
    watch, _ = second(path, GradualUnfreeze(), watching, make=Renamed)
    saved = torch.load(path, weights_only=True)["state_dict"]
    older = {name.replace("top.", "head."): value for name, value in watch.start.items()}
    assert changed(saved, older) == set()
    assert "top.weight" in watch.trained
    assert watching.findings == []


# Older and damaged states


@pytest.mark.parametrize("keys", [["optimizers"], ["optimizers", "trains", "callback"]])
def test_a_state_of_an_older_version_that_says_less_goes_on(
    tmp_path: Path, keys: list[str]
) -> None:
    whole = first(tmp_path / "whole", GradualUnfreeze())
    older = altered(first(tmp_path / "older", GradualUnfreeze()), "Gradual", without(*keys))
    (watch, model), (control, other) = (second(p, GradualUnfreeze()) for p in (older, whole))
    assert watch.trained == control.trained
    assert watch.trained > HEAD
    assert trainable(model) == trainable(other)


@pytest.mark.parametrize(
    "alter",
    [
        without("stage"),
        lambda state: state.update(stage="one"),
        lambda state: state.update(stage=-1),
        lambda state: state.update(stage=1.5),
    ],
)
def test_a_state_without_a_stage_is_refused(tmp_path: Path, alter: Any) -> None:
    path = altered(first(tmp_path, GradualUnfreeze()), "Gradual", alter)
    with pytest.raises(ResumeError, match=r"`stage` of `Gradual.* can't be"):
        second(path, GradualUnfreeze())


def test_a_state_of_the_version_that_split_groups_is_refused(tmp_path: Path) -> None:
    path = altered(first(tmp_path, GradualUnfreeze()), "Gradual", lambda s: s.update(layout=[[2]]))
    with pytest.raises(ResumeError, match=r"lightning-freeze 0.1.*Model.load_from_checkpoint"):
        second(path, GradualUnfreeze())


@pytest.mark.parametrize("key", ["best", "waited", "stage", "fed"])
def test_a_state_without_all_of_the_metric_is_refused(tmp_path: Path, key: str) -> None:
    def following() -> GradualUnfreeze:
        return GradualUnfreeze(monitor="val_steps")

    path = first(tmp_path, following())
    altered(path, "Gradual", lambda state: state["metric"].pop(key))
    with pytest.raises(ResumeError, match=rf"lacks `metric.{key}`"):
        second(path, following())


@pytest.mark.parametrize(
    "alter",
    [
        without("moments"),
        without("checks"),
        without("trainable"),
        without("certificate"),
        lambda state: state["moments"][0].update(colour="blue"),
        lambda state: state["moments"][0].pop("lr"),
        lambda state: state.clear(),
    ],
)
def test_a_state_of_the_audit_that_says_less_or_more_stops_no_resume(
    tmp_path: Path, alter: Any
) -> None:
    path = first(tmp_path, GradualUnfreeze(), audit())
    altered(path, "TrainableParamAudit", alter)
    watching = audit()
    watch, _ = second(path, GradualUnfreeze(), watching)
    assert watch.batches == 8
    assert watching.findings == []
    assert watching.moments[-1].lr["head"]


def test_a_schedule_of_fewer_stages_that_freezes_nothing_again_goes_on(tmp_path: Path) -> None:
    path = first(tmp_path, GradualUnfreeze(unit="step"))  # its last stage, the fifth
    watch, model = second(path, GradualUnfreeze(unit="step", layers_per_step=4))
    everything = {name for name, _ in model.named_parameters()}
    assert watch.trained == everything == trainable(model)


# Other audits


def test_audits_of_other_intervals_may_come_and_go(tmp_path: Path) -> None:
    path = first(tmp_path, GradualUnfreeze(), audit(), TrainableParamAudit(table=False, every=3))
    for audits in (
        [TrainableParamAudit(table=False, every="batch")],
        [audit(), TrainableParamAudit(table=False, every=3)],
        [TrainableParamAudit(table=False, every=2), TrainableParamAudit(table=False, every=3)],
    ):
        second(path, GradualUnfreeze(), *audits)
        assert [each.findings for each in audits] == [[]] * len(audits)
