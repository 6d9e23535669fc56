"""F1 to F8: frozen weights that move."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_freeze import (
    FreezeBackbone,
    FrozenWeightsChanged,
    TrainableParamAudit,
    assert_frozen,
    audit_parameters,
    fingerprint,
    freeze,
)
from tests.catalogue.harness import audited, by_hand, fitted, inside, one, row
from tests.toys import Toy, changed, loader, seeded, state, trainer

MATRICES = ("backbone.embed.weight", *(f"backbone.blocks.{i}.linear.weight" for i in range(3)))
BLOCK_0, BLOCK_1 = (
    tuple(
        f"backbone.blocks.{i}.{name}"
        for name in ("linear.weight", "linear.bias", "norm.weight", "norm.bias")
    )
    for i in range(2)
)


# F1


class SingleDeviceMuon(torch.optim.Optimizer):
    """Muon as in its first repository: no gradient counts as one of zeros, and decays."""

    def __init__(self, params: Any, lr: float = 0.02, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = state["momentum_buffer"] / (state["momentum_buffer"].norm() + 1e-7)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])
        return loss


class TwoOptimizers(Toy):
    """One for the matrices, AdamW for the rest, both of which are handed frozen ones, too."""

    def __init__(self, muon: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.muon = muon

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim == 2]
        vectors = [p for p in self.parameters() if p.ndim != 2]
        decay = {"lr": 0.02, "weight_decay": 0.1}
        return self.muon(matrices, **decay), torch.optim.AdamW(vectors, **decay)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()


@row("F1", found="frozen-changed")
def test_f1_muon_that_decays_what_has_no_gradient_is_named() -> None:
    model = by_hand(lambda: TwoOptimizers(SingleDeviceMuon))
    before = state(model)
    finding = one(audited(model), "frozen-changed")
    assert finding.names == MATRICES
    assert inside(changed(before, state(model))) == set(MATRICES)
    assert "SingleDeviceMuon holds it" in finding.cause
    assert "weight decay" in finding.cause
    assert "AdamW" not in finding.cause
    # control: torch's own Muon skips it
    assert audited(by_hand(lambda: TwoOptimizers(torch.optim.Muon))).findings == []
    # and with the callback its groups are empty
    assert audited(seeded(lambda: TwoOptimizers(SingleDeviceMuon)), FreezeBackbone()).findings == []


# F2


class Inversion(Toy):
    """Textual inversion: of one embedding, only the row of the new token shall train."""

    def __init__(self, weight_decay: float) -> None:
        super().__init__(
            lambda m: torch.optim.AdamW(m.parameters(), 0.1, weight_decay=weight_decay)
        )
        self.tokens = nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.tokens(x.argmax(dim=1) + 2))

    def on_after_backward(self) -> None:
        self.tokens.weight.grad[:5] = 0


@row("F2", told="`fingerprint(weight[rows])` before and after; the audit compares whole tensors")
def test_f2_rows_with_zeroed_gradients_drift_and_their_fingerprint_tells() -> None:
    for weight_decay in (0.01, 0.0):
        model = seeded(lambda: Inversion(weight_decay))  # noqa: B023
        freeze(model, ["backbone", "head"])
        old, new = model.tokens.weight[:5], model.tokens.weight[5:]
        before = fingerprint(old), fingerprint(new)
        assert audited(model).findings == []  # the tensor as a whole is to train
        after = fingerprint(old), fingerprint(new)
        assert (before[0] == after[0]) == (not weight_decay)
        assert before[1] != after[1]


# F3


class OwnRows(Toy):
    """Each rank sees rows of its own, so that one gradient isn't the other's."""

    def train_dataloader(self) -> Any:
        return loader(seed=1 + self.global_rank)


class FreezesOn(Callback):
    """Freezes after DistributedDataParallel has wrapped the model, on some ranks."""

    def __init__(self, *ranks: int) -> None:
        self.ranks = ranks

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        if trainer.global_rank in self.ranks:
            module.backbone.embed.requires_grad_(False)


def on_two_ranks(report: Path, freezing: Callback) -> list[dict[str, Any]]:
    audit = TrainableParamAudit(table=False, on_violation="warn", report=report)
    strategy = DDPStrategy(start_method="fork", find_unused_parameters=True)
    options: dict[str, Any] = {"devices": 2, "use_distributed_sampler": False}
    fit = trainer(freezing, audit, epochs=1, strategy=strategy, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(seeded(OwnRows))
    return json.loads(report.read_text())["findings"]


@row("F3", found="frozen-changed")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_f3_gradient_that_ddp_gives_to_a_layer_that_this_rank_froze_is_named(
    tmp_path: Path,
) -> None:
    # since torch 1.4 DDP leaves alone what no rank has used, and not what another rank has
    assert on_two_ranks(tmp_path / "both.json", FreezesOn(0, 1)) == []
    assert on_two_ranks(tmp_path / "ours.json", FreezeBackbone()) == []
    findings = on_two_ranks(tmp_path / "one.json", FreezesOn(0))
    (drift,) = [finding for finding in findings if finding["code"] == "frozen-changed"]
    assert (drift["names"], drift["rank"]) == (["backbone.embed.weight", "backbone.embed.bias"], 0)
    assert "DistributedDataParallel" in drift["cause"]


# F4


def plain_loop(model: Any, optimizer: torch.optim.Optimizer, clear: Any) -> set[str]:
    """Two epochs as in a tutorial; returns the names of what moved."""
    before = state(model)
    for _ in range(2):
        for batch in loader():
            clear()
            model.loss(batch).backward()
            optimizer.step()
    return changed(before, state(model))


@row("F4", found="frozen-changed")
def test_f4_stale_gradient_that_moves_a_layer_that_was_frozen_again_is_named() -> None:
    model = seeded(Toy)
    sgd = torch.optim.SGD(model.parameters(), 0.1)

    def clear() -> None:  # of a frozen layer, the gradient stays as it was
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = None

    assert plain_loop(model, sgd, clear) >= {*BLOCK_0, *BLOCK_1}  # control: both train at first
    model.backbone.blocks[0].requires_grad_(False).eval()
    freeze(model, "backbone.blocks.1")  # drops the gradient, too
    (stale,) = audit_parameters(model, sgd)
    assert (stale.code, stale.names) == ("stale-gradient", BLOCK_0)
    moving = pytest.raises(FrozenWeightsChanged, match="stale gradient, which each step")
    with moving as caught, assert_frozen(model):
        plain_loop(model, sgd, clear)
    (finding,) = caught.value.findings
    assert (finding.code, finding.names) == ("frozen-changed", BLOCK_0)
    assert finding.cause.startswith("SGD holds it")
    freeze(model, "backbone.blocks.0")
    assert audit_parameters(model, sgd) == []
    with assert_frozen(model):
        assert "head.weight" in plain_loop(model, sgd, clear)


# F5


@row("F5", found="flag-changed")
def test_f5_flag_that_is_set_between_backward_and_step_is_named_with_its_hook() -> None:
    class Pruner(Callback):
        def on_after_backward(self, trainer: Trainer, module: Any) -> None:
            if trainer.global_step == 5:
                module.backbone.blocks[0].requires_grad_(False)
                self.then = state(module)

        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                self.moved = changed(self.then, state(module))

    model = seeded(Toy)
    pruner = Pruner()
    finding = one(audited(model, pruner), "flag-changed")
    assert pruner.moved >= set(BLOCK_0)  # the gradient that was there was applied
    assert finding.names == BLOCK_0
    assert "set it to False" in finding.cause
    assert "`Pruner.on_after_backward`" in finding.cause
    assert finding.since == (1, 5)
    assert audited(seeded(Toy)).findings == []


# F6


@row("F6", found="frozen-changed")
def test_f6_momentum_that_moves_what_has_a_gradient_of_zeros_is_named() -> None:
    model = seeded(Toy)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def clear() -> None:
        sgd.zero_grad(set_to_none=False)  # torch's default before 2.0

    assert plain_loop(model, sgd, clear) >= {*BLOCK_0, *BLOCK_1}
    model.backbone.blocks[0].requires_grad_(False).eval()
    freeze(model, "backbone.blocks.1")  # it has no gradient; SGD has its momentum all the same
    moving = pytest.raises(FrozenWeightsChanged, match="stale gradient of zeros")
    with moving as caught, assert_frozen(model):
        plain_loop(model, sgd, clear)
    (finding,) = caught.value.findings
    assert (finding.code, finding.names) == ("frozen-changed", BLOCK_0)
    assert finding.cause.startswith("SGD holds it")
    assert "momentum still move it" in finding.cause
    freeze(model, "backbone.blocks.0")
    with assert_frozen(model):
        assert "head.weight" in plain_loop(model, sgd, clear)


# F8


@row("F8", prevented="`FreezeBackbone` keeps statistics, too, and empties the optimizer's group")
def test_f8_learning_rate_of_zero_is_no_freeze_and_the_callback_is_one() -> None:
    def lr_mult(model: Any) -> Any:
        groups = [
            {"params": model.backbone.parameters(), "lr": 0.0},
            {"params": model.head.parameters()},
        ]
        return torch.optim.SGD(groups, 0.1, weight_decay=0.1)

    moved = inside(fitted(seeded(lambda: Toy(lr_mult))))
    assert {name.rpartition(".")[2] for name in moved} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    model = seeded(lambda: Toy(lr_mult))
    assert fitted(model, FreezeBackbone()) == {"head.weight", "head.bias"}
    assert audited(seeded(lambda: Toy(lr_mult)), FreezeBackbone()).findings == []
