"""Golden files: text that a person has read, kept in tests/golden/.

`UPDATE_GOLDEN=1 python -m pytest tests` writes them anew; read the diff before you keep it.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def assert_golden(name: str, text: str) -> None:
    """Compare a text with the file `tests/golden/<name>`."""
    path = FOLDER / name
    text = text.rstrip() + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path} is missing: run with UPDATE_GOLDEN=1, and read what it wrote"
    assert text == path.read_text(encoding="utf-8")
