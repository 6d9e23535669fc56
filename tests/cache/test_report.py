"""What a cache did stands in the audit's report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_freeze import ArgumentError, FreezeBackbone, FrozenFeatureCache, TrainableParamAudit
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


def test_without_a_cache_the_report_is_what_it_was() -> None:
    audit = TrainableParamAudit(table=False)
    fitted(lambda: Texts(tiny_bert(2)), FreezeBackbone(), audit, data=texts, epochs=1)
    assert "cache" not in audit.to_dict()


def test_two_caches_are_refused() -> None:
    with pytest.raises(ArgumentError, match="2 FrozenFeatureCache callbacks"):
        fitted(lambda: Module(Net()), FrozenFeatureCache(), FrozenFeatureCache())
