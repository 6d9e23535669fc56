"""Code of the user's that knows the optimizer's groups goes on as without these callbacks.

Each is of a kind that public reports tell of; the run with our callbacks is compared with the same
run without, or by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, AdamW

from lightning_freeze import FreezeBackbone, GradualFreeze, GradualUnfreeze, TrainableParamAudit
from tests.callbacks.recipes import configure, two_groups
from tests.oracle import Oracle
from tests.toys import ByStep, FixedDropout, Toy, changed, loader, seeded, state, trainer
from tests.unit.test_optimizers import Estimates, Hybrid, SlowWeights, Wrapper

FREEZING: dict[str, Callable[[], Callback]] = {
    "FreezeBackbone": lambda: FreezeBackbone(unfreeze_at_epoch=1, lr_scale=0.1),
    "GradualUnfreeze": lambda: GradualUnfreeze(lr_decay=0.5),
    "GradualFreeze": GradualFreeze,
    "LISA": lambda: GradualUnfreeze.lisa(1, 3),
}


# Groups known by place, by name, by identity


class ByPlace(Toy):
    """Sets an option of the first group alone, as DINO's loop does."""

    def configure_optimizers(self) -> Any:
        return AdamW([{**g, "weight_decay": 0.0} for g in two_groups(self)], lr=1e-2)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for number, group in enumerate(self.trainer.optimizers[0].param_groups):
            if number == 0:
                group["weight_decay"] = 0.04 * (self.global_step + 1)


class ByName(Toy):
    """Looks a group up by the name that it gave it."""

    def configure_optimizers(self) -> Any:
        named = zip(("matrices", "vectors"), two_groups(self))
        return AdamW([{**group, "name": name} for name, group in named], lr=1e-2)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        groups = {group["name"]: group for group in self.trainer.optimizers[0].param_groups}
        assert set(groups) == {"matrices", "vectors"}
        groups["vectors"]["lr"] = 1e-3 * (self.global_step + 1)


class ByIdentity(Toy):
    """Keeps a group itself."""

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(two_groups(self), lr=1e-2)
        self.mine = optimizer.param_groups[1]
        return optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.mine["lr"] = 1e-3 * (self.global_step + 1)
        assert any(self.mine is group for group in self.trainer.optimizers[0].param_groups)


class Options(Callback):
    """The options of every group at each step."""

    def __init__(self) -> None:
        self.seen: list[list[dict[str, Any]]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(
            [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        )


@pytest.mark.parametrize("freezing", FREEZING)
@pytest.mark.parametrize("kind", [ByPlace, ByName, ByIdentity])
def test_whoever_knows_a_group_by_place_name_or_identity_reaches_it(
    kind: type[Toy], freezing: str
) -> None:
    plain, ours = Options(), Options()
    trainer(plain, epochs=3).fit(seeded(kind), loader())
    trainer(FREEZING[freezing](), ours, epochs=3).fit(seeded(kind), loader())
    assert ours.seen == plain.seen
    assert len({str(options) for options in ours.seen}) > 1


# Optimizers of many kinds


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "state from birth": lambda m: SlowWeights(m.parameters(), lr=1e-2),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
    "writes into its groups": lambda m: Estimates(m.parameters(), lr=1e-2, momentum=0.9),
    "joins two": lambda m: Hybrid(
        SGD([p for p in m.parameters() if p.ndim > 1], lr=1e-2, momentum=0.9),
        AdamW([p for p in m.parameters() if p.ndim < 2], lr=1e-3),
    ),
    "wraps one": lambda m: Wrapper(AdamW(m.parameters(), lr=1e-2)),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=1e-2),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters(), lr=1e-2),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=1e-2),
}


def fitted(make: Any, *callbacks: Callback, epochs: int = 5) -> Toy:
    model = seeded(lambda: Toy(make))
    trainer(*callbacks, FixedDropout(), epochs=epochs).fit(model, loader())
    return model


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_kind_of_optimizer_freezes_and_trains(optimizer: str) -> None:
    make, before = OPTIMIZERS[optimizer], state(seeded(Toy))
    names = {name for name, p in Toy().named_parameters() if p.ndim > 1}
    audit = TrainableParamAudit(table=False, dead_after=99)
    frozen = changed(before, state(fitted(make, FreezeBackbone(), audit)))
    assert frozen == {"head.weight", "head.bias"}
    assert audit.findings == []
    gradual = changed(before, state(fitted(make, GradualUnfreeze(lr_decay=0.9), audit)))
    assert names <= gradual
    assert audit.findings == []
    refrozen = fitted(make, GradualFreeze(start=2), audit)
    assert names <= changed(before, state(refrozen))
    assert audit.findings == []


# Averaging, accumulation, monitors


