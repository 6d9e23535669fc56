"""Every optimizer and scheduler that the oracles are run with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

STEPS_PER_EPOCH = 4
EPOCHS = 5
TOTAL = STEPS_PER_EPOCH * EPOCHS


def two_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The usual two: weight decay for matrices, none for the rest, and another lr."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": rest, "weight_decay": 0.0, "lr": 5e-3},
    ]


def _one_group_of_matrices(module: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [p for p in module.parameters() if p.ndim == 2]}]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda m: torch.optim.AdamW(two_groups(m), lr=1e-2, foreach=False),
    "AdamW-foreach": lambda m: torch.optim.AdamW(two_groups(m), lr=1e-2, foreach=True),
    "AdamW-fused": lambda m: torch.optim.AdamW(two_groups(m), lr=1e-2, fused=True),
    "SGD": lambda m: torch.optim.SGD(two_groups(m), lr=1e-2, momentum=0.9),
    "RMSprop": lambda m: torch.optim.RMSprop(two_groups(m), lr=1e-2, momentum=0.9),
    "Adafactor": lambda m: torch.optim.Adafactor(two_groups(m), lr=1e-2),
    "Muon": lambda m: torch.optim.Muon(_one_group_of_matrices(m), lr=1e-2),
}


def _constant(step: int) -> float:
    return 1.0 / (1 + step)


def _falling(step: int) -> float:
    return 0.9**step


def _per_group(optimizer: Optimizer, functions: list[Any]) -> list[Any]:
    return functions[: len(optimizer.param_groups)]


def _cycles(optimizer: Optimizer) -> bool:
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


def _sequential(o: Optimizer) -> Any:
    warm = lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5)
    rest = lr_scheduler.CosineAnnealingLR(o, T_max=TOTAL - 5, eta_min=1e-4)
    return lr_scheduler.SequentialLR(o, [warm, rest], milestones=[5])


def _chained(o: Optimizer) -> Any:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=6), lr_scheduler.ExponentialLR(o, 0.95)]
    )


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.7),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.93),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, _constant),
    "LambdaLR-list": lambda o: lr_scheduler.LambdaLR(o, _per_group(o, [_constant, _falling])),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.05, total_steps=TOTAL + 1, cycle_momentum=_cycles(o)
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(
        o, 6, eta_min=1e-3
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 1e-3, 2e-2, step_size_up=3, cycle_momentum=_cycles(o)
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, TOTAL, power=2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(
        o, factor=0.8, patience=1, min_lr=1e-3
    ),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
    "linear-warmup": lambda o: get_linear_schedule_with_warmup(o, 4, TOTAL),
    "cosine-warmup": lambda o: get_cosine_schedule_with_warmup(o, 4, TOTAL),
}


def configure(optimizer: str, scheduler: str) -> Callable[[nn.Module], dict[str, Any]]:
    """A `configure_optimizers` as a user writes it."""

    def configure_optimizers(module: nn.Module) -> dict[str, Any]:
        made = OPTIMIZERS[optimizer](module)
        return {
            "optimizer": made,
            "lr_scheduler": {
                "scheduler": SCHEDULERS[scheduler](made),
                "interval": "step",
                "monitor": "tick",
            },
        }

    return configure_optimizers
