"""The audit where fits are odd: broken off, warmed up, overridden; optimizers of all makes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_freeze import AuditError, FreezeBackbone, TrainableParamAudit
from tests.catalogue.harness import Do, audited, by_hand, codes, one
from tests.toys import Toy, loader, seeded, trainer


def weight(module: Any) -> nn.Parameter:
    return module.backbone.embed.weight


def grow(_: Any, module: Any) -> None:
    weight(module).add_(1e-3)


# Broken off


@pytest.mark.parametrize("every", ["epoch", "batch", 3])
def test_a_fit_that_breaks_off_is_not_called_clean_unless_it_is(tmp_path: Path, every: str) -> None:
    class Breaks(Callback):
        def __init__(self, writes: bool) -> None:
            self.writes = writes

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                with torch.no_grad():
                    weight(module).data.add_(float(self.writes))
                raise RuntimeError("out of memory")

    for writes in (True, False):
        path = tmp_path / f"{writes}.json"
        audit = TrainableParamAudit(table=False, every=every, report=path)
        fit = trainer(FreezeBackbone(), Breaks(writes), audit, epochs=2)
        with pytest.raises(RuntimeError, match="out of memory"):
            fit.fit(seeded(Toy), loader())
        report = json.loads(path.read_text())
        assert report["clean"] is report["certificate"]["clean"] is not writes
        assert codes(audit) == ({"frozen-changed"} if writes else set())


def test_everything_frozen_in_the_middle_is_told_beside_the_error_of_torch() -> None:
    audit = TrainableParamAudit(table=False, on_violation="warn")
    freeze = Do(at=4, on_train_epoch_start=lambda _, module: module.requires_grad_(False))
    fit = trainer(FreezeBackbone(), freeze, audit, epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="does not require grad"):
            fit.fit(seeded(Toy), loader())
    finding = one(audit, "flag-changed")
    assert finding.names == ("head.weight", "head.bias")
    assert "`Do.on_train_epoch_start`" in finding.cause


# Before the first batch


@pytest.mark.parametrize("hook", ["on_sanity_check_end", "on_validation_batch_end"])
def test_a_write_in_the_sanity_validation_is_found(hook: str) -> None:
    def write(trainer: Any, module: Any) -> None:
        if trainer.sanity_checking:
            grow(trainer, module)

    sabotage = Do(**{hook: write})
    audit = audited(
        seeded(Toy), sabotage, FreezeBackbone(), validation=loader(seed=2), num_sanity_val_steps=1
    )
    finding = one(audit, "frozen-changed")
    assert (finding.epoch, finding.step) == (0, 0)
    assert "before the fit's first batch" in finding.cause


# What should move


class Restoring(Callback):
    """Puts the head back behind each step."""

    def on_train_start(self, _: Any, module: Any) -> None:
        self.kept = {k: v.clone() for k, v in module.head.state_dict().items()}

    def on_train_batch_end(self, _: Any, module: Any, *__: Any) -> None:
        module.head.load_state_dict(self.kept)


@pytest.mark.parametrize("validates", [True, False])
def test_a_head_that_is_put_back_is_found_although_validation_clears_gradients(
    validates: bool,
) -> None:
    audit = audited(
        seeded(Toy),
        Restoring(),
        FreezeBackbone(),
        validation=loader(seed=2) if validates else None,
        audit={"dead_after": 4},
    )
    finding = one(audit, "not-updated")
    assert finding.names == ("head.weight", "head.bias")
    assert "some code writes it back" in finding.cause


def warm(interval: str) -> Any:
    def configure(module: nn.Module) -> Any:
        optimizer = AdamW(module.parameters(), lr=1e-2)
        rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: min(1.0, count / 3))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": rise, "interval": interval},
        }

    return configure


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("freezes", [True, False])
def test_a_warm_up_from_zero_is_no_finding(interval: str, freezes: bool) -> None:
    model = seeded(lambda: Toy(warm(interval)))
    callbacks = [FreezeBackbone()] if freezes else []
    assert audited(model, *callbacks, epochs=3, audit={"dead_after": 3}).findings == []


def test_an_override_that_never_steps_is_found() -> None:
    class Idle(Toy):
        steps = False

        def optimizer_step(self, epoch: int, batch: int, optimizer: Any, closure: Any) -> None:
            if self.steps:
                optimizer.step(closure=closure)
            else:
                closure()

    first, last = audited(seeded(Idle), FreezeBackbone(), epochs=4).findings
    assert first.message == "`head` trains, but no optimizer has stepped in 10 batches"
    assert (first.code, first.severity) == ("not-updated", "warning")
    assert (last.code, last.severity, last.step) == ("not-updated", "error", 16)
    stepping = seeded(Idle)
    stepping.steps = True
    assert audited(stepping, FreezeBackbone(), epochs=4).findings == []
    # control: what is accumulated steps rarely
    rare = {"accumulate_grad_batches": 12}
    assert audited(seeded(Toy), FreezeBackbone(), epochs=7, **rare).findings == []


def test_a_gradient_that_is_dropped_behind_the_backward_pass_is_told_from_none() -> None:
    drop = Do(on_after_backward=lambda _, module: module.head.zero_grad())
    audit = audited(seeded(Toy), drop, FreezeBackbone(), audit={"dead_after": 3})
    assert "some code sets `.grad` to None before" in one(audit, "no-gradient").cause


class Dropping(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 3))


def test_a_head_that_was_put_to_sleep_in_mid_fit_is_found() -> None:
    sleep = Do(at=5, on_train_batch_end=lambda _, module: module.head.eval())
    finding = one(audited(seeded(Dropping), sleep, FreezeBackbone()), "mode-changed")
    assert finding.names == ("head",)
    assert "left train mode although it trains" in finding.message

    def look(_: Any, module: Any) -> None:  # control: one that restores the mode
        module.head.eval()
        module.head.train()

    calm = Do(on_train_batch_end=look)
    assert audited(seeded(Dropping), calm, FreezeBackbone()).findings == []
    # control: a dropout alone is somebody's decision, and so is a mode before the first batch
    alone = Do(at=5, on_train_batch_end=lambda _, module: module.head[0].eval())
    assert audited(seeded(Dropping), alone, FreezeBackbone()).findings == []
    first = Do(on_train_epoch_start=lambda _, module: module.head.eval())
    assert audited(seeded(Dropping), first, FreezeBackbone()).findings == []


# Buffers


def test_a_frozen_buffer_that_is_taken_away_is_found() -> None:
    def take(_: Any, module: Any) -> None:
        module.backbone.blocks[0].norm.running_mean = None
        module.backbone.blocks[0].norm.running_var = None

    audit = audited(seeded(Toy), Do(at=6, on_train_batch_end=take), FreezeBackbone())
    finding = one(audit, "frozen-buffer-changed")
    assert len(finding.names) == 2
    assert "deleted, or set to None" in finding.cause


def test_statistics_that_a_callback_loads_are_not_blamed_on_train_mode() -> None:
    twin = Toy()
    twin.backbone.blocks[0].norm.running_mean.add_(1)
    other = twin.state_dict()
    load = Do(at=8, on_train_epoch_end=lambda _, module: module.load_state_dict(other))
    audit = audited(seeded(Toy), load, FreezeBackbone(), epochs=2, validation=loader(seed=2))
    for code in ("frozen-changed", "frozen-buffer-changed"):
        assert "`Do.on_train_epoch_end`" in one(audit, code).cause

    def reset(_: Any, module: Any) -> None:
        module.backbone.blocks[0].norm.reset_running_stats()

    model = seeded(Toy)
    model.backbone.blocks[0].norm.num_batches_tracked.add_(3)
    audit = audited(
        model, Do(on_validation_end=reset), FreezeBackbone(), epochs=1, validation=loader(seed=2)
    )
    assert "Some code wrote to it, during validation" in one(audit, "frozen-buffer-changed").cause


class Graph(Toy):
    """Its frozen part holds a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.register_buffer("adjacency", torch.eye(4).to_sparse())


