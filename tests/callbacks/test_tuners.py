"""Lightning's own tuners try steps on a copy of the state and put it back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_freeze import FreezeBackbone, GradualUnfreeze, TrainableParamAudit
from tests.toys import Toy, changed, loader, seeded, state, trainer


class Tuned(Toy):
    """Has what the tuners look for."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-2, 6

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(loader().dataset, batch_size=self.batch_size)

    val_dataloader = train_dataloader


def fit(path: Path, *callbacks: Callback, tune: Any = None, **options: Any) -> Any:
    model = seeded(Tuned)
    kept = {"default_root_dir": path, "enable_checkpointing": True, "epochs": 4, **options}
    run = trainer(*callbacks, **kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if tune is not None:
            tune(Tuner(run), model)
        run.fit(model)
    return model


TUNERS = {
    "learning rate": lambda: LearningRateFinder(num_training_steps=6),
    "batch size": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2),
}


@pytest.mark.parametrize("freezing", [FreezeBackbone, GradualUnfreeze])
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_tuner_beside_a_freezing_callback(tmp_path: Path, freezing: Any, tuner: str) -> None:
    audit = TrainableParamAudit(table=False)
    before = state(seeded(Tuned))
    model = fit(tmp_path, freezing(), TUNERS[tuner](), audit)
    assert audit.findings == []
    moved = changed(before, state(model))
    assert "head.weight" in moved
    assert ("backbone.blocks.2.linear.weight" in moved) is (freezing is GradualUnfreeze)
    assert "backbone.embed.weight" not in moved or freezing is GradualUnfreeze


def test_a_learning_rate_that_was_looked_for_before_the_fit(tmp_path: Path) -> None:
    audit = TrainableParamAudit(table=False)
    before = state(seeded(Tuned))
    search = lambda tuner, model: tuner.lr_find(model, num_training=6)  # noqa: E731
    model = fit(tmp_path, FreezeBackbone(), audit, tune=search)
    assert audit.findings == []
    assert {name.split(".")[0] for name in changed(before, state(model))} == {"head"}
