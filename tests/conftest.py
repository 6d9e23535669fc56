"""What every test needs: a quiet, offline, seeded process."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Lightning calls parts of jsonargparse that a later version will drop
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["COLUMNS"] = "110"  # whoever runs the tests, and wherever
# on a busy machine, threads that spin while they wait for each other take twenty times as long
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

# machines are slow and shared, and a test run leaves no files behind
settings.register_profile("quiet", deadline=None, database=None, max_examples=50)
settings.load_profile("quiet")

collect_ignore = ["contracts/namespaces.py"]  # a program of its own

_torchvision_operators = []

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError:
    # torchvision's wheel is built for CUDA; beside a CPU torch two operators are missing, and a
    # half-imported torchvision breaks lightning and transformers, too
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_operators.append(library)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _garbage() -> None:
    # what is imported stays: without this each collection goes through a million objects
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)  # the models are small: threads would only wait for each other