def test_a_sparse_buffer_of_a_frozen_part_is_watched() -> None:
    assert audited(seeded(Graph), FreezeBackbone()).findings == []
    double = Do(at=5, on_train_batch_end=lambda _, m: m.backbone.adjacency._values().mul_(2))
    audit = audited(seeded(Graph), double, FreezeBackbone())
    assert one(audit, "frozen-buffer-changed").names == ("backbone.adjacency",)


# Who writes around the update


class Decay(Optimizer):
    """Decays everything past autograd, as old optimizers do."""

    def __init__(self, parameters: Any, lr: float = 1e-2, late: bool = False) -> None:
        super().__init__(parameters, {"lr": lr})
        self.late, self.count = late, 0

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.late or self.count > 6:
                    parameter.data.mul_(1 - 0.1 * group["lr"])
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad.data, alpha=-group["lr"])
        return loss


@pytest.mark.parametrize("late", [True, False])
def test_an_optimizer_that_writes_past_autograd_is_named_also_behind_a_warm_up(late: bool) -> None:
    def configure(module: nn.Module) -> Any:
        optimizer = Decay(module.parameters(), late=late)
        rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: min(1.0, count / 3))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rise, "interval": "step"}}

    audit = audited(by_hand(lambda: Toy(configure)), audit={"every": "batch"})
    causes = [f.cause for f in audit.findings if f.code == "frozen-changed"]
    assert causes
    assert all("Decay" in cause for cause in causes)


