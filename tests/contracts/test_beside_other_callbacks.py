"""Staged runs beside early stopping, averaging, metrics of other people's, and odd layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_freeze import (
    ArgumentError,
    ConflictError,
    FreezeBackbone,
    GradualFreeze,
    GradualUnfreeze,
    TrainableParamAudit,
    freeze,
    unfreeze,
)
from tests.oracle import Oracle
from tests.ranks.fits import OwnData, fit, sgd
from tests.ranks.processes import on_ranks
from tests.toys import (
    ByStep,
    FixedDropout,
    Toy,
    changed,
    loader,
    seeded,
    state,
    trainable,
    trainer,
)

SAID = "ignore:.*would end the fit"  # each test that is about it looks for it
MESSAGES = "ignore:.*StochasticWeightAveraging|.*SWA"


# Early stopping


class Stages(Callback):
    """How many parameters train in each epoch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(len(trainable(pl_module)))


class Flat(ByStep):
    """A metric that never improves after the first epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("flat", 1.0)


def stopped(
    *callbacks: Callback,
    model: Any = Flat,
    epochs: int = 40,
    path: Path | None = None,
    **options: Any,
) -> list[int]:
    stages = Stages()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    run = trainer(*callbacks, stages, epochs=epochs, enable_checkpointing=saves, **options)
    run.fit(seeded(model), loader(), loader(seed=2), ckpt_path=path)
    return stages.seen


ALL, HEAD = 16, 2


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("at_validation", [True, False])
@pytest.mark.filterwarnings(SAID)
def test_a_stopper_lets_the_next_stage_begin_and_stops_after_the_last(
    first: bool, at_validation: bool
) -> None:
    stopper = EarlyStopping("flat", patience=2, check_on_train_epoch_end=not at_validation)
    gradual = GradualUnfreeze(monitor="flat", patience=9)
    seen = stopped(*([stopper, gradual] if first else [gradual, stopper]))
    # 1 epoch to set the best value, then 2 without improvement in each stage
    assert seen == [2] * 3 + [6] * 2 + [10] * 2 + [14] * 2 + [16] * 2
    assert stopper.stopped_epoch == len(seen) - 1
    assert (stopper.patience, stopper.wait_count) == (2, 2)
    # control: alone it ends where its patience does
    assert len(stopped(EarlyStopping("flat", patience=2))) == 3


def test_it_is_said_once() -> None:
    callbacks = [EarlyStopping("flat", patience=1), GradualUnfreeze(monitor="flat", patience=5)]
    with pytest.warns(UserWarning, match="would end the fit early.*patience anew") as said:
        stopped(*callbacks)
    assert len([w for w in said if "would end the fit" in str(w.message)]) == 1


@pytest.mark.filterwarnings(SAID)
def test_a_stage_that_is_due_anyway_isnt_passed_over() -> None:
    """Both patiences end in the same epoch: one stage a time."""
    seen = stopped(EarlyStopping("flat", patience=1), GradualUnfreeze(monitor="flat", patience=1))
    assert seen == [2] * 2 + [6, 10, 14, 16]


class Bad(Flat):
    value = float("nan")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("flat", self.value if self.current_epoch else 1.0)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, float("nan")),
        ({"stopping_threshold": 0.5}, 0.1),
        ({"divergence_threshold": 5.0}, 9.0),
    ],
)
def test_a_stop_for_another_reason_than_patience_is_a_stop(options: Any, value: float) -> None:
    model = type("Bad", (Bad,), {"value": value})
    stopper = EarlyStopping("flat", patience=9, **options)
    assert len(stopped(stopper, GradualUnfreeze(monitor="flat", patience=5), model=model)) == 2


class Stops(Callback):
    """Ends the fit in an epoch's validation."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop |= trainer.current_epoch == self.epoch


@pytest.mark.filterwarnings(SAID)
def test_a_stop_of_the_users_is_a_stop_also_where_a_patience_ends_then() -> None:
    gradual = lambda: GradualUnfreeze(monitor="flat", patience=9)  # noqa: E731
    stopper = EarlyStopping("flat", patience=2, check_on_train_epoch_end=False)
    assert len(stopped(Stops(1), gradual())) == 2
    assert len(stopped(Stops(2), stopper, gradual())) == 3


