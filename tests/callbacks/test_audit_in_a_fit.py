"""The audit in real fits: who did it and where, the hunt, slices, certificates, resumes."""

from __future__ import annotations

import json
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_freeze import (
    AuditError,
    FreezeBackbone,
    FrozenWeightsChanged,
    GradualUnfreeze,
    TrainableParamAudit,
    fingerprint,
)
from lightning_freeze.checkpoints.certificate import read_certificate
from lightning_freeze.cli import main
from lightning_freeze.errors import ArgumentError
from tests.catalogue.harness import Do, audited, codes, one
from tests.toys import Toy, loader, seeded, trainer


def weight(module: Any) -> torch.nn.Parameter:
    return module.backbone.embed.weight


def nudge(trainer: Any, module: Any) -> None:
    weight(module).data.add_(1e-3)


def grow(trainer: Any, module: Any) -> None:
    weight(module).add_(1e-3)


# Where it happens, and whose code runs there

PLACES = {
    "on_train_batch_start": "before the epoch's first batch",
    "on_before_backward": "in the forward or backward pass of a batch",
    "on_after_backward": "in the forward or backward pass of a batch",
    "on_train_batch_end": "between the optimizer's update and the batch's end",
    "on_validation_batch_end": "during validation",
}


@pytest.mark.parametrize("hook", PLACES)
def test_a_write_in_place_is_placed_and_the_code_that_runs_there_is_named(hook: str) -> None:
    audit = audited(
        seeded(Toy), Do(**{hook: grow}), FreezeBackbone(), epochs=1, validation=loader(seed=2)
    )
    cause = one(audit, "frozen-changed").cause
    assert "written in place by other code" in cause
    assert PLACES[hook] in cause
    assert f"`Do.{hook}`" in cause


def test_the_hook_of_a_module_is_named_as_well_as_that_of_a_callback() -> None:
    class Growing(Toy):
        def on_after_backward(self) -> None:
            with torch.no_grad():
                grow(self.trainer, self)

    cause = one(audited(seeded(Growing), FreezeBackbone()), "frozen-changed").cause
    assert "`Growing.on_after_backward`" in cause
    assert "`Growing.training_step`" in cause


def test_a_flag_flipped_in_validation_is_placed_there() -> None:
    flip = Do(on_validation_end=lambda trainer, module: weight(module).requires_grad_(True))
    audit = audited(seeded(Toy), flip, FreezeBackbone(), epochs=1, validation=loader(seed=2))
    finding = one(audit, "flag-changed")
    assert "set it to True, during validation" in finding.cause
    assert codes(audit) == {"flag-changed"}


def test_a_finding_says_until_when_it_was_right() -> None:
    audit = audited(seeded(Toy), Do(at=6, on_train_batch_end=grow), FreezeBackbone(), epochs=3)
    finding = one(audit, "frozen-changed")
    assert (finding.epoch, finding.step, finding.since) == (1, 8, (1, 5))
    audit = audited(seeded(Toy), Do(at=6, on_train_batch_end=nudge), FreezeBackbone(), epochs=3)
    assert one(audit, "frozen-changed").since == (0, 4)  # the last time that bytes were read


# The hunt


def test_after_a_violation_the_next_epoch_is_watched_and_the_culprit_named() -> None:
    audit = audited(seeded(Toy), Do(on_after_backward=nudge), FreezeBackbone(), epochs=3)
    first, second = audit.findings
    assert (first.epoch, first.step) == (0, 4)
    assert "through `.data`" in first.cause
    assert "`Do." not in first.cause
    assert (second.epoch, second.step) == (1, 5)
    assert "in the forward or backward pass of a batch (there: `Do.on_after_backward`" in (
        second.cause
    )


def test_a_culprit_that_does_not_come_back_is_not_made_up() -> None:
    audit = audited(seeded(Toy), Do(at=2, on_train_batch_end=nudge), FreezeBackbone(), epochs=4)
    assert len(audit.findings) == 1


def test_a_hunt_costs_one_epoch_and_then_ends() -> None:
    run = audited(seeded(Toy), Do(at=2, on_train_batch_end=nudge), FreezeBackbone(), epochs=5)
    calm = audited(seeded(Toy), FreezeBackbone(), epochs=5)
    assert run._record.checks == calm._record.checks + 4


# After the last epoch


