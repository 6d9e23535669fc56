"""Report and certificate where things go wrong: resumes, ranks, what can't be written to."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_freeze import FreezeBackbone, FrozenWeightsChanged, TrainableParamAudit
from lightning_freeze.audit.run import AuditRun
from lightning_freeze.callbacks import _papers
from lightning_freeze.callbacks._papers import check_writable
from lightning_freeze.callbacks.reinit_top_layers import ReinitTopLayers
from lightning_freeze.checkpoints.certificate import Certificate, read_certificate, sha256
from lightning_freeze.checkpoints.verify.compare import verify
from lightning_freeze.errors import ArgumentError
from tests.catalogue.harness import Do, audited
from tests.ranks.fits import OwnData
from tests.toys import Toy, changed, loader, seeded, state, trainer
from tests.verify.files import certificate


def nudge(_: Any, module: Any) -> None:
    module.backbone.embed.weight.data.add_(1e-3)


def saving(folder: Path | str, *callbacks: Any, epochs: int, **resume: Any) -> Any:
    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    fit = trainer(*callbacks, save, epochs=epochs, enable_checkpointing=True)
    model = seeded(Toy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(model, loader(), **resume)
    return model


# Resumes


def test_a_resume_goes_on_with_what_was_found_before_it(tmp_path: Path) -> None:
    audit = TrainableParamAudit(table=False, on_violation="warn")
    saving(tmp_path, Do(at=2, on_train_batch_end=nudge), FreezeBackbone(), audit, epochs=1)
    assert len(audit.findings) == 1
    again = TrainableParamAudit(table=False)
    path = tmp_path / "epoch=0.ckpt"
    saving(tmp_path, FreezeBackbone(), again, epochs=2, ckpt_path=path)
    assert again.findings == audit.findings
    assert "1 finding (frozen-changed)" in again.verdict
    assert not read_certificate(tmp_path / "certificate.json").clean
    calm = TrainableParamAudit(table=False)  # control
    saving(tmp_path / "calm", FreezeBackbone(), calm, epochs=1)
    path = tmp_path / "calm" / "epoch=0.ckpt"
    saving(tmp_path / "calm", FreezeBackbone(), calm, epochs=2, ckpt_path=path)
    assert read_certificate(tmp_path / "calm" / "certificate.json").clean


# Ties, and layers with a fresh start


class Tied(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Linear(4, 8, bias=False)
        self.decoder.weight = self.backbone.embed.weight


def test_every_name_of_a_tied_tensor_is_certified(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    audited(seeded(Tied), FreezeBackbone("backbone"), audit={"certificate": path})
    frozen = read_certificate(path).frozen
    first, other = frozen["backbone.embed.weight"], frozen["decoder.weight"]
    assert other.fingerprint == first.fingerprint
    assert (first.tied_to, other.tied_to) == (None, "backbone.embed.weight")


def test_what_was_given_a_fresh_start_is_certified_as_such_also_behind_a_resume(
    tmp_path: Path,
) -> None:
    def callbacks() -> list[Any]:
        fresh = ReinitTopLayers(params="backbone.embed", seed=3)
        return [fresh, FreezeBackbone("backbone"), TrainableParamAudit(table=False)]

    saving(tmp_path, *callbacks(), epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    saving(tmp_path, *callbacks(), epochs=2, ckpt_path=path)
    for file in (path, tmp_path / "certificate.json"):
        frozen = read_certificate(file).frozen
        assert frozen["backbone.embed.weight"].reinitialised
        assert not frozen["backbone.blocks.0.linear.weight"].reinitialised


# Digests


def test_a_certificate_by_sha256_is_written_at_the_end_of_the_fit(tmp_path: Path) -> None:
    audit = TrainableParamAudit(table=False, certificate_digest="sha256")
    model = saving(tmp_path, FreezeBackbone(), audit, epochs=1)
    found = read_certificate(tmp_path / "certificate.json")
    assert found.digest == "sha256"
    tensors = state(model)
    assert {n: entry.fingerprint for n, entry in found.frozen.items()} == {
        n: sha256(t) for n, t in tensors.items() if n.startswith("backbone.")
    }
    # what a resume compares with is in the checkpoint, by the digest that a checkpoint can afford
    held = read_certificate(tmp_path / "epoch=0.ckpt")
    assert held.digest == "xxh3_128"
    assert verify(None, tmp_path / "epoch=0.ckpt", tmp_path / "certificate.json").ok
    saving(tmp_path, FreezeBackbone(), audit, epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert not audit.findings
    with pytest.raises(ArgumentError, match=r"`certificate_digest` is 'sha1'.*sha256"):
        TrainableParamAudit(certificate_digest="sha1")  # type: ignore[arg-type]


def test_what_has_other_bytes_than_were_watched_is_not_certified_by_them() -> None:
    model = seeded(Toy)
    watched = certificate({n: t for n, t in state(model).items() if n.startswith("backbone.")})
    assert _papers._with_sha256(watched, model).frozen.keys() == watched.frozen.keys()
    nudge(None, model)
    left = watched.frozen.keys() - _papers._with_sha256(watched, model).frozen.keys()
    assert left == {"backbone.embed.weight"}


# Folders elsewhere


def test_beside_checkpoints_in_a_remote_folder_it_is_written_through_fsspec() -> None:
    saving("memory://runs/one", FreezeBackbone(), TrainableParamAudit(table=False), epochs=1)
    files = fsspec.filesystem("memory")
    content = json.loads(files.cat("/runs/one/certificate.json"))
    assert len(Certificate.from_dict(content, "here").frozen) == 23
    assert files.exists("/runs/one/epoch=0.ckpt")


def test_a_remote_folder_that_takes_no_certificate_is_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(fsspec, "open", refuse)
    save = ModelCheckpoint("memory://runs/two", save_top_k=-1)
    audit = TrainableParamAudit(table=False)
    fit = trainer(FreezeBackbone(), audit, save, epochs=3, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit.fit(seeded(Toy), loader())
    said = [str(w.message) for w in told if "couldn't be written" in str(w.message)]
    assert said == [
        "`memory://runs/two/certificate.json` couldn't be written: no credentials. The fit goes on."
    ]
    assert fsspec.filesystem("memory").glob("/runs/two/*.ckpt")


# What it costs


def test_a_checkpoint_costs_one_look_at_all_tensors_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    look = AuditRun.look_at_weights

    def counted(run: AuditRun, **options: Any) -> Any:
        looks.append(1)
        return look(run, **options)

    monkeypatch.setattr(AuditRun, "look_at_weights", counted)

    def save(fit: Any, _: Any) -> None:
        before = len(looks)
        fit.save_checkpoint(tmp_path / "x.ckpt")
        seen.append(len(looks) - before)

    seen: list[int] = []
    at = Do(at=2, on_train_batch_end=save)
    saving(tmp_path, FreezeBackbone(), TrainableParamAudit(table=False), at, epochs=1)
    assert seen == [1]
    assert read_certificate(tmp_path / "certificate.json").step == 4


# Ranks


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("act", [nudge, lambda *_: None])
def test_processes_of_a_launcher_write_their_report_before_they_raise(
    tmp_path: Path, act: Any
) -> None:
    path = tmp_path / "report.json"
    audit = TrainableParamAudit(table=False, report=path, certificate=tmp_path / "c.json")
    options: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2}
    fit = trainer(
        Do(at=2, on_train_batch_end=act),
        FreezeBackbone(),
        audit,
        epochs=1,
        use_distributed_sampler=False,
        **options,
    )
    if act is nudge:
        with pytest.raises(Exception, match=r"frozen-changed.*embed"):
            fit.fit(seeded(OwnData))
    else:
        fit.fit(seeded(OwnData))
    assert json.loads(path.read_text())["clean"] is (act is not nudge)
    assert read_certificate(tmp_path / "c.json").clean is (act is not nudge)
    assert "processes had audits of their own" in audit.verdict


# Files that can't be written


@pytest.mark.parametrize("argument", ["report", "certificate"])
def test_a_path_that_no_file_can_be_written_to_is_refused_before_the_fit(
    tmp_path: Path, argument: str
) -> None:
    (tmp_path / "file").write_text("mine")
    for path, why in (
        (tmp_path, "it is a folder"),
        (tmp_path / "file" / "below.json", "is a file, not a folder"),
    ):
        audit = TrainableParamAudit(table=False, **{argument: path})
        model = seeded(Toy)
        before = state(model)
        with pytest.raises(ArgumentError, match=f"`{argument}=.*{why}"):
            trainer(FreezeBackbone(), audit, epochs=1).fit(model, loader())
        assert changed(before, state(model)) == set()
    assert (tmp_path / "file").read_text() == "mine"
    check_writable(tmp_path / "new" / "folder" / "x.json", argument)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArgumentError, match="can't be written to"):
        check_writable(tmp_path / "x.json", "report")
    tmp_path.chmod(0o700)


def test_a_full_disk_costs_neither_the_checkpoint_nor_the_error_that_ends_a_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_papers, "write_json", full)
    audit = TrainableParamAudit(table=False, report=tmp_path / "r.json")
    save = ModelCheckpoint(tmp_path / "saved", filename="kept")
    fit = trainer(FreezeBackbone(), audit, save, epochs=1, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="couldn't be written: .*No space left"):
        fit.fit(seeded(Toy), loader())
    assert (tmp_path / "saved" / "kept.ckpt").is_file()
    nudged = Do(at=2, on_train_batch_end=nudge)
    audit = TrainableParamAudit(table=False, report=tmp_path / "r.json")
    fit = trainer(nudged, FreezeBackbone(), audit, epochs=1)
    with (
        pytest.warns(UserWarning, match="couldn't be written"),
        pytest.raises(FrozenWeightsChanged, match="embed"),
    ):
        fit.fit(seeded(Toy), loader())


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    audit = TrainableParamAudit(table=False, report="~/r.json", certificate="~/c.json")
    trainer(FreezeBackbone(), audit, epochs=1).fit(seeded(Toy), loader())
    assert {path.name for path in tmp_path.iterdir()} >= {"r.json", "c.json"}
