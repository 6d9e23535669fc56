"""What an optimizer should have done in a step, worked out by a plain one of its kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from tests.toys import same


class Oracle(Callback):
    """Redoes each step tensor by tensor, at the user's rate times a factor, and compares the bits.

    Attributes:
        lrs: for each step, the rate of each of the user's groups.
        wrong: step and name of each tensor that didn't end where the plain optimizer puts it.
        moved: names of the tensors that a step has changed.
    """

    def __init__(self, factor_of: Callable[[str], float] = lambda name: 1.0) -> None:
        self.factor_of = factor_of
        self.lrs: list[list[float]] = []
        self.wrong: list[tuple[int, str]] = []
        self.moved: set[str] = set()
        self._before: dict[str, Any] = {}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        name_of = {id(p): n for n, p in pl_module.named_parameters()}
        self.lrs.append([float(group["lr"]) for group in optimizer.param_groups])
        self._before = {
            name_of[id(p)]: (
                type(optimizer),
                copy.deepcopy(
                    {k: v for k, v in group.items() if k not in ("params", "param_names")}
                ),
                p.detach().clone(),
                p.grad.clone(),
                copy.deepcopy(optimizer.state.get(p, {})),
            )
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        }

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        for name, (kind, options, value, grad, state) in self._before.items():
            tensor = nn.Parameter(value.clone())
            plain = kind([tensor])
            plain.param_groups[0].update(options)
            plain.param_groups[0]["lr"] = options["lr"] * self.factor_of(name)
            if state:
                plain.state[tensor] = state
            tensor.grad = grad
            plain.step()
            if not same(tensor.detach(), parameters[name].detach()):
                self.wrong.append((trainer.global_step, name))
            if not torch.equal(value, parameters[name].detach()):
                self.moved.add(name)
        self._before = {}
