"""Unfrozen, but not trained: no gradient, a flag that went back, ranks that drift apart."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import (
    AuditError,
    ConflictError,
    FreezeBackbone,
    GradualUnfreeze,
    TrainableParamAudit,
)
from tests.catalogue.harness import Do, audited, codes, one, row
from tests.toys import Backbone, Toy, changed, loader, seeded, state, trainable, trainer

SOON = {"dead_after": 3}


def causes(audit: TrainableParamAudit, code: str) -> dict[str, str]:
    """Name -> cause, of everything that a code was found for."""
    found = [finding for finding in audit.findings if finding.code == code]
    return {name: finding.cause for finding in found for name in finding.names}


class Plain(Toy):
    """Without batch-norm and dropout: two ranks can be compared to the bit."""

    def __init__(self, configure: Any = None) -> None:
        super().__init__(configure)
        for block in self.backbone.blocks:
            block.norm = nn.LayerNorm(8)
            block.dropout = nn.Identity()

    def train_dataloader(self) -> Any:
        return loader(seed=1 + self.global_rank)


def sgd(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def on_two_ranks(
    model: Plain, *callbacks: Callback, folder: Path, strategy: str = "ddp_fork", **options: Any
) -> tuple[list[dict[str, Any]], set[str]]:
    """A fit on two ranks, each with data of its own: findings, and names of what has moved."""
    path = folder / "report.json"
    audit = TrainableParamAudit(table=False, on_violation="warn", report=path)
    fit = trainer(
        *callbacks,
        audit,
        epochs=2,
        strategy=strategy,
        devices=2,
        use_distributed_sampler=False,
        **options,
    )
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(model)
    return json.loads(path.read_text())["findings"], changed(before, state(model))


@pytest.mark.slow
@pytest.mark.timeout(120)
@row("U1", found="rank-mismatch")
def test_u1_unfreezing_by_hand_under_ddp_lets_the_ranks_drift_apart(tmp_path: Path) -> None:
    model = Plain(sgd)
    names = {name for name, _ in model.backbone.named_parameters(prefix="backbone")}
    model.backbone.requires_grad_(False)
    unfreeze = Do(at=4, on_train_epoch_start=lambda _, m: m.backbone.requires_grad_(True))
    findings, moved = on_two_ranks(model, unfreeze, folder=tmp_path)
    assert names <= moved
    (drift,) = [finding for finding in findings if finding["code"] == "rank-mismatch"]
    assert set(drift["names"]) == names
    assert "DistributedDataParallel had collected what requires a gradient" in drift["cause"]
    # the callback wraps the model anew, so that all gradients are averaged
    callback = FreezeBackbone(unfreeze_at_epoch=1)
    findings, moved = on_two_ranks(Plain(sgd), callback, folder=tmp_path)
    assert names <= moved
    assert findings == []


@row("U2", found="no-gradient")
def test_u2_a_compiled_graph_that_is_used_again_after_an_unfreeze_gives_no_gradient() -> None:
    unsafe = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)
    if unsafe is None:
        pytest.skip("this torch has no option to leave out guards")

    def fit(**options: Any) -> TrainableParamAudit:
        torch._dynamo.reset()
        model = seeded(lambda: Toy(blocks=2))
        model.backbone = torch.compile(model.backbone, backend="aot_eager", **options)
        return audited(model, FreezeBackbone(unfreeze_at_epoch=1), audit=SOON)

    # leaving out guards is advised against slow guards: a flip of a flag goes unseen, too
    audit = fit(options={"guard_filter_fn": unsafe})
    names = {name for name, _ in Toy(blocks=2).backbone.named_parameters(prefix="backbone")}
    found = causes(audit, "no-gradient")
    assert set(found) == names
    assert all("unfrozen after `torch.compile`" in cause for cause in found.values())
    assert codes(audit) == {"no-gradient"}
    assert fit().findings == []


class Vision(LightningModule):
    """A transformer whose blocks are checkpointed."""

    def __init__(self, *, use_reentrant: bool) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        super().__init__()
        sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 4, "patch_size": 2}
        config = ViTConfig(num_hidden_layers=2, num_attention_heads=2, num_channels=1, **sizes)
        self.model = ViTForImageClassification(config)
        with warnings.catch_warnings():  # it has got another name in transformers 5
            warnings.simplefilter("ignore", FutureWarning)
            self.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pixels, labels = batch
        loss: Tensor = self.model(pixels, labels=labels).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@row("U7", found="no-gradient")
def test_u7_reentrant_checkpointing_behind_frozen_embeddings_gives_no_gradient() -> None:
    images = TensorDataset(torch.randn(16, 1, 4, 4), torch.arange(16) % 2)

    def fit(*, use_reentrant: bool) -> TrainableParamAudit:
        freeze = FreezeBackbone("model.vit.embeddings")
        model = seeded(lambda: Vision(use_reentrant=use_reentrant))
        data = DataLoader(images, batch_size=4)
        return audited(model, freeze, data=data, epochs=1, audit=SOON)

    audit = fit(use_reentrant=True)
    names = [name for name, _ in Vision(use_reentrant=True).named_parameters()]
    found = causes(audit, "no-gradient")
    assert set(found) == {name for name in names if re.search(r"layers?\.\d", name)}
    assert all("checkpointed in the reentrant way" in cause for cause in found.values())
    assert codes(audit) == {"no-gradient"}
    assert fit(use_reentrant=False).findings == []


class Tower(nn.Module):
    """An encoder as a frozen one is often written, and then used again to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WithTower(Toy):
    """Beside its backbone it has an encoder, and a layer that is checkpointed."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        mixed = checkpoint(self.mix, self.tower(x), use_reentrant=True)
        return self.head(self.backbone(x) + mixed)


@row("U9", found="no-gradient")
def test_u9_a_tower_under_no_grad_is_told_from_a_checkpoint_without_gradient() -> None:
    audit = audited(seeded(lambda: WithTower(Tower())), audit=SOON)
    found = causes(audit, "no-gradient")
    assert set(found) == {"tower.layer.weight", "tower.layer.bias", "mix.weight", "mix.bias"}
    assert "`torch.no_grad()`" in found["tower.layer.weight"] == found["tower.layer.bias"]
    assert "reentrant" in found["mix.weight"] == found["mix.bias"]
    assert codes(audit) == {"no-gradient"}
    # with gradients the checkpoint has an input that requires one, too
    assert audited(seeded(lambda: WithTower(nn.Linear(4, 8))), audit=SOON).findings == []


class Outputs(Toy):
    """Two more heads; the first one's output may be left unused, the second isn't called."""

    def __init__(self, *, used: bool) -> None:
        super().__init__()
        self.value = nn.Linear(8, 3)
        self.spare = nn.Linear(8, 3)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.backbone(x)
        value = self.value(hidden)
        return self.head(hidden) + value + self.spare(hidden) if self.used else self.head(hidden)


@row("U10", found="no-gradient")
def test_u10_a_layer_with_an_unused_output_is_told_from_one_that_is_never_called() -> None:
    audit = audited(seeded(lambda: Outputs(used=False)), audit=SOON)
    found = causes(audit, "no-gradient")
    assert set(found) == {"value.weight", "value.bias", "spare.weight", "spare.bias"}
    assert "doesn't depend on its output" in found["value.weight"] == found["value.bias"]
    assert "wasn't called" in found["spare.weight"] == found["spare.bias"]
    assert audited(seeded(lambda: Outputs(used=True)), audit=SOON).findings == []


class Net(nn.Module):
    """What an adapter is put on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.embed(x)))


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(Net(), LoraConfig(target_modules=["embed", "out"], r=2))


