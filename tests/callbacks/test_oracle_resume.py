"""Interrupted and uninterrupted runs end alike to the bit: weights, optimizer state, lrs, flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_freeze import (
    FreezeBackbone,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
)
from tests.callbacks.recipes import EPOCHS, SCHEDULERS, configure
from tests.toys import (
    ByStep,
    FixedDropout,
    Toy,
    changed,
    loader,
    same,
    seeded,
    state,
    trainable,
    trainer,
)


def callbacks(kind: str) -> list[Callback]:
    audit = TrainableParamAudit(table=False, dead_after=2)
    freezing: Any = {
        "gradual": lambda: GradualUnfreeze(lr_decay=0.5),
        "steps": lambda: GradualUnfreeze(start=3, every=5, unit="step", lr_decay=0.5),
        "lp-ft": lambda: FreezeBackbone(unfreeze_at_epoch=2, lr_scale=0.2),
        "train-metric": lambda: GradualUnfreeze(monitor="steps", patience=1),
        "metric": lambda: GradualUnfreeze(monitor="val_steps", patience=1),
    }[kind]()
    return [freezing, ReinitTopLayers(1, seed=3), audit, FixedDropout()]


def fit(
    folder: Path,
    scheduler: str,
    kind: str,
    *,
    every: dict[str, Any] | None = None,
    ckpt_path: str | Path | None = None,
    epochs: int = EPOCHS,
) -> tuple[Trainer, Toy]:
    model = seeded(lambda: ByStep(configure("AdamW", scheduler)))
    save = (
        [ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **every)]
        if every
        else []
    )
    run = trainer(*callbacks(kind), *save, epochs=epochs, enable_checkpointing=bool(every))
    run.fit(model, loader(), loader(seed=2), ckpt_path=ckpt_path)
    return run, model


def everything(run: Trainer, model: Toy) -> dict[str, Any]:
    optimizer = run.optimizers[0]
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        "flags": trainable(model),
        "modes": {n: m.training for n, m in model.named_modules()},
        "groups": [
            {k: v if k != "params" else [names[id(p)] for p in v] for k, v in group.items()}
            for group in optimizer.param_groups
        ],
        "state": {names[id(p)]: dict(s) for p, s in optimizer.state.items()},
        "last_lr": run.lr_scheduler_configs[0].scheduler.get_last_lr(),
    }


def assert_equal(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert same(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for left, right in zip(a, b):
            assert_equal(left, right)
    else:
        assert a == b


# Lightning itself loses a ReduceLROnPlateau update after a checkpoint inside an epoch: see below
@pytest.mark.slow
@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS.keys() - {"ReduceLROnPlateau"}))
@pytest.mark.parametrize("kind", ["gradual", "steps"])
def test_resumed_run_ends_as_the_uninterrupted_one(
    tmp_path: Path, scheduler: str, kind: str
) -> None:
    every = {"every_n_train_steps": 3, "save_on_train_epoch_end": False}
    run, model = fit(tmp_path, scheduler, kind, every=every)
    uninterrupted, weights = everything(run, model), state(model)
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    # steps 3 (mid-epoch), 12 (the last batch of an epoch) and 15 (mid-epoch)
    for path in (paths[0], paths[3], paths[4]):
        run, model = fit(tmp_path, scheduler, kind, ckpt_path=path)
        assert changed(weights, state(model)) == set(), path.name
        assert_equal(uninterrupted, everything(run, model))
    # control: a run that isn't resumed but cut short ends elsewhere
    _, short = fit(tmp_path, scheduler, kind, epochs=3)
    assert changed(weights, state(short)) != set()


class Rates(Callback):
    """The lr at each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("kind", ["gradual", "steps"])
def test_plateau_scheduler_resumed_at_an_end_of_epoch_is_exact(tmp_path: Path, kind: str) -> None:
    every = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    run, model = fit(tmp_path, "ReduceLROnPlateau", kind, every=every)
    uninterrupted, weights = everything(run, model), state(model)
    for path in sorted(tmp_path.glob("*.ckpt"))[:-1]:
        run, model = fit(tmp_path, "ReduceLROnPlateau", kind, ckpt_path=path)
        assert changed(weights, state(model)) == set(), path.name
        assert_equal(uninterrupted, everything(run, model))


def test_plateau_scheduler_resumed_inside_an_epoch_has_the_lr_of_a_plain_resumed_run(
    tmp_path: Path,
) -> None:
    every = {"every_n_train_steps": 3, "save_on_train_epoch_end": False}
    ends = []
    for freezing in ([], [FreezeBackbone(unfreeze_at_epoch=2)]):
        folder = tmp_path / str(len(freezing))
        save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **every)
        for ckpt_path in (None, folder / "step=3.ckpt"):
            model = seeded(lambda: ByStep(configure("AdamW", "ReduceLROnPlateau")))
            seen = Rates()
            run = trainer(*freezing, save, seen, epochs=3, enable_checkpointing=True)
            run.fit(model, loader(), ckpt_path=ckpt_path)
            ends.append(seen.rates)
    plain, plain_resumed, ours, ours_resumed = ends
    assert ours == plain
    assert ours_resumed == plain_resumed
    assert plain[3:] != plain_resumed  # what Lightning loses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gradual", "steps", "lp-ft", "metric", "train-metric"])
@pytest.mark.parametrize("when", ["validation_end", "epoch_end"])
def test_resume_from_every_end_of_epoch_is_exact(tmp_path: Path, kind: str, when: str) -> None:
    if kind == "train-metric" and when == "validation_end":
        pytest.skip("Lightning saves no training metric of the epoch in such a checkpoint")
    every = {"every_n_epochs": 1, "save_on_train_epoch_end": when == "epoch_end"}
    run, model = fit(tmp_path, "OneCycleLR", kind, every=every)
    uninterrupted, weights = everything(run, model), state(model)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == EPOCHS
    for path in paths[:-1]:
        run, model = fit(tmp_path, "OneCycleLR", kind, ckpt_path=path)
        assert changed(weights, state(model)) == set(), path.name
        assert_equal(uninterrupted, everything(run, model))


def test_reinitialised_layers_keep_their_training_on_a_resume(tmp_path: Path) -> None:
    every = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    fit(tmp_path, "StepLR", "gradual", every=every, epochs=2)
    path = max(tmp_path.glob("*.ckpt"))
    saved = torch.load(path, weights_only=True)["state_dict"]
    model = seeded(lambda: ByStep(configure("AdamW", "StepLR")))
    seen: dict[str, torch.Tensor] = {}

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            seen.update(state(module))

    trainer(*callbacks("gradual"), Look(), epochs=3).fit(model, loader(), ckpt_path=path)
    assert changed(saved, seen) == set()
    # control: a fresh fit does re-initialise
    fresh = seeded(lambda: ByStep(configure("AdamW", "StepLR")))
    before = state(fresh)
    trainer(*callbacks("gradual"), Look(), epochs=3).fit(fresh, loader())
    assert "backbone.blocks.2.linear.weight" in changed(before, seen)
