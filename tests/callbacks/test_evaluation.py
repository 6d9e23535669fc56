"""validate, test and predict change nothing; callbacks serve a second fit and a second Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_freeze import FreezeBackbone, GradualUnfreeze, ReinitTopLayers, TrainableParamAudit
from tests.oracle import Oracle
from tests.toys import Toy, changed, loader, seeded, state, trainable, trainer


def everything(callbacks: list[Any], model: Toy) -> tuple[Any, ...]:
    return (
        trainable(model),
        {name: module.training for name, module in model.named_modules()},
        {cb.state_key: cb.state_dict() for cb in callbacks},
    )


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
@pytest.mark.parametrize("with_ckpt", [False, True])
def test_evaluation_after_a_fit_changes_no_flag_mode_weight_or_phase(
    tmp_path: Path, function: str, with_ckpt: bool
) -> None:
    callbacks = [
        GradualUnfreeze(),
        ReinitTopLayers(1, seed=1),
        TrainableParamAudit(table=False),
    ]
    model = seeded(Toy)
    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    run = trainer(*callbacks, save, epochs=3, enable_checkpointing=True)
    run.fit(model, loader(), loader(seed=2))
    before, weights = everything(callbacks, model), state(model)
    assert before[0] != {name for name, _ in model.named_parameters()}
    ckpt = tmp_path / "epoch=2.ckpt" if with_ckpt else None
    getattr(run, function)(model, dataloaders=loader(), ckpt_path=ckpt)
    assert everything(callbacks, model) == before
    assert changed(weights, state(model)) == set()
    # an older checkpoint brings its weights, and nothing else
    getattr(run, function)(model, dataloaders=loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert everything(callbacks, model) == before
    assert changed(weights, state(model)) != set()


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_evaluation_before_a_fit_changes_nothing(function: str) -> None:
    callbacks = [FreezeBackbone(), TrainableParamAudit(table=False)]
    model = seeded(Toy)
    before, weights = everything(callbacks, model), state(model)
    run = trainer(*callbacks, epochs=1)
    getattr(run, function)(model, dataloaders=loader())
    assert everything(callbacks, model) == before
    assert changed(weights, state(model)) == set()
    run.fit(model, loader())  # control
    assert trainable(model) == {"head.weight", "head.bias"}


def test_fit_goes_on_after_a_test_with_an_older_checkpoint(tmp_path: Path) -> None:
    callback = GradualUnfreeze()
    model = seeded(Toy)
    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    run = trainer(callback, save, epochs=3, enable_checkpointing=True)
    run.fit(model, loader())
    run.test(model, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    run.fit_loop.max_epochs = 4
    run.fit(model, loader())
    assert "backbone.blocks.0.linear.weight" in trainable(model)
    assert "backbone.embed.weight" not in trainable(model)


@pytest.mark.parametrize("kind", [GradualUnfreeze, lambda: FreezeBackbone(unfreeze_at_epoch=1)])
def test_same_callbacks_in_a_second_trainer_start_clean(kind: Any) -> None:
    callbacks = [kind(), TrainableParamAudit(table=False)]
    runs = []
    for _ in range(2):
        model = seeded(Toy)
        trainer(*callbacks, epochs=3).fit(model, loader())
        runs.append((trainable(model), state(model), callbacks[1].moments))
    assert runs[0][0] == runs[1][0]
    assert changed(runs[0][1], runs[1][1]) == set()
    assert runs[0][2] == runs[1][2]
    assert "backbone.blocks.1.linear.weight" in runs[0][0]


def test_same_model_in_a_second_trainer_trains_what_the_first_had_frozen() -> None:
    model = seeded(Toy)
    trainer(FreezeBackbone(), epochs=1).fit(model, loader())
    assert trainable(model) == {"head.weight", "head.bias"}
    before = state(model)
    trainer(GradualUnfreeze(), epochs=5).fit(model, loader())
    assert "backbone.embed.weight" in changed(before, state(model))


def test_same_optimizer_in_a_second_fit_is_not_scaled_twice() -> None:
    import torch

    model = seeded(Toy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.configure = lambda _: optimizer
    for _ in range(2):
        oracle = Oracle(lambda name: 1.0 if name.startswith("head") else 0.5)
        trainer(GradualUnfreeze(lr_decay=0.5), oracle, epochs=2).fit(model, loader())
        assert oracle.wrong == []
        assert "backbone.blocks.2.linear.weight" in oracle.moved
        assert [group["lr"] for group in optimizer.param_groups] == [0.1]
