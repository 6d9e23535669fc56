"""F9 to F11, F14, F15, F22: flags that somebody else sets."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lightning_freeze import FreezeBackbone, freeze
from tests.catalogue.harness import Do, audited, one, row
from tests.toys import Backbone, Toy, changed, loader, seeded, state, trainable, trainer

BACKBONE = tuple(f"backbone.{name}" for name, _ in Backbone().named_parameters())


def by_hand(make: Any = Toy) -> Any:
    """A model whose backbone is frozen as people do it: the flags, and eval mode once."""
    model = seeded(make)
    model.backbone.requires_grad_(False).eval()
    return model


def turn_on_what_is_held(module: Any, optimizer: Any) -> None:
    """What Lightning did up to 1.1 so that only one optimizer's parameters have gradients."""
    for parameter in module.parameters():
        parameter.requires_grad = False
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad = True


# F9


class OldLoop(_AutomaticOptimization):
    """As Lightning's loop was in 0.6: it sets flags before each step."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.module = trainer.lightning_module

    def run(self, optimizer: Any, batch_idx: int, kwargs: Any) -> Any:
        turn_on_what_is_held(self.module, optimizer)
        return super().run(optimizer, batch_idx, kwargs)


class InOldLoop(Callback):
    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        trainer.fit_loop.epoch_loop.automatic_optimization = OldLoop(trainer)


@row("F9", found="flag-changed")
def test_f9_loop_of_the_trainer_that_turns_frozen_parameters_on_is_told_with_the_time() -> None:
    audit = audited(by_hand(), InOldLoop())
    drift = one(audit, "frozen-changed")
    assert drift.names == BACKBONE
    assert drift.cause.startswith("`requires_grad` is True: other code turned it on, in a batch")
    assert drift.cause.endswith("`Toy.training_step`), and AdamW holds it.")
    flags = one(audit, "flag-changed")
    assert (flags.names, flags.since) == (BACKBONE, (0, 0))
    assert "set it to True" in flags.cause
    assert "a batch" in flags.cause
    assert "all of `backbone` at once" in flags.cause
    assert audited(by_hand()).findings == []  # control
    # no optimizer holds what the callback froze, so the loop doesn't turn it on
    assert audited(seeded(Toy), FreezeBackbone(), InOldLoop()).findings == []


# F10


class Gan(Toy):
    """Two optimizers by hand; `toggle_optimizer` as it was in Lightning 1.1, or as it is."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.old = old

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.head, self.backbone)]

    def toggle_optimizer(self, optimizer: Any) -> None:
        if self.old:
            turn_on_what_is_held(self, optimizer)
        else:
            super().toggle_optimizer(optimizer)

    def untoggle_optimizer(self, optimizer: Any) -> None:
        if not self.old:
            super().untoggle_optimizer(optimizer)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def on_validation_end(self) -> None:
        """Another place of the user's code, which has nothing to do with it."""


@row("F10", found="flag-changed")
def test_f10_toggle_optimizer_that_turns_frozen_parameters_on_is_named_with_its_step() -> None:
    model = seeded(lambda: Gan(old=True))
    freeze(model, "backbone.blocks.0")
    audit = audited(model, validation=loader())
    block = {name for name in BACKBONE if ".blocks.0." in name}
    drift = one(audit, "frozen-changed")
    assert set(drift.names) == block
    assert "turned it on, in a batch (there: `Gan.training_step`), and SGD holds" in drift.cause
    on, off = (found for found in audit.findings if found.code == "flag-changed")
    assert set(on.names) == block
    assert set(off.names) == {"head.weight", "head.bias"}
    for finding, value in ((on, True), (off, False)):
        assert f"set it to {value}" in finding.cause
        assert "`Gan.training_step`" in finding.cause
        assert "on_validation_end" not in finding.cause
    model = seeded(lambda: Gan(old=False))  # control: it remembers
    freeze(model, "backbone.blocks.0")
    assert audited(model, validation=loader()).findings == []


# F11


class TurnsOn(Callback):
    """As in yolov5's `train.py`, below the lines that freeze: "train all layers"."""

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        for parameter in module.parameters():
            parameter.requires_grad = True


class Innocent(Callback):
    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        pass


