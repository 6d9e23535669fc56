"""From a fit with an audit to a verdict on its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_freeze import FreezeBackbone, TrainableParamAudit
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
    for certificate in (run, report):
        assert main(["verify", base, run, "--certificate", certificate]) == 0
        assert "as certified: all 23 frozen tensors, 23 of them" in capsys.readouterr().out
        assert main(["verify", base, broken, "--certificate", certificate]) == 1
        assert "not as certified: 1 tensor in backbone.embed" in capsys.readouterr().out
