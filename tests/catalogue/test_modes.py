"""Modes and buffers: `requires_grad=False` alone freezes neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import (
    FreezeBackbone,
    FrozenWeightsChanged,
    TrainableParamAudit,
    assert_frozen,
    summarize,
)
from tests.catalogue.harness import Do, audited, codes, one, row
from tests.toys import Toy, changed, loader, seeded, state, trainer
from tests.zoo import tiny_bert

NORMS = tuple(f"backbone.blocks.{number}.norm" for number in range(3))
STATISTICS = {
    f"{norm}.{buffer}"
    for norm in NORMS
    for buffer in ("running_mean", "running_var", "num_batches_tracked")
}
AFFINE = {f"{norm}.{name}" for norm in NORMS for name in ("weight", "bias")}


def head_alone(module: Any) -> Any:
    return torch.optim.SGD(module.head.parameters(), lr=0.1)


def by_hand(make: Any = Toy, *, eval_mode: bool = True) -> Any:
    """A backbone that was frozen without these callbacks."""
    model = seeded(make)
    model.backbone.requires_grad_(False)
    model.backbone.train(not eval_mode)
    return model


def moves(model: Any, *callbacks: Any, **options: Any) -> tuple[set[str], TrainableParamAudit]:
    """Tensors of the backbone that a fit changes, and what the audit saw of it."""
    before = state(model)
    audit = audited(model, *callbacks, **options)
    return {name for name in changed(before, state(model)) if name.startswith("backbone.")}, audit


@row("M1", found="frozen-buffer-changed")
def test_m1_statistics_of_a_frozen_batch_norm_in_train_mode_are_named() -> None:
    audit = audited(by_hand(eval_mode=False))
    finding = one(audit, "frozen-buffer-changed")
    assert set(finding.names) == STATISTICS
    assert "Its batch-norm is in train mode" in finding.cause
    assert codes(audit) == {"frozen-buffer-changed"}
    # control: in eval mode, by hand or by callback, they stay; `train_bn=True` lets them move
    assert not moves(by_hand())[0]
    assert not moves(seeded(Toy), FreezeBackbone(train_bn=False))[0]
    moved, audit = moves(seeded(Toy), FreezeBackbone(train_bn=True))
    assert moved == STATISTICS | AFFINE
    assert audit.findings == []


def test_train_bn_false_holds_while_the_backbone_is_frozen() -> None:
    # Lightning's own callback heeds `train_bn` only from the unfreezing on
    theirs = BackboneFinetuning(unfreeze_backbone_at_epoch=9, train_bn=False)
    assert moves(seeded(Toy), theirs)[0] >= STATISTICS
    assert not moves(seeded(Toy), FreezeBackbone(unfreeze_at_epoch=9, train_bn=False))[0]


class FreezesStatistics(BackboneFinetuning):
    """Freezes batch-norm as Lightning's `freeze` does: by `track_running_stats=False`."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)


def normalises_by_the_batch(module: Any) -> bool:
    """Whether what the frozen norm makes of a sample depends on what else is in its batch."""
    norm, batch = module.backbone.blocks[0].norm, torch.randn(6, 8)
    return not torch.allclose(norm(batch)[:3], norm(batch[:3]))


def untracked(trainer: Any, module: Any) -> None:
    for block in module.backbone.blocks:
        block.norm.track_running_stats = False


@row("M2", found="mode-changed")
def test_m2_a_frozen_batch_norm_that_normalises_by_the_batch_is_named() -> None:
    seen: list[bool] = []
    look = Do(on_train_batch_end=lambda _, module: seen.append(normalises_by_the_batch(module)))
    frozen = FreezesStatistics(unfreeze_backbone_at_epoch=9)
    audit = audited(seeded(lambda: Toy(head_alone)), frozen, look)
    assert all(seen) and len(seen) == 8
    finding = one(audit, "mode-changed")
    assert finding.names == NORMS
    assert "track_running_stats" in finding.cause
    # control: our callback puts it in eval mode and leaves the attribute alone ...
    seen.clear()
    model = seeded(Toy)
    assert audited(model, FreezeBackbone(), look).findings == []
    assert model.backbone.blocks[0].norm.track_running_stats
    # ... and where a user sets it, it does no harm
    assert audited(seeded(Toy), FreezeBackbone(), Do(on_train_start=untracked), look).findings == []
    assert not any(seen) and len(seen) == 16


