"""What is frozen is in eval, and stays so; what trains is in train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_freeze import FreezeBackbone, GradualUnfreeze, TrainableParamAudit
from tests.callbacks.test_freeze_backbone import Classifier, bert, tokens
from tests.toys import Toy, changed, loader, seeded, state, trainer


class Modes(Callback):
    """Records who is in train mode when a training step's forward runs."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        for part in (module.backbone.blocks, module.head):
            leaf = part if part is module.head else part[0].dropout

            def record(*_: Any, module: Any = module) -> None:
                if torch.is_grad_enabled():
                    self.seen.append({n for n, m in module.named_modules() if m.training})

            leaf.register_forward_hook(record)


def buffers(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_buffers()}


def test_frozen_batch_norm_keeps_its_running_statistics() -> None:
    model = seeded(Toy)
    before = state(model)
    trainer(FreezeBackbone(), epochs=2).fit(model, loader(), loader(seed=2))
    assert changed(before, state(model)) == {"head.weight", "head.bias"}
    # control: unfrozen, they move
    model = seeded(Toy)
    trainer(epochs=2).fit(model, loader(), loader(seed=2))
    assert buffers(model) <= changed(before, state(model))


def test_frozen_modules_are_in_eval_in_each_step_and_the_head_in_train() -> None:
    modes = Modes()
    model = seeded(Toy)
    trainer(FreezeBackbone(), modes, epochs=2).fit(model, loader(), loader(seed=2))
    assert modes.seen
    for names in modes.seen:
        assert "head" in names
        assert not any(name.startswith("backbone") for name in names)


class CallsTrain(Toy):
    """A module that calls `train()` wherever it can."""

    def on_train_epoch_start(self) -> None:
        self.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.train()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.train()
        return super().training_step(batch, batch_idx)

    def on_validation_end(self) -> None:
        self.train()


def test_frozen_modules_go_back_to_eval_after_a_users_train() -> None:
    model = seeded(CallsTrain)
    before = state(model)
    audit = TrainableParamAudit(every="batch", table=False)
    trainer(FreezeBackbone(), audit, epochs=2).fit(model, loader(), loader(seed=2))
    assert changed(before, state(model)) == {"head.weight", "head.bias"}
    assert audit.findings == []
    # control: frozen by flags alone, the statistics move
    model = seeded(CallsTrain)
    model.backbone.requires_grad_(False)
    trainer(epochs=2).fit(model, loader(), loader(seed=2))
    assert buffers(model) <= changed(before, state(model))


def test_modes_come_back_on_unfreezing() -> None:
    modes = Modes()
    model = seeded(Toy)
    frozen_norm = model.backbone.blocks[2].norm.eval()  # the user's decision
    trainer(GradualUnfreeze(), modes, epochs=5).fit(model, loader())
    last = modes.seen[-1]
    expected = {n for n, _ in model.named_modules()} - {"backbone.blocks.2.norm"}
    assert last == expected
    assert not frozen_norm.training
    assert modes.seen[0] == {"", "head"}


def test_train_bn_lets_batch_norm_train_weights_and_statistics() -> None:
    model = seeded(Toy)
    before = state(model)
    modes = Modes()
    audit = TrainableParamAudit(table=False)
    trainer(FreezeBackbone(train_bn=True), modes, audit, epochs=2).fit(model, loader())
    moved = changed(before, state(model))
    assert {name for name in moved if name.startswith("backbone")} == {
        name for name in before if "norm" in name
    }
    for names in modes.seen:
        assert "backbone.blocks.0.norm" in names
        assert "backbone.blocks.0.dropout" not in names
    assert audit.findings == []


def test_eval_mode_false_leaves_the_modes_alone() -> None:
    modes = Modes()
    model = seeded(Toy)
    before = state(model)
    audit = TrainableParamAudit(table=False)
    trainer(FreezeBackbone(eval_mode=False), modes, audit, epochs=2).fit(model, loader())
    assert all("backbone.blocks.0.dropout" in names for names in modes.seen)
    weights = {name for name, _ in model.named_parameters() if name.startswith("backbone")}
    assert not weights & changed(before, state(model))
    assert audit.findings == []


def test_model_left_in_eval_by_from_pretrained_trains_in_train_mode(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bert(2).save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not model.classifier.training  # what transformers does
    module = Classifier(model)
    trainer(GradualUnfreeze(), TrainableParamAudit(), epochs=2).fit(module, tokens())
    assert model.classifier.training
    assert model.dropout.training
    assert model.bert.encoder.layer[1].training
    assert not model.bert.encoder.layer[0].training
    printed = capsys.readouterr().out
    assert "were in eval mode, as `from_pretrained` leaves them" in printed
    assert "put in train mode" in printed


def test_a_teacher_in_no_optimizer_is_left_in_eval() -> None:
    class Distil(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()

        def configure_optimizers(self) -> Any:
            kept = [p for n, p in self.named_parameters() if not n.startswith("teacher")]
            return torch.optim.SGD(kept, lr=0.1)

    model = seeded(Distil)
    trainer(FreezeBackbone("backbone"), epochs=1).fit(model, loader())
    assert not model.teacher[1].training