@pytest.mark.parametrize("where", ["clipping", "step"])
def test_code_around_the_update_is_told_from_the_optimizer_that_holds_the_tensor(
    where: str,
) -> None:
    class Overrides(Toy):
        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            if where == "clipping":
                with torch.no_grad():
                    grow(None, self)

        def optimizer_step(self, *given: Any) -> None:
            if where == "step":
                with torch.no_grad():
                    grow(None, self)
            super().optimizer_step(*given)

    model = by_hand(lambda: Overrides(lambda m: AdamW(m.parameters(), lr=1e-2)))
    cause = one(audited(model), "frozen-changed").cause
    assert "written in place by other code" in cause
    hook = {"clipping": "configure_gradient_clipping", "step": "optimizer_step"}[where]
    assert f"`Overrides.{hook}`" in cause


def test_a_step_that_goes_on_behind_a_manual_update_is_named() -> None:
    class Manual(Toy):
        def __init__(self) -> None:
            super().__init__(lambda m: SGD(m.parameters(), lr=0.1))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            with torch.no_grad():
                grow(None, self)

    cause = one(audited(seeded(Manual), FreezeBackbone()), "frozen-changed").cause
    assert "between the optimizer's update and the batch's end (there: `Manual.train" in cause


class Wrapper(Optimizer):
    """A wrapper as public code has them: no whole optimizer of its own."""

    def __init__(self, inner: Optimizer, plain: bool) -> None:
        self.inner = inner
        if plain:
            hooks: dict[str, dict[int, Any]] = {
                f"_optimizer_{name}_hooks": {} for name in ("step_pre", "step_post")
            }
            self.__dict__.update(hooks)
        self.defaults = inner.defaults
        self.state = inner.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.inner.step(closure)

    def state_dict(self) -> Any:
        return self.inner.state_dict()


@pytest.mark.parametrize("plain", [True, False])
def test_an_optimizer_that_takes_no_hooks_is_done_without(plain: bool) -> None:
    model = by_hand(lambda: Toy(lambda m: Wrapper(SGD(m.parameters(), lr=0.1), plain)))
    assert audited(model).findings == []


def test_an_optimizer_that_keeps_everything_under_its_first_tensor_is_no_finding() -> None:
    class Plain(Toy):
        def __init__(self) -> None:
            super().__init__(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2))
            for block in self.backbone.blocks:
                block.norm, block.dropout = nn.Identity(), nn.Identity()

    assert audited(by_hand(Plain)).findings == []


def test_a_gradient_that_code_gave_to_what_never_trained_is_told_so() -> None:
    def give(_: Any, module: Any) -> None:
        weight(module).grad = torch.ones_like(weight(module))

    model = by_hand(lambda: Toy(lambda m: AdamW(m.parameters(), lr=1e-2)))
    audit = audited(model, Do(on_after_backward=give), epochs=1)
    assert "frozen since the fit began, so some code" in one(audit, "stale-gradient").cause
    assert "frozen since the fit began" in one(audit, "stale-optimizer-state").cause


def test_a_writer_beside_an_average_is_named_and_the_average_is_not() -> None:
    averages = [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)]
    if hasattr(lightning_callbacks, "WeightAveraging"):
        averages.append(lightning_callbacks.WeightAveraging())
    for average in averages:
        model = seeded(lambda: Toy(lambda m: SGD(m.parameters(), lr=0.1)))
        audit = audited(model, Do(at=6, on_train_batch_end=grow), FreezeBackbone(), average)
        first = audit.findings[0]
        assert "`Do.on_train_batch_end`" in first.cause
        assert not any("keeps has changed" in finding.message for finding in audit.findings)


# A resume without what split the groups


def test_a_resume_without_the_freezing_callback_says_what_is_missing(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="first")
    both = [FreezeBackbone(), TrainableParamAudit(table=False)]
    trainer(*both, save, epochs=1, enable_checkpointing=True).fit(seeded(Toy), loader())
    alone = trainer(TrainableParamAudit(table=False), epochs=2)
    with pytest.raises(AuditError, match=r"\[resume-mismatch\] backbone.embed.weight.*was lost"):
        alone.fit(seeded(Toy), loader(), ckpt_path=tmp_path / "first.ckpt")
    trainer(*both, epochs=2).fit(  # control
        seeded(Toy), loader(), ckpt_path=tmp_path / "first.ckpt"
    )
