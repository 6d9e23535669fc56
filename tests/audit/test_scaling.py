"""Many tensors cost in proportion, also when all of them change."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.optim import SGD

from lightning_freeze import layer_groups
from lightning_freeze.audit.ledger import Ledger
from tests.audit.nets import around, only


class Many(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        blocks = [nn.Sequential(*[nn.Linear(2, 2) for _ in range(5)]) for _ in range(count // 10)]
        self.backbone = nn.ModuleList(blocks)
        self.head = nn.Linear(2, 2)


def all_changed(count: int) -> float:
    model = Many(count)
    model.backbone.requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.1)
    ledger = Ledger(model)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(1)
    began = time.perf_counter()
    seen = only(ledger.check(around(ledger, optimizer)))
    took = time.perf_counter() - began
    assert len(seen.names) == count
    return took


def grouped(count: int) -> float:
    model = Many(count)
    began = time.perf_counter()
    assert len(layer_groups(model)) > 2
    return time.perf_counter() - began


def test_sixteen_times_as_many_take_nowhere_near_that_squared() -> None:
    for measure in (all_changed, grouped):
        few, many = (min(measure(count) for _ in range(3)) for count in (500, 8000))
        assert many < 64 * few
