"""`FrozenFeatureCache` on two ranks: each keeps rows of its own, and the fit is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_freeze import FreezeBackbone, FrozenFeatureCache, TrainableParamAudit
from tests.ranks.fits import OwnData, fit, sgd
from tests.ranks.processes import on_ranks
from tests.toys import seeded


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_cache_on_two_ranks_changes_nothing_and_the_ranks_stay_equal() -> None:
    def act(rank: int) -> Any:
        found = []
        for caches in ([], [FrozenFeatureCache()]):
            callbacks = [FreezeBackbone(), *caches, TrainableParamAudit(table=False)]
            module = fit(lambda: OwnData(sgd), *callbacks, epochs=5).lightning_module
            found.append({name: t.tolist() for name, t in module.state_dict().items()})
        return *found, caches[0].stats.hits

    outcomes = on_ranks(act, seconds=90)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    for plain, cached, hits in (outcome.value for outcome in outcomes):
        assert hits > 0
        for name, values in plain.items():
            one, other = torch.tensor(values), torch.tensor(cached[name])
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-7), name
    assert outcomes[0].value[1] == outcomes[1].value[1]
    assert outcomes[0].value[1] != fresh()


def fresh() -> Any:
    return {name: t.tolist() for name, t in seeded(lambda: OwnData(sgd)).state_dict().items()}
