"""Callbacks are pickled and copied: by spawned ranks, by tuners of hyperparameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from lightning_freeze import FreezeBackbone, GradualUnfreeze, ReinitTopLayers, TrainableParamAudit
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