class WakesAfterValidation(Toy):
    """Does what Lightning's evaluation loop did by itself before 2.2."""

    def on_validation_model_train(self) -> None:
        self.trainer.model.train()


@row("M3", found="mode-changed")
def test_m3_train_at_the_end_of_validation_is_named_with_its_place() -> None:
    audit = audited(by_hand(WakesAfterValidation), validation=loader(seed=2))
    finding = one(audit, "mode-changed")
    assert finding.names == ("backbone",)
    assert (finding.epoch, finding.step) == (0, 4)
    assert "called `train()` on the whole model" in finding.cause
    assert "WakesAfterValidation.on_validation_model_train" in finding.cause
    moved = one(audit, "frozen-buffer-changed")
    assert set(moved.names) == STATISTICS
    assert moved.epoch == 1  # the epoch after that validation
    # control: Lightning as it is now puts back each module's mode
    assert audited(by_hand(), validation=loader(seed=2)).findings == []


def test_freeze_backbone_undoes_a_train_call_at_the_end_of_validation() -> None:
    model = seeded(WakesAfterValidation)
    moved, audit = moves(model, FreezeBackbone(), validation=loader(seed=2))
    assert not moved
    assert audit.findings == []  # it is put back before any forward pass: there is nothing to tell


class Text(LightningModule):
    """A classifier from a checkpoint of transformers."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = transformers.BertForSequenceClassification.from_pretrained(folder)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words, label = batch
        return self.model(input_ids=words, labels=label).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def words() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (8, 6), generator=generator)
    return DataLoader(TensorDataset(tokens, tokens[:, 0] % 2), batch_size=4)


@row("M4", told="the table at fit start counts modules in eval mode that train")
def test_m4_a_model_that_from_pretrained_left_in_eval_mode_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bert(2).save_pretrained(tmp_path)
    modes: list[bool] = []
    look = Do(on_train_batch_end=lambda _, module: modes.append(module.model.dropout.training))
    model = Text(tmp_path)
    model.model.bert.requires_grad_(False)
    audit = TrainableParamAudit()
    trainer(look, audit, epochs=1).fit(model, words())
    assert modes == [False, False]
    printed = capsys.readouterr().out
    assert "The dropout of what trains is off: " in printed
    assert "modules, such as `model." in printed
    assert "call `train()` on the model before the fit." in printed
    # a control that does as it says, and one with the callback, which does it
    for callbacks in ((), (FreezeBackbone(),)):
        modes.clear()
        model = Text(tmp_path)
        if not callbacks:
            model.train()
            model.model.bert.requires_grad_(False).eval()
        audit = TrainableParamAudit()
        trainer(*callbacks, look, audit, epochs=1).fit(model, words())
        assert modes == [True, True]
        assert not model.model.bert.training
        printed = capsys.readouterr().out
        assert "are in eval mode although" not in printed
        assert ("put in train mode" in printed) == bool(callbacks)
        assert audit.findings == []


def plain_loop(model: Any, *, wake: bool) -> None:
    """A loop as tutorials write it; the backbone was put in eval mode once, before it."""
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with assert_frozen(model):
        for _ in range(2):
            if wake:
                model.train()
            for x, y in loader():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()


@row("M5", found="frozen-buffer-changed")
def test_m5_an_eval_that_each_epoch_undoes_is_named_in_a_plain_loop() -> None:
    model = by_hand()
    with pytest.raises(FrozenWeightsChanged, match="Its batch-norm is in train mode") as raised:
        plain_loop(model, wake=True)
    (finding,) = raised.value.findings
    assert finding.code == "frozen-buffer-changed"
    assert set(finding.names) == STATISTICS
    assert "eval mode on every epoch" in finding.fix
    model = by_hand()  # control
    head = model.head.weight.clone()
    plain_loop(model, wake=False)
    assert not torch.equal(model.head.weight, head)


def test_an_eval_that_each_epoch_undoes_is_told_once_in_a_fit() -> None:
    wake = Do(on_train_epoch_start=lambda _, module: module.train())
    audit = audited(by_hand(), wake)
    assert codes(audit) == {"mode-changed", "frozen-buffer-changed"}
    assert "called `train()` on the whole model" in one(audit, "mode-changed").cause
    assert audited(by_hand()).findings == []
    assert audited(seeded(Toy), FreezeBackbone(), wake).findings == []


def only_eval(module: Any) -> None:
    """The `freeze_BN` of many repositories: it sets the mode, and no flag."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.eval()


