"""Forms of configure_optimizers, several optimizers, manual optimisation, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_freeze import FreezeBackbone, GradualUnfreeze, TrainableParamAudit, UnsupportedError
from tests.toys import Toy, changed, loader, seeded, state, trainable, trainer


class DecaysWithoutGradient(Optimizer):
    """Decays every parameter it holds, as KellerJordan's Muon does with those without gradient."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"])
        return loss


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1),
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1, fused=True),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda m: DecaysWithoutGradient(m.parameters(), lr=0.1),
    ],
    ids=["AdamW", "AdamW-fused", "SGD", "decays-without-gradient"],
)
def test_frozen_parameters_and_buffers_keep_every_bit(make: Any) -> None:
    model = seeded(lambda: Toy(make))
    before = state(model)
    audit = TrainableParamAudit(table=False)
    trainer(FreezeBackbone(), audit, epochs=2).fit(model, loader())
    assert changed(before, state(model)) == {"head.weight", "head.bias"}
    assert audit.findings == []
    model = seeded(lambda: Toy(make))  # control
    trainer(epochs=2).fit(model, loader())
    weights = {n for n, p in model.named_parameters() if p.ndim == 2}
    assert weights <= changed(before, state(model))


def filtered(module: nn.Module) -> Any:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)


def as_tuple(module: nn.Module) -> Any:
    made = torch.optim.AdamW(module.parameters(), lr=1e-2)
    return [made], [torch.optim.lr_scheduler.StepLR(made, 1)]


def as_dict(module: nn.Module) -> Any:
    made = torch.optim.AdamW(module.parameters(), lr=1e-2)
    return {"optimizer": made, "lr_scheduler": torch.optim.lr_scheduler.StepLR(made, 1)}


def named(module: nn.Module) -> Any:
    return torch.optim.AdamW(module.named_parameters(), lr=1e-2)


@pytest.mark.parametrize("configure", [filtered, as_tuple, as_dict, named])
def test_every_form_of_configure_optimizers_unfreezes_and_trains(configure: Any) -> None:
    model = seeded(lambda: Toy(configure))
    before = state(model)
    audit = TrainableParamAudit(table=False, dead_after=2)
    run = trainer(GradualUnfreeze(), audit, epochs=5)
    run.fit(model, loader())
    assert {n for n, _ in model.named_parameters()} <= changed(before, state(model))
    assert audit.findings == []
    if configure is named:
        [group] = run.optimizers[0].param_groups
        assert group["param_names"] == [name for name, _ in model.named_parameters()]


class Two(Toy):
    """Two optimizers, stepped by hand."""

    def __init__(self, configure: Any = None) -> None:
        super().__init__(configure)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        body, head = self.optimizers()
        loss = self.loss(batch)
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(loss)
        body.step()
        head.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        body = torch.optim.AdamW(self.backbone.parameters(), lr=1e-2)
        head = torch.optim.SGD(self.head.parameters(), lr=0.1)
        return [body, head], [torch.optim.lr_scheduler.StepLR(o, 4) for o in (body, head)]


def test_two_optimizers_under_manual_optimisation_freeze_and_unfreeze() -> None:
    model = seeded(Two)
    before = state(model)
    audit = TrainableParamAudit(table=False)
    run = trainer(FreezeBackbone(unfreeze_at_epoch=1, lr_scale=0.5), audit, epochs=1)
    run.fit(model, loader())
    assert changed(before, state(model)) == {"head.weight", "head.bias"}
    model = seeded(Two)
    run = trainer(FreezeBackbone(unfreeze_at_epoch=1, lr_scale=0.5), audit, epochs=2)
    run.fit(model, loader())
    assert "backbone.embed.weight" in changed(before, state(model))
    body, head = run.optimizers
    assert [group["lr"] for group in body.param_groups] == [1e-2 * 0.1 * 0.1]
    assert [group["lr"] for group in head.param_groups] == [0.1 * 0.1 * 0.1]
    assert audit.findings == []


class Toggled(Two):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = self.loss(batch)
            if loss.requires_grad:
                self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def test_toggle_optimizer_keeps_frozen_flags_and_raises_no_alarm() -> None:
    model = seeded(Toggled)
    before = state(model)
    audit = TrainableParamAudit(table=False, every="batch")
    trainer(FreezeBackbone(unfreeze_at_epoch=1), audit, epochs=2).fit(model, loader())
    assert audit.findings == []
    assert "backbone.embed.weight" in changed(before, state(model))


def test_freezing_drops_gradients_and_state_of_what_is_frozen() -> None:
    model = seeded(Toy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.loss(next(iter(loader()))).backward()
    optimizer.step()
    model.configure = lambda _: optimizer
    assert len(optimizer.state) == len(list(model.parameters()))
    trainer(FreezeBackbone(), epochs=1).fit(model, loader())
    assert all(p.grad is None for p in model.backbone.parameters())
    assert set(optimizer.state) == set(model.head.parameters())


def test_lbfgs_is_refused_before_training_and_the_model_is_as_it_was() -> None:
    model = seeded(lambda: Toy(lambda m: torch.optim.LBFGS(m.parameters())))
    before = state(model)
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(UnsupportedError, match=r"LBFGS.*one parameter group.*Use AdamW"):
        trainer(FreezeBackbone(), epochs=1).fit(model, loader())
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert changed(before, state(model)) == set()


def test_accumulation_and_bf16_run_without_findings() -> None:
    for options in ({"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}):
        model = seeded(Toy)
        before = state(model)
        audit = TrainableParamAudit(table=False, dead_after=2)
        trainer(GradualUnfreeze(), audit, epochs=5, **options).fit(model, loader())
        assert audit.findings == []
        assert "backbone.embed.weight" in changed(before, state(model))
