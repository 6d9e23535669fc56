"""The audit in real fits: who did it and where, events, certificates, resumes."""

from __future__ import annotations

import warnings
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


# Events


def test_a_write_by_the_same_cause_at_the_next_check_is_counted() -> None:
    audit = audited(seeded(Toy), Do(on_after_backward=nudge), FreezeBackbone(), epochs=3)
    finding = one(audit, "frozen-changed")
    assert (finding.epoch, finding.step, finding.count) == (0, 4, 3)
    assert "through `.data`" in finding.cause
    assert "`Do." not in finding.cause


def test_a_later_write_to_the_same_tensor_is_told_again() -> None:
    first, second = Do(at=2, on_train_batch_end=nudge), Do(at=14, on_train_batch_end=nudge)
    audit = audited(seeded(Toy), first, second, FreezeBackbone(), epochs=4)
    assert [(f.code, f.step, f.count) for f in audit.findings] == [
        ("frozen-changed", 4, 1),
        ("frozen-changed", 16, 1),
    ]
    assert len(audited(seeded(Toy), first, FreezeBackbone(), epochs=4).findings) == 1


def test_a_write_after_a_resume_from_warn_to_raise_is_raised(tmp_path: Path) -> None:
    path = tmp_path / "warned.ckpt"
    warned = TrainableParamAudit(table=False, on_violation="warn")
    fit = trainer(FreezeBackbone(), Do(at=2, on_train_batch_end=nudge), warned, epochs=2)
    with pytest.warns(UserWarning, match="frozen-changed"):
        fit.fit(seeded(Toy), loader())
    fit.save_checkpoint(path)
    audit = TrainableParamAudit(table=False)
    again = trainer(FreezeBackbone(), Do(at=10, on_train_batch_end=nudge), audit, epochs=4)
    with pytest.raises(FrozenWeightsChanged, match="embed"):
        again.fit(seeded(Toy), loader(), ckpt_path=path)
    calm = trainer(FreezeBackbone(), TrainableParamAudit(table=False), epochs=4)
    calm.fit(seeded(Toy), loader(), ckpt_path=path)


@pytest.mark.parametrize("every", ["step", "rolling", "", True, 0, -1, 1.5])
def test_another_rhythm_is_refused_with_those_that_exist(every: Any) -> None:
    with pytest.raises(ArgumentError, match="`every` is"):
        TrainableParamAudit(every=every)


# After the last epoch


def test_a_write_in_the_last_hook_of_another_callback_is_found() -> None:
    audit = TrainableParamAudit(table=False)
    fit = trainer(FreezeBackbone(), audit, Do(on_train_end=grow), epochs=1)
    with pytest.raises(FrozenWeightsChanged, match=r"embed\.weight.*after the last epoch"):
        fit.fit(seeded(Toy), loader())


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
    assert main(["verify", first, last, "--no-certificate"]) == 1  # the head has trained
    assert main(["verify", first, last]) == 0
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