def test_a_write_in_the_last_hook_of_another_callback_is_found() -> None:
    audit = TrainableParamAudit(table=False)
    fit = trainer(FreezeBackbone(), audit, Do(on_train_end=grow), epochs=1)
    with pytest.raises(FrozenWeightsChanged, match=r"embed\.weight.*after the last epoch"):
        fit.fit(seeded(Toy), loader())


# Slices


def test_slices_find_a_change_long_before_the_epoch_ends(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    long = loader(rows=6 * 400)
    audit = audited(
        seeded(Toy),
        Do(at=100, on_train_batch_end=nudge),
        FreezeBackbone(),
        epochs=1,
        data=long,
        audit={"every": "rolling", "report": path},
    )
    finding = one(audit, "frozen-changed")
    assert 100 <= finding.step < 400
    rounds = json.loads(path.read_text())["steps_per_round"]
    assert 1 <= rounds < 400
    healthy = audited(
        seeded(Toy), FreezeBackbone(), epochs=1, data=long, audit={"every": "rolling"}
    )
    assert healthy.findings == []
    assert "A full round of slices takes" in healthy.verdict


@pytest.mark.parametrize("every", ["step", "", True, 0, -1, 1.5])
def test_another_rhythm_is_refused_with_those_that_exist(every: Any) -> None:
    with pytest.raises(ArgumentError, match="`every` is"):
        TrainableParamAudit(every=every)


# Hidden modules, and what is omitted


class Listed(Toy):
    """Keeps a layer in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = [torch.nn.Linear(8, 3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone(x)
        return self.head(hidden) + self.extra[0](hidden)


def test_a_module_in_a_plain_list_is_found_by_its_gradient() -> None:
    finding = one(audited(seeded(Listed), FreezeBackbone()), "not-in-optimizer")
    assert finding.names == ("extra[0].weight", "extra[0].bias")
    assert "`extra` is a plain list: torch doesn't register" in finding.cause

    class Teacher(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = [torch.nn.Linear(4, 3)]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                soft = self.teacher[0](x)
            return super().forward(x) + soft

    assert audited(seeded(Teacher), FreezeBackbone()).findings == []


# Certificates


def certified(folder: Path, *callbacks: Callback, epochs: int = 2) -> Any:
    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    model = seeded(Toy)
    trainer(*callbacks, save, epochs=epochs, enable_checkpointing=True).fit(model, loader())
    return model


def test_a_certificate_stands_beside_the_checkpoints_and_in_each(tmp_path: Path) -> None:
    model = certified(tmp_path, FreezeBackbone(), TrainableParamAudit(table=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "certificate.json",
        "epoch=0.ckpt",
        "epoch=1.ckpt",
    ]
    written = read_certificate(tmp_path / "certificate.json")
    inside = read_certificate(tmp_path / "epoch=0.ckpt")
    assert written.clean
    assert (written.step, inside.step) == (8, 4)
    assert written.frozen == inside.frozen
    expected = {f"backbone.{name}": digest for name, digest in fingerprint(model.backbone).items()}
    assert {name: tensor.fingerprint for name, tensor in written.frozen.items()} == expected
    assert {tensor.kind for tensor in written.frozen.values()} == {"parameter", "buffer"}
    assert {"torch", "lightning"} <= written.versions.keys()


def test_a_certificate_says_since_when(tmp_path: Path) -> None:
    class Refreezing(Toy):
        pass

    path = tmp_path / "mine.json"
    audit = TrainableParamAudit(table=False, certificate=path)
    model = seeded(Refreezing)
    trainer(FreezeBackbone("backbone.embed"), audit, epochs=1).fit(model, loader())
    trainer(FreezeBackbone(), audit, epochs=1).fit(model, loader())
    frozen = read_certificate(path).frozen
    assert {(tensor.epoch, tensor.step) for tensor in frozen.values()} == {(0, 0)}
    gradual = TrainableParamAudit(table=False, certificate=path)
    trainer(GradualUnfreeze(), gradual, epochs=2).fit(seeded(Toy), loader())
    names = read_certificate(path).frozen.keys()
    assert "backbone.embed.weight" in names
    assert "backbone.blocks.2.linear.weight" not in names


def test_a_certificate_tells_what_the_audit_found(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    audit = TrainableParamAudit(table=False, certificate=path)
    fit = trainer(Do(at=2, on_train_batch_end=nudge), FreezeBackbone(), audit, epochs=1)
    with pytest.raises(FrozenWeightsChanged, match="embed"):
        fit.fit(seeded(Toy), loader())
    written = read_certificate(path)
    assert not written.clean
    assert written.findings[0]["code"] == "frozen-changed"


@pytest.mark.parametrize("where", [True, False])
def test_no_certificate_is_written_where_there_is_no_place_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    audit = TrainableParamAudit(table=False, certificate=where)
    trainer(FreezeBackbone(), audit, epochs=1).fit(seeded(Toy), loader())
    assert list(tmp_path.rglob("*.json")) == []
    if not where:
        certified(tmp_path / "c", FreezeBackbone(), audit, epochs=1)
        assert list(tmp_path.rglob("*.json")) == []


def test_the_command_verifies_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certified(tmp_path, FreezeBackbone(), TrainableParamAudit(table=False))
    first, last = (str(tmp_path / f"epoch={i}.ckpt") for i in range(2))
    proof = str(tmp_path / "certificate.json")
    assert main(["verify", last, "--certificate", proof]) == 0
    assert main(["verify", first, last]) == 1  # the head has trained
    assert main(["verify", first, last, "--certificate", proof]) == 0
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["state_dict"]["backbone.embed.weight"].view(torch.int32)[0, 0] ^= 1
    torch.save(checkpoint, last)
    capsys.readouterr()
    assert main(["verify", last, "--certificate", proof]) == 1
    assert "embed" in capsys.readouterr().out


# Resumes


def test_a_resume_goes_on_with_its_certificate(tmp_path: Path) -> None:
    callbacks = [FreezeBackbone(), TrainableParamAudit(table=False)]
    certified(tmp_path, *callbacks, epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    audit = TrainableParamAudit(table=False, certificate=tmp_path / "resumed.json")
    trainer(FreezeBackbone(), audit, epochs=2).fit(seeded(Toy), loader(), ckpt_path=path)
    resumed = read_certificate(tmp_path / "resumed.json")
    assert resumed.clean
    assert {(tensor.epoch, tensor.step) for tensor in resumed.frozen.values()} == {(0, 0)}


@pytest.mark.parametrize("lost", [True, False])
def test_a_resume_that_freezes_otherwise_is_named(tmp_path: Path, lost: bool) -> None:
    def model(freeze: bool) -> Toy:
        toy = seeded(Toy)
        toy.backbone.embed.requires_grad_(not freeze)
        return toy

    save = ModelCheckpoint(tmp_path, filename="{epoch}")
    audit = TrainableParamAudit(table=False)
    options: dict[str, Any] = {"enable_checkpointing": True}
    trainer(audit, save, epochs=1, **options).fit(model(lost), loader())
    path = tmp_path / "epoch=0.ckpt"
    what = "was frozen when the checkpoint was saved, and trains" if lost else "and is frozen now"
    with pytest.raises(AuditError, match=what):
        trainer(audit, epochs=2).fit(model(not lost), loader(), ckpt_path=path)
    assert one(audit, "resume-mismatch").names[0] == "backbone.embed.weight"
    trainer(audit, epochs=2).fit(model(lost), loader(), ckpt_path=path)  # control
    assert audit.findings == []


# The fit is left as it was found


def test_no_hook_stays_on_model_or_optimizer() -> None:
    class Unused(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Linear(2, 2)

    model = seeded(Unused)
    audit = TrainableParamAudit(table=False, on_violation="warn", dead_after=3)
    fit = trainer(FreezeBackbone(), audit, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(model, loader())
    assert "wasn't called" in one(audit, "no-gradient").cause
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not fit.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.parametrize("seconds", [0.0, 0.01])
@pytest.mark.parametrize("on_violation", ["warn", "raise"])
def test_a_slice_that_shows_one_statistic_names_the_cause_of_all(
    on_violation: str, seconds: float
) -> None:
    class Slow(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(seconds)
            return super().training_step(batch, batch_idx)

    model = seeded(lambda: Slow(blocks=12))
    model.backbone.requires_grad_(False)
    audit = TrainableParamAudit(table=False, every="rolling", on_violation=on_violation)
    fit = trainer(audit, epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = pytest.raises(FrozenWeightsChanged, match="train mode")
        with nullcontext() if on_violation == "warn" else told:
            fit.fit(model, loader())
    causes = {finding.cause for finding in audit.findings}
    assert len(causes) == 1, causes
    assert "train mode" in causes.pop()
