"""A small model with a frozen body, and what the audit's tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze import freeze
from lightning_freeze.audit.findings import CODES, Seen
from lightning_freeze.audit.ledger import Ledger
from lightning_freeze.audit.scene import Scene


class Net(nn.Module):
    """A frozen body with batch-norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def frozen_net() -> Net:
    net = Net()
    freeze(net, "body")
    return net


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(6, 3)).pow(2).sum().backward()
    optimizer.step()


def around(ledger: Ledger, *optimizers: Optimizer) -> Scene:
    """A loop that nobody watched: causes are told from what is left behind."""
    return Scene(optimizers, shared=ledger.shared)


def look(model: nn.Module, *optimizers: Optimizer) -> list[Seen]:
    ledger = Ledger(model)
    return ledger.check(around(ledger, *optimizers))


def only(found: list[Seen]) -> Seen:
    assert len(found) == 1, [str(seen) for seen in found]
    assert found[0].code in CODES
    assert found[0].cause
    assert found[0].fix
    return found[0]


def codes(found: list[Seen]) -> set[str]:
    return {seen.code for seen in found}


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "decoder": nn.Linear(4, 5, bias=False)})
    model["decoder"].weight = model["embed"].weight
    return model
