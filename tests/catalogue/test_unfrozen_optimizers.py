"""Unfrozen, but no optimizer moves it; or its groups and the scheduler no longer agree."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from lightning_freeze import (
    FreezeBackbone,
    FreezeError,
    GradualUnfreeze,
    TrainableParamAudit,
    UnsupportedError,
    summarize,
)
from tests.catalogue.harness import Do, audited, codes, one, row
from tests.toys import Toy, changed, loader, same, seeded, state, trainer

BACKBONE = {name for name, _ in Toy().backbone.named_parameters(prefix="backbone")}
# a bias in front of a batch-norm has no gradient but rounding
SURE = {name for name in BACKBONE if name.endswith(("linear.weight", "embed.weight"))}


def names_of(audit: TrainableParamAudit, code: str) -> set[str]:
    """What a code was found for."""
    found = [finding for finding in audit.findings if finding.code == code]
    return {name for finding in found for name in finding.names}


class Cached(Callback):
    """Unfreezes by hand, into a group that it looked up when the fit began."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        module.backbone.requires_grad_(False)

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.group = trainer.optimizers[0].param_groups[0]

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            module.backbone.requires_grad_(True)
            self.group["params"] = [*self.group["params"], *module.backbone.parameters()]


def only_trainable(module: nn.Module) -> Any:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)


