"""The benchmark against model size runs, and measures what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.test_benchmarks import load

TINY = "--tensors 10 50 --repeats 1 --processes 1 --steps 8 16 --no-bert"
# as tests/conftest.py does it
PRELOAD = """import torch
try:
    import torchvision
except ModuleNotFoundError:
    pass
except RuntimeError:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load("scaling")


@pytest.mark.slow
def test_scaling_prints_a_row_for_each_size(
    benchmark: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "declared_first.py").write_text(PRELOAD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    rows, imports, memory = benchmark.main([*TINY.split(), "--preload", "declared_first"])
    shown = capsys.readouterr().out
    assert [row.tensors for row in rows] == [10, 50]
    assert [row.stages for row in rows] == [4, 8]
    for row in rows:
        assert row.whole >= row.index + row.transition > 0
        assert row.audited > row.transition
        assert row.start > 0
        assert row.fingerprints > 0
        assert f"{1e3 * row.whole:.2f}" in shown
    assert imports.lightning > imports.ours > 0
    assert f"adds {1e3 * imports.ours:.1f} ms" in shown
    assert f"grew by {memory.added:,} bytes" in " ".join(shown.split())


def test_scaling_makes_models_of_the_size_that_is_asked_for(benchmark: Any) -> None:
    for tensors in (10, 50, 210):
        assert len(list(benchmark.toy(tensors).parameters())) == tensors


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--tensors 3", "--tensors has 3"),
        ("--repeats 0", "must be at least 1"),
        ("--steps 9 9", "the second larger"),
    ],
)
def test_scaling_refuses_what_it_cant_measure(
    benchmark: Any, given: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.parse(given.split())
    assert told in capsys.readouterr().err