@row("M6", prevented="`train_bn=False` freezes statistics and affine weights together")
def test_m6_a_frozen_batch_norm_keeps_statistics_and_affine_weights() -> None:
    model = seeded(Toy)
    only_eval(model)
    moved, audit = moves(model)
    assert moved & (STATISTICS | AFFINE) == AFFINE  # the failure: half a freeze
    assert audit.findings == []  # nothing was declared frozen
    rows = {row.name: row for row in summarize(model).rows}
    assert all(rows[name].status == "trains" and not rows[name].training for name in AFFINE)
    moved, audit = moves(seeded(Toy), FreezeBackbone())
    assert not moved
    assert audit.findings == []


def converted(*, keep_mode: bool) -> Do:
    """Makes SyncBatchNorm of every batch-norm after step 2.

    Without `keep_mode`, as torch did before 2.2 and copies of its function in libraries still do.
    """

    def convert(_: Any, module: Any) -> None:
        module.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(module.backbone)
        for part in module.modules():
            if isinstance(part, nn.SyncBatchNorm) and not keep_mode:
                part.training = True

    return Do(at=2, on_train_batch_end=convert)


@row("M8", found="mode-changed")
def test_m8_a_conversion_that_loses_the_mode_is_named() -> None:
    finding = one(audited(by_hand(), converted(keep_mode=False)), "mode-changed")
    assert finding.names == NORMS
    assert "SyncBatchNorm" in finding.cause
    assert "`train()`" not in finding.cause
    moved, audit = moves(seeded(Toy), FreezeBackbone(), converted(keep_mode=False))
    assert audit.findings or not moved  # with the callback it isn't silent, either
    # control: torch's function as it is now keeps the mode, and nothing moves
    for model, callbacks in ((by_hand(), ()), (seeded(Toy), (FreezeBackbone(),))):
        moved, audit = moves(model, *callbacks, converted(keep_mode=True))
        assert not moved
        assert audit.findings == []


def test_buffers_of_a_module_that_was_replaced_are_still_watched() -> None:
    def write(_: Any, module: Any) -> None:
        module.backbone.blocks[1].norm.running_mean.add_(1)

    late = Do(at=6, on_train_batch_end=write)
    audit = audited(seeded(Toy), FreezeBackbone(), converted(keep_mode=True), late)
    finding = one(audit, "frozen-buffer-changed")
    assert finding.names == ("backbone.blocks.1.norm.running_mean",)
    assert finding.epoch == 1
    # and so is what a lost mode does to them
    audit = audited(by_hand(), converted(keep_mode=False))
    assert set(one(audit, "frozen-buffer-changed").names) == STATISTICS


class Centred(nn.Module):
    """Subtracts a running centre of what it has seen, which it assigns anew in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)
        return x - self.centre


class OwnData(Toy):
    """Each rank has data of its own; without batch-norm."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        for block in self.backbone.blocks:
            block.norm = nn.LayerNorm(8)
        self.backbone.blocks[2].dropout = last

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step((x + self.global_rank, y), batch_idx)


@pytest.mark.slow
@pytest.mark.timeout(120)
@row("M9", found="rank-mismatch")
def test_m9_a_buffer_that_each_rank_assigns_for_itself_is_named(tmp_path: Path) -> None:
    def run(last: nn.Module) -> dict[str, dict[str, Any]]:
        path = tmp_path / "report.json"
        ranks: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2}
        audited(
            by_hand(lambda: OwnData(last)),
            epochs=1,
            audit={"report": path},
            use_distributed_sampler=False,
            **ranks,
        )
        return {found["code"]: found for found in json.loads(path.read_text())["findings"]}

    # torch takes buffers from rank 0 before each pass; after the last one they differ all the same
    found = run(Centred())
    assert found.keys() == {"rank-mismatch", "frozen-buffer-changed"}
    for finding in found.values():
        assert finding["names"] == ["backbone.blocks.2.dropout.centre"]
    assert "assigned another tensor" in found["frozen-buffer-changed"]["cause"]
    assert "gradient" not in found["rank-mismatch"]["cause"]  # a buffer has none
    assert "buffer" in found["rank-mismatch"]["cause"]
    assert run(nn.Identity()) == {}  # control