@row("U3", found="not-in-optimizer")
def test_u3_a_group_that_was_looked_up_before_a_restore_is_an_orphan_after_it(
    tmp_path: Path,
) -> None:
    def fit(callback: Callback) -> tuple[TrainableParamAudit, set[str]]:
        save = ModelCheckpoint(tmp_path, filename="first", enable_version_counter=False)
        first = trainer(callback, save, epochs=1, enable_checkpointing=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first.fit(seeded(lambda: Toy(only_trainable)), loader())
        model = seeded(lambda: Toy(only_trainable))
        audit = TrainableParamAudit(table=False, on_violation="warn")
        second = trainer(callback, audit, epochs=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            second.fit(model, loader(), ckpt_path=tmp_path / "first.ckpt")
        saved = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]
        return audit, changed(saved, state(model))

    model = seeded(lambda: Toy(only_trainable))
    before = state(model)
    audited(model, Cached())
    assert changed(before, state(model)) >= SURE  # without a restore it is the right group
    audit, moved = fit(Cached())
    assert not BACKBONE & moved  # it requires gradients, and no optimizer has it
    assert names_of(audit, "not-in-optimizer") == BACKBONE
    audit, moved = fit(FreezeBackbone(unfreeze_at_epoch=1))
    assert audit.findings == []
    assert moved >= SURE


class Growing(Toy):
    """Adds a layer to itself, before its optimizer is made or at its first step."""

    def __init__(self, *, late: bool) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
        self.late = late

    def configure_model(self) -> None:
        if not self.late:
            self.extra = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(3, 3)
        output: Tensor = self.extra(super().forward(x))
        return output


@row("U4", found="not-in-optimizer")
def test_u4_a_layer_that_came_after_the_optimizer_is_in_none() -> None:
    audit = audited(seeded(lambda: Growing(late=True)))
    finding = one(audit, "not-in-optimizer")
    assert finding.names == ("extra.weight", "extra.bias")
    assert "added to the model after the optimizer was made" in finding.cause
    assert codes(audit) == {"not-in-optimizer"}
    assert audited(seeded(lambda: Growing(late=False))).findings == []


class OnMeta(Toy):
    """Makes its head without memory, and its optimizer with it or after it."""

    def __init__(self, *, too_early: bool) -> None:
        super().__init__()
        with torch.device("meta"):
            self.head = nn.Linear(8, 3)
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.too_early = too_early

    def configure_model(self) -> None:
        self.head.to_empty(device="cpu")
        self.head.reset_parameters()

    def configure_optimizers(self) -> Any:
        return self.optimizer if self.too_early else torch.optim.SGD(self.parameters(), lr=0.1)


@row("U5", found="not-in-optimizer")
def test_u5_an_optimizer_that_was_made_from_meta_tensors_holds_none_of_the_model() -> None:
    model = seeded(lambda: OnMeta(too_early=True))
    audit = audited(model)
    finding = one(audit, "not-in-optimizer")
    assert finding.names == ("head.weight", "head.bias")
    assert "SGD holds one on the meta device of its shape" in finding.cause
    assert codes(audit) == {"not-in-optimizer"}
    assert audited(seeded(lambda: OnMeta(too_early=False))).findings == []


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Goes by its name; DeepSpeed itself isn't installed."""


@row("U6", told="an error at fit start: DeepSpeed's flat optimizer isn't served")
def test_u6_unfreezing_under_deepspeed_is_refused_before_the_first_batch() -> None:
    seen: list[int] = []
    watch = Do(on_train_batch_start=lambda run, _: seen.append(run.global_step))
    for callback in (FreezeBackbone(unfreeze_at_epoch=1), GradualUnfreeze()):
        run = trainer(callback, watch, epochs=1, strategy=DeepSpeedStrategy("cpu"))
        with pytest.raises(UnsupportedError, match=r"DeepSpeedStrategy.*flat optimizer.*\"ddp\""):
            run.fit(seeded(Toy), loader())
    assert seen == []
    trainer(FreezeBackbone(), watch, epochs=1).fit(seeded(Toy), loader())
    assert seen == [0, 1, 2, 3]


class ByHand(Callback):
    """Unfreezes with a group of its own, as many a forum's answer says."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        module.backbone.requires_grad_(False)
        module.backbone.eval()

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            module.backbone.requires_grad_(True)
            group = {"params": list(module.backbone.parameters()), "lr": 0.05}
            trainer.optimizers[0].add_param_group(group)


class Scheduled(Toy):
    """Its scheduler steps once a batch; timm's are told the step."""

    def __init__(self, schedule: Any) -> None:
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = only_trainable(self)
        scheduler = {"scheduler": self.schedule(optimizer), "interval": "step", "monitor": "tick"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class WithTimm(Scheduled):
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)


def timm_cosine(optimizer: Optimizer) -> Any:
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(optimizer, t_initial=12, t_in_epochs=False)


class Rates(Callback):
    """Keeps each parameter's learning rate in each step."""

    def __init__(self) -> None:
        self.of: dict[str, list[float]] = {"head.weight": [], "backbone.embed.weight": []}

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            held = {id(parameter) for parameter in group["params"]}
            for name, rates in self.of.items():
                if id(module.get_parameter(name)) in held:
                    rates.append(group["lr"])


@row("U16", found="scheduler-mismatch")
def test_u16_a_group_that_was_added_keeps_its_learning_rate_while_the_others_fall() -> None:
    rates = Rates()
    audit = audited(seeded(lambda: WithTimm(timm_cosine)), ByHand(), rates, epochs=3)
    assert set(rates.of["backbone.embed.weight"]) == {0.05}
    assert len(set(rates.of["head.weight"])) > 8
    finding = one(audit, "scheduler-mismatch")
    assert finding.names == ("CosineLRScheduler",)
    assert "knows 1 parameter groups, its optimizer has 2" in finding.message
    assert "added after the scheduler was made" in finding.cause
    # torch's own schedulers scale the new group along or raise; the lists disagree, too
    step = audited(
        seeded(lambda: Scheduled(lambda o: lr_scheduler.StepLR(o, 1, gamma=0.9))), ByHand()
    )
    assert one(step, "scheduler-mismatch").names == ("StepLR",)
    rates = Rates()
    unfreeze = FreezeBackbone(unfreeze_at_epoch=1)
    assert audited(seeded(lambda: WithTimm(timm_cosine)), unfreeze, rates, epochs=3).findings == []
    assert rates.of["backbone.embed.weight"] == rates.of["head.weight"][4:]


def plateau(optimizer: Optimizer) -> Any:
    floors = [1e-4] * len(optimizer.param_groups)
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=floors)


def one_cycle(optimizer: Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=12)


def survives(schedule: Any, callback: Callback) -> Rates:
    """A fit that unfreezes at epoch 1; returns the learning rates."""
    rates = Rates()
    audit = audited(seeded(lambda: Scheduled(schedule)), callback, rates, epochs=3)
    assert audit.findings == []
    return rates


@row("U17", prevented="the number of groups never changes, so no list is too short")
def test_u17_reduce_on_plateau_goes_on_after_an_unfreeze() -> None:
    lightnings = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.05)
    for control in (ByHand(), lightnings):
        with pytest.raises((IndexError, RuntimeError), match=r"index out of range|param groups"):
            survives(plateau, control)
    rates = survives(plateau, FreezeBackbone(unfreeze_at_epoch=1))
    assert rates.of["backbone.embed.weight"] == rates.of["head.weight"][4:]
    assert rates.of["head.weight"][-1] < 0.1


