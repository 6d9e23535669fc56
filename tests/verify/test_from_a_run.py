"""From a fit with an audit to a verdict on its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_freeze import FreezeBackbone, GradualUnfreeze, TrainableParamAudit
from lightning_freeze.cli import main
from tests.toys import Toy, loader, seeded, state, trainer
from tests.verify.files import save


def test_what_an_audited_run_wrote_is_verified_from_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = seeded(Toy)
    base = save(tmp_path / "base.pt", state(model))
    report, run = str(tmp_path / "audit.json"), str(tmp_path / "run.ckpt")
    fit = trainer(FreezeBackbone(), TrainableParamAudit(report=report, table=False), epochs=2)
    fit.fit(model, loader())
    fit.save_checkpoint(run)
    capsys.readouterr()
    content = torch.load(run, weights_only=True)
    content["state_dict"]["backbone.embed.bias"][0] += 1
    broken = save(tmp_path / "broken.ckpt", content)
    for certificate in ([], ["--certificate", run], ["--certificate", report]):
        assert main(["verify", base, run, *certificate]) == 0
        assert "OK: as certified: all 23 frozen tensors (23 ide" in capsys.readouterr().out
        assert main(["verify", base, broken, *certificate]) == 1
        assert "CHANGED: not as certified: 1 tensor in backbone.embed" in capsys.readouterr().out


def test_a_run_that_ends_with_nothing_frozen_is_verified_by_its_earlier_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = seeded(Toy)
    base = save(tmp_path / "base.pt", state(model))
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_last=True)
    schedule = GradualUnfreeze({0: "head", 1: "blocks.2", 2: "**"})
    audit = TrainableParamAudit(table=False)
    trainer(schedule, audit, saver, epochs=3, enable_checkpointing=True).fit(model, loader())
    capsys.readouterr()
    last, first = str(tmp_path / "last.ckpt"), str(tmp_path / "epoch=0.ckpt")
    beside = ["--certificate", str(tmp_path / "certificate.json")]
    for arguments in ([base, last], [last], [base, last, *beside]):
        assert main(["verify", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("CANNOT VERIFY: ")
        assert "backbone.blocks.2 until epoch 1, step 4" in said
        assert "backbone.blocks.0, backbone.blocks.1, backbone.embed until epoch 2, step 8" in said
    for arguments in ([base, first], [first], [base, first, *beside]):
        assert main(["verify", *arguments]) == 0
        assert "OK: as certified: all 23 frozen tensors" in capsys.readouterr().out
