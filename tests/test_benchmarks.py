"""Each benchmark runs, with sizes that tell nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import overhead, peers
from benchmarks.staged import __main__ as staged

BERT = "--layers 2 --width 48"
SMALL = "--random --samples 24 --batch 4 --width 24 --heads 2 --vocabulary 50 --max-length 12"
STAGED = f"{SMALL} --epochs-per-stage 2 --freeze 1:4,3:5 --seeds 1 --threads 1"
MATRIX = "--strategies DDP FSDP2 --precisions bf16-mixed --schedulers OneCycleLR"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (f"hooks --tensors 60 --steps 4 --repeats 1 {BERT}", "60 tensors"),
        (f"audit --tensors 60 --steps 4 --repeats 1 {BERT}", "GB/s"),
        ("size --tensors 400 --repeats 1", "times the tensors"),
        ("memory --steps 4", "a step)"),
        ("cache --samples 24 --repeats 1 --width 48", "head only"),
        (f"matrix {MATRIX}", "2 of 2"),
    ],
    ids=lambda value: value.split()[0],
)
def test_overhead_prints_what_it_measured(
    arguments: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overhead.main(arguments.split())
    shown = capsys.readouterr().out
    assert told in shown
    assert "0 of" not in shown


@pytest.mark.slow
def test_overhead_prints_what_the_import_takes(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "import lightning.pytorch"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("lightning can't be imported in a plain process of this environment")
    overhead.main(["imports", "--repeats", "1"])
    assert "lightning_freeze adds" in capsys.readouterr().out


@pytest.mark.slow
def test_the_staged_run_is_the_same_by_hand_and_with_callbacks_and_has_a_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = staged.main([*STAGED.split(), "--markdown"])
    shown = capsys.readouterr().out
    hand, ours, cache = (result.fits[key][0] for key in ("hand", "ours", "cache"))
    assert ours.losses == pytest.approx(hand.losses, rel=1e-5)
    assert cache.losses == pytest.approx(hand.losses, rel=1e-5)
    assert result.fits["freeze"][0].losses != pytest.approx(hand.losses, rel=1e-5)
    # the same schedule has one limit; everything, always, needs all
    assert hand.least == ours.least == cache.least < result.fits["full"][0].least == 1
    assert "losses of all steps differ by at most" in shown


@pytest.mark.slow
def test_peers_prints_a_row_for_each_claim(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["options", "validate", "second", "names", "verified", "reinit"]
    found = peers.main(["--only", *asked, "--markdown"])
    ours = {key: row["lightning-freeze"].partition(":")[0] for key, row in found.items()}
    assert ours == dict.fromkeys(asked, "yes")
    # the control: a claim can fail
    assert found["options"]["BackboneFinetuning"].startswith("no: lr")
    assert "re-initialises layers" in capsys.readouterr().out
