"""The benchmarks run, say what they say of lightning-freeze, and can say no."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = "--steps 4 --repeats 2 --layers 3 --width 24 --heads 2 --vocabulary 50 --batch 2 --length 6"

# what each claim says where it holds; every other cell is a "no"
HOLDS = {
    "options": "yes",
    "LambdaLR": "right",
    "OneCycleLR": "right",
    "CosineAnnealingLR": "right",
    "ReduceLROnPlateau": "right",
    "SequentialLR": "right",
    "CyclicLR": "right",
    "batch-norm": "yes",
    "resume": "at epoch ends 4 of 4, by step 9 of 9",
    "validate": "yes",
    "second": "yes",
    "ranks": "yes",
    "names": "yes",
    "verified": "yes: `FrozenWeightsChanged` with name and cause",
    "reinit": "yes",
    "configure": "3 of 3",
}
SLOW = ("resume",)


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def step_time() -> Any:
    return load("step_time")


@pytest.fixture(scope="module")
def peers() -> Any:
    return load("peers")


def probe(peers: Any, contender: Any, key: str, folder: Path) -> str:
    claim = next(claim for claim in peers.CLAIMS if claim.key == key)
    with peers.hushed():
        return claim.probe(contender, folder)


@pytest.mark.slow
def test_step_time_prints_the_ratio_of_each_stage(
    step_time: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # ends with an error where the two ways don't end with the same weights
    result = step_time.main(TINY.split())
    shown = capsys.readouterr().out
    assert [row.stage for row in result.rows] == ["head only", "top 2 layers", "all layers"]
    for row in result.rows:
        assert row.by_hand > 0
        assert row.callbacks > row.hooks > 0
        assert row.cpu > 0
        assert row.ratio.low <= row.ratio.median <= row.ratio.high
        assert f"{row.ratio}" in shown
    assert all(f"{1e3 * seconds:.1f} ms" in shown for seconds in result.fixed.values())


def test_step_time_of_two_fits_is_compared_only_if_both_are_one_run(step_time: Any) -> None:
    def made(weights: str, trainable: str) -> Any:
        timer = step_time.StepTimer()
        timer.trainable = [{trainable}]
        return step_time.Fit(timer, step_time.HookClock(), 1.0, {"head": weights})

    step_time.check_same_run(made("a", "head"), made("a", "head"))
    with pytest.raises(AssertionError, match="end with different weights, such as head"):
        step_time.check_same_run(made("a", "head"), made("b", "head"))
    with pytest.raises(AssertionError, match="don't train the same tensors"):
        step_time.check_same_run(made("a", "head"), made("a", "tail"))


def test_step_time_leaves_out_the_first_two_steps(step_time: Any) -> None:
    timer = step_time.StepTimer()
    timer.ends = [[(0.0, 0.0), (9.0, 9.0), (10.0, 9.5), (11.0, 10.0)]]
    assert timer.steps(0) == [1.0, 1.0]
    assert timer.steps(0, cpu=True) == [0.5, 0.5]


@pytest.mark.parametrize("steps", [1, 2])
def test_step_time_needs_steps_to_count(
    step_time: Any, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        step_time.parse(["--steps", str(steps)])
    assert "the first 2 of a stage aren't counted" in capsys.readouterr().err
    assert step_time.parse(["--steps", "3"]).steps == 3


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=pytest.mark.slow if key in SLOW else ())
        for key in HOLDS
        if key != "ranks"
    ],
)
def test_every_claim_holds_for_lightning_freeze(peers: Any, key: str, tmp_path: Path) -> None:
    assert probe(peers, peers.OURS, key, tmp_path) == HOLDS[key]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_hold_equal_weights(peers: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import lightning.pytorch"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("lightning can't be imported in a plain process of this environment")
    assert probe(peers, peers.OURS, "ranks", tmp_path) == HOLDS["ranks"]
    assert probe(peers, peers.BACKBONE_FINETUNING, "ranks", tmp_path).startswith("no: they differ")


def test_a_claim_for_each_expectation(peers: Any) -> None:
    assert [claim.key for claim in peers.CLAIMS] == list(HOLDS)


@pytest.mark.parametrize(
    ("key", "cell"),
    [
        ("options", "no: lr 0.005 became 0.01, weight decay 0 became 0.1"),
        ("LambdaLR", "raises ValueError"),
        ("validate", "no: 52 trainable tensors became 26"),
        ("verified", "no: the fit ends without a word"),
    ],
)
def test_a_claim_can_fail(peers: Any, key: str, cell: str, tmp_path: Path) -> None:
    assert probe(peers, peers.BACKBONE_FINETUNING, key, tmp_path) == cell


@pytest.mark.slow
def test_lightning_alone_resumes_to_the_bit(peers: Any, tmp_path: Path) -> None:
    assert probe(peers, peers.NOTHING, "resume", tmp_path) == HOLDS["resume"]


def test_names_of_finetuning_scheduler_are_regular_expressions(peers: Any, tmp_path: Path) -> None:
    pytest.importorskip("finetuning_scheduler")
    cell = probe(peers, peers.finetuning_scheduler(), "names", tmp_path)
    assert cell == "no: layers 1, 10, 11; with `layer\\.1\\..*` yes"


def test_the_markdown_table_has_a_row_for_each_claim(
    peers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "contenders", lambda: [peers.OURS, peers.BACKBONE_FINETUNING])
    found = {
        "names": {"lightning-freeze": "yes", "BackboneFinetuning": "a | b"},
        "reinit": {"lightning-freeze": "yes", "BackboneFinetuning": "no"},
    }
    lines = peers.markdown(found).splitlines()
    assert lines[2].startswith("| `layer.1` doesn't match `layer.10` | yes | a \\| b | ")
    assert lines[3].startswith("| re-initialises layers | yes | no | ")
    assert "lightning-freeze" in lines[0]
    assert lines[-1].startswith("Measured by `benchmarks/peers.py` with lightning-freeze")


def test_the_terminal_table_shows_each_cell(
    peers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "contenders", lambda: [peers.OURS])
    found = peers.main(["--only", "reinit"])
    shown = capsys.readouterr().out
    assert found == {"reinit": {"lightning-freeze": "yes"}}
    assert "re-initialises layers" in " ".join(shown.split())


@pytest.mark.slow
def test_audit_cost_prints_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    module = load("audit_cost")
    small = "--repeats 1 --base-layers 1 --base-width 48"
    result = module.main([*small.split(), "--small", "400"])
    shown = capsys.readouterr().out
    assert [reading.what for reading in result.readings] == ["BERT-base", "small tensors"]
    for reading in result.readings:
        assert f"{reading.ratio:.2f}" in shown
        assert reading.most >= reading.kept > 0
    assert f"adds {result.in_a_fit:.0f} B/tensor" in shown


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_matrix_runs_where_it_is_supported(capsys: pytest.CaptureFixture[str]) -> None:
    matrix = load("matrix")
    asked = "--strategies DDP FSDP2 --precisions bf16-mixed --schedulers OneCycleLR --each"
    results = matrix.main(asked.split())
    shown = capsys.readouterr().out
    assert len(results) == 16
    assert set(results.values()) == {"runs"}
    assert shown.count("2 of 2") == 8
    assert "DeepSpeed: refused at fit start" in shown
    assert "FSDP2 | bf16-mixed | True | True | 2 | OneCycleLR | runs" in shown


def test_the_matrix_tells_what_moved_too_early_and_what_never_moved() -> None:
    matrix = load("matrix")
    order = ("head.w", "backbone.blocks.1.w", "backbone.blocks.0.w", "backbone.embed.w")

    def trained(first: dict[str, int]) -> str:
        layers = matrix.Layers()
        layers.seen = [
            {name: str(max(0, epoch - first[name])) for name in order}
            for epoch in range(matrix.EPOCHS + 1)
        ]
        return str(matrix.judge(layers))

    due = {name: turn for turn, name in enumerate(order)}
    assert trained(due) == "runs"
    assert "moved in epoch 2" in trained({**due, "backbone.embed.w": 2})
    assert "`backbone.blocks.0.*` didn't move in epoch 2" in trained(
        {**due, "backbone.blocks.0.w": 3}
    )
