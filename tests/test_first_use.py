"""What a new user does first, from an empty folder: each at most five lines more than without."""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import nn

from lightning_freeze import FrozenWeightsChanged
from tests.toys import changed, state

SCRIPTS = Path(__file__).parents[1] / "examples" / "first_steps"
PLAIN = SCRIPTS / "plain.py"
TASKS = sorted(path.stem for path in SCRIPTS.glob("*.py") if path != PLAIN)


class Run:
    """A script that was run in an empty folder."""

    def __init__(self, folder: Path, name: str, *replace: tuple[str, str]) -> None:
        text = (SCRIPTS / f"{name}.py").read_text()
        for old, new in (("logger=False)", "logger=False, enable_progress_bar=False)"), *replace):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        script = folder / "script.py"
        script.write_text(text)
        self.names: dict[str, Any] = runpy.run_path(str(script))
        self.model: nn.Module = self.names["model"]
        pl.seed_everything(0)
        self.before = state(self.names["Classifier"]())

    @property
    def moved(self) -> set[str]:
        """Parts of the model that changed: embeddings, layers by number, pooler, classifier."""
        found = set()
        for name in changed(self.before, state(self.model)):
            parts = name.removeprefix("bert.").removeprefix("bert.").split(".")
            found.add(parts[2] if parts[0] == "encoder" else parts[0])
        return found


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


EVERYTHING = {"embeddings", "0", "1", "2", "3", "pooler", "classifier"}


def test_without_any_of_this_everything_trains(tmp_path: Path) -> None:
    assert Run(tmp_path, "plain").moved == EVERYTHING


@pytest.mark.parametrize("task", TASKS)
def test_a_task_takes_at_most_five_lines(task: str) -> None:
    plain, script = (
        (SCRIPTS / f"{name}.py").read_text().partition('"""\n\n')[2].splitlines()
        for name in ("plain", task)
    )
    difference = list(difflib.ndiff(plain, script))
    added = [line for line in difference if line.startswith("+ ")]
    assert 1 <= len(added) <= 5
    removed = [line for line in difference if line.startswith("- ")]
    assert removed in ([], ["- callbacks = []"])


def test_there_are_five_tasks() -> None:
    assert len(TASKS) == 5


def test_freeze_all_but_the_classifier(tmp_path: Path) -> None:
    run = Run(tmp_path, "freeze_all_but_classifier")
    assert run.moved == {"classifier"}
    trains = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trains == {"bert.classifier.weight", "bert.classifier.bias"}
    assert set(run.names["trainer"].optimizers[0].state) == set(
        run.model.bert.classifier.parameters()
    )


@pytest.mark.parametrize(
    ("epochs", "moved"),
    [
        (1, {"pooler", "classifier"}),
        (2, {"2", "3", "pooler", "classifier"}),
        (3, EVERYTHING - {"embeddings"}),
        (4, EVERYTHING),
    ],
)
def test_unfreeze_two_layers_an_epoch(tmp_path: Path, epochs: int, moved: set[str]) -> None:
    length = ("max_epochs=3", f"max_epochs={epochs}")
    assert Run(tmp_path, "unfreeze_two_layers_an_epoch", length).moved == moved


def test_reinitialise_the_top_three(tmp_path: Path) -> None:
    no_training = ("max_epochs=3", "max_epochs=0")
    assert Run(tmp_path, "reinit_top_three", no_training).moved == {"1", "2", "3", "pooler"}
    assert Run(tmp_path, "reinit_top_three").moved == EVERYTHING


def test_which_parameters_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, "which_parameters_train")
    said = capsys.readouterr().out
    rows = {line.split()[1]: line for line in said.splitlines() if "bert." in line}
    trains = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert {name for name in rows if "frozen" not in rows[name]} == trains
    assert {name for name in rows if "frozen" in rows[name]} == {
        name for name, _ in run.model.named_parameters()
    } - trains
    assert trains
    assert len(trains) < len(rows)
    size = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert f"{size:,} of {sum(p.numel() for p in run.model.parameters()):,} parameters" in said


def test_did_anything_frozen_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, "did_anything_frozen_change")
    assert run.moved == {"classifier"}
    said = capsys.readouterr().out
    assert "clean" in said
    assert "unchanged to the bit" in said
    write = "self.bert.bert.pooler.dense.weight.data.mul_(1.001)"
    line = "        return self.bert(input_ids"
    with pytest.raises(FrozenWeightsChanged, match=r"pooler\.dense\.weight changed although froz"):
        Run(tmp_path, "did_anything_frozen_change", (line, f"        {write}\n{line}"))
