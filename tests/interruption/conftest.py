from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.interruption.harness import Place, one_life


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a training comes to that nothing interrupts, in a process of its own."""
    if not hasattr(os, "fork"):
        pytest.skip("needs processes that fork")
    place = Place(tmp_path_factory.mktemp("uninterrupted"))
    assert not one_life(place).killed
    return torch.load(place.end, weights_only=True)
