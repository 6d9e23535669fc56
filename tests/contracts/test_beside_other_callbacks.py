"""Staged runs beside early stopping, averaging, metrics of other people's, and odd layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_freeze import (
    ArgumentError,
    ConflictError,
    FreezeBackbone,
    GradualFreeze,
    GradualUnfreeze,
    TrainableParamAudit,
)
from tests.oracle import Oracle
from tests.toys import (
    ByStep,
    FixedDropout,
    Toy,
    changed,
    loader,
    seeded,
    state,
    trainable,
    trainer,
)

SAID = "ignore:.*would end the fit"  # each test that is about it looks for it
MESSAGES = "ignore:.*StochasticWeightAveraging|.*SWA"


# Early stopping


class Stages(Callback):
    """How many parameters train in each epoch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(len(trainable(pl_module)))


class Flat(ByStep):
    """A metric that never improves after the first epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("flat", 1.0)


def stopped(*callbacks: Callback, model: Any = Flat, epochs: int = 40, **options: Any) -> list[int]:
    stages = Stages()
    run = trainer(*callbacks, stages, epochs=epochs, **options)
    run.fit(seeded(model), loader(), loader(seed=2))
    return stages.seen


ALL, HEAD = 16, 2


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("at_validation", [True, False])
@pytest.mark.filterwarnings(SAID)
def test_a_stopper_lets_the_next_stage_begin_and_stops_after_the_last(
    first: bool, at_validation: bool
) -> None:
    stopper = EarlyStopping("flat", patience=2, check_on_train_epoch_end=not at_validation)
    gradual = GradualUnfreeze(monitor="flat", patience=9)
    seen = stopped(*([stopper, gradual] if first else [gradual, stopper]))
    # 1 epoch to set the best value, then 2 without improvement in each stage
    assert seen == [2] * 3 + [6] * 2 + [10] * 2 + [14] * 2 + [16] * 2
    assert stopper.stopped_epoch == len(seen) - 1
    # control: alone it ends where its patience does
    assert len(stopped(EarlyStopping("flat", patience=2))) == 3


def test_it_is_said_once() -> None:
    callbacks = [EarlyStopping("flat", patience=1), GradualUnfreeze(monitor="flat", patience=5)]
    with pytest.warns(UserWarning, match="would end the fit early.*patience anew") as said:
        stopped(*callbacks)
    assert len([w for w in said if "would end the fit" in str(w.message)]) == 1


@pytest.mark.filterwarnings(SAID)
def test_a_stage_that_is_due_anyway_isnt_passed_over() -> None:
    """Both patiences end in the same epoch: one stage a time."""
    seen = stopped(EarlyStopping("flat", patience=1), GradualUnfreeze(monitor="flat", patience=1))
    assert seen == [2] * 2 + [6, 10, 14, 16]


class Bad(Flat):
    value = float("nan")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("flat", self.value if self.current_epoch else 1.0)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, float("nan")),
        ({"stopping_threshold": 0.5}, 0.1),
        ({"divergence_threshold": 5.0}, 9.0),
    ],
)
def test_a_stop_for_another_reason_than_patience_is_a_stop(options: Any, value: float) -> None:
    model = type("Bad", (Bad,), {"value": value})
    stopper = EarlyStopping("flat", patience=9, **options)
    assert len(stopped(stopper, GradualUnfreeze(monitor="flat", patience=5), model=model)) == 2


def test_a_stop_of_the_users_is_a_stop() -> None:
    class Stop(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    assert len(stopped(Stop(), GradualUnfreeze(monitor="flat", patience=5))) == 2


@pytest.mark.filterwarnings(SAID)
def test_a_resume_from_any_epoch_goes_the_same_way(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        stopper = EarlyStopping("flat", patience=2)
        return [stopper, GradualUnfreeze(monitor="flat", patience=9), FixedDropout()]

    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = stopped(*callbacks(), save, enable_checkpointing=True)
    for epoch in range(len(whole) - 1):
        stages = Stages()
        trainer(*callbacks(), stages, epochs=40).fit(
            seeded(Flat), loader(), loader(seed=2), ckpt_path=tmp_path / f"epoch={epoch}.ckpt"
        )
        assert stages.seen == whole[epoch + 1 :], epoch


# Stages that never come


def said(*callbacks: Callback, **options: Any) -> str:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(*callbacks, **options).fit(seeded(Toy), loader(), loader(seed=2))
    return " ".join(str(w.message) for w in told if "lightning_freeze" in w.filename)


@pytest.mark.parametrize(
    ("make", "options", "at"),
    [
        (lambda: FreezeBackbone(unfreeze_at_epoch=10), {"epochs": 3}, "epoch 10"),
        (GradualUnfreeze, {"epochs": 3}, "epoch 3"),
        (lambda: GradualUnfreeze({0: "head", 7: "**"}), {"epochs": 3}, "epoch 7"),
        (lambda: GradualFreeze(start=5), {"epochs": 3}, "epoch 5"),
        (GradualUnfreeze.chain_thaw, {"epochs": 3}, "epoch 3"),
        (lambda: GradualUnfreeze(start=30, unit="step"), {"epochs": -1, "max_steps": 8}, "step 30"),
        (lambda: GradualUnfreeze(start=30, unit="step"), {"epochs": 2}, "step 30"),
        (lambda: FreezeBackbone(unfreeze_at_epoch=4), {"epochs": 9, "max_steps": 8}, "epoch 4"),
    ],
)
def test_stages_beyond_the_end_are_told(make: Any, options: Any, at: str) -> None:
    told = said(make(), **options)
    assert "stages are never reached" in told
    assert f"begins at {at}" in told


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: FreezeBackbone(unfreeze_at_epoch=2), {"epochs": 3}),
        (FreezeBackbone, {"epochs": 1}),
        (GradualUnfreeze, {"epochs": 5}),
        (lambda: GradualUnfreeze.lisa(1, 5), {"epochs": 1}),
        (lambda: GradualUnfreeze(start=3, unit="step"), {"epochs": 2}),
        (lambda: GradualUnfreeze(monitor="val_loss"), {"epochs": 1}),
        (GradualUnfreeze.layerwise_lr_decay, {"epochs": 1}),
    ],
)
def test_stages_that_come_are_not_told(make: Any, options: Any) -> None:
    assert said(make(), **options) == ""


def test_a_stopper_less_patient_than_a_stage_is_long_is_told() -> None:
    stopper = lambda patience: EarlyStopping("val_loss", patience=patience)  # noqa: E731
    late = lambda: FreezeBackbone(unfreeze_at_epoch=4)  # noqa: E731
    assert "may never come" in said(late(), stopper(3), epochs=5)
    assert said(late(), stopper(4), epochs=5) == ""
    assert said(GradualUnfreeze(), stopper(3), epochs=5) == ""


def test_the_verdict_names_what_was_scheduled_and_never_trained() -> None:
    def verdict(epochs: int, *more: Callback) -> str:
        audit = TrainableParamAudit(table=False)
        trainer(GradualUnfreeze(), audit, *more, epochs=epochs).fit(seeded(Toy), loader())
        return audit.verdict

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 3

    assert "never trained in this fit: `backbone.embed.weight` and 1 more" in verdict(4)
    assert "never trained in this fit: `backbone.embed.weight` and 1 more" in verdict(9, Stop())
    assert "never trained" not in verdict(5)


# Batch-norm statistics


class Recomputes(Callback):
    """Recomputes the statistics of all batch-norms when the training is over."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        update_bn([x for x, _ in loader()], pl_module)


