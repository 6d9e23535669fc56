"""Callbacks are pickled and copied: by spawned ranks, by tuners of hyperparameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_freeze import (
    FreezeBackbone,
    FrozenFeatureCache,
    GradualFreeze,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
)
from tests.toys import Toy, changed, loader, seeded, state, trainer


@pytest.mark.parametrize("way", [copy.deepcopy, lambda cb: pickle.loads(pickle.dumps(cb))])
@pytest.mark.parametrize("make", [FreezeBackbone, GradualUnfreeze, lambda: ReinitTopLayers(1)])
def test_what_took_part_in_a_fit_can_be_copied_and_used_again(
    make: Callable[[], Any], way: Callable[[Any], Any]
) -> None:
    used, audit = make(), TrainableParamAudit(table=False)
    first, second = seeded(Toy), seeded(Toy)
    before = state(first)
    trainer(used, audit, epochs=2).fit(first, loader())
    again, other = way(used), way(audit)
    assert (other.verdict, other.findings) == (audit.verdict, [])
    trainer(again, other, epochs=2).fit(second, loader())
    assert other.findings == []
    assert changed(before, state(first)) == changed(before, state(second)) != set()


def reinit() -> Any:
    return ReinitTopLayers(1)


class Copies(Callback):
    """In a fit: copies and pickles all callbacks, and the model's backbone."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.models: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        others = [callback for callback in trainer.callbacks if callback is not self]
        self.sizes += [len(pickle.dumps(callback)) for callback in others]
        for one, other in zip(others, copy.deepcopy(others)):
            assert one.state_key == other.state_key
        self.models += [copy.deepcopy(pl_module.backbone)]
        self.models += [pickle.loads(pickle.dumps(pl_module.backbone))]


@pytest.mark.filterwarnings("ignore:FrozenFeatureCache did nothing")
@pytest.mark.parametrize(
    "make", [FreezeBackbone, GradualUnfreeze, GradualFreeze, GradualFreeze.autofreeze, reinit]
)
@pytest.mark.filterwarnings("ignore:FrozenFeatureCache did nothing")  # with some of these
def test_callbacks_and_model_can_be_pickled_in_the_middle_of_a_fit(make: Any) -> None:
    class Local(Toy):
        """Of no module: it can't be pickled, and needn't be."""

    copies = Copies()
    cache, audit = FrozenFeatureCache(), TrainableParamAudit(table=False)
    fit = trainer(make(), cache, audit, copies, epochs=2)
    fit.fit(seeded(Local), loader())
    assert len(copies.models) == 2 * fit.global_step > 0
    assert max(copies.sizes) < 50_000


def test_a_copy_that_is_made_in_a_fit_has_modes_of_its_own() -> None:
    copies = Copies()
    model = seeded(Toy)
    trainer(FreezeBackbone(), copies, epochs=1).fit(model, loader())
    for made in copies.models:
        assert not made.training
        made.train()
        made(torch.randn(6, 4))
        assert made.blocks[0].dropout.training
    assert model.backbone.training  # as it was before the fit