class Adapted(Toy):
    """A model with a LoRA adapter in front of its head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head


ADAPTER = {
    f"backbone.base_model.model.{layer}.lora_{part}.default.weight"
    for layer in ("embed", "out")
    for part in "AB"
}


@row("U11", found="nothing-trainable")
def test_u11_an_adapter_that_is_loaded_without_is_trainable_leaves_nothing_to_train(
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    lora().save_pretrained(tmp_path)

    def fit(**options: Any) -> TrainableParamAudit:
        audit = TrainableParamAudit(table=False)
        net = PeftModel.from_pretrained(Net(), tmp_path, **options)
        model = Adapted(net, nn.Identity())
        trainer(audit, epochs=1).fit(model, loader())
        assert trainable(model) == ADAPTER
        return audit

    # before the first batch, whose backward pass would say no more than "does not require grad"
    with pytest.raises(AuditError, match=r"nothing-trainable.*step 0.*All \d+ parameters are froz"):
        fit()
    assert fit(is_trainable=True).findings == []


@row("U12", found="flag-changed")
def test_u12_a_checkpoint_that_freezes_the_adapter_is_named_with_the_hook(tmp_path: Path) -> None:
    class Saving(Adapted):
        freezes = True

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.backbone.save_pretrained(tmp_path / "adapter")
            if self.freezes:  # what peft 0.18.1 did when it converted an adapter to save it
                tuner = self.backbone.base_model
                tuner.set_adapter(tuner.active_adapters, inference_mode=True)

    def fit(model: Adapted) -> TrainableParamAudit:
        save = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
        return audited(model, save, enable_checkpointing=True)

    audit = fit(seeded(lambda: Saving(lora(), nn.Linear(3, 3))))
    finding = one(audit, "flag-changed")
    assert set(finding.names) == ADAPTER
    assert "set it to False" in finding.cause
    assert "checkpoint" in finding.cause
    assert "Saving.on_save_checkpoint" in finding.cause
    assert finding.since is not None and finding.since <= (0, 2)
    Saving.freezes = False
    assert fit(seeded(lambda: Saving(lora(), nn.Linear(3, 3)))).findings == []


class Stages(Backbone):
    """A backbone as in mmsegmentation: each `train()` freezes its stages again."""

    frozen_stages = 1

    def train(self, mode: bool = True) -> Stages:
        super().train(mode)
        for block in self.blocks[: self.frozen_stages]:
            block.eval()
            block.requires_grad_(False)
        return self


@row("U15", found="flag-changed")
def test_u15_a_train_override_that_freezes_again_undoes_an_unfreeze() -> None:
    class Segmenter(Toy):
        def __init__(self, frozen_stages: int) -> None:
            super().__init__()
            self.backbone = Stages()
            self.backbone.frozen_stages = frozen_stages

        def on_train_epoch_start(self) -> None:
            self.train()

    schedule = {0: "head", 1: "backbone"}
    audit = audited(seeded(lambda: Segmenter(1)), GradualUnfreeze(schedule))
    finding = one(audit, "flag-changed")
    inside = Backbone().blocks[0].named_parameters(prefix="backbone.blocks.0")
    assert set(finding.names) == {name for name, _ in inside}
    assert "set it to False" in finding.cause
    assert "all of `backbone.blocks.0` at once" in finding.cause
    assert "Segmenter.on_train_epoch_start" in finding.cause
    assert finding.epoch == 1
    assert audited(seeded(lambda: Segmenter(0)), GradualUnfreeze(schedule)).findings == []


class Alternating(Plain):
    """Uses one layer in every other micro-batch, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__(sgd)
        self.even = nn.Linear(8, 8)
        self.odd = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        layer = self.odd if self.calls % 2 == 0 else self.even
        return self.head(layer(self.backbone(x)))