def while_the_optimizer_is_made(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad = True
    return torch.optim.AdamW(model.parameters(), 1e-2)


@row("F11", found="flag-changed")
def test_f11_part_of_the_program_that_turns_layers_on_is_named_before_the_first_batch() -> None:
    # what turns them on where the optimizer is made is too early to undo the callback's freeze
    model = seeded(lambda: Toy(while_the_optimizer_is_made))
    assert audited(model, FreezeBackbone(), Innocent()).findings == []
    assert trainable(model) == {"head.weight", "head.bias"}
    finding = one(audited(seeded(Toy), FreezeBackbone(), Innocent(), TurnsOn()), "flag-changed")
    assert (finding.names, finding.step) == (BACKBONE, 0)
    assert "set it to True" in finding.cause
    assert "all of `backbone` at once" in finding.cause
    assert "Innocent" not in finding.cause
    assert "`TurnsOn.on_train_start`" in finding.cause


# F14, F15


LORA = LoraConfig(target_modules=["linear"], r=2)


class Adapted(Toy):
    """A backbone with two adapters; its steps may ask it without any, for a reference."""

    def __init__(self, *, reference: bool = False) -> None:
        super().__init__()
        self.backbone = get_peft_model(self.backbone, LORA)
        self.backbone.add_adapter("other", LORA)
        self.backbone.eval()
        self.reference = reference

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.reference:
            with torch.no_grad(), self.backbone.disable_adapter():
                self(batch[0])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        """Another place of the user's code, which has nothing to do with it."""


def of_adapter(model: Any, name: str) -> set[str]:
    return {n for n, _ in model.named_parameters() if f".{name}." in n}


@row("F14", found="flag-changed")
def test_f14_context_manager_that_unfreezes_an_adapter_is_named_with_its_step() -> None:
    model = by_hand(lambda: Adapted(reference=True))
    audit = audited(model)
    drift = one(audit, "frozen-changed")
    assert set(drift.names) == of_adapter(model, "default")
    assert "turned it on, in a batch (there: `Adapted.training_step`), and AdamW" in drift.cause
    flags = one(audit, "flag-changed")
    assert set(flags.names) == of_adapter(model, "default")
    assert "set it to True" in flags.cause
    assert "`Adapted.training_step`" in flags.cause
    assert "on_train_epoch_end" not in flags.cause
    assert audited(by_hand(Adapted)).findings == []  # control


class LoadsAnother(Callback):
    """What PEFT did up to 0.20 to an adapter at hand whenever it loaded another."""

    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        if trainer.current_epoch == 1:
            module.backbone.set_adapter("other")

    def on_train_batch_start(self, *_: Any) -> None:
        """Has nothing to do with it."""


@row("F15", found="flag-changed")
def test_f15_second_adapter_that_flips_which_one_trains_is_told_both_ways() -> None:
    model = seeded(Adapted)
    audit = audited(model, LoadsAnother())
    found = [finding for finding in audit.findings if finding.code == "flag-changed"]
    assert [set(finding.names) for finding in found] == [
        of_adapter(model, "other"),
        of_adapter(model, "default"),
    ]
    for finding, value in zip(found, (True, False)):
        assert f"set it to {value}" in finding.cause
        assert "between two epochs" in finding.cause
        assert "`LoadsAnother.on_train_epoch_start`" in finding.cause
        assert "on_train_batch_start" not in finding.cause
        assert finding.since == (0, 4)
    assert set(one(audit, "frozen-changed").names) == of_adapter(model, "other")
    assert audited(seeded(Adapted), Do(on_train_epoch_start=lambda *_: None)).findings == []


# F22


class Detector(Toy):
    """Reads its option when it is made, and never again."""

    def __init__(self, *, freeze_encoder: bool = False) -> None:
        super().__init__()
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            self.backbone.requires_grad_(False).eval()


@row("F22", prevented="`FreezeBackbone` is asked anew at each fit")
def test_f22_wish_to_freeze_is_heard_whenever_it_is_made() -> None:
    def moved(*callbacks: Callback) -> set[str]:
        before = state(model)
        trainer(*callbacks, epochs=1).fit(model, loader())
        return changed(before, state(model))

    model = seeded(Detector)
    model.freeze_encoder = True  # control: too late
    assert moved() >= set(BACKBONE)
    assert moved(FreezeBackbone()) == {"head.weight", "head.bias"}
    assert audited(model, FreezeBackbone()).findings == []
    top = {name for name in BACKBONE if ".blocks.2." in name}
    assert moved(FreezeBackbone(trainable_layers=1)) & set(BACKBONE) == top  # another wish
