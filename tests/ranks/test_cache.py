"""`FrozenFeatureCache` on two ranks: each keeps rows of its own, and the fit is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_freeze import FreezeBackbone, FrozenFeatureCache, GradualFreeze, TrainableParamAudit
from tests.callbacks import test_fsdp2 as fsdp2
from tests.ranks.fits import OwnData, fit, sgd
from tests.ranks.processes import on_ranks
from tests.toys import seeded


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "make", [FreezeBackbone, lambda: GradualFreeze({1: "backbone.embed", 2: "backbone.blocks.0"})]
)
def test_a_cache_on_two_ranks_changes_nothing_and_the_ranks_stay_equal(make: Any) -> None:
    def act(rank: int) -> Any:
        found = []
        for caches in ([], [FrozenFeatureCache()]):
            callbacks = [make(), *caches, TrainableParamAudit(table=False)]
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


class Tells(Callback):
    """Writes down what the cache has done."""

    def __init__(self, folder: Any, cache: FrozenFeatureCache) -> None:
        self.folder, self.cache = folder, cache

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        told = f"{self.cache.stats.hits} {self.cache.stats.aside}"
        (self.folder / f"told-{trainer.global_rank}").write_text(told)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_cache_steps_aside_from_what_is_sharded(ranks: int, tmp_path: Any) -> None:
    cache = FrozenFeatureCache()
    for tag, callbacks in (("plain", []), ("cached", [Tells(tmp_path, cache), cache])):
        save = fsdp2.Save(tmp_path, tag)
        fsdp2.fit(lambda: fsdp2.Net(sgd), FreezeBackbone(), save, *callbacks, ranks=ranks, epochs=2)
    for rank in range(ranks):
        plain, cached = (fsdp2.saved(tmp_path, f"{t}-{rank}-1") for t in ("plain", "cached"))
        start = fsdp2.saved(tmp_path, f"cached-{rank}-start")
        assert all(torch.equal(plain[name], cached[name]) for name in plain)
        assert not torch.equal(start["head.weight"], cached["head.weight"])
        told = (tmp_path / f"told-{rank}").read_text()
        assert told == "0 the model's tensors are sharded over ranks"
