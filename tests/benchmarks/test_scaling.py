"""The benchmark against model size measures what it says, at tiny sizes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.test_benchmarks import load

ROOT = Path(__file__).parents[2]
TINY = "--tensors 10 50 --repeats 1 --processes 1 --no-bert --steps 5 15"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load("scaling")


@pytest.mark.slow
def test_each_size_has_a_row_and_import_and_a_long_fit_have_a_sentence(
    benchmark: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    rows, imports, memory = benchmark.main([*TINY.split(), "--preload", "tests.conftest"])
    shown = capsys.readouterr().out
    assert [row.tensors for row in rows] == [10, 50]
    assert rows[1].stages > rows[0].stages
    for row in rows:
        assert 0 < row.transition < row.whole
        assert 0 < row.tick < row.start
    assert 0 < imports.ours < imports.lightning
    assert f"grew by {memory.added:,} bytes" in shown
    assert "5.0 times the tensors (10 to 50)" in shown


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--tensors 3", "a model has at least 10"),
        ("--repeats 0", "must be at least 1"),
        ("--steps 9 9", "the second larger"),
    ],
)
def test_sizes_that_measure_nothing_are_refused(
    benchmark: Any, capsys: pytest.CaptureFixture[str], wrong: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.parse(wrong.split())
    assert message in capsys.readouterr().err