def test_of_two_stoppers_the_one_that_has_another_reason_ends_the_fit() -> None:
    class Two(Flat):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("other", float("nan") if self.current_epoch == 2 else 1.0)

    for end in (True, False):
        stoppers = [
            EarlyStopping("other", patience=50, check_on_train_epoch_end=end),
            EarlyStopping("flat", patience=2, check_on_train_epoch_end=end),
        ]
        seen = stopped(*stoppers, GradualUnfreeze(monitor="flat", patience=9), model=Two)
        assert len(seen) == 3
        assert stoppers[0].stopping_reason == EarlyStoppingReason.NON_FINITE_METRIC
        assert stoppers[1].stopping_reason == EarlyStoppingReason.NOT_STOPPED


@pytest.mark.filterwarnings(SAID)
def test_each_stage_has_the_whole_patience_whoever_began_it() -> None:
    seen = stopped(
        GradualUnfreeze(monitor="flat", patience=1), EarlyStopping("flat", patience=3), epochs=40
    )
    assert seen == [2, 2, 6, 10, 14, 16, 16, 16]


@pytest.mark.filterwarnings(SAID)
def test_a_stopper_that_counts_within_epochs_ends_stages_within_them() -> None:
    seen = stopped(
        EarlyStopping("flat", patience=3),
        GradualUnfreeze(monitor="flat", patience=9),
        val_check_interval=0.5,
    )
    # 4 checks in the first stage, 3 in each later one; the stage is noted at an epoch's end
    assert seen == [2, 2, 6, 10, 10, 14, 16, 16]


class Late(ByStep):
    """Logs in the hook that Lightning calls behind those of callbacks, but for stoppers."""

    values = (5.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0)

    def on_train_epoch_end(self) -> None:
        self.log("late", self.values[self.current_epoch])


@pytest.mark.filterwarnings(SAID)
def test_a_stopper_goes_by_what_the_module_logs_at_an_epochs_end() -> None:
    gradual = GradualUnfreeze(monitor="val_steps", mode="max", patience=9)
    assert stopped(EarlyStopping("late", patience=1), gradual, model=Late, epochs=6) == [
        *[2] * 4,
        6,
        10,
    ]


def test_a_stopper_of_a_subclass_is_asked_once_a_check() -> None:
    class Counts(EarlyStopping):
        calls = 0

        def on_train_epoch_end(self, *args: Any) -> None:
            Counts.calls += 1
            super().on_train_epoch_end(*args)

    stopper = Counts("flat", patience=9, check_on_train_epoch_end=True)
    stopped(stopper, GradualUnfreeze(monitor="flat", patience=2), epochs=3)
    assert Counts.calls == 3


def test_a_stopper_has_its_own_patience_again_when_a_fit_breaks_off() -> None:
    class Breaks(Flat):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.current_epoch == 1:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    stopper = EarlyStopping("flat", patience=2)
    with pytest.raises(RuntimeError, match="broken"):
        stopped(stopper, GradualUnfreeze(monitor="flat", patience=9), model=Breaks)
    assert type(stopper.patience) is int
    assert stopper.patience == 2


