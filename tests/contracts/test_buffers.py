"""Weights that are kept as buffers are watched; what a module writes by design is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_freeze import (
    Finding,
    FreezeBackbone,
    FrozenWeightsChanged,
    TrainableParamAudit,
    assert_frozen,
)
from tests.toys import Toy, loader, seeded, trainer


class Quantised(nn.Module):
    """A layer whose weights are buffers, as GPTQ and AWQ keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.randint(-8, 8, (8, 8)).to(torch.int8))
        self.register_buffer("scales", torch.full((8,), 0.05))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.cache += 1
        return x @ (self.qweight * self.scales[:, None])


class Adapter(nn.Module):
    """A quantised layer with an adapter around it, which trains."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.low = Quantised(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.low(x)


class Tuned(Toy):
    """An adapter under the head; a queue and a norm without weights beside it."""

    def __init__(self) -> None:
        super().__init__(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
        self.adapter, self.queue = Adapter(), Queue()
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.queue(self.norm(self.adapter(self.backbone(x)))))


class Queue(nn.Module):
    """Keeps the last output, as a contrastive loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.last.copy_(x.detach().mean(0))
        return x


class Once(Callback):
    def __init__(self, act: Callable[[Any], Any]) -> None:
        self.act = act

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            self.act(module)


def fitted(act: Callable[[Any], Any], *callbacks: Callback) -> list[Finding]:
    audit = TrainableParamAudit(table=False, on_violation="warn", every="batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(*callbacks, Once(act), audit, epochs=3).fit(seeded(Tuned), loader())
    return audit.findings


def stepped(act: Callable[[Any], Any]) -> list[Finding]:
    model = seeded(Tuned)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        with assert_frozen(model):
            for step, (x, y) in enumerate([*loader(), *loader()], 1):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                if step == 6:
                    act(model)
    except FrozenWeightsChanged as error:
        return list(error.findings)
    return []


SETTINGS: dict[str, Callable[[Callable[[Any], Any]], list[Finding]]] = {
    "suite": lambda act: fitted(act, FreezeBackbone(trainable="adapter")),
    "suite, in train mode": lambda act: fitted(
        act, FreezeBackbone(trainable="adapter", eval_mode=False, train_bn=True)
    ),
    "by hand": fitted,
    "plain loop": stepped,
}
ACTS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "weights": (lambda m: m.adapter.base.qweight.add_(1), ("adapter.base.qweight",)),
    "scales": (lambda m: m.adapter.base.scales.mul_(1.1), ("adapter.base.scales",)),
    "scales past autograd": (
        lambda m: m.adapter.base.scales.data.mul_(1.1),
        ("adapter.base.scales",),
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("act", ACTS)
def test_a_write_to_weights_kept_as_buffers_is_found(act: str, setting: str) -> None:
    do, names = ACTS[act]
    found = SETTINGS[setting](do)
    assert [(f.code, f.names) for f in found] == [("frozen-buffer-changed", names)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_moves_by_design_is_no_finding(setting: str) -> None:
    assert SETTINGS[setting](lambda _: None) == []


def test_a_quantised_layer_that_is_exchanged_is_found_without_parameters() -> None:
    def act(module: Any) -> None:
        module.adapter.base = nn.Identity()

    assert "parameter-replaced" in {finding.code for finding in fitted(act)}
