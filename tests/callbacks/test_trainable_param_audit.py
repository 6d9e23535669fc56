"""The audit in real fits: sabotage is named with its cause; healthy runs have no findings."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from lightning_freeze import (
    AuditError,
    FreezeBackbone,
    FrozenWeightsChanged,
    GradualUnfreeze,
    TrainableParamAudit,
)
from tests.toys import Toy, loader, seeded, trainer


class Sabotage(Callback):
    """Does something to the module after the second batch of epoch 1."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def on_train_batch_end(self, trainer: Trainer, module: Any, *rest: Any) -> None:
        if trainer.global_step == 6:
            with torch.no_grad():
                self.act(module)


def audited(act: Any, *callbacks: Callback, **arguments: Any) -> TrainableParamAudit:
    audit = TrainableParamAudit(table=False, on_violation="warn", **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(Sabotage(act), *callbacks, audit, epochs=3).fit(seeded(Toy), loader())
    return audit


def write_data(module: Any) -> None:
    module.backbone.embed.weight.data.add_(1e-7)


def write_in_place(module: Any) -> None:
    module.backbone.embed.weight.add_(1.0)


def flip_flag(module: Any) -> None:
    module.backbone.blocks[0].linear.weight.requires_grad = True


def freeze_head(module: Any) -> None:
    module.head.bias.requires_grad = False


def write_buffer(module: Any) -> None:
    module.backbone.blocks[1].norm.running_mean.add_(1)


def replace(module: Any) -> None:
    module.backbone.embed.weight = nn.Parameter(module.backbone.embed.weight.clone(), False)


SABOTAGES = {
    "data": (write_data, "frozen-changed", "backbone.embed.weight", "through `.data`"),
    "in place": (write_in_place, "frozen-changed", "backbone.embed.weight", "in place by other"),
    "flag on": (flip_flag, "flag-changed", "backbone.blocks.0.linear.weight", "set it to True"),
    "flag off": (freeze_head, "flag-changed", "head.bias", "set it to False"),
    "buffer": (
        write_buffer,
        "frozen-buffer-changed",
        "backbone.blocks.1.norm.running_mean",
        "wrote to it",
    ),
    "replaced": (replace, "parameter-replaced", "backbone.embed.weight", "assigned anew"),
}


@pytest.mark.parametrize("case", SABOTAGES)
@pytest.mark.parametrize("every", ["epoch", "batch", 2])
def test_sabotage_is_named_with_tensor_and_cause(case: str, every: Any) -> None:
    act, code, name, cause = SABOTAGES[case]
    audit = audited(act, FreezeBackbone(), every=every)
    found = [finding for finding in audit.findings if finding.code == code]
    assert len(found) == 1
    assert found[0].names == (name,)
    assert cause in found[0].cause
    assert found[0].epoch == 1
    assert found[0].fix
    assert found[0].step == (8 if every == "epoch" else 6)
    assert audited(lambda module: None, FreezeBackbone(), every=every).findings == []


def test_frozen_weights_changed_raises_by_default() -> None:
    audit = TrainableParamAudit(table=False)
    run = trainer(Sabotage(write_data), FreezeBackbone(), audit, epochs=3)
    with pytest.raises(FrozenWeightsChanged, match=r"backbone\.embed\.weight changed although"):
        run.fit(seeded(Toy), loader())
    assert audit.findings[0].code == "frozen-changed"
    run = trainer(Sabotage(flip_flag), FreezeBackbone(), TrainableParamAudit(table=False), epochs=3)
    with pytest.raises(AuditError, match="flag-changed"):
        run.fit(seeded(Toy), loader())


def by_hand(**arguments: Any) -> tuple[TrainableParamAudit, Toy]:
    model = seeded(Toy)
    model.backbone.requires_grad_(False)
    return TrainableParamAudit(table=False, **arguments), model


def test_alone_it_guards_a_freeze_written_by_hand() -> None:
    audit, model = by_hand()
    model.backbone.eval()
    trainer(audit, epochs=2).fit(model, loader(), loader(seed=2))
    assert audit.findings == []
    assert "What was frozen was unchanged to the bit" in audit.verdict
    assert "(23 tensors are frozen at the end)" in audit.verdict
    audit, model = by_hand()
    model.backbone.eval()
    run = trainer(Sabotage(write_data), audit, epochs=2)
    with pytest.raises(FrozenWeightsChanged, match="embed"):
        run.fit(model, loader())


def test_alone_it_names_batch_norm_that_was_left_in_train_mode() -> None:
    audit, model = by_hand()
    with pytest.raises(FrozenWeightsChanged, match="running statistics"):
        trainer(audit, epochs=1).fit(model, loader())
    assert {finding.code for finding in audit.findings} == {"frozen-buffer-changed"}


def test_alone_it_names_a_train_call_on_a_frozen_module() -> None:
    audit, model = by_hand(on_violation="warn", every="batch")
    for block in model.backbone.blocks:
        block.norm = nn.Identity()
    model.backbone.eval()
    run = trainer(Sabotage(lambda module: module.train()), audit, epochs=2)
    with pytest.warns(UserWarning, match="mode-changed"):
        run.fit(model, loader())


def test_stale_gradient_and_its_drift_are_named() -> None:
    class NoZeroing(Toy):
        def on_train_start(self) -> None:
            self.backbone.embed.weight.grad = torch.ones_like(self.backbone.embed.weight)

        def optimizer_zero_grad(self, *_: Any) -> None:
            pass

    model = seeded(lambda: NoZeroing(lambda m: torch.optim.SGD(m.parameters(), lr=0.1)))
    model.backbone.requires_grad_(False)
    model.backbone.eval()
    audit = TrainableParamAudit(table=False, on_violation="warn")
    with pytest.warns(UserWarning, match="stale"):
        trainer(audit, epochs=1).fit(model, loader())
    codes = {finding.code for finding in audit.findings}
    assert {"stale-gradient", "frozen-changed"} <= codes
    causes = [f.cause for f in audit.findings if f.code == "frozen-changed"]
    assert all("stale gradient" in cause for cause in causes)


class Unused(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 3)


def test_trainable_parameter_without_a_gradient_is_named_once() -> None:
    audit = TrainableParamAudit(table=False, on_violation="warn", dead_after=3)
    with pytest.warns(UserWarning, match="no-gradient"):
        trainer(FreezeBackbone(), audit, epochs=3).fit(seeded(Unused), loader())
    (finding,) = audit.findings
    assert finding.names == ("unused.weight", "unused.bias")
    assert finding.step == 3
    audit = TrainableParamAudit(table=False, dead_after=100)  # control: within the window
    trainer(FreezeBackbone(), audit, epochs=3).fit(seeded(Unused), loader())
    assert audit.findings == []


def test_head_that_is_in_no_optimizer_is_named() -> None:
    model = seeded(lambda: Toy(lambda m: torch.optim.SGD(m.backbone.parameters(), lr=0.1)))
    audit = TrainableParamAudit(table=False)
    with pytest.raises(AuditError, match=r"not-in-optimizer.*head"):
        trainer(audit, epochs=1).fit(model, loader())
    # control: a backbone that is left out is frozen by omission
    model = seeded(lambda: Toy(lambda m: torch.optim.SGD(m.head.parameters(), lr=0.1)))
    audit = TrainableParamAudit(table=False)
    trainer(audit, epochs=1).fit(model, loader())
    assert audit.findings == []


@pytest.mark.filterwarnings("ignore:.*gives them to no optimizer")
def test_unfrozen_layers_that_are_in_no_optimizer_are_named() -> None:
    model = seeded(lambda: Toy(lambda m: torch.optim.SGD(m.head.parameters(), lr=0.1)))
    audit = TrainableParamAudit(table=False)
    with pytest.raises(AuditError, match=r"not-in-optimizer.*backbone\.blocks\.2"):
        trainer(GradualUnfreeze(), audit, epochs=3).fit(model, loader())


def test_zero_learning_rate_is_no_finding_and_zeroed_gradients_are() -> None:
    class Zeroed(Toy):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for parameter in self.head.parameters():
                parameter.grad.zero_()

    model = seeded(lambda: Zeroed(lambda m: torch.optim.SGD(m.parameters(), lr=0.1)))
    audit = TrainableParamAudit(table=False, dead_after=3)
    with pytest.raises(AuditError, match=r"not-updated.*`head`"):
        trainer(FreezeBackbone(), audit, epochs=2).fit(model, loader())
    model = seeded(lambda: Toy(lambda m: torch.optim.SGD(m.parameters(), lr=0.0)))
    audit = TrainableParamAudit(table=False, dead_after=3)
    trainer(FreezeBackbone(), audit, epochs=2).fit(model, loader())
    assert audit.findings == []


def test_report_is_json_with_findings_and_moments(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    audit = TrainableParamAudit(table=False, report=path)
    trainer(GradualUnfreeze(lr_decay=0.5), audit, epochs=3).fit(seeded(Toy), loader())
    report = json.loads(path.read_text())
    assert report["clean"] is True
    assert report["findings"] == []
    assert report["moments"][2]["lr"]["backbone.blocks.1"] == 1e-2 * 0.25
    assert report["moments"][0]["lr"]["backbone.blocks.1"] is None
    assert set(report["frozen"]) >= {"backbone.embed.weight"}
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    run = trainer(
        Sabotage(write_data),
        FreezeBackbone(),
        TrainableParamAudit(table=False, report=path),
        epochs=2,
    )
    with pytest.raises(FrozenWeightsChanged, match="embed"):
        run.fit(seeded(Toy), loader())
    assert json.loads(path.read_text())["findings"][0]["code"] == "frozen-changed"


def test_table_is_printed_at_fit_start_and_at_each_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer(GradualUnfreeze(), TrainableParamAudit(), epochs=3).fit(seeded(Toy), loader())
    printed = capsys.readouterr().out
    assert printed.count("who trains") == 3
    assert "Epoch 2, step 8: who trains" in printed
    assert "Audit: clean" in printed
    trainer(FreezeBackbone(), TrainableParamAudit(table=False), epochs=1).fit(seeded(Toy), loader())
    assert "who trains" not in capsys.readouterr().out


def test_timeline_of_a_fit_is_drawn(tmp_path: Path) -> None:
    audit = TrainableParamAudit(table=False)
    trainer(GradualUnfreeze(), audit, epochs=3).fit(seeded(Toy), loader())
    audit.plot(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_stochastic_weight_averaging_raises_no_alarm_and_ema_is_named() -> None:
    audit = TrainableParamAudit(table=False)
    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    trainer(FreezeBackbone(), swa, audit, epochs=3).fit(seeded(Toy), loader())
    assert audit.findings == []
    audit = TrainableParamAudit(table=False, on_violation="warn")
    if not hasattr(lightning_callbacks, "EMAWeightAveraging"):
        pytest.skip("EMAWeightAveraging came with Lightning 2.6")
    average = lightning_callbacks.EMAWeightAveraging(decay=0.77)
    run = trainer(FreezeBackbone(), average, audit, epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(seeded(Toy), loader())
    assert all("EMAWeightAveraging" in finding.cause for finding in audit.findings)


def test_resume_with_other_frozen_weights_is_named(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    save = ModelCheckpoint(tmp_path, filename="{epoch}")
    callbacks = [FreezeBackbone(), TrainableParamAudit(table=False)]
    trainer(*callbacks, save, epochs=1, enable_checkpointing=True).fit(seeded(Toy), loader())
    path = tmp_path / "epoch=0.ckpt"
    trainer(*callbacks, epochs=2).fit(seeded(Toy), loader(), ckpt_path=path)  # control
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["backbone.embed.weight"][0, 0] += 1
    torch.save(checkpoint, path)
    with pytest.raises(AuditError, match="resume-mismatch"):
        trainer(*callbacks, epochs=2).fit(seeded(Toy), loader(), ckpt_path=path)
