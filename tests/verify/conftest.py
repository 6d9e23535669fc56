"""One run, and one pretrained model, for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

from tests.verify.files import Run, run_in
from tests.zoo import tiny_bert


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_in(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def bert() -> BertForSequenceClassification:
    torch.manual_seed(3)
    return tiny_bert(2)


@pytest.fixture(scope="session")
def folder(bert: BertForSequenceClassification, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrained")
    bert.save_pretrained(path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, so that messages have short paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
