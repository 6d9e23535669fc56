"""Healthy runs: the audit finds nothing, at every batch, however the run is done."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_freeze import FreezeBackbone, GradualUnfreeze, ReinitTopLayers, TrainableParamAudit
from tests.toys import Toy, changed, loader, seeded, state, trainer

Make = Callable[[], Toy]


class Manual(Toy):
    """Two optimizers, by hand, with toggled flags, as a GAN has them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.backbone.parameters(), lr=1e-2),
            torch.optim.SGD(self.head.parameters(), lr=1e-2),
        ]


class Checkpointed(Toy):
    """Recomputes its blocks in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone.embed(x)
        x.requires_grad_(True) if x.is_leaf else None  # as `enable_input_require_grads` does
        for block in self.backbone.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Sometimes(Toy):
    """A branch that only every third batch takes."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 3 == 2:
            loss = loss + self.branch(self.backbone(batch[0])).pow(2).mean()
        return loss


class Tied(Toy):
    """Its input layer is used again above."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 8, bias=False)
        self.decoder.weight = self.backbone.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.backbone(x)
        return self.head(hidden + self.decoder(hidden[:, :4]))


class Adapted(Toy):
    """A hand-written freeze with low-rank adapters that train beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 8, bias=False)
        nn.init.zeros_(self.up.weight)
        self.head.requires_grad_(True)
        self.backbone.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x) + self.up(self.down(x)))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Compiled(Toy):
    """Its network is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.compile(self.backbone, backend="aot_eager")


def averaging() -> Callback:
    return lightning_callbacks.WeightAveraging()


RUNS: dict[str, tuple[Make, Callable[[], list[Callback]], dict[str, Any]]] = {
    "plain": (Toy, lambda: [FreezeBackbone()], {}),
    "gradual": (Toy, lambda: [GradualUnfreeze(lr_decay=0.5)], {}),
    "re-initialised": (Toy, lambda: [ReinitTopLayers(1), GradualUnfreeze()], {}),
    "accumulation": (Toy, lambda: [GradualUnfreeze()], {"accumulate_grad_batches": 2}),
    "clipping by norm": (Toy, lambda: [GradualUnfreeze()], {"gradient_clip_val": 0.1}),
    "clipping by value": (
        Toy,
        lambda: [GradualUnfreeze()],
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    ),
    "bf16-mixed": (Toy, lambda: [GradualUnfreeze()], {"precision": "bf16-mixed"}),
    "bf16-true": (Toy, lambda: [GradualUnfreeze()], {"precision": "bf16-true"}),
    "two optimizers by hand": (Manual, lambda: [FreezeBackbone(trainable_layers=1)], {}),
    "averaged by SWA": (
        lambda: Toy(lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
        lambda: [
            FreezeBackbone(),
            StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
        ],
        {},
    ),
    "averaged": (Toy, lambda: [FreezeBackbone(), averaging()], {}),
    "checkpointed": (lambda: Checkpointed(False), lambda: [GradualUnfreeze()], {}),
    "checkpointed, reentrant": (lambda: Checkpointed(True), lambda: [GradualUnfreeze()], {}),
    "compiled": (Compiled, lambda: [GradualUnfreeze()], {}),
    "a branch in some steps": (Sometimes, lambda: [GradualUnfreeze()], {}),
    "tied": (Tied, lambda: [GradualUnfreeze()], {}),
    "adapters": (Adapted, list, {}),
    "several validations an epoch": (
        Toy,
        lambda: [GradualUnfreeze()],
        {"val_check_interval": 0.5, "num_sanity_val_steps": 1},
    ),
}


@pytest.mark.parametrize("every", ["batch", 3])
@pytest.mark.parametrize("case", RUNS)
def test_a_healthy_run_has_no_finding(case: str, every: str) -> None:
    make, callbacks, options = RUNS[case]
    if case == "averaged" and not hasattr(lightning_callbacks, "WeightAveraging"):
        pytest.skip("WeightAveraging came with Lightning 2.6")
    model = seeded(make)
    before = state(model)
    audit = TrainableParamAudit(table=False, every=every, dead_after=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = trainer(*callbacks(), audit, epochs=6, **options)
        fit.fit(model, loader(), loader(seed=2))
    assert audit.findings == []
    assert audit.verdict.startswith("Audit: clean in ")
    moved = changed(before, state(model))
    assert any(name.startswith(("head", "up")) for name in moved)


@pytest.mark.parametrize("decay", [0.77, 0.999])
def test_an_exponential_average_is_named_as_what_it_is(decay: float) -> None:
    if not hasattr(lightning_callbacks, "EMAWeightAveraging"):
        pytest.skip("EMAWeightAveraging came with Lightning 2.6")
    average = lightning_callbacks.EMAWeightAveraging(decay=decay)
    audit = TrainableParamAudit(table=False, on_violation="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(FreezeBackbone(), average, audit, epochs=3).fit(seeded(Toy), loader())
    assert audit.findings
    assert {finding.code for finding in audit.findings} == {"frozen-changed"}
    assert all("`EMAWeightAveraging` averages weights" in f.cause for f in audit.findings)
    assert all(name.startswith("backbone") for f in audit.findings for name in f.names)
    assert audit.findings[0].epoch == 0
