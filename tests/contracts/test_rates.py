"""The rate of every tensor in every step: the user's, whoever sets it, times the layer's factor.

It is read off the update: each step is done again by a plain optimizer, and compared to the bit.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.optim import SGD, AdamW, lr_scheduler

from lightning_freeze import FreezeBackbone, GradualUnfreeze, TrainableParamAudit
from tests.callbacks.recipes import EPOCHS, OPTIMIZERS, SCHEDULERS, configure
from tests.oracle import Oracle
from tests.toys import Toy, loader, seeded, trainer

DECAY = 0.3
# layer group -> distance from the top
DISTANCE = {"head": 0, "backbone.blocks.2": 1, "backbone.blocks.1": 2, "backbone.blocks.0": 3}


def decayed(name: str) -> float:
    group = name.split(".")[0] if name.startswith("head") else ".".join(name.split(".")[:3])
    return DECAY ** DISTANCE.get(group, 4)


def tenth(name: str) -> float:
    return 0.1 if name.startswith("backbone") else 1.0


def run(
    make: Any, *callbacks: Callback, factor_of: Any = lambda name: 1.0, **options: Any
) -> Oracle:
    oracle = Oracle(factor_of)
    model = seeded(make)
    audit = TrainableParamAudit(table=False, on_violation="raise", dead_after=99)
    trainer(*callbacks, oracle, audit, epochs=EPOCHS, **options).fit(model, loader())
    assert audit.findings == []
    return oracle


@functools.cache
def alone(optimizer: str, scheduler: str) -> list[list[float]]:
    """The rates of the run without any freezing."""
    return run(lambda: Toy(configure(optimizer, scheduler))).lrs


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_step_is_that_of_a_plain_optimizer_at_the_users_rate_times_the_factor(
    optimizer: str, scheduler: str
) -> None:
    make = lambda: Toy(configure(optimizer, scheduler))  # noqa: E731
    oracle = run(make, GradualUnfreeze(lr_decay=DECAY), factor_of=decayed)
    assert oracle.wrong == []
    assert oracle.lrs == alone(optimizer, scheduler)
    assert len({tuple(lrs) for lrs in oracle.lrs}) > 1  # the schedule does move
    assert {"head.weight", "backbone.embed.weight"} <= oracle.moved


def test_the_oracle_sees_a_wrong_factor() -> None:
    make = lambda: Toy(configure("AdamW", "StepLR"))  # noqa: E731
    wrong = run(make, GradualUnfreeze(lr_decay=DECAY), factor_of=tenth).wrong
    assert "backbone.blocks.0.linear.weight" in {name for _, name in wrong}


# who sets the user's rate, and how: module -> optimizers


class InOptimizerStep(Toy):
    """A warm-up by hand behind each step, as in Lightning's own documentation."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None
    ) -> None:
        optimizer.step(closure=closure)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (self.global_step + 1) / 8)


class InTrainingStep(Toy):
    """A rate that is set within the step's closure."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for group in self.optimizers().param_groups:
            group["lr"] = 1e-2 / (1 + self.global_step)
        return super().training_step(batch, batch_idx)


class AtBatchStart(Toy):
    """A tensor rate that is written in place."""

    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=torch.tensor(1e-2), foreach=False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"].fill_(1e-2 / (1 + self.global_step))


class Kept(Toy):
    """A scheduler that the module keeps for itself and steps by hand."""

    make: Any = None

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=1e-2)
        self.schedule = type(self).make(optimizer)
        return optimizer

    def on_train_epoch_end(self) -> None:
        self.schedule.step()


class Nested:
    """A scheduler of one's own around one of torch's, with a list of one rate per group."""

    def __init__(self, optimizer: Any) -> None:
        self.inner = lr_scheduler.ExponentialLR(optimizer, 0.8)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.optimizer = optimizer

    def step(self) -> None:
        self.inner.step()
        assert len(self.rates) == len(self.optimizer.param_groups)


class Dampened(Toy):
    """A dampener around a scheduler, as in pytorch_warmup: it takes its factor back before each."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=1e-2)
        self.rates, self.number = [1e-2], 0
        self.damp(optimizer)
        scheduler = lr_scheduler.StepLR(optimizer, 5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def damp(self, optimizer: Any) -> None:
        self.number += 1
        for group in optimizer.param_groups:
            group["lr"] *= min(1.0, self.number / 16)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        optimizer = self.trainer.optimizers[0]
        for group, lr in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr
        scheduler.step()
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.damp(optimizer)


class Timm(Toy):
    """timm's scheduler, which holds one base value per group."""

    def configure_optimizers(self) -> Any:
        from timm.scheduler import CosineLRScheduler

        optimizer = SGD(self.parameters(), lr=1e-2)
        scheduler = CosineLRScheduler(optimizer, t_initial=20, warmup_t=5, warmup_lr_init=1e-4)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.global_step)


def kept(make: Any) -> type[Kept]:
    return type("Kept", (Kept,), {"make": staticmethod(make)})


SETTERS: dict[str, Any] = {
    "optimizer_step": InOptimizerStep,
    "training_step": InTrainingStep,
    "tensor in place": AtBatchStart,
    "dampener": Dampened,
    "timm": Timm,
    "nested": kept(Nested),
    "LambdaLR by hand": kept(lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch)),
    "WarmRestarts by hand": kept(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2)),
    "CyclicLR by hand": kept(lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=2)),
    "OneCycleLR by hand": kept(lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=9)),
    "SequentialLR by hand": kept(
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
        )
    ),
}


@pytest.mark.parametrize("setter", SETTERS)
def test_whoever_sets_the_rate_the_factor_is_kept_and_seen_by_nobody(setter: str) -> None:
    make = SETTERS[setter]
    plain = run(make)
    ours = run(make, FreezeBackbone(unfreeze_at_epoch=1, lr_scale=0.1), factor_of=tenth)
    assert ours.wrong == []
    assert ours.lrs == plain.lrs
    assert len({tuple(lrs) for lrs in ours.lrs}) > 1
    assert "backbone.embed.weight" in ours.moved


@pytest.mark.parametrize("setter", ["optimizer_step", "dampener", "OneCycleLR by hand"])
def test_without_a_factor_the_rates_are_the_users(setter: str) -> None:
    ours = run(SETTERS[setter], GradualUnfreeze())
    assert ours.wrong == []
    assert ours.lrs == run(SETTERS[setter]).lrs
