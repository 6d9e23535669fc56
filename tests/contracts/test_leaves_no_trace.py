"""After a fit nothing is left: memory, hooks, modes; and the order of callbacks is free."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_freeze import (
    FreezeBackbone,
    FrozenFeatureCache,
    GradualFreeze,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
    freeze,
)
from tests.callbacks.recipes import configure
from tests.toys import Toy, changed, loader, seeded, state, trainable, trainer

# Memory


def failing() -> list[Callback]:
    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("of the user's own")

    return [GradualUnfreeze(), Fails()]


FITS: dict[str, Callable[[], list[Callback]]] = {
    "FreezeBackbone": lambda: [FreezeBackbone()],
    "released": lambda: [FreezeBackbone(unfreeze_at_epoch=1, lr_scale=0.1)],
    "GradualUnfreeze": lambda: [GradualUnfreeze(lr_decay=0.5)],
    "by metric": lambda: [GradualUnfreeze(monitor="val_loss")],
    "GradualFreeze": lambda: [GradualFreeze()],
    "autofreeze": lambda: [GradualFreeze.autofreeze()],
    "LISA": lambda: [GradualUnfreeze.lisa(1, 2)],
    "reinit": lambda: [ReinitTopLayers(1)],
    "audit alone": lambda: [TrainableParamAudit(table=False)],
    "with audit": lambda: [GradualUnfreeze(), TrainableParamAudit(table=False)],
    "with cache": lambda: [FreezeBackbone(), FrozenFeatureCache()],
    "that fails": failing,
    "averaged": lambda: [GradualUnfreeze(), StochasticWeightAveraging(1e-3, swa_epoch_start=1)],
}


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.filterwarnings("ignore:FrozenFeatureCache", "ignore:.*StochasticWeightAveraging")
def test_model_trainer_and_optimizer_are_garbage_after_the_fit(kind: str, tmp_path: Path) -> None:
    def fit() -> tuple[list[Callback], list[weakref.ref[Any]]]:
        callbacks, model = FITS[kind](), Toy()
        run = trainer(*callbacks, epochs=2)
        if kind == "that fails":
            with pytest.raises(RuntimeError, match="of the user's own"):
                run.fit(model, loader())
        else:
            run.fit(model, loader(), loader(seed=2))
        optimizer = run.optimizers[0]
        held = [run, model, optimizer, model.head.weight, model.backbone]
        return callbacks, [weakref.ref(each) for each in held]

    callbacks, held = fit()
    ours = [cb for cb in callbacks if type(cb).__module__.startswith("lightning_freeze")]
    del callbacks
    gc.collect()
    assert [each() for each in held] == [None] * len(held)
    assert ours  # what the user keeps, keeps nothing of it


# Hooks, groups, modes


class Dropping(Toy):
    """Has a tower that somebody froze and put to sleep, and one that is awake."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.teacher = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.teacher.requires_grad_(False)
        self.judge = copy.deepcopy(self.teacher).eval()

    def loss(self, batch: Any) -> Tensor:
        self.judge(batch[0])
        return super().loss(batch) + 0.0 * self.teacher(batch[0]).sum()


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize(
    "make",
    [
        FreezeBackbone,
        GradualUnfreeze,
        GradualFreeze,
        lambda: FreezeBackbone("backbone.embed"),
        lambda: FreezeBackbone(eval_mode=False),
        lambda: GradualUnfreeze({0: "head", 1: "blocks.2"}),
    ],
)
def test_a_fit_leaves_modes_hooks_and_groups_as_they_were(make: Callable[[], Callback]) -> None:
    model = seeded(lambda: Dropping(configure("AdamW", "StepLR")))
    before = modes(model)
    run = trainer(make(), TrainableParamAudit(table=False), epochs=2)
    run.fit(model, loader())
    assert modes(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    [optimizer] = run.optimizers
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(model.parameters())
    )
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_state_dict_pre_hooks