@pytest.mark.parametrize("lrs", [1e-3, [1e-3], [1e-3, 2e-3]])
@pytest.mark.filterwarnings("ignore:.*SWA|.*StochasticWeightAveraging|.*swa")
def test_averaging_takes_one_rate_for_each_group_of_the_users(lrs: Any) -> None:
    def make(module: nn.Module) -> Any:
        return AdamW(module.parameters() if lrs != [1e-3, 2e-3] else two_groups(module), lr=1e-2)

    fitted(make, StochasticWeightAveraging(lrs, swa_epoch_start=2))
    fitted(make, StochasticWeightAveraging(lrs, swa_epoch_start=2), FreezeBackbone(train_bn=True))


def test_lightnings_monitor_shows_the_users_groups(tmp_path: Path) -> None:
    seen = []
    for callbacks in ([], [GradualUnfreeze(lr_decay=0.5)]):
        monitor = LearningRateMonitor(log_weight_decay=True)
        model = seeded(lambda: Toy(configure("AdamW", "StepLR")))
        options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
        trainer(monitor, *callbacks, epochs=3, **options).fit(model, loader())
        seen.append(monitor.lrs)
    assert seen[0] == seen[1]


def test_accumulation_that_changes_keeps_the_factors() -> None:
    oracle = Oracle(lambda name: 1.0 if name.startswith("head") else 0.1)
    accumulation = GradientAccumulationScheduler({0: 1, 1: 2})
    make = configure("SGD", "CosineAnnealingLR")
    fitted(make, FreezeBackbone(unfreeze_at_epoch=1, lr_scale=0.1), accumulation, oracle)
    assert oracle.wrong == []


# Checkpoints


@pytest.mark.parametrize("freezing", FREEZING)
def test_a_checkpoint_has_the_users_shape(tmp_path: Path, freezing: str) -> None:
    for name, callbacks in (("plain", []), ("ours", [FREEZING[freezing]()])):
        save = ModelCheckpoint(tmp_path, filename=name)
        model = seeded(lambda: Toy(configure("AdamW", "StepLR")))
        trainer(*callbacks, save, epochs=2, enable_checkpointing=True).fit(model, loader())
    plain, ours = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("plain", "ours")
    )
    assert (
        ours["optimizer_states"][0]["param_groups"] == plain["optimizer_states"][0]["param_groups"]
    )
    assert ours["lr_schedulers"] == plain["lr_schedulers"]


def test_a_run_goes_on_with_and_without_these_callbacks_as_by_hand(tmp_path: Path) -> None:
    """All trains in both halves: a run in two halves is a run in one, whoever freezes nothing."""
    make = lambda: ByStep(configure("AdamW", "StepLR"))  # noqa: E731
    none = lambda: GradualUnfreeze({0: "**"})  # noqa: E731
    whole = seeded(make)
    trainer(FixedDropout(), epochs=4).fit(whole, loader())
    for first, second in (([], [none()]), ([none()], []), ([none()], [none()])):
        save = ModelCheckpoint(tmp_path, filename=f"{len(first)}{len(second)}")
        trainer(*first, FixedDropout(), save, epochs=2, enable_checkpointing=True).fit(
            seeded(make), loader()
        )
        model = seeded(make)
        path = tmp_path / f"{len(first)}{len(second)}.ckpt"
        trainer(*second, FixedDropout(), epochs=4).fit(model, loader(), ckpt_path=path)
        assert changed(state(whole), state(model)) == set()


# An optimizer that comes later, or steps by another way


def test_an_optimizer_that_takes_the_place_of_another_is_noticed() -> None:
    class Swaps(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.optimizers = [SGD(pl_module.parameters(), lr=0.1)]

    oracle = Oracle(lambda name: 1.0 if name.startswith("head") else 0.1)
    model = fitted(
        lambda m: AdamW(m.parameters(), lr=1e-2),
        FreezeBackbone(unfreeze_at_epoch=2, lr_scale=0.1),
        Swaps(),
        oracle,
        epochs=4,
    )
    assert oracle.wrong == []
    assert "backbone.embed.weight" in oracle.moved
    assert all(p.requires_grad for p in model.parameters())


def test_a_step_that_runs_no_hooks_is_told_where_factors_exist() -> None:
    def bypassed(module: nn.Module) -> Any:
        optimizer = SGD(module.parameters(), lr=0.1)
        bare = SGD.step.__wrapped__  # type: ignore[attr-defined]
        optimizer.step = lambda closure=None: bare(optimizer, closure)  # type: ignore[method-assign]
        return optimizer

    with pytest.warns(UserWarning, match="`lr_decay` and `lr_scale` have no effect"):
        fitted(bypassed, FreezeBackbone(unfreeze_at_epoch=1, lr_scale=0.1))
    fitted(bypassed, FreezeBackbone(unfreeze_at_epoch=1))  # control: nothing to tell
