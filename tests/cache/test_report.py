"""What a cache did stands in the audit's report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_freeze import (
    ArgumentError,
    FreezeBackbone,
    FrozenFeatureCache,
    GradualUnfreeze,
    TrainableParamAudit,
)
from lightning_freeze.cache.stats import CacheStats
from lightning_freeze.callbacks.frozen_feature_cache import _told
from tests.cache.nets import Module, Net, fitted
from tests.cache.test_exactness import Texts, texts
from tests.zoo import tiny_bert


def test_the_audits_report_tells_of_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    audit = TrainableParamAudit(table=False, report=path)
    cache = FrozenFeatureCache()
    fitted(lambda: Texts(tiny_bert(2)), FreezeBackbone(), audit, cache, data=texts)
    told = json.loads(path.read_text())["cache"]
    assert told == cache.stats.to_dict()
    assert told["hits"] > 0
    assert told["nbytes"] > 0
    assert audit.to_dict()["cache"] == told


def test_bytes_are_the_most_that_were_taken_though_all_trains_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    audit = TrainableParamAudit(table=False, report=path)
    stages = GradualUnfreeze({0: "classifier", 3: "layer.1", 6: "**"})
    fitted(lambda: Texts(tiny_bert(2)), stages, audit, FrozenFeatureCache(), data=texts, epochs=8)
    told = json.loads(path.read_text())["cache"]
    assert told["skipped"] == told["aside"] == ""
    assert told["hits"] > 48
    assert told["hit_rate"] == told["hits"] / (told["hits"] + told["misses"])
    # 24 rows of 10 x 16 numbers
    assert told["nbytes"] >= 24 * 10 * 16 * 4


@pytest.mark.parametrize(("seconds", "said"), [(12.34, "about 12.3 s saved"), (-0.5, "0.5 s lost")])
def test_the_last_line_says_what_was_saved_or_lost(seconds: float, said: str) -> None:
    told = _told(CacheStats(hits=750, misses=250, nbytes=3 << 20, seconds_saved=seconds))
    assert "750 of 1,000 samples (75 %)" in told
    assert said in told
    assert "3.0 MiB kept" in told


def test_without_a_cache_the_report_is_what_it_was() -> None:
    audit = TrainableParamAudit(table=False)
    fitted(lambda: Texts(tiny_bert(2)), FreezeBackbone(), audit, data=texts, epochs=1)
    assert "cache" not in audit.to_dict()


def test_two_caches_are_refused() -> None:
    with pytest.raises(ArgumentError, match="2 FrozenFeatureCache callbacks"):
        fitted(lambda: Module(Net()), FrozenFeatureCache(), FrozenFeatureCache())