class Apart(OwnData):
    """Each rank logs a metric of its own: it improves on the first alone."""

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        value = 1.0 if self.global_rank else -float(self.current_epoch)
        self.log("own", value, rank_zero_only=False, sync_dist=False)
        self.log("flat", 1.0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.filterwarnings(SAID)
def test_a_stopper_that_counts_on_one_rank_alone_moves_all(first: bool, end: bool) -> None:
    def act(_: int) -> Any:
        stages = Stages()
        stopper = EarlyStopping("own", patience=1, check_on_train_epoch_end=end)
        gradual = GradualUnfreeze(monitor="flat", patience=9)
        pair = [stopper, gradual] if first else [gradual, stopper]
        fit(lambda: Apart(sgd), *pair, stages)
        return stages.seen

    outcomes = on_ranks(act)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    one, other = (outcome.value for outcome in outcomes)
    assert one == other
    # the value of the first epoch is the best on both; then a stage an epoch
    assert one[:2] == [2, 2]
    assert one[1:] == sorted(set(one))


WHEN: dict[str, dict[str, Any]] = {
    "at an epoch's end": {},
    "behind a validation": {"save_on_train_epoch_end": False},
    "each step": {"every_n_train_steps": 1, "save_on_train_epoch_end": False},
}


@pytest.mark.filterwarnings(SAID)
@pytest.mark.parametrize(
    ("when", "end"),
    # from behind a validation, Lightning runs an epoch's end again, and a stopper has no metric
    [(when, end) for when in WHEN for end in (True, False) if not end or "behind" not in when],
)
def test_a_resume_from_any_checkpoint_goes_the_same_way(
    tmp_path: Path, when: str, end: bool
) -> None:
    class Counts(Callback):
        def __init__(self) -> None:
            self.seen: dict[int, int] = {}

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            self.seen[trainer.global_step] = len(trainable(module))

    def run(path: Path | None, *more: Callback) -> tuple[dict[int, int], EarlyStopping]:
        stopper = EarlyStopping("flat", patience=2, check_on_train_epoch_end=end)
        counts = Counts()
        gradual = GradualUnfreeze(monitor="flat", patience=9)
        callbacks = [stopper, gradual, FixedDropout(), counts, *more]
        trainer(*callbacks, epochs=40, enable_checkpointing=bool(more)).fit(
            seeded(Flat), loader(), loader(seed=2), ckpt_path=path
        )
        return counts.seen, stopper

    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **WHEN[when])
    whole, stopper = run(None, save)
    assert len(set(whole.values())) == 5
    paths = {int(path.stem.removeprefix("step=")): path for path in tmp_path.iterdir()}
    last = max(whole) + 1
    # what was to follow a step's checkpoint, a validation or an epoch's end, Lightning skips
    steps = [step for step in paths if step < last and (when != "each step" or step % 4)]
    for step in steps[:: 3 if when == "each step" else 1]:
        state = torch.load(paths[step], weights_only=True)["callbacks"][stopper.state_key]
        assert type(state["patience"]) is int
        assert state["patience"] == 2
        rest, again = run(paths[step])
        assert rest == {at: size for at, size in whole.items() if at >= step}, step
        assert again.state_dict() == stopper.state_dict()


# Stages that never come


def said(*callbacks: Callback, **options: Any) -> str:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(*callbacks, **options).fit(seeded(Toy), loader(), loader(seed=2))
    return " ".join(str(w.message) for w in told if "lightning_freeze" in w.filename)


@pytest.mark.parametrize(
    ("make", "options", "at"),
    [
        (lambda: FreezeBackbone(unfreeze_at_epoch=10), {"epochs": 3}, "epoch 10"),
        (GradualUnfreeze, {"epochs": 3}, "epoch 3"),
        (lambda: GradualUnfreeze({0: "head", 7: "**"}), {"epochs": 3}, "epoch 7"),
        (lambda: GradualFreeze(start=5), {"epochs": 3}, "epoch 5"),
        (GradualUnfreeze.chain_thaw, {"epochs": 3}, "epoch 3"),
        (lambda: GradualUnfreeze(start=30, unit="step"), {"epochs": -1, "max_steps": 8}, "step 30"),
        (lambda: GradualUnfreeze(start=30, unit="step"), {"epochs": 2}, "step 30"),
        (lambda: FreezeBackbone(unfreeze_at_epoch=4), {"epochs": 9, "max_steps": 8}, "epoch 4"),
    ],
)
def test_stages_beyond_the_end_are_told(make: Any, options: Any, at: str) -> None:
    told = said(make(), **options)
    assert "stages are never reached" in told
    assert f"begins at {at}" in told


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: FreezeBackbone(unfreeze_at_epoch=2), {"epochs": 3}),
        (FreezeBackbone, {"epochs": 1}),
        (GradualUnfreeze, {"epochs": 5}),
        (lambda: GradualUnfreeze.lisa(1, 5), {"epochs": 1}),
        (lambda: GradualUnfreeze(start=3, unit="step"), {"epochs": 2}),
        (lambda: GradualUnfreeze(monitor="val_loss"), {"epochs": 1}),
        (GradualUnfreeze.layerwise_lr_decay, {"epochs": 1}),
    ],
)
def test_stages_that_come_are_not_told(make: Any, options: Any) -> None:
    assert said(make(), **options) == ""


