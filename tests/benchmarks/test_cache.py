"""The cache's benchmark runs on the example's texts, and notices another run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks.test_benchmarks import load

TINY = "--random --samples 24 --epochs 4 --repeats 1 --batch 4 --width 24 --heads 2"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load("cache")


def test_cache_prints_a_ratio_for_each_stage(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = benchmark.main([*TINY.split(), "--vocabulary", "50"])
    shown = capsys.readouterr().out
    assert [row.stage for row in rows] == ["head only", "top 2 of 6 layers"]
    for row in rows:
        assert row.aside == ""
        assert row.hit_rate > 0.4
        assert row.megabytes > 0
        assert f"{row.ratio:.2f}" in shown


def test_cache_stops_where_losses_differ(benchmark: Any) -> None:
    one = benchmark.Fit([1.0], [0.5, 0.25], None)
    benchmark.check_same_run(one, benchmark.Fit([1.0], [0.5, 0.25], None))
    with pytest.raises(AssertionError, match=r"the loss is 0\.25 without and 0\.26 with it"):
        benchmark.check_same_run(one, benchmark.Fit([1.0], [0.5, 0.26], None))


def test_cache_needs_epochs_to_count(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.parse(["--epochs", "2"])
    assert "the first 2 aren't counted" in capsys.readouterr().err