@pytest.mark.slow
@pytest.mark.timeout(120)
@row("U22", prevented="it is wrapped anew on each unfreeze, and torch averages all of a window")
def test_u22_what_only_an_earlier_micro_batch_used_is_averaged_across_ranks(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {
        "strategy": "ddp_fork_find_unused_parameters_true",
        "accumulate_grad_batches": 2,
        "folder": tmp_path,
    }
    layers = {"even.weight", "even.bias", "odd.weight", "odd.bias"}
    unfreeze = FreezeBackbone(["even", "odd"], unfreeze_at_epoch=1)
    findings, moved = on_two_ranks(Alternating(), unfreeze, **options)
    assert layers | {"backbone.embed.weight"} <= moved
    assert findings == []

    # the control: unfrozen by hand neither is averaged, whatever torch does
    def by_hand(_: Any, module: Any, *, trains: bool = True) -> None:
        for layer in (module.even, module.odd):
            layer.requires_grad_(trains)

    model = Alternating()
    by_hand(None, model, trains=False)
    findings, _ = on_two_ranks(model, Do(at=2, on_train_epoch_start=by_hand), **options)
    assert [set(f["names"]) for f in findings if f["code"] == "rank-mismatch"] == [layers]


@pytest.mark.slow
@pytest.mark.timeout(120)
@row("U24", told="an error before the model is wrapped")
def test_u24_a_schedule_that_leaves_nothing_to_train_is_refused_before_ddp_would() -> None:
    options: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "epochs": 1}
    options["use_distributed_sampler"] = False
    model = Plain(sgd)
    before = state(model)
    with pytest.raises(
        ProcessRaisedException, match=r"Nothing is left to train at the start.*name the head"
    ):
        trainer(GradualUnfreeze({1: "**"}), **options).fit(model)
    with pytest.raises(ConflictError, match=r"Nothing is left to train at the start"):
        trainer(FreezeBackbone("**"), epochs=1).fit(model)
    assert changed(before, state(model)) == set()
    model.requires_grad_(False)  # control: without the callbacks it is DDP that refuses
    with pytest.raises(ProcessRaisedException, match="a module doesn't have any parameter"):
        trainer(**options).fit(model)
    trainer(FreezeBackbone(), **options).fit(Plain(sgd))
