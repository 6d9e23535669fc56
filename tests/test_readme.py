"""Every Python snippet of the README runs as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import lightning_freeze.callbacks
from tests.callbacks.test_freeze_backbone import Classifier, bert, tokens

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


@pytest.mark.parametrize("position", range(len(SNIPPETS)))
def test_snippet_runs_as_written(
    position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "model": Validated(bert(4)),
        "train_loader": tokens(),
        "val_loader": tokens(),
        "batch": next(iter(tokens())),
    }
    exec(compile(SNIPPETS[position], f"README snippet {position}", "exec"), names)


def test_there_is_a_short_snippet_for_each_callback() -> None:
    for name in lightning_freeze.callbacks.__all__:
        assert any(
            name in snippet and len(snippet.strip().splitlines()) <= 10 for snippet in SNIPPETS
        ), name


def test_files_that_the_readme_names_exist() -> None:
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target