def test_nothing_is_told_of_a_dry_run_or_of_steps_that_change_their_size() -> None:
    assert said(GradualUnfreeze(), fast_dev_run=True) == ""
    by_step = lambda: GradualUnfreeze(start=7, every=1, unit="step")  # noqa: E731
    assert said(by_step(), GradientAccumulationScheduler({0: 4, 1: 1}), epochs=4) == ""
    assert "never reached" in said(by_step(), accumulate_grad_batches=4, epochs=4)  # control


def test_a_stopper_less_patient_than_a_stage_is_long_is_told() -> None:
    stopper = lambda patience: EarlyStopping("val_loss", patience=patience)  # noqa: E731
    late = lambda: FreezeBackbone(unfreeze_at_epoch=4)  # noqa: E731
    assert "may never come" in said(late(), stopper(3), epochs=5)
    assert said(late(), stopper(4), epochs=5) == ""
    assert said(GradualUnfreeze(), stopper(3), epochs=5) == ""
    # patience counts checks, not epochs
    assert said(late(), stopper(2), epochs=5, check_val_every_n_epoch=2) == ""
    assert "may never come" in said(late(), stopper(7), epochs=5, val_check_interval=0.5)
    assert said(late(), stopper(8), epochs=5, val_check_interval=0.5) == ""
    # nothing new was to train
    assert said(GradualFreeze(start=4, layers_per_step=4), stopper(1), epochs=5) == ""


def test_the_verdict_names_what_was_scheduled_and_never_trained() -> None:
    def verdict(epochs: int, *more: Callback) -> str:
        audit = TrainableParamAudit(table=False)
        trainer(GradualUnfreeze(), audit, *more, epochs=epochs).fit(seeded(Toy), loader())
        return audit.verdict

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 3

    assert "never trained in this fit: `backbone.embed.weight` and 1 more" in verdict(4)
    assert "never trained in this fit: `backbone.embed.weight` and 1 more" in verdict(9, Stop())
    assert "never trained" not in verdict(5)
    audit = TrainableParamAudit(table=False)
    trainer(GradualUnfreeze.lisa(1, 5), audit, epochs=1).fit(seeded(Toy), loader())
    assert "never trained" not in audit.verdict


# Batch-norm statistics


class Recomputes(Callback):
    """Recomputes the statistics of all batch-norms when the training is over."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        update_bn([x for x, _ in loader()], pl_module)


def averaging(epoch: int) -> Callback:
    return StochasticWeightAveraging(1e-3, swa_epoch_start=epoch)


def with_statistics(*, momentum: float | None = 0.1) -> Toy:
    model = seeded(Toy)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = momentum
            module.running_mean.normal_()
            module.running_var.uniform_(1, 3)
            module.num_batches_tracked.fill_(7)
    return model


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def moved(model: Toy, *callbacks: Callback) -> set[str]:
    before = state(model)
    trainer(*callbacks, epochs=6).fit(model, loader())
    return {name for name in changed(before, state(model)) if name.endswith(STATISTICS)}


OTHERS: dict[str, Callable[[], Callback]] = {
    "SWA from the first epoch": lambda: averaging(1),
    "SWA": lambda: averaging(2),
    "update_bn by hand": Recomputes,
    "weight averaging": WeightAveraging,
}


@pytest.mark.filterwarnings(MESSAGES)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_frozen_batch_norm_keeps_its_statistics_to_the_bit(
    other: str, first: bool, momentum: float | None
) -> None:
    audit = TrainableParamAudit(table=False)
    pair = [FreezeBackbone(trainable_layers=1), OTHERS[other]()]
    model = with_statistics(momentum=momentum)
    kept = moved(model, *(pair if first else pair[::-1]), audit)
    assert audit.findings == []
    assert kept == {f"backbone.blocks.2.norm.{name}" for name in STATISTICS}
    assert model.backbone.blocks[0].norm.momentum == momentum
    assert len(moved(with_statistics(momentum=momentum), OTHERS[other]())) == 9  # control


@pytest.mark.parametrize("first", [True, False])
def test_an_average_of_equal_statistics_is_not_rounded_into_the_model(first: bool) -> None:
    pair = [FreezeBackbone(), EMAWeightAveraging(decay=0.9)]
    assert moved(with_statistics(), *(pair if first else pair[::-1])) == set()


def test_an_average_of_what_trained_before_it_froze_is_left_in_the_model() -> None:
    class AtTheEnd(Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.state = state(pl_module)

    model, end = with_statistics(), AtTheEnd()
    trainer(GradualFreeze(), WeightAveraging(), end, epochs=6).fit(model, loader())
    assert changed(end.state, state(model)) == set()
    other = with_statistics()
    trainer(GradualFreeze(), epochs=6).fit(other, loader())
    assert "backbone.blocks.0.norm.running_mean" in changed(state(other), end.state)  # control


# Metrics


class Alias(Toy):
    """Logs through another name of its own."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        tell = self.log
        tell("val_" + "loss", self.loss(batch))


