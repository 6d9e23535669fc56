"""A checkpoint that was written on two ranks resumes on one, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_freeze import GradualUnfreeze, TrainableParamAudit
from tests.ranks.fits import EPOCHS, OwnData, Save, adamw, fit, saved, sgd
from tests.ranks.processes import on_ranks
from tests.toys import same, trainable

BREAK = 3  # epochs before the run is broken off: blocks have unfrozen, and others will


def callbacks(folder: Path) -> list[Callback]:
    keep = ModelCheckpoint(folder, filename="broken", save_last=False)
    return [GradualUnfreeze(lr_decay=0.5), TrainableParamAudit(table=False), Save(folder), keep]


def run(folder: Path, configure: Any, ranks: int, **options: Any) -> None:
    def act(_: int) -> set[str]:
        options.setdefault("enable_checkpointing", True)
        made = fit(lambda: OwnData(configure), *callbacks(folder), ranks=ranks, **options)
        return trainable(made.lightning_module)

    outcomes = on_ranks(act, ranks)
    assert [outcome.error for outcome in outcomes] == [""] * ranks
    frozen = options.get("epochs", EPOCHS) < EPOCHS
    assert all(("backbone.embed.weight" in outcome.value) is not frozen for outcome in outcomes)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("optimizer", "tolerance"), [(sgd, 1e-6), (adamw, 1e-4)])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    before: int, after: int, optimizer: Any, tolerance: float, tmp_path: Path
) -> None:
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    for folder in (whole, first, second):
        folder.mkdir()
    run(whole, optimizer, ranks=1)
    run(first, optimizer, before, epochs=BREAK)
    run(second, optimizer, after, ckpt_path=first / "broken.ckpt")
    for epoch in range(BREAK, EPOCHS):
        expected = saved(whole, 0, epoch)
        for rank in range(after):
            found = saved(second, rank, epoch)
            apart = max(float((found[name] - expected[name]).abs().max()) for name in expected)
            assert apart <= tolerance
            assert all(same(found[name], saved(second, 0, epoch)[name]) for name in expected)
    assert not (second / f"0-{BREAK - 1}").exists()
