"""A schedule that follows a metric, in fits that are cut short, resumed and continued."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_freeze import FreezeError, GradualUnfreeze, TrainableParamAudit
from tests.callbacks.recipes import configure
from tests.callbacks.test_oracle_resume import assert_equal
from tests.interruption.harness import outcome
from tests.toys import ByStep, FixedDropout, Toy, loader, seeded, trainable, trainer


class Trains(Callback):
    """How many tensors train at each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.counts.append(len(trainable(module)))


class Validates(Callback):
    """The steps at which validation ran."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        self.steps.append(trainer.global_step)


class Stops(Callback):
    """Asks for an end after a step, as early stopping does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop |= trainer.global_step == self.at


def fit(
    *more: Callback, ckpt_path: Path | None = None, monitor: str = "val_steps", **options: Any
) -> tuple[Trainer, Toy, list[int]]:
    seen = Trains()
    given: dict[str, Any] = {"epochs": 6, "enable_checkpointing": True, **options}
    audit = TrainableParamAudit(table=False)
    run = trainer(GradualUnfreeze(monitor=monitor), audit, FixedDropout(), seen, *more, **given)
    model = seeded(lambda: ByStep(configure("AdamW", "StepLR")))
    run.fit(model, loader(), loader(seed=2), ckpt_path=ckpt_path)
    assert audit.findings == []
    return run, model, seen.counts


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("end", ["max_steps", "should_stop"])
def test_a_fit_that_ends_inside_an_epoch_needs_no_value_of_that_epoch(end: str, steps: int) -> None:
    if end == "max_steps":
        run, _, _ = fit(epochs=-1, max_steps=steps)
    else:
        run, _, _ = fit(Stops(steps), min_epochs=0)
    assert run.global_step == steps


WHEN: dict[str, dict[str, Any]] = {
    "within an epoch": {"val_check_interval": 3},
    "twice an epoch": {"val_check_interval": 0.5},
    "each second epoch": {"check_val_every_n_epoch": 2},
    "across epochs": {"val_check_interval": 6, "check_val_every_n_epoch": None},
}


@pytest.mark.parametrize("when", WHEN)
def test_a_resume_follows_the_metric_whenever_validation_runs(tmp_path: Path, when: str) -> None:
    save = ModelCheckpoint(
        tmp_path,
        filename="{step}",
        save_top_k=-1,
        every_n_train_steps=1,
        save_on_train_epoch_end=False,
    )
    validates = Validates()
    run, model, counts = fit(save, validates, **WHEN[when])
    assert len(set(counts)) > 1
    # Lightning skips a validation, and an epoch's end, that was to follow the checkpoint
    skipped = {*validates.steps, *range(4, 24, 4)}
    for step in sorted({5, 6, 9, 11, 15} - skipped):
        resumed, other, rest = fit(ckpt_path=tmp_path / f"step={step}.ckpt", **WHEN[when])
        assert rest == counts[step:], step
        assert_equal(outcome(run, model), outcome(resumed, other))


def test_an_epoch_without_a_validation_is_no_epoch_without_improvement() -> None:
    _, _, counts = fit(**WHEN["each second epoch"], epochs=8)
    # values at the ends of epochs 1 (the best), 3 and 5
    assert [counts[4 * epoch] for epoch in range(8)] == [2, 2, 2, 2, 6, 6, 10, 10]


@pytest.mark.parametrize("when", WHEN)
def test_a_metric_that_no_validation_logs_is_told_of_at_the_first(when: str) -> None:
    class Silent(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            for stage in ("val",):
                self.log(f"{stage}_loss", self.loss(batch))

    run = trainer(GradualUnfreeze(monitor="loss_of_none"), epochs=4, **WHEN[when])
    with pytest.raises(FreezeError, match="`monitor='loss_of_none'` was not logged"):
        run.fit(seeded(Silent), loader(), loader(seed=2))
    assert run.global_step <= 8  # no batch behind the epoch of the first validation


def test_lightning_skips_a_validation_that_was_to_follow_the_checkpoint(tmp_path: Path) -> None:
    """So the metric has no value of that epoch; should this fail, docs/resuming.md can say less."""
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_on_train_epoch_end=False)
    seen = []
    for path in (None, tmp_path / "epoch=0-step=4.ckpt"):
        validates = Validates()
        model = seeded(ByStep)
        run = trainer(validates, *([] if path else [save]), epochs=2, enable_checkpointing=True)
        save.save_top_k = -1
        run.fit(model, loader(), loader(seed=2), ckpt_path=path)
        seen.append(validates.steps)
    assert seen == [[4, 8], [8]]


# Going on with the same trainer


def kept(unfreeze: GradualUnfreeze) -> GradualUnfreeze:
    return unfreeze


@pytest.mark.parametrize("monitor", ["val_steps", "steps"])
def test_a_trainer_that_goes_on_keeps_what_the_metric_has_come_to(monitor: str) -> None:
    whole = fit(monitor=monitor)[2]
    seen = Trains()
    unfreeze, audit = GradualUnfreeze(monitor=monitor), TrainableParamAudit(table=False)
    run = trainer(audit, unfreeze, seen, epochs=4)  # the audit's `setup` comes first
    model = seeded(lambda: ByStep(configure("AdamW", "StepLR")))
    run.fit(model, loader(), loader(seed=2))
    assert run.fit_loop.max_epochs is not None
    run.fit_loop.max_epochs += 2
    run.fit(model, loader(), loader(seed=2))
    assert seen.counts == whole
    assert audit.findings == []


@pytest.mark.parametrize("way", [kept, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_another_trainer_begins_with_the_first_stage(
    way: Callable[[GradualUnfreeze], GradualUnfreeze],
) -> None:
    unfreeze = GradualUnfreeze(monitor="val_steps")
    model = seeded(ByStep)  # pickling takes the trainer, and with it the model
    trainer(unfreeze, epochs=4).fit(model, loader(), loader(seed=2))
    assert len(trainable(model)) > 2
    seen = Trains()
    trainer(way(unfreeze), seen, epochs=3).fit(model, loader(), loader(seed=2))
    assert [seen.counts[4 * epoch] for epoch in range(3)] == [2, 2, 6]
