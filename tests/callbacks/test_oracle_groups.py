"""The lr of every group at every step is that of an unfrozen run, times the group's factor."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from lightning_freeze import FreezeBackbone, GradualUnfreeze
from tests.callbacks.recipes import EPOCHS, OPTIMIZERS, SCHEDULERS, configure
from tests.toys import Toy, loader, seeded, trainer

DECAY = 0.3
# layer group -> distance from the top
GROUPS = {"head": 0, "backbone.blocks.2": 1, "backbone.blocks.1": 2, "backbone.blocks.0": 3}


def group_of(name: str) -> str:
    if name.startswith("head"):
        return "head"
    return ".".join(name.split(".")[:3]) if "blocks" in name else "backbone.embed"


class Record(Callback):
    """At each optimizer step: (layer group, user's group) -> lr, frozen groups included."""

    def __init__(self) -> None:
        self.lrs: list[dict[tuple[str, int], float]] = []
        self.sizes: list[list[int]] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        names = {id(p): n for n, p in module.named_parameters()}
        now: dict[tuple[str, int], float] = {}
        for position, group in enumerate(optimizer.param_groups):
            if "name" in group:  # split: "backbone.blocks.0/1" is the user's second group
                layer, _, user = group["name"].partition("/")
                now[layer, int(user or 0)] = group["lr"]
                held = {group_of(names[id(p)]) for p in group["params"]}
                assert held <= {layer}
            else:
                for p in group["params"]:
                    now[group_of(names[id(p)]), position] = group["lr"]
        self.lrs.append(now)
        self.sizes.append([len(group["params"]) for group in optimizer.param_groups])


def run(optimizer: str, scheduler: str, *callbacks: Callback) -> Record:
    record = Record()
    model = seeded(lambda: Toy(configure(optimizer, scheduler)))
    trainer(*callbacks, record, epochs=EPOCHS).fit(model, loader())
    return record


@functools.cache
def unfrozen(optimizer: str, scheduler: str) -> Record:
    """What each way to freeze is compared with."""
    return run(optimizer, scheduler)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_lr_of_every_group_is_that_of_the_unfrozen_run_times_its_factor(
    optimizer: str, scheduler: str
) -> None:
    plain = unfrozen(optimizer, scheduler)
    staged = run(optimizer, scheduler, GradualUnfreeze(lr_decay=DECAY))
    assert len(plain.lrs) == len(staged.lrs) == EPOCHS * 4
    for before, now in zip(plain.lrs, staged.lrs):
        assert before.keys() == now.keys()
        for (layer, user), lr in before.items():
            assert now[layer, user] == lr * DECAY ** GROUPS.get(layer, 4), (layer, user)
    # control: the schedule does move, and groups do fill
    assert len({tuple(sorted(lrs.items())) for lrs in plain.lrs}) > 1
    assert sum(staged.sizes[0]) < sum(staged.sizes[-1]) == sum(plain.sizes[-1])
    assert len({len(sizes) for sizes in staged.sizes}) == 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_lr_without_decay_is_exactly_the_users(scheduler: str) -> None:
    plain = unfrozen("AdamW", scheduler)
    staged = run("AdamW", scheduler, FreezeBackbone(unfreeze_at_epoch=2))
    assert plain.lrs == staged.lrs


def test_factor_of_linear_probe_then_fine_tune_applies_to_the_backbone_alone() -> None:
    plain = unfrozen("SGD", "CosineAnnealingLR")
    staged = run("SGD", "CosineAnnealingLR", FreezeBackbone(unfreeze_at_epoch=1, lr_scale=0.1))
    for before, now in zip(plain.lrs, staged.lrs):
        for key, lr in before.items():
            assert now[key] == (lr if key[0] == "head" else lr * 0.1)