def averaging(epoch: int) -> Callback:
    return StochasticWeightAveraging(1e-3, swa_epoch_start=epoch)


@pytest.mark.filterwarnings(MESSAGES)
@pytest.mark.parametrize("other", [lambda: averaging(1), lambda: averaging(2), Recomputes])
@pytest.mark.parametrize("first", [True, False])
def test_a_frozen_batch_norm_keeps_its_statistics_to_the_bit(
    other: Callable[[], Callback], first: bool
) -> None:
    def made() -> Toy:
        model = seeded(Toy)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(1, 3)
        return model

    def moved(*callbacks: Callback) -> set[str]:
        model = made()
        before = state(model)
        trainer(*callbacks, epochs=4).fit(model, loader())
        return {name for name in changed(before, state(model)) if "running" in name}

    audit = TrainableParamAudit(table=False)
    pair = [FreezeBackbone(trainable_layers=1), other()]
    kept = moved(*(pair if first else pair[::-1]), audit)
    assert audit.findings == []
    assert kept == {"backbone.blocks.2.norm.running_mean", "backbone.blocks.2.norm.running_var"}
    assert len(moved(other())) == 6  # control


# Metrics


class Alias(Toy):
    """Logs through another name of its own."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        tell = self.log
        tell("val_" + "loss", self.loss(batch))


class TwoLoaders(Toy):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))


class NotInSanity(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.log("val_loss", self.loss(batch))


class Counts(Callback):
    """A metric that a callback logs."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("val_loss", float(trainer.current_epoch))


