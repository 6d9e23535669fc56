"""A resumed fit: groups that don't fit, phases that come late, what was unfrozen frozen again."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_freeze import FreezeBackbone, GradualUnfreeze, ResumeError, TrainableParamAudit
from tests.catalogue.harness import audited, one, row
from tests.toys import FixedDropout, Toy, changed, loader, seeded, state, trainable, trainer

HEAD = {"head.weight", "head.bias"}


def only_trainable(module: nn.Module) -> Any:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)


def plain(configure: Any = only_trainable) -> Toy:
    """Without batch-norm and dropout, so that a freeze by hand is a whole one."""
    model: Toy = seeded(lambda: Toy(configure))
    for block in model.backbone.blocks:
        block.norm = nn.Identity()
        block.dropout = nn.Identity()
    return model


WEIGHTS = {name for name, _ in plain().backbone.named_parameters(prefix="backbone")}


def fit(
    model: Toy, *callbacks: Callback, epochs: int, folder: Path, resume: int | None = None
) -> TrainableParamAudit:
    """A fit that saves each epoch's end, from such a checkpoint on or from the beginning."""
    audit = TrainableParamAudit(table=False, on_violation="warn")
    save = ModelCheckpoint(
        folder,
        filename="{epoch}",
        save_top_k=-1,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    run = trainer(*callbacks, audit, save, epochs=epochs, enable_checkpointing=True)
    path = None if resume is None else folder / f"epoch={resume}.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(model, loader(), ckpt_path=path)
    return audit


class AddsGroup(Callback):
    """Unfreezes by hand at epoch 1, with a parameter group of its own."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            module.backbone.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": list(module.backbone.parameters())})


@row("R1", prevented="the number of groups never changes, so each checkpoint has one shape")
def test_r1_a_checkpoint_after_an_unfreeze_has_as_many_groups_as_one_before(
    tmp_path: Path,
) -> None:
    fit(plain(), AddsGroup(), epochs=2, folder=tmp_path)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        fit(plain(), AddsGroup(), epochs=3, folder=tmp_path, resume=1)
    whole = plain()
    fit(whole, FreezeBackbone(unfreeze_at_epoch=1), epochs=3, folder=tmp_path)
    for epoch in (0, 1):
        model = plain()
        unfreeze = FreezeBackbone(unfreeze_at_epoch=1)
        assert fit(model, unfreeze, epochs=3, folder=tmp_path, resume=epoch).findings == []
        assert changed(state(whole), state(model)) == set()
    saved = [torch.load(tmp_path / f"epoch={epoch}.ckpt")["optimizer_states"] for epoch in (0, 1)]
    assert len({len(optimizer["param_groups"]) for (optimizer,) in saved}) == 1


@row("R2", found="resume-mismatch")
def test_r2_a_resume_that_freezes_again_what_was_unfrozen_is_named(tmp_path: Path) -> None:
    # Lightning's own: it restores the groups, not the flags, and unfreezes at epoch 1 alone
    options = {"unfreeze_backbone_at_epoch": 1, "backbone_initial_lr": 0.05}
    fit(plain(), BackboneFinetuning(**options), epochs=2, folder=tmp_path)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)["state_dict"]
    model = plain()
    monitor = LearningRateMonitor()
    audit = TrainableParamAudit(table=False, on_violation="warn")
    log = CSVLogger(tmp_path)
    run = trainer(
        BackboneFinetuning(**options), monitor, audit, epochs=3, logger=log, log_every_n_steps=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(model, loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert changed(saved, state(model)) == HEAD
    assert monitor.lrs["lr-SGD/pg2"][-1] > 0  # it seems to train
    finding = one(audit, "resume-mismatch")
    assert set(finding.names) == WEIGHTS
    assert "trained when the checkpoint was saved, and is frozen now" in finding.message
    assert "what had been unfrozen is frozen again" in finding.cause
    fit(plain(), FreezeBackbone(unfreeze_at_epoch=1), epochs=2, folder=tmp_path)
    model = plain()
    unfreeze = FreezeBackbone(unfreeze_at_epoch=1)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)["state_dict"]
    assert fit(model, unfreeze, epochs=3, folder=tmp_path, resume=1).findings == []
    assert changed(saved, state(model)) >= WEIGHTS


def test_a_resume_with_a_later_schedule_does_not_freeze_again_in_silence(tmp_path: Path) -> None:
    fit(plain(), GradualUnfreeze(), epochs=5, folder=tmp_path)  # now everything trains
    with pytest.raises(ResumeError, match=r"back to stage 2: .* again, such as `backbone\.blocks"):
        fit(plain(), GradualUnfreeze(start=3), epochs=6, folder=tmp_path, resume=4)
    model = plain()
    audit = fit(model, GradualUnfreeze(), epochs=6, folder=tmp_path, resume=4)
    assert trainable(model) == WEIGHTS | HEAD
    assert audit.findings == []


class Extends(Callback):
    """Unfreezes by hand from epoch 1 on, by putting what it unfreezes into the first group."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.resumed = trainer.ckpt_path is not None

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1 or self.resumed:
            self.resumed = False
            trainer.optimizers[0].param_groups[0]["params"].extend(module.backbone.parameters())


@row("R3", found="scheduler-mismatch")
def test_r3_a_parameter_that_a_resume_adds_once_more_is_named(tmp_path: Path) -> None:
    def resumed(configure: Any) -> TrainableParamAudit:
        fit(plain(configure), epochs=1, folder=tmp_path)
        return fit(plain(configure), Extends(), epochs=2, folder=tmp_path, resume=0)

    def everything(module: nn.Module) -> Any:
        return torch.optim.SGD(module.parameters(), lr=0.1)

    finding = one(resumed(everything), "scheduler-mismatch")
    assert set(finding.names) == WEIGHTS
    assert "more than one parameter group of SGD" in finding.message
    # `add_param_group` says so itself, without names
    optimizer = everything(plain())
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        optimizer.add_param_group({"params": optimizer.param_groups[0]["params"][:1]})
    fit(plain(), GradualUnfreeze(), epochs=4, folder=tmp_path)
    for epoch in range(3):
        audit = fit(plain(), GradualUnfreeze(), epochs=4, folder=tmp_path, resume=epoch)
        assert audit.findings == []


class Rebuilds(Callback):
    """Unfreezes by hand at epoch 1 and makes the optimizer anew, as pysot does."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            module.backbone.requires_grad_(True)
            trainer.optimizers = [module.configure_optimizers()]


@row("R4", prevented="a checkpoint says which phase it is of, and the groups are filled to match")
def test_r4_a_fit_resumes_from_a_checkpoint_of_any_phase(tmp_path: Path) -> None:
    fit(plain(), Rebuilds(), epochs=2, folder=tmp_path)
    fit(plain(), Rebuilds(), epochs=2, folder=tmp_path, resume=0)  # the first phase fits
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        fit(plain(), Rebuilds(), epochs=3, folder=tmp_path, resume=1)

    def adam(module: nn.Module) -> Any:
        return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)

    whole = seeded(lambda: Toy(adam))
    fit(whole, GradualUnfreeze(), FixedDropout(), epochs=5, folder=tmp_path)
    for epoch in range(4):
        model = seeded(lambda: Toy(adam))
        callbacks = (GradualUnfreeze(), FixedDropout())
        assert fit(model, *callbacks, epochs=5, folder=tmp_path, resume=epoch).findings == []
        assert changed(state(whole), state(model)) == set()
    # with a schedule that would freeze again what trains: an error, before anything is trained
    with pytest.raises(
        ResumeError, match=r"FreezeBackbone\(\) would .*again.* Use the schedule of"
    ):
        fit(seeded(lambda: Toy(adam)), FreezeBackbone(), epochs=5, folder=tmp_path, resume=3)


def with_state(model: Toy, optimizer: Any) -> set[str]:
    """Names of what an optimizer has moments for."""
    return {name for name, p in model.named_parameters() if optimizer.state.get(p)}


def through_a_checkpoint(model: Toy, optimizer: Any) -> Any:
    """Another optimizer with the state of this one, by way of torch's distributed checkpoints."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    fresh = type(optimizer)(groups, lr=1e-2)
    set_optimizer_state_dict(model, fresh, saved)
    return fresh


@row("R5", prevented="what is frozen has no optimizer state and is in no group: none can be lost")
def test_r5_a_checkpoint_keeps_the_state_of_all_that_an_optimizer_holds(
    tmp_path: Path,
) -> None:
    def trained() -> tuple[Toy, Any]:
        model = plain(lambda module: torch.optim.AdamW(module.parameters(), lr=1e-2))
        run = trainer(epochs=1)
        run.fit(model, loader())
        model.configure = lambda _: run.optimizers[0]
        return model, run.optimizers[0]

    model, optimizer = trained()
    model.backbone.requires_grad_(False)
    optimizer.zero_grad()
    audit = audited(model, epochs=1)
    assert with_state(model, optimizer) == WEIGHTS | HEAD
    assert with_state(model, through_a_checkpoint(model, optimizer)) == HEAD
    assert set(one(audit, "stale-optimizer-state").names) == WEIGHTS
    model, optimizer = trained()
    assert fit(model, FreezeBackbone(), epochs=2, folder=tmp_path).findings == []
    assert with_state(model, optimizer) == HEAD
    (saved,) = torch.load(tmp_path / "epoch=0.ckpt")["optimizer_states"]
    assert len(saved["state"]) == len(HEAD)
    resumed, _ = trained()
    audit = fit(resumed, FreezeBackbone(), epochs=2, folder=tmp_path, resume=0)
    assert audit.findings == []
    assert changed(state(model), state(resumed)) == set()


class Counts(Callback):
    """Unfreezes a block every other epoch, and counts from the fit's start: a resume, too."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        module.backbone.requires_grad_(False)
        self.phase = 0

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.phase = self.next(trainer.current_epoch)
        for block in module.backbone.blocks[3 - self.phase :]:
            block.requires_grad_(True)

    def next(self, epoch: int) -> int:
        return self.phase + 1 if epoch and epoch % 2 == 0 else self.phase


class Knows(Counts):
    """The same, and right after a resume."""

    def next(self, epoch: int) -> int:
        return epoch // 2


@row("R6", found="resume-mismatch")
def test_r6_a_resume_that_is_one_phase_late_is_named(tmp_path: Path) -> None:
    def everything(module: nn.Module) -> Any:
        return torch.optim.SGD(module.parameters(), lr=0.1)

    def resumed(*callbacks: Callback) -> tuple[TrainableParamAudit, set[str]]:
        fit(plain(everything), *callbacks, epochs=3, folder=tmp_path)
        model = plain(everything)
        audit = fit(model, *callbacks, epochs=4, folder=tmp_path, resume=2)
        return audit, trainable(model)

    top = {"backbone.blocks.2.linear.weight", "backbone.blocks.2.linear.bias"}
    audit, trains = resumed(Counts())
    assert trains == HEAD
    finding = one(audit, "resume-mismatch")
    assert set(finding.names) == top
    assert "trained when the checkpoint was saved, and is frozen now" in finding.message
    assert "what had been unfrozen is frozen again" in finding.cause
    audit, trains = resumed(Knows())
    assert trains == HEAD | top
    assert [f for f in audit.findings if f.code == "resume-mismatch"] == []
    audit, trains = resumed(GradualUnfreeze(start=2, every=2))
    assert trains == HEAD | top
    assert audit.findings == []