class TwoLoaders(Toy):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))


class NotInSanity(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.log("val_loss", self.loss(batch))


class Counts(Callback):
    """A metric that a callback logs."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("val_loss", float(trainer.current_epoch))


class Own(Toy):
    """Names each loader's metric itself."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log(f"val_loss_{dataloader_idx}", self.loss(batch), add_dataloader_idx=False)


class Mean(nn.Module):
    """Accumulates over a validation, as torchmetrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def helper(self, module: Any) -> None:
        module.log_dict({"val_mean": torch.stack(self.values).mean()})
        self.values.clear()


class Helped(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.mean = Mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.mean.values.append(self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        self.mean.helper(self)


class Silent(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


@pytest.mark.parametrize(
    ("model", "monitor", "more"),
    [
        (Alias, "val_loss", []),
        (TwoLoaders, "val_loss/dataloader_idx_0", []),
        (TwoLoaders, "val_loss/dataloader_idx_1", []),
        (Own, "val_loss_1", []),
        (Helped, "val_mean", []),
        (NotInSanity, "val_loss", []),
        (Late, "late", []),
        (Silent, "val_loss", [Counts()]),
    ],
)
def test_what_early_stopping_accepts_can_be_monitored(
    model: Any, monitor: str, more: list[Callback]
) -> None:
    loaders = [loader(seed=2), loader(seed=3)] if model in (TwoLoaders, Own) else loader(seed=2)
    options = {"epochs": 3, "num_sanity_val_steps": 2}
    trainer(EarlyStopping(monitor, patience=9), *more, **options).fit(
        seeded(model), loader(), loaders
    )
    ours = GradualUnfreeze(monitor=monitor, patience=1, min_delta=99.0)
    net = seeded(model)
    trainer(ours, *more, **options).fit(net, loader(), loaders)
    assert len(trainable(net)) > HEAD


def test_what_the_module_logs_at_an_epochs_end_is_in_that_epochs_checkpoint(
    tmp_path: Path,
) -> None:
    def run(path: Path | None, *more: Callback) -> list[int]:
        gradual = GradualUnfreeze(monitor="late")
        return stopped(gradual, FixedDropout(), *more, model=Late, epochs=8, path=path)

    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = run(None, save)
    assert whole == [2, 2, 2, 2, 6, 10, 14, 16]
    for epoch in range(7):
        assert run(tmp_path / f"epoch={epoch}.ckpt") == whole[epoch + 1 :], epoch


def test_a_training_metric_whose_name_begins_like_validation_needs_none() -> None:
    class Critic(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("value_loss", 1.0, on_step=False, on_epoch=True)
            return self.loss(batch)

    model = seeded(Critic)
    trainer(GradualUnfreeze(monitor="value_loss"), epochs=3).fit(model, loader())
    assert len(trainable(model)) > HEAD


@pytest.mark.parametrize("monitor", ["val_loss", "val/loss", "validation_loss", "valid_acc"])
def test_a_validation_metric_without_a_validation_is_told_of_before_the_first_batch(
    monitor: str,
) -> None:
    stages = Stages()
    with pytest.raises(ArgumentError, match=f"`monitor='{monitor}'`.*no validation"):
        trainer(stages, GradualUnfreeze(monitor=monitor), epochs=2).fit(seeded(Toy), loader())
    assert stages.seen == []


@pytest.mark.parametrize("monitor", ["val_los", "accuracy"])
def test_a_metric_that_nothing_logs_ends_the_fit_with_the_first_validation(monitor: str) -> None:
    stages = Stages()
    with pytest.raises(
        ArgumentError, match=rf"`monitor='{monitor}'` .*Metrics that exist: .*val_loss"
    ):
        trainer(stages, GradualUnfreeze(monitor=monitor), epochs=3).fit(
            seeded(Toy), loader(), loader(seed=2)
        )
    assert len(stages.seen) == 1


# Who froze it, who left it out


def test_an_optimizer_that_holds_only_the_head_is_told() -> None:
    def head(module: Any) -> Any:
        return torch.optim.SGD(module.head.parameters(), lr=0.1)

    for make in (GradualUnfreeze, lambda: FreezeBackbone(unfreeze_at_epoch=1)):
        with pytest.warns(UserWarning, match="`configure_optimizers` gives them to no optimizer"):
            trainer(make(), epochs=1).fit(seeded(lambda: Toy(head)), loader())
    trainer(FreezeBackbone(), epochs=1).fit(seeded(lambda: Toy(head)), loader())  # control

    def filtered(module: Any) -> Any:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)

    model = seeded(lambda: Toy(filtered))
    model.backbone.embed.requires_grad_(False)  # left out because the user froze it
    trainer(GradualUnfreeze(), epochs=5).fit(model, loader())


@pytest.mark.parametrize(
    "make",
    [
        lambda: FreezeBackbone(trainable_layers=2),
        lambda: FreezeBackbone(trainable_layers=-1),
        lambda: FreezeBackbone(unfreeze_at_epoch=1),
        GradualUnfreeze,
    ],
)
def test_a_backbone_that_the_model_froze_itself_is_told(make: Callable[[], Callback]) -> None:
    model = seeded(Toy)
    model.backbone.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"froze it before|was frozen before the fit"):
        trainer(make(), epochs=2).fit(model, loader())
    assert trainable(model) == {"head.weight", "head.bias"}
    trainer(make(), epochs=2).fit(seeded(Toy), loader())  # control


def test_a_head_that_the_model_froze_itself_is_named_where_nothing_is_left() -> None:
    model = seeded(Toy)
    model.head.requires_grad_(False)
    with pytest.raises(ConflictError, match=r"`head.bias`, were frozen before the fit"):
        trainer(FreezeBackbone(), epochs=1).fit(model, loader())
    trainer(FreezeBackbone(trainable_layers=1), epochs=1).fit(model, loader())  # control


# Layers that mind the mode


class Recurrent(Toy):
    """An RNN that is made before or behind what feeds it."""

    def __init__(self, kind: Any = nn.LSTM, *, first: bool = False) -> None:
        super().__init__()
        rnn = kind(8, 8, num_layers=2, dropout=0.5)
        parts = {"embed": nn.Linear(4, 8), "rnn": rnn}
        self.backbone = nn.ModuleDict(dict(reversed(parts.items())) if first else parts)
        self.modes: list[tuple[bool, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        rnn = self.backbone["rnn"]
        self.modes.append((rnn.training, rnn.dropout))
        return self.head(rnn(self.backbone["embed"](x)[None])[0][0])


# on the CPU an RNN can go back through eval mode; with cuDNN it can't
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("first", [True, False])
def test_a_frozen_rnn_stays_in_train_mode_without_dropout(kind: Any, first: bool) -> None:
    model = seeded(lambda: Recurrent(kind, first=first))
    before = state(model)
    audit = TrainableParamAudit(table=False)
    trainer(FreezeBackbone("backbone.rnn"), audit, epochs=2).fit(model, loader())
    assert audit.findings == []
    assert set(model.modes) == {(True, 0.0)}
    rnn = model.backbone["rnn"]
    assert (rnn.training, rnn.dropout) == (True, 0.5)
    names = changed(before, state(model))
    assert {name.rpartition(".")[0] for name in names} == {"backbone.embed", "head"}


def test_a_frozen_rnn_that_begins_to_train_has_its_dropout_again() -> None:
    model = seeded(Recurrent)
    gradual = GradualUnfreeze({0: ["head", "backbone.embed"], 1: "backbone.rnn"})
    trainer(gradual, epochs=2).fit(model, loader())
    assert list(dict.fromkeys(model.modes)) == [(True, 0.0), (True, 0.5)]


def test_a_frozen_rnn_that_was_loaded_in_eval_mode_is_put_in_train_mode_for_the_fit() -> None:
    model = seeded(Recurrent).eval()
    trainer(FreezeBackbone("backbone.rnn"), epochs=1).fit(model, loader())
    assert set(model.modes) == {(True, 0.0)}
    assert (model.backbone["rnn"].training, model.backbone["rnn"].dropout) == (False, 0.5)


def test_freeze_and_unfreeze_by_hand_set_an_rnn_as_a_fit_does() -> None:
    model = seeded(Recurrent)
    rnn = model.backbone["rnn"]
    freeze(model, "backbone.rnn")
    assert (rnn.training, rnn.dropout) == (True, 0.0)
    unfreeze(model, "backbone.rnn")
    assert (rnn.training, rnn.dropout) == (True, 0.5)


class Encodes(Toy):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.backbone = nn.Sequential()
        self.embed = nn.Linear(4, 8)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)[:, None].expand(-1, 5, -1)
        padding = torch.zeros(len(x), 5, dtype=torch.bool)
        padding[0, 3:] = True
        return self.head(self.encoder(tokens, src_key_padding_mask=padding)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_whose_lower_layers_are_frozen_computes_on_padded_tensors() -> None:
    by_hand = seeded(Encodes)
    for part in (by_hand.embed, *by_hand.encoder.layers[:2]):
        part.requires_grad_(False).eval()
    with pytest.raises(AssertionError, match="does not support NestedTensor"):
        trainer(epochs=1).fit(by_hand, loader())
    model = seeded(Encodes)
    before = state(model)
    audit = TrainableParamAudit(table=False)
    groups = ["embed", "encoder.layers.0", "encoder.layers.1", "encoder.layers.2", "head"]
    trainer(GradualUnfreeze(groups=groups), audit, epochs=2).fit(model, loader())
    assert audit.findings == []
    assert "encoder.layers.2.linear1.weight" in changed(before, state(model))
    assert model.encoder.use_nested_tensor


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_freeze_by_hand_has_an_encoder_compute_on_padded_tensors_until_its_layers_train() -> None:
    model = seeded(Encodes)
    encoder = model.encoder
    freeze(model, ["embed", "encoder.layers.0", "encoder.layers.1"])
    model(torch.randn(4, 4)).sum().backward()
    assert not encoder.use_nested_tensor
    unfreeze(model, "encoder.layers.1")
    assert not encoder.use_nested_tensor
    unfreeze(model, "encoder.layers.0")
    assert encoder.use_nested_tensor


def test_an_encoder_that_was_emptied_is_no_obstacle() -> None:
    class Emptied(Encodes):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, batch_first=True), 1
            )
            self.unused.layers = nn.ModuleList()

    trainer(FreezeBackbone("encoder.layers.0"), epochs=1).fit(seeded(Emptied), loader())


def test_factors_hold_beside_a_stopper() -> None:
    oracle = Oracle(lambda name: 1.0 if name.startswith("head") else 0.1)
    callbacks = [FreezeBackbone(unfreeze_at_epoch=1, lr_scale=0.1), EarlyStopping("val_loss")]
    trainer(*callbacks, oracle, epochs=3).fit(seeded(Toy), loader(), loader(seed=2))
    assert oracle.wrong == []