class Silent(Toy):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


@pytest.mark.parametrize(
    ("model", "monitor", "more"),
    [
        (Alias, "val_loss", []),
        (TwoLoaders, "val_loss/dataloader_idx_0", []),
        (TwoLoaders, "val_loss/dataloader_idx_1", []),
        (NotInSanity, "val_loss", []),
        (Silent, "val_loss", [Counts()]),
    ],
)
def test_what_early_stopping_accepts_can_be_monitored(
    model: Any, monitor: str, more: list[Callback]
) -> None:
    loaders = [loader(seed=2), loader(seed=3)] if model is TwoLoaders else loader(seed=2)
    options = {"epochs": 3, "num_sanity_val_steps": 2}
    trainer(EarlyStopping(monitor, patience=9), *more, **options).fit(
        seeded(model), loader(), loaders
    )
    ours = GradualUnfreeze(monitor=monitor, patience=1, min_delta=99.0)
    net = seeded(model)
    trainer(ours, *more, **options).fit(net, loader(), loaders)
    assert len(trainable(net)) > HEAD


@pytest.mark.parametrize("monitor", ["val_los", "accuracy"])
def test_a_metric_that_nothing_logs_ends_the_fit_with_the_first_validation(monitor: str) -> None:
    stages = Stages()
    with pytest.raises(
        ArgumentError, match=rf"`monitor='{monitor}'` .*Metrics that exist: .*val_loss"
    ):
        trainer(stages, GradualUnfreeze(monitor=monitor), epochs=3).fit(
            seeded(Toy), loader(), loader(seed=2)
        )
    assert len(stages.seen) == 1


# Who froze it, who left it out


def test_an_optimizer_that_holds_only_the_head_is_told() -> None:
    def head(module: Any) -> Any:
        return torch.optim.SGD(module.head.parameters(), lr=0.1)

    for make in (GradualUnfreeze, lambda: FreezeBackbone(unfreeze_at_epoch=1)):
        with pytest.warns(UserWarning, match="`configure_optimizers` gives them to no optimizer"):
            trainer(make(), epochs=1).fit(seeded(lambda: Toy(head)), loader())
    trainer(FreezeBackbone(), epochs=1).fit(seeded(lambda: Toy(head)), loader())  # control

    def filtered(module: Any) -> Any:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)

    model = seeded(lambda: Toy(filtered))
    model.backbone.embed.requires_grad_(False)  # left out because the user froze it
    trainer(GradualUnfreeze(), epochs=5).fit(model, loader())


@pytest.mark.parametrize(
    "make",
    [
        lambda: FreezeBackbone(trainable_layers=2),
        lambda: FreezeBackbone(trainable_layers=-1),
        lambda: FreezeBackbone(unfreeze_at_epoch=1),
        GradualUnfreeze,
    ],
)
def test_a_backbone_that_the_model_froze_itself_is_told(make: Callable[[], Callback]) -> None:
    model = seeded(Toy)
    model.backbone.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"froze it before|was frozen before the fit"):
        trainer(make(), epochs=2).fit(model, loader())
    assert trainable(model) == {"head.weight", "head.bias"}
    trainer(make(), epochs=2).fit(seeded(Toy), loader())  # control


