"""Bad input: an error that says what was asked, what exists and what to write; nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

from lightning_freeze import (
    FreezeBackbone,
    FreezeError,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
)
from tests.toys import Toy, changed, loader, seeded, state, trainable, trainer


class Counts(Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1


class NoBackbone(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.two(self.one(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


CASES: dict[str, tuple[Callable[[], list[Callback]], str]] = {
    "selector without a match": (
        lambda: [FreezeBackbone("backbnoe.*")],
        r"No parameter matches `backbnoe\.\*`\. Top-level modules: backbone, head\. "
        r"Did you mean `backbone\.\*`\?",
    ),
    "trainable without a match": (
        lambda: [FreezeBackbone(trainable="**.LayerNorm")],
        r"No parameter matches `\*\*\.LayerNorm`",
    ),
    "module without parameters": (
        lambda: [FreezeBackbone("backbone.blocks.0.dropout")],
        "has no parameters",
    ),
    "schedule that matches nothing": (
        lambda: [GradualUnfreeze({0: "head", 1: "layer.11"})],
        r"No parameter matches `layer\.11`",
    ),
    "schedule that names a group again": (
        lambda: [GradualUnfreeze({0: "head", 1: "backbone.blocks", 2: "backbone.blocks.1"})],
        r"unfreezes `backbone\.blocks\.1` at 2, but it trains since 1",
    ),
    "trainable_layers beyond the blocks": (
        lambda: [FreezeBackbone(trainable_layers=4)],
        r"`trainable_layers=4` is beyond the 3 blocks",
    ),
    "n_layers beyond the blocks": (
        lambda: [ReinitTopLayers(4)],
        r"`n_layers=4` is beyond the 3 blocks",
    ),
    "nothing left to train": (
        lambda: [FreezeBackbone("**")],
        "Nothing is left to train at the start",
    ),
    "nothing trains at epoch 0": (
        lambda: [GradualUnfreeze({1: "head"})],
        r"Nothing is left to train at the start.*name the head at 0",
    ),
    "contradicting callbacks": (
        lambda: [FreezeBackbone(), GradualUnfreeze()],
        "contradict each other",
    ),
    "contradicting selectors": (
        lambda: [
            FreezeBackbone(),
            FreezeBackbone("backbone.embed", trainable="backbone.embed.bias"),
        ],
        "contradict each other",
    ),
    "a backbone that stays trainable": (
        lambda: [FreezeBackbone(trainable="backbone")],
        "freezes nothing",
    ),
    "good callback before a bad one": (
        lambda: [ReinitTopLayers(1), FreezeBackbone(trainable_layers=9)],
        "beyond the 3 blocks",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_before_the_first_batch_and_changes_nothing(case: str) -> None:
    make, message = CASES[case]
    model = seeded(Toy)
    before = state(model)
    modes = {name: module.training for name, module in model.named_modules()}
    counts = Counts()
    run = trainer(*make(), counts, TrainableParamAudit(table=False), epochs=1)
    with pytest.raises(FreezeError, match=message):
        run.fit(model, loader(), loader(seed=2))
    assert counts.batches == 0
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert changed(before, state(model)) == set()
    # control: the same model trains without the bad callback
    trainer(epochs=1).fit(model, loader())
    assert changed(before, state(model)) != set()


def test_model_without_a_backbone_gets_the_candidates_and_the_line_to_write() -> None:
    model = NoBackbone()
    with pytest.raises(FreezeError, match=r'`one` \(Linear\).*FreezeBackbone\(backbone="one"\)'):
        trainer(FreezeBackbone(), epochs=1).fit(model, loader())
    assert len(trainable(model)) == 4
    trainer(FreezeBackbone(backbone="one"), epochs=1).fit(model, loader())  # the line
    assert trainable(model) == {"two.weight", "two.bias"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FreezeBackbone(trainable_layers=1.5), "`trainable_layers` is 1.5"),
        (lambda: FreezeBackbone(unfreeze_at_epoch=0), "`unfreeze_at_epoch` is 0"),
        (lambda: FreezeBackbone(lr_scale=0), "`lr_scale` is 0"),
        (lambda: FreezeBackbone(backbone=[]), "`backbone` is empty"),
        (lambda: FreezeBackbone(backbone="re:("), "not a regular expression"),
        (lambda: FreezeBackbone(backbone=[3]), "A selector is"),
        (lambda: GradualUnfreeze({-1: "head"}), "has the epoch -1"),
        (lambda: GradualUnfreeze({"one": "head"}), "has the key 'one'"),
        (lambda: GradualUnfreeze({}), "`schedule` is {}"),
        (lambda: GradualUnfreeze({0: ["head", "head"]}), "names `head` twice at 0"),
        (lambda: GradualUnfreeze({0: "head", 1: "head"}), "names `head` at 0 and 1"),
        (lambda: GradualUnfreeze({0: {"thaw": "head"}}), "unknown key `thaw`"),
        (lambda: GradualUnfreeze({0: {"unfreeze": "head", "lr_scale": -1}}), "lr_scale"),
        (lambda: GradualUnfreeze("missing.yaml"), "`missing.yaml` can't be read"),
        (lambda: GradualUnfreeze(3), "`schedule` is 3"),
        (lambda: GradualUnfreeze(order="sideways"), "`order` is 'sideways'. Write \"top_down\""),
        (lambda: GradualUnfreeze(every=0), "`every` is 0"),
        (lambda: GradualUnfreeze(start=-1), "`start` is -1"),
        (lambda: GradualUnfreeze(unit="batch"), "`unit` is 'batch'"),
        (lambda: GradualUnfreeze(lr_decay=0), "`lr_decay` is 0"),
        (lambda: GradualUnfreeze(patience=0), "`patience` is 0"),
        (lambda: GradualUnfreeze(monitor="x", unit="step"), "once an epoch"),
        (lambda: GradualUnfreeze(monitor="x", mode="lower"), "`mode` is 'lower'"),
        (lambda: GradualUnfreeze(min_delta=-1), "`min_delta` is -1"),
        (lambda: GradualUnfreeze(groups=[]), "`groups` is"),
        (lambda: ReinitTopLayers(), "nothing to do"),
        (lambda: ReinitTopLayers(-1), "`n_layers` is -1"),
        (lambda: ReinitTopLayers(1, init="zeros"), "`init` is 'zeros'"),
        (lambda: ReinitTopLayers(1, seed="x"), "`seed` is 'x'"),
        (lambda: TrainableParamAudit(every="hour"), "`every` is 'hour'"),
        (lambda: TrainableParamAudit(every=0), "`every` is 0"),
        (lambda: TrainableParamAudit(every="0"), "`every` is 0"),
        (lambda: TrainableParamAudit(every="-5"), "`every` is '-5'"),
        (lambda: TrainableParamAudit(on_violation="ignore"), "`on_violation` is 'ignore'"),
        (lambda: TrainableParamAudit(dead_after=0), "`dead_after` is 0"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(make: Any, message: str) -> None:
    with pytest.raises(FreezeError, match=message.replace("(", r"\(")):
        make()


def test_reinitialised_layers_that_never_train_are_warned_about() -> None:
    run = trainer(ReinitTopLayers(1), FreezeBackbone(), epochs=1)
    with pytest.warns(UserWarning, match="random values, but they stay frozen"):
        run.fit(seeded(Toy), loader())


def test_validation_metric_without_validation_is_refused() -> None:
    run = trainer(GradualUnfreeze(monitor="val_loss"), epochs=1, limit_val_batches=0)
    with pytest.raises(FreezeError, match="this run has no validation"):
        run.fit(seeded(Toy), loader())


def test_schedule_for_what_the_user_froze_by_hand_is_warned_about() -> None:
    model = seeded(Toy)
    model.backbone.requires_grad_(False)
    with pytest.warns(UserWarning, match="has nothing to unfreeze"):
        trainer(GradualUnfreeze(), epochs=2).fit(model, loader())
    assert trainable(model) == {"head.weight", "head.bias"}
    model = seeded(Toy)
    model.backbone.requires_grad_(False)
    trainer(GradualUnfreeze({0: "head", 1: "**"}), epochs=2).fit(model, loader())  # named
    assert "backbone.embed.weight" in trainable(model)


def lbfgs(module: nn.Module) -> Any:
    return torch.optim.LBFGS([p for p in module.parameters() if p.requires_grad])


def test_a_refused_fit_gives_back_what_a_selector_had_claimed() -> None:
    model = seeded(Toy)
    model.backbone.embed.requires_grad_(False)
    before = trainable(model)
    model.configure = lbfgs
    run = trainer(FreezeBackbone(trainable="backbone.embed"), epochs=1)
    with pytest.raises(FreezeError, match="LBFGS"):
        run.fit(model, loader())
    assert trainable(model) == before
    model.configure = None  # control
    trainer(FreezeBackbone(trainable="backbone.embed"), epochs=1).fit(model, loader())
    assert "backbone.embed.weight" in trainable(model)


def test_a_refused_second_fit_keeps_in_mind_who_froze_what() -> None:
    model = seeded(Toy)
    trainer(FreezeBackbone(), epochs=1).fit(model, loader())
    model.configure = lbfgs
    with pytest.raises(FreezeError, match="LBFGS"):
        trainer(FreezeBackbone(), epochs=1).fit(model, loader())
    assert trainable(model) == {"head.weight", "head.bias"}
    model.configure = None
    trainer(GradualUnfreeze(), epochs=5).fit(model, loader())
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_a_configure_optimizers_that_raises_gives_back_what_was_claimed() -> None:
    def broken(module: nn.Module) -> Any:
        raise ValueError("the user's own mistake")

    model = seeded(lambda: Toy(broken))
    model.backbone.embed.requires_grad_(False)
    before = trainable(model)
    run = trainer(FreezeBackbone(trainable="backbone.embed"), epochs=1)
    with pytest.raises(ValueError, match="the user's own mistake"):
        run.fit(model, loader())
    assert trainable(model) == before


def test_two_callbacks_of_one_class_have_different_state_keys() -> None:
    for one, other in (
        (FreezeBackbone(), FreezeBackbone(train_bn=True)),
        (FreezeBackbone(), FreezeBackbone(lr_scale=0.5)),
        (GradualUnfreeze(), GradualUnfreeze(lr_decay=0.5)),
        (GradualUnfreeze(), GradualUnfreeze(order="bottom_up")),
        (GradualUnfreeze(), GradualUnfreeze(monitor="val_loss")),
        (ReinitTopLayers(1), ReinitTopLayers(1, pooler=False)),
        (TrainableParamAudit(), TrainableParamAudit(every=3)),
    ):
        assert one.state_key != other.state_key
        assert one.state_key == type(one)(**_arguments(one)).state_key


def _arguments(callback: Any) -> dict[str, Any]:
    return {"n_layers": 1} if isinstance(callback, ReinitTopLayers) else {}
