"""The final weights of a staged run are, bit for bit, those of the same run written by hand."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from lightning_freeze import FreezeBackbone, GradualUnfreeze, TrainableParamAudit
from tests.callbacks.recipes import OPTIMIZERS
from tests.toys import Block, FixedDropout, Toy, changed, loader, seeded, state, trainer

EPOCHS = 5
TOP_DOWN = [
    ["head"],
    ["head", "backbone.blocks.2"],
    ["head", "backbone.blocks.2", "backbone.blocks.1"],
    ["head", "backbone.blocks"],
    ["head", "backbone"],
]
BOTTOM_UP = [
    ["head"],
    ["head", "backbone.embed"],
    ["head", "backbone.embed", "backbone.blocks.0"],
    ["head", "backbone.embed", "backbone.blocks.0", "backbone.blocks.1"],
    ["head", "backbone"],
]
LP_FT = [["head"], ["head"], ["head", "backbone"], ["head", "backbone"], ["head", "backbone"]]


def trains(name: str, prefixes: list[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def by_hand(optimizer_name: str, stages: list[list[str]], clip: float | None = None) -> Toy:
    """Flags set by hand, an optimizer built by hand at each stage with the kept state."""
    model = seeded(Toy)
    model.train()
    kept: dict[nn.Parameter, dict[str, object]] = {}
    step = 0
    for epoch in range(EPOCHS):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = trains(name, stages[epoch])
            if not parameter.requires_grad:
                parameter.grad = None
        for name, module in model.named_modules():
            inside = list(module.parameters())
            if isinstance(module, Block):
                module.train(inside[0].requires_grad)
            elif name == "backbone" and not any(p.requires_grad for p in inside):
                module.eval()
        optimizer = OPTIMIZERS[optimizer_name](model)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
            for parameter in group["params"]:
                if parameter in kept:
                    optimizer.state[parameter] = kept[parameter]
        for batch in loader():
            torch.manual_seed(1000 + step)
            for group in optimizer.param_groups:
                base = group.setdefault("base", group["lr"])
                group["lr"] = base * 0.9**step
            optimizer.zero_grad()
            model.loss(batch).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(
                    [p for g in optimizer.param_groups for p in g["params"]], clip
                )
            optimizer.step()
            step += 1
        kept = dict(optimizer.state)
    return model


def staged(optimizer_name: str, callback: object, clip: float | None = None) -> Toy:
    def configure(module: nn.Module) -> object:
        made = OPTIMIZERS[optimizer_name](module)
        scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.9**step)
        return {
            "optimizer": made,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    model = seeded(lambda: Toy(configure))
    audit = TrainableParamAudit(table=False, dead_after=2)
    options = {"gradient_clip_val": clip}
    trainer(callback, audit, FixedDropout(), epochs=EPOCHS, **options).fit(model, loader())
    assert audit.findings == []
    return model


@functools.cache
def elsewhere(optimizer_name: str) -> dict[str, torch.Tensor]:
    """Where another schedule ends: the control of each order."""
    return state(staged(optimizer_name, GradualUnfreeze(start=2)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("order", ["top_down", "bottom_up", "lp_ft"])
def test_staged_run_ends_with_the_weights_of_the_same_run_by_hand(
    optimizer: str, order: str
) -> None:
    callback, stages = {
        "top_down": (GradualUnfreeze(), TOP_DOWN),
        "bottom_up": (GradualUnfreeze(order="bottom_up"), BOTTOM_UP),
        "lp_ft": (FreezeBackbone(unfreeze_at_epoch=2), LP_FT),
    }[order]
    start = state(seeded(Toy))
    hand = state(by_hand(optimizer, stages))
    ours = state(staged(optimizer, callback))
    assert changed(hand, ours) == set()
    # control: it did move, and another schedule ends elsewhere
    assert "backbone.embed.weight" in changed(start, ours)
    assert changed(ours, elsewhere(optimizer)) != set()


def test_staged_run_with_gradient_clipping_is_that_by_hand() -> None:
    hand = state(by_hand("AdamW", TOP_DOWN, clip=0.05))
    ours = state(staged("AdamW", GradualUnfreeze(), clip=0.05))
    assert changed(hand, ours) == set()
    assert changed(ours, state(staged("AdamW", GradualUnfreeze()))) != set()
