"""Lightning's own launchers: a script that starts itself once more, and spawned processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks.launched import main

ROOT = Path(__file__).parents[2]


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.ranks.launched", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_script_that_starts_its_ranks_itself_equals_one_process(tmp_path: Path) -> None:
    paths = {strategy: str(tmp_path / strategy) for strategy in ("auto", "ddp", "ddp_spawn")}
    main("auto", "adamw", paths["auto"])
    one = torch.load(paths["auto"])
    for strategy in ("ddp", "ddp_spawn"):
        run = script(strategy, "adamw", paths[strategy])
        assert run.returncode == 0, run.stderr
        assert json.loads(Path(paths[strategy] + ".json").read_text())["clean"]
        for name, tensor in torch.load(paths[strategy]).items():
            assert torch.allclose(tensor, one[name], rtol=0, atol=1e-4), (strategy, name)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_script_whose_ranks_differ_ends_with_an_error_on_all_of_them(tmp_path: Path) -> None:
    run = script("ddp", "sgd", str(tmp_path / "weights"), "sabotage")
    assert run.returncode not in (0, None)
    assert "[rank-mismatch] backbone.embed.weight differ" in run.stderr
    assert "WritesOnOneRank.on_train_batch_end" in run.stderr
    assert not (tmp_path / "weights").exists()
    report = json.loads((tmp_path / "weights.json").read_text())
    assert not report["clean"]
