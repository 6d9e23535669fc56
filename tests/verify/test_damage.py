"""Flipped bits anywhere: an answer or a complaint, never a traceback, never a yes that is wrong."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from lightning_freeze.checkpoints.certificate import read_certificate
from lightning_freeze.cli import main
from tests.toys import same
from tests.verify.files import Run, save

FLIPS = 100
Captured = pytest.CaptureFixture[str]


def damaged(content: bytes, seed: int) -> bytes:
    random, found = Random(seed), bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    return bytes(found)


def status(capsys: Captured, *arguments: str) -> int:
    found = main(["verify", *arguments])
    output = capsys.readouterr()
    said = output.out + output.err
    assert found in (0, 1, 2)
    assert said.strip()
    assert "Traceback" not in said
    assert "Please report it" not in said
    return found


def test_a_damaged_checkpoint_passes_only_if_what_was_frozen_is_whole(
    run: Run, tmp_path: Path, capsys: Captured
) -> None:
    certificate = read_certificate(run.certificate)
    callbacks = {"TrainableParamAudit": {"certificate": certificate.to_dict()}}
    whole = save(tmp_path / "whole.ckpt", {**run.content, "callbacks": callbacks})
    content, path = Path(whole).read_bytes(), tmp_path / "x.ckpt"
    seen = []
    for seed in range(FLIPS):
        path.write_bytes(damaged(content, seed))
        for file in (run.certificate, str(path)):
            seen.append(status(capsys, str(path), "--certificate", file))
            if seen[-1] == 0:
                state = torch.load(path, weights_only=True, mmap=True)["state_dict"]
                assert all(same(state[name], run.after[name]) for name in certificate.frozen)
        if status(capsys, run.checkpoint, str(path)) == 0:
            state = torch.load(path, weights_only=True, mmap=True)["state_dict"]
            assert all(same(state[name], run.after[name]) for name in state if name in run.after)
    assert set(seen) == {0, 1, 2}


def test_a_damaged_certificate_is_refused(run: Run, tmp_path: Path, capsys: Captured) -> None:
    content, path = Path(run.certificate).read_bytes(), tmp_path / "c.json"
    for seed in range(FLIPS):
        path.write_bytes(damaged(content, seed))
        assert status(capsys, run.checkpoint, "--certificate", str(path)) == 2