class Watch(Callback):
    """The modes in each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, bool]] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.seen.append(modes(pl_module))


@pytest.mark.parametrize(
    ("make", "asleep"),
    [
        (FreezeBackbone, True),
        (GradualUnfreeze, True),
        (lambda: GradualUnfreeze({0: "head", 1: "backbone"}), True),
        (lambda: FreezeBackbone("backbone"), True),
        (lambda: FreezeBackbone(eval_mode=False), False),
        (lambda: GradualUnfreeze(eval_mode=False), False),
    ],
)
def test_only_what_a_schedule_governs_changes_its_mode(
    make: Callable[[], Callback], asleep: bool
) -> None:
    watch, model = Watch(), seeded(Dropping)
    statistics = model.teacher[1].running_mean.clone()
    trainer(make(), watch, epochs=1).fit(model, loader())
    for seen in watch.seen:
        assert all(mode for name, mode in seen.items() if name.startswith("teacher"))
        assert not any(mode for name, mode in seen.items() if name.startswith("judge"))
        assert seen["backbone.blocks.0.dropout"] is not asleep
    assert not torch.equal(statistics, model.teacher[1].running_mean)


def test_a_second_phase_by_hand_trains_with_dropout_and_statistics() -> None:
    model = seeded(Toy)
    trainer(FreezeBackbone(), epochs=1).fit(model, loader())
    model.requires_grad_(True)
    watch, before = Watch(), state(model)
    trainer(watch, epochs=1).fit(model, loader())
    assert all(all(seen.values()) for seen in watch.seen)
    assert "backbone.blocks.0.norm.running_mean" in changed(before, state(model))


@pytest.mark.parametrize("second", [FreezeBackbone, GradualUnfreeze])
def test_a_deep_copy_of_a_fitted_model_fits_as_new(second: Callable[[], Callback]) -> None:
    model = seeded(Toy)
    trainer(FreezeBackbone(), epochs=1).fit(model, loader())
    fresh = seeded(Toy)
    fresh.load_state_dict(model.state_dict())
    ends = []
    for each in (copy.deepcopy(model), model, fresh):
        torch.manual_seed(3)
        trainer(second(), epochs=3).fit(each, loader())
        ends.append((state(each), trainable(each)))
    for weights, names in ends[1:]:
        assert changed(ends[0][0], weights) == set()
        assert names == ends[0][1]


def test_what_the_user_froze_stays_the_users_in_a_copy() -> None:
    model = seeded(Toy)
    freeze(model, "backbone.embed")
    other = copy.deepcopy(model)
    trainer(FreezeBackbone(unfreeze_at_epoch=1), epochs=2).fit(other, loader())
    assert "backbone.embed.weight" not in trainable(other)
    assert "backbone.blocks.0.linear.weight" in trainable(other)


# The order of callbacks


class Late(Toy):
    """Makes a part of itself in a hook."""

    hook = ""

    def __init__(self) -> None:
        super().__init__()
        self.made = False

    def make_head(self) -> None:
        if not self.made:
            self.made = True
            torch.manual_seed(11)
            self.head = nn.Linear(8, 3)


class InSetup(Late):
    def setup(self, stage: str) -> None:
        self.make_head()


class InConfigureModel(Late):
    def configure_model(self) -> None:
        self.make_head()


@pytest.mark.parametrize("kind", [Toy, InSetup, InConfigureModel])
def test_the_order_of_callbacks_never_matters(kind: type[Toy]) -> None:
    ends = []
    for order in itertools.permutations(range(3)):
        made = [GradualUnfreeze(), TrainableParamAudit(table=False), ReinitTopLayers(1, seed=5)]
        model = seeded(kind)
        before = state(model)
        torch.manual_seed(4)
        trainer(*(made[i] for i in order), epochs=2).fit(model, loader())
        assert made[1].findings == []
        assert "backbone.blocks.2.linear.weight" in changed(before, state(model))
        ends.append(state(model))
    assert all(changed(ends[0], end) == set() for end in ends[1:])


def test_a_checkpoint_that_is_saved_behind_the_fit_resumes(tmp_path: Path) -> None:
    model = seeded(lambda: Toy(configure("AdamW", "StepLR")))
    run = trainer(GradualUnfreeze(), TrainableParamAudit(table=False), epochs=2)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "behind.ckpt")
    save = ModelCheckpoint(tmp_path, filename="inside")
    again = seeded(lambda: Toy(configure("AdamW", "StepLR")))
    trainer(
        GradualUnfreeze(), TrainableParamAudit(table=False), save, epochs=2,
        enable_checkpointing=True,
    ).fit(again, loader())  # fmt: skip
    ends = []
    for path in ("behind.ckpt", "inside.ckpt"):
        audit = TrainableParamAudit(table=False)
        model = seeded(lambda: Toy(configure("AdamW", "StepLR")))
        torch.manual_seed(8)
        trainer(GradualUnfreeze(), audit, epochs=4).fit(model, loader(), ckpt_path=tmp_path / path)
        assert audit.findings == []
        ends.append((state(model), trainable(model)))
    assert ends[0][1] == ends[1][1]
    assert changed(ends[0][0], ends[1][0]) == set()