def test_a_head_that_the_model_froze_itself_is_named_where_nothing_is_left() -> None:
    model = seeded(Toy)
    model.head.requires_grad_(False)
    with pytest.raises(ConflictError, match=r"`head.bias`, were frozen before the fit"):
        trainer(FreezeBackbone(), epochs=1).fit(model, loader())
    trainer(FreezeBackbone(trainable_layers=1), epochs=1).fit(model, loader())  # control


# Layers that mind the mode


class Recurrent(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"embed": nn.Linear(4, 8), "rnn": nn.LSTM(8, 8, num_layers=2, dropout=0.5)}
        )
        self.modes: list[tuple[bool, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        rnn = self.backbone["rnn"]
        self.modes.append((rnn.training, rnn.dropout))
        return self.head(rnn(self.backbone["embed"](x)[None])[0][0])


def test_a_frozen_rnn_that_gradients_pass_stays_in_train_mode_without_dropout() -> None:
    model = seeded(Recurrent)
    before = state(model)
    audit = TrainableParamAudit(table=False)
    trainer(FreezeBackbone("backbone.rnn"), audit, epochs=2).fit(model, loader())
    assert audit.findings == []
    assert set(model.modes) == {(True, 0.0)}
    rnn = model.backbone["rnn"]
    assert (rnn.training, rnn.dropout) == (True, 0.5)
    assert {name.split(".")[0] for name in changed(before, state(model))} == {"head", "backbone"}
    assert not any("rnn" in name for name in changed(before, state(model)))


def test_a_frozen_rnn_above_nothing_that_trains_is_in_eval_mode() -> None:
    model = seeded(Recurrent)
    trainer(FreezeBackbone("backbone"), epochs=1).fit(model, loader())
    assert set(model.modes) == {(False, 0.5)}
    released = seeded(Recurrent)
    gradual = GradualUnfreeze({0: ["head", "backbone.embed"], 1: "backbone.rnn"})
    trainer(gradual, epochs=2).fit(released, loader())
    assert list(dict.fromkeys(released.modes)) == [(True, 0.0), (True, 0.5)]


class Encodes(Toy):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.backbone = nn.Sequential()
        self.embed = nn.Linear(4, 8)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)[:, None].expand(-1, 5, -1)
        padding = torch.zeros(len(x), 5, dtype=torch.bool)
        padding[0, 3:] = True
        return self.head(self.encoder(tokens, src_key_padding_mask=padding)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_whose_lower_layers_are_frozen_computes_on_padded_tensors() -> None:
    by_hand = seeded(Encodes)
    for part in (by_hand.embed, *by_hand.encoder.layers[:2]):
        part.requires_grad_(False).eval()
    with pytest.raises(AssertionError, match="does not support NestedTensor"):
        trainer(epochs=1).fit(by_hand, loader())
    model = seeded(Encodes)
    before = state(model)
    audit = TrainableParamAudit(table=False)
    groups = ["embed", "encoder.layers.0", "encoder.layers.1", "encoder.layers.2", "head"]
    trainer(GradualUnfreeze(groups=groups), audit, epochs=2).fit(model, loader())
    assert audit.findings == []
    assert "encoder.layers.2.linear1.weight" in changed(before, state(model))
    assert model.encoder.use_nested_tensor


def test_factors_hold_beside_a_stopper() -> None:
    oracle = Oracle(lambda name: 1.0 if name.startswith("head") else 0.1)
    callbacks = [FreezeBackbone(unfreeze_at_epoch=1, lr_scale=0.1), EarlyStopping("val_loss")]
    trainer(*callbacks, oracle, epochs=3).fit(seeded(Toy), loader(), loader(seed=2))
    assert oracle.wrong == []
