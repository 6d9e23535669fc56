from __future__ import annotations

import ast
import copy
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_freeze import VerifyError
from lightning_freeze.checkpoints import certificate as module
from lightning_freeze.checkpoints.certificate import (
    Certificate,
    Certified,
    checksum,
    read_certificate,
    sha256,
)
from tests.verify.files import save

FINDING = {"code": "frozen-changed", "names": ["a.weight"], "epoch": 0, "step": 3, "rank": 0}
WHOLE = Certificate(
    frozen={
        "a.weight": Certified("0123456789abcdef" * 2, "parameter", "float32", (3, 2), 0, 0),
        "a.running_mean": Certified("f" * 32, "buffer", "float32", (), 1, 8),
    },
    epoch=3,
    step=24,
    findings=(),
    versions={"torch": "2.13.0", "lightning": "2.6.6"},
    created="2026-01-01T00:00:00+00:00",
)
UNCLEAN = Certificate(WHOLE.frozen, 3, 24, (FINDING,), WHOLE.versions, WHOLE.created)


def resealed(content: dict[str, Any]) -> dict[str, Any]:
    """With the checksum that fits."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return {**rest, "checksum": checksum(rest)}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# Values


def test_a_certificate_is_plain_values_and_back() -> None:
    for whole, clean in ((WHOLE, True), (UNCLEAN, False)):
        content = json.loads(json.dumps(whole.to_dict()))
        assert Certificate.from_dict(content, "here") == whole
        assert whole.clean is content["clean"] is clean


def test_a_certificate_says_what_it_is() -> None:
    content = WHOLE.to_dict()
    assert content["format"] == "lightning-freeze certificate"
    assert content["version"] == 1
    assert content["algorithm"] == "XXH3-128 over dtype, shape and bytes"
    by_sha = replace(WHOLE, digest="sha256").to_dict()
    assert by_sha["algorithm"] == "SHA-256 over dtype, shape and bytes"
    assert Certificate.from_dict(by_sha, "here").digest == "sha256"
    assert content["frozen"]["a.running_mean"] == {
        "fingerprint": "f" * 32,
        "kind": "buffer",
        "dtype": "float32",
        "shape": [],
        "since": {"epoch": 1, "step": 8},
    }
    assert content["checksum"] == checksum({k: v for k, v in content.items() if k != "checksum"})


def test_a_certificate_is_plain_down_to_the_versions(tmp_path: Path) -> None:
    versions = {"torch": torch.__version__}
    whole = Certificate(WHOLE.frozen, 3, 24, (), versions, WHOLE.created)
    assert type(whole.to_dict()["versions"]["torch"]) is str
    state = {"callbacks": {"audit": {"certificate": whole.to_dict()}}}
    assert read_certificate(save(tmp_path / "x.ckpt", state)) == whole


def test_certificates_need_no_torch_of_their_own() -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = [n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)]
    assert "xxhash" in imported
    assert "torch" not in imported


# Damage


def test_every_change_of_a_digit_is_noticed() -> None:
    text = json.dumps(UNCLEAN.to_dict())
    digits = [position for position, character in enumerate(text) if character.isdigit()]
    assert len(digits) > 80
    for position in digits:
        other = str((int(text[position]) + 1) % 10)
        try:
            changed = json.loads(text[:position] + other + text[position + 1 :])
        except ValueError:
            continue  # such as 08
        with pytest.raises(VerifyError, match=r"was changed after it was written|newer version"):
            Certificate.from_dict(changed, "here")


@pytest.mark.parametrize("key", ["epoch", "frozen", "findings", "versions", "algorithm"])
def test_a_missing_key_is_noticed_even_under_a_fitting_checksum(key: str) -> None:
    content = WHOLE.to_dict()
    del content[key]
    with pytest.raises(
        VerifyError, match=r"^here: the certificate was changed .* checksum doesn't"
    ):
        Certificate.from_dict(content, "here")
    with pytest.raises(VerifyError, match=r"^here: the certificate was changed .*not the form"):
        Certificate.from_dict(resealed(content), "here")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(epoch="x"),
        lambda c: c.update(frozen=[]),
        lambda c: c.update(findings=[3]),
        lambda c: c.update(algorithm="MD5"),
        lambda c: c.update(until={"body": [1]}),
        lambda c: c["frozen"].update({"a.weight": 3}),
        lambda c: c["frozen"]["a.weight"].update(shape=[None]),
        lambda c: c["frozen"]["a.weight"].update(since={"epoch": 0}),
    ],
)
def test_what_is_of_the_wrong_type_is_noticed_even_under_a_fitting_checksum(
    change: Callable[[dict[str, Any]], None],
) -> None:
    content = copy.deepcopy(WHOLE.to_dict())
    change(content)
    with pytest.raises(VerifyError, match="not the form"):
        Certificate.from_dict(resealed(content), "here")


def test_what_is_no_plain_value_is_refused() -> None:
    itself: dict[str, Any] = {}
    itself["x"] = itself
    for odd in (torch.ones(2), itself, {1: 2, "a": 3}, object()):
        content = {**WHOLE.to_dict(), "versions": odd}
        with pytest.raises(VerifyError, match="something else than plain values"):
            Certificate.from_dict(content, "here")


def test_a_checksum_that_does_not_fit_is_noticed() -> None:
    content = {**WHOLE.to_dict(), "step": 25}
    with pytest.raises(
        VerifyError, match=r"^here: the certificate was changed after it was writte"
    ):
        Certificate.from_dict(content, "here")
    assert Certificate.from_dict(resealed(content), "here").step == 25


def test_a_newer_version_asks_for_a_newer_package() -> None:
    content = resealed({**WHOLE.to_dict(), "version": 2})
    with pytest.raises(VerifyError, match=r"format version 2; .* reads version 1.*pip install -U"):
        Certificate.from_dict(content, "here")


@pytest.mark.parametrize("content", [None, 3, [], {}, {"format": "x"}, {"format": 1}], ids=str)
def test_other_content_is_no_certificate(content: Any) -> None:
    with pytest.raises(VerifyError, match=r"^here is no certificate: it doesn't have `format: "):
        Certificate.from_dict(content, "here")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_documented_way_to_sign_a_certificate_tells_a_change(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "certificates.md").read_text(encoding="utf-8")
    commands = [line.strip() for line in text.splitlines() if line.strip().startswith("openssl ")]
    write(tmp_path / "certificate.json", WHOLE.to_dict())
    verified = [
        subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
        for command in commands
    ][-1]
    assert (verified.returncode, verified.stdout) == (0, "Verified OK\n")
    write(tmp_path / "certificate.json", UNCLEAN.to_dict())
    changed = subprocess.run(commands[-1], shell=True, cwd=tmp_path, capture_output=True)
    assert changed.returncode == 1


# Files


def test_a_certificate_is_read_from_its_file_a_report_or_a_checkpoint(tmp_path: Path) -> None:
    content = WHOLE.to_dict()
    report = {"format": 1, "verdict": "clean", "certificate": content}
    state = {"state_dict": {}, "callbacks": {"A": {"x": 1}, "B": {"certificate": content}, "C": 3}}
    assert read_certificate(write(tmp_path / "certificate.json", content)) == WHOLE
    assert read_certificate(write(tmp_path / "audit.json", report)) == WHOLE
    assert read_certificate(save(tmp_path / "run.ckpt", state)) == WHOLE


def test_of_several_audits_of_one_run_what_any_of_them_found_counts(tmp_path: Path) -> None:
    other = replace(UNCLEAN, findings=({"code": "no-gradient"},))
    states = {
        str(i): {"certificate": c.to_dict()} for i, c in enumerate([WHOLE, other, UNCLEAN, other])
    }
    read = read_certificate(save(tmp_path / "x.ckpt", {"callbacks": states}))
    assert read == replace(WHOLE, findings=(*other.findings, *UNCLEAN.findings))


def test_what_was_frozen_until_when_is_told_by_the_audit_s_state_in_a_checkpoint(
    tmp_path: Path,
) -> None:
    told = replace(WHOLE, until={"body": (2, 8)})
    assert Certificate.from_dict(told.to_dict(), "here") == told
    rates: list[tuple[int, dict[str, Any]]] = [
        (0, {"body": None, "gone": None, "head": 0.1}),
        (4, {"body": None, "head": None}),
        (8, {"body": 0.1, "head": 0.1}),
        (12, {"body": 0.2, "head": 0.1}),
    ]
    moments = [{"epoch": step // 4, "step": step, "lr": lr} for step, lr in rates]
    for found, expected in ((moments, {"body": (2, 8)}), ([3], {}), ("x", {}), ([{}], {}), (3, {})):
        state = {"certificate": WHOLE.to_dict(), "moments": found}
        path = save(tmp_path / "x.ckpt", {"callbacks": {"A": state}})
        assert read_certificate(path).until == expected


DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sha256_is_that_of_dtype_shape_and_bytes_however_they_lie_in_memory(
    dtype: torch.dtype,
) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    memory = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    expected = hashlib.sha256(f"{dtype}|2,3|".encode() + memory).hexdigest()
    assert sha256(tensor) == sha256(tensor.t().contiguous().t()) == expected
    assert sha256(tensor.t()) != expected
    assert sha256(torch.zeros(0, dtype=dtype)) == hashlib.sha256(f"{dtype}|0|".encode()).hexdigest()


def test_a_tensor_of_several_parts_has_no_sha256() -> None:
    assert sha256(torch.eye(2).to_sparse()) is None


def test_certificates_that_contradict_each_other_are_an_error(tmp_path: Path) -> None:
    other = Certificate({"b": WHOLE.frozen["a.weight"]}, 3, 24, (), {}, "")
    states = {str(i): {"certificate": c.to_dict()} for i, c in enumerate([WHOLE, other])}
    path = save(tmp_path / "x.ckpt", {"callbacks": states})
    with pytest.raises(VerifyError, match="holds 2 certificates that contradict each other"):
        read_certificate(path)


@pytest.mark.parametrize("content", [{}, {"callbacks": {"A": {"certificate": None}}}, [1]], ids=str)
def test_a_checkpoint_without_a_certificate_says_so(tmp_path: Path, content: Any) -> None:
    path = save(tmp_path / "x.ckpt", content)
    with pytest.raises(VerifyError, match=r"the checkpoint `.*x\.ckpt` holds no certificate\. One"):
        read_certificate(path)


def test_a_report_without_a_certificate_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", {"format": 1, "certificate": None})
    with pytest.raises(VerifyError, match=r"the audit report `.*x\.json` holds no certificate"):
        read_certificate(path)


@pytest.mark.parametrize(
    "content", [b"hello", b"\xff\xfe\x00", b"[" * 100_000, b'{"format": '], ids=len
)
def test_a_file_that_is_no_json_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(VerifyError, match=r"x\.json` holds no certificate: it is neither JSON"):
        read_certificate(tmp_path / "x.json")


def test_a_path_without_a_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match=r"` is a folder, a pipe or"):
        read_certificate(tmp_path)
    with pytest.raises(VerifyError, match=r"There is no file or folder `.*x\.json`"):
        read_certificate(tmp_path / "x.json")
    (tmp_path / "x.json").touch()
    with pytest.raises(VerifyError, match=r"x\.json` is empty"):
        read_certificate(tmp_path / "x.json")
