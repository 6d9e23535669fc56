"""Layers that freeze again: equal to a loop written by hand, and exact after every resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_freeze import ConflictError, GradualUnfreeze, TrainableParamAudit
from lightning_freeze.schedule.rules import RandomLayers
from tests.callbacks.recipes import OPTIMIZERS
from tests.callbacks.test_oracle_resume import assert_equal, everything
from tests.toys import (
    Block,
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

EPOCHS, PER_EPOCH = 6, 4
STEPS = EPOCHS * PER_EPOCH
BLOCKS = ["backbone.blocks.0", "backbone.blocks.1", "backbone.blocks.2"]
CHAIN = [["head"], ["backbone.embed"], *([block] for block in BLOCKS), ["head", "backbone"]]
WRITTEN = {
    0: ["head", "blocks.2"],
    2: {"freeze": "**", "unfreeze": "blocks.0", "lr_scale": 0.5},
    3: {"freeze": "blocks.0", "unfreeze": ["embed", "head"]},
    5: "**",
}
BY_HAND = [
    ["head", BLOCKS[2]],
    ["head", BLOCKS[2]],
    [BLOCKS[0]],
    ["head", "backbone.embed"],
    ["head", "backbone.embed"],
    ["head", "backbone"],
]


def lisa_at(step: int) -> list[str]:
    drawn = RandomLayers(2, 3, 4).drawn(step // 3, 3)
    return ["head", "backbone.embed", *(BLOCKS[layer] for layer in drawn)]


KINDS: dict[str, tuple[Callable[[], GradualUnfreeze], Callable[[int], list[str]]]] = {
    "chain-thaw": (GradualUnfreeze.chain_thaw, lambda step: CHAIN[step // PER_EPOCH]),
    "chain-thaw by steps": (
        lambda: GradualUnfreeze.chain_thaw(every=3, unit="step"),
        lambda step: CHAIN[min(step // 3, 5)],
    ),
    "lisa": (lambda: GradualUnfreeze.lisa(layers=2, every=3, seed=4), lisa_at),
    "written": (lambda: GradualUnfreeze(WRITTEN), lambda step: BY_HAND[step // PER_EPOCH]),
}


def by_hand(optimizer_name: str, kind: str) -> Toy:
    """Flags, modes and a new optimizer at each change; what freezes again loses its state."""
    model = seeded(Toy)
    model.train()
    state_of: dict[nn.Parameter, dict[str, Any]] = {}
    for step in range(STEPS):
        trains = KINDS[kind][1](step)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = any(name.startswith(prefix + ".") for prefix in trains)
            parameter.grad = None
        for module in model.modules():
            if isinstance(module, Block):
                module.train(module.linear.weight.requires_grad)
        optimizer = OPTIMIZERS[optimizer_name](model)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.9**step
        if kind == "written":  # what is unfrozen with a factor keeps it
            slow = {id(p) for p in model.backbone.blocks[0].parameters()}
            for group in list(optimizer.param_groups):
                parts = [[], []]
                for p in group["params"]:
                    parts[id(p) in slow].append(p)
                group["params"] = parts[0]
                rate = group["lr"] * 0.5
                optimizer.param_groups.append({**group, "params": parts[1], "lr": rate})
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
            optimizer.state.update((p, state_of[p]) for p in group["params"] if p in state_of)
        torch.manual_seed(1000 + step)
        batch = list(loader())[step % PER_EPOCH]  # a loader draws a number, too
        model.loss(batch).backward()
        optimizer.step()
        state_of = dict(optimizer.state)
    return model


def configure(optimizer: str) -> Callable[[nn.Module], Any]:
    def configure_optimizers(module: nn.Module) -> Any:
        made = OPTIMIZERS[optimizer](module)
        scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.9**step)
        return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return configure_optimizers


def fit(
    kind: str, optimizer: str = "AdamW", save: ModelCheckpoint | None = None, **resume: Any
) -> tuple[Any, Toy, TrainableParamAudit]:
    model = seeded(lambda: ByStep(configure(optimizer)))
    audit = TrainableParamAudit(table=False, dead_after=2)
    callbacks = [KINDS[kind][0](), audit, FixedDropout(), *([save] if save else [])]
    run = trainer(*callbacks, epochs=EPOCHS, enable_checkpointing=save is not None)
    run.fit(model, loader(), **resume)
    assert audit.findings == []
    return run, model, audit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_a_run_in_which_layers_freeze_again_is_that_of_a_loop_by_hand(
    kind: str, optimizer: str
) -> None:
    hand = state(by_hand(optimizer, kind))
    _, model, _ = fit(kind, optimizer)
    assert changed(hand, state(model)) == set()
    # control: everything has moved, and in another order it ends elsewhere
    start = state(seeded(Toy))
    assert {name for name in start if name.endswith("weight")} <= changed(start, hand)
    other = "lisa" if kind != "lisa" else "chain-thaw"
    assert changed(hand, state(by_hand(optimizer, other))) != set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_which_layers_freeze_again_is_exact_after_a_resume(
    tmp_path: Path, kind: str
) -> None:
    save = ModelCheckpoint(
        tmp_path, filename="{step:02d}", save_top_k=-1, every_n_train_steps=5,
        save_on_train_epoch_end=False,
    )  # fmt: skip
    run, model, _ = fit(kind, save=save)
    whole, weights = everything(run, model), state(model)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 4  # steps 5, 10, 15 and the last batch of an epoch, 20
    for path in paths:
        run, model, _ = fit(kind, ckpt_path=path)
        assert changed(weights, state(model)) == set(), path.name
        assert_equal(whole, everything(run, model))


def test_what_freezes_again_has_no_gradient_and_no_optimizer_state() -> None:
    run, model, _ = fit("lisa")
    held = {id(p) for p in run.optimizers[0].state}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        assert (id(parameter) in held) == parameter.requires_grad
    assert 0 < sum(not p.requires_grad for p in model.parameters()) < 10


def test_an_audit_knows_since_when_a_layer_is_frozen_again() -> None:
    model = seeded(Toy)
    audit = TrainableParamAudit(table=False)
    schedule = {0: "head", 1: {"freeze": "head", "unfreeze": "embed"}}
    trainer(GradualUnfreeze(schedule), audit, epochs=3).fit(model, loader())
    frozen = audit.to_dict()["certificate"]["frozen"]
    assert frozen["head.weight"]["since"] == {"epoch": 1, "step": 4}
    assert frozen["backbone.blocks.0.linear.weight"]["since"] == {"epoch": 0, "step": 0}
    assert "backbone.embed.weight" not in frozen
    assert trainable(model) == {"backbone.embed.weight", "backbone.embed.bias"}


def test_an_audit_sees_a_write_to_a_layer_that_was_frozen_again() -> None:
    class Write(FixedDropout):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                module.head.weight.data.add_(1e-3)

    audit = TrainableParamAudit(table=False, on_violation="warn")
    schedule = {0: "head", 1: {"freeze": "head", "unfreeze": "embed"}}
    with pytest.warns(UserWarning, match=r"head\.weight changed although frozen"):
        trainer(GradualUnfreeze(schedule), audit, Write(), epochs=2).fit(seeded(Toy), loader())
    assert [finding.names for finding in audit.findings] == [("head.weight",)]


def test_chain_thaw_by_a_metric_goes_on_when_it_stalls() -> None:
    seen: list[set[str]] = []

    class Look(FixedDropout):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            seen.append({name.rpartition(".")[0] for name in trainable(module)})

    chain = GradualUnfreeze.chain_thaw(monitor="val_steps", patience=1)
    trainer(chain, Look(), epochs=4).fit(seeded(Toy), loader(), loader(seed=2))
    assert seen[0] == {"head"}
    assert {"backbone.embed"} in seen


def test_a_stage_that_leaves_nothing_to_train_is_refused_before_the_first_batch() -> None:
    model = seeded(Toy)
    for parameter in model.backbone.embed.parameters():
        parameter.requires_grad = False
    before = state(model)
    with pytest.raises(ConflictError, match="Nothing is left to train from epoch 1 on"):
        trainer(GradualUnfreeze.chain_thaw(), epochs=3).fit(model, loader())
    assert changed(before, state(model)) == set()


def test_two_clocks_that_leave_nothing_to_train_are_told_at_that_moment() -> None:
    by_epoch = GradualUnfreeze({0: "**", 1: {"freeze": ["backbone"]}})
    by_step = GradualUnfreeze({0: "**", 6: {"freeze": "head"}}, unit="step")
    with pytest.raises(ConflictError, match="Nothing is left to train from epoch 1, step 6 on"):
        trainer(by_epoch, by_step, epochs=3).fit(seeded(Toy), loader())