@row("U18", prevented="the number of groups never changes, and each has the cycle's own values")
def test_u18_one_cycle_goes_on_after_an_unfreeze() -> None:
    lightnings = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.05)
    for control in (ByHand(), lightnings):
        with pytest.raises(KeyError, match="_lr"):
            survives(one_cycle, control)
    rates = survives(one_cycle, FreezeBackbone(unfreeze_at_epoch=1))
    assert rates.of["backbone.embed.weight"] == rates.of["head.weight"][4:]
    assert max(rates.of["head.weight"]) == pytest.approx(0.2, rel=0.2)


class Detector(Toy):
    """With a backbone as torchvision's detectors make it."""

    def __init__(self, **options: Any) -> None:
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        super().__init__()
        body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, **options)
        self.backbone = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), body)
        self.head = nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        features: Any = self.backbone(x)
        output: Tensor = self.head(features["pool"].mean((2, 3)))
        return output


@row("U19", told="`summarize`, and the table at fit start: what ships frozen is listed as frozen")
def test_u19_layers_that_a_model_ships_frozen_are_listed_by_summary_and_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = seeded(Detector)
    shipped = {row.name for row in summarize(model).rows if row.status == "frozen"}
    assert shipped == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "backbone.2.body.conv1.weight" in shipped
    assert "backbone.2.body.layer1.0.conv1.weight" in shipped
    assert "backbone.2.body.layer2.0.conv1.weight" not in shipped
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(TrainableParamAudit(on_violation="warn"), epochs=1).fit(model, loader())
    printed = capsys.readouterr().out
    assert f"{len(shipped)} frozen" in printed
    everything = seeded(lambda: Detector(trainable_layers=5))
    assert all(row.status == "trains" for row in summarize(everything).rows)


class Experts(Toy):
    """Keeps its experts in a list."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.experts = kind([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.backbone(x)
        return self.head(hidden + sum(expert(hidden) for expert in self.experts))


@row("U20", found="not-in-optimizer")
def test_u20_modules_in_a_plain_list_are_found_though_parameters_does_not_give_them() -> None:
    model = seeded(lambda: Experts(list))
    before = model.experts[0].weight.clone()
    audit = audited(model)
    assert same(before, model.experts[0].weight)
    finding = one(audit, "not-in-optimizer")
    assert set(finding.names) == {
        f"experts[{place}].{name}" for place in (0, 1) for name in ("weight", "bias")
    }
    assert "`experts` is a plain list" in finding.cause
    model = seeded(lambda: Experts(nn.ModuleList))
    before = model.experts[0].weight.clone()
    assert audited(model).findings == []
    assert not same(before, model.experts[0].weight)


class Adversarial(Toy):
    """Two optimizers under a gradient scaler; the loss may not depend on what the second holds."""

    def __init__(self, *, used: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(4, 3)
        self.used = used

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        output = self(x) + self.other(x) if self.used else self(x)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(output, y))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        both = ([*self.backbone.parameters(), *self.head.parameters()], self.other.parameters())
        return [torch.optim.SGD(held, lr=0.1) for held in both]


def half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@row("U23", found="no-gradient")
def test_u23_an_optimizer_without_any_gradient_is_named_when_the_scaler_gives_up() -> None:
    audit = TrainableParamAudit(table=False, on_violation="warn")
    run = trainer(audit, epochs=1, plugins=[half()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            run.fit(seeded(lambda: Adversarial(used=False)), loader())
    finding = one(audit, "no-gradient")
    assert finding.names == ("other.weight", "other.bias")
    assert "Nothing that SGD holds has one" in finding.cause
    healthy = audited(seeded(lambda: Adversarial(used=True)), epochs=1, plugins=[half()])
    assert healthy.findings == []


def test_freezing_all_that_an_optimizer_holds_is_refused_under_a_scaler() -> None:
    run = trainer(FreezeBackbone("other"), epochs=1, plugins=[half()])
    with pytest.raises(FreezeError, match="GradScaler"):
        run.fit(seeded(lambda: Adversarial(used=True)), loader())
    # the scaler has something to look at in each optimizer
    trainer(FreezeBackbone(), epochs=1, plugins=[half()]).fit(
        seeded(lambda: Adversarial(used=True)), loader()
    )
