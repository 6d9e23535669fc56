"""Flipped bits anywhere: an answer or a complaint, never a traceback, never a yes that is wrong."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from lightning_freeze.checkpoints.certificate import read_certificate
from lightning_freeze.cli import main
from tests.toys import same
from tests.verify.files import Run, certificate, save, write_certificate

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
    held = read_certificate(run.certificate)
    callbacks = {"TrainableParamAudit": {"certificate": held.to_dict()}}
    whole = save(tmp_path / "whole.ckpt", {**run.content, "callbacks": callbacks})
    content, path = Path(whole).read_bytes(), tmp_path / "x.ckpt"
    seen = []
    for seed in range(FLIPS):
        path.write_bytes(damaged(content, seed))
        for file in (run.certificate, str(path)):
            seen.append(status(capsys, str(path), "--certificate", file))
            if seen[-1] == 0:
                state = torch.load(path, weights_only=True, mmap=True)["state_dict"]
                assert all(same(state[name], run.after[name]) for name in held.frozen)
        if status(capsys, run.checkpoint, str(path)) == 0:
            state = torch.load(path, weights_only=True, mmap=True)["state_dict"]
            assert all(same(state[name], run.after[name]) for name in state if name in run.after)
    assert set(seen) == {0, 1, 2}


MIXED = {
    f"body.layer.{i}.{part}": torch.arange(6.0).reshape(shape) + 10 * i
    for i in range(3)
    for part, shape in (("weight", (2, 3)), ("scale", (6,)))
}


def test_no_copy_elsewhere_passes_for_a_certified_tensor_that_is_not_as_it_was(
    tmp_path: Path, capsys: Captured
) -> None:
    seen = set()
    for seed in range(4 * FLIPS):
        random = Random(seed)
        there, here = (random.choice(("", "model.", "net.model.", "x.")) for _ in range(2))
        weights = {here + name: tensor.clone() for name, tensor in MIXED.items()}
        spoilt = random.sample(list(weights), random.choice((0, 1, 2, 4)))
        for name in spoilt:
            other = random.choice((weights[name] + 1, torch.zeros(9), weights[name].double(), None))
            weights |= {name: other} if other is not None else {}
            if other is None:
                del weights[name]
        copies = random.choice(((), (f"old.{here}",), ("old.", "ema.")))
        for copy in copies:
            weights |= {copy + name: tensor for name, tensor in MIXED.items()}
        checkpoint = save(tmp_path / "x.pt", {**weights, f"{here}head.w": torch.zeros(2)})
        certified = {there + name: tensor for name, tensor in MIXED.items()}
        proof = write_certificate(tmp_path / "c.json", certificate(certified))
        base = [save(tmp_path / "b.pt", certified)] if random.random() < 0.5 else []
        found = status(capsys, *base, checkpoint, "--certificate", proof)
        assert found or not spoilt, (seed, spoilt)
        seen.add((found, bool(spoilt)))
    assert seen == {(0, False), (2, False), (1, True), (2, True)}


def test_a_damaged_certificate_is_refused(run: Run, tmp_path: Path, capsys: Captured) -> None:
    content, path = Path(run.certificate).read_bytes(), tmp_path / "c.json"
    for seed in range(FLIPS):
        path.write_bytes(damaged(content, seed))
        assert status(capsys, run.checkpoint, "--certificate", str(path)) == 2
