"""The callbacks in a LightningCLI configuration."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from lightning_freeze import TrainableParamAudit
from tests.toys import Toy, loader, trainable

CONFIG = """
seed_everything: 7
trainer:
  max_epochs: 3
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_freeze.ReinitTopLayers
      init_args: {n_layers: 1, seed: 0}
    - class_path: lightning_freeze.GradualUnfreeze
      init_args:
        schedule:
          0: head
          1: {unfreeze: [blocks.1, blocks.2], lr_scale: 0.5}
    - class_path: lightning_freeze.FreezeBackbone
      init_args: {backbone: backbone.embed}
    - class_path: lightning_freeze.TrainableParamAudit
      init_args: {table: false, every: 2}
"""


class Module(Toy):
    def __init__(self) -> None:
        super().__init__()


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], LightningCLI]:
    def run(config: str) -> LightningCLI:
        path = tmp_path / "config.yaml"
        path.write_text(config)
        monkeypatch.setattr(sys, "argv", ["main.py", "fit", f"--config={path}"])
        return LightningCLI(Module, Data, save_config_callback=None)

    return run


def test_all_four_callbacks_run_from_a_yaml_config(cli: Callable[[str], LightningCLI]) -> None:
    run = cli(CONFIG)
    assert {name.split(".")[2] for name in trainable(run.model) if "blocks" in name} == {"1", "2"}
    audit = next(cb for cb in run.trainer.callbacks if isinstance(cb, TrainableParamAudit))
    assert audit.findings == []
    lrs = {group["name"]: group["lr"] for group in run.trainer.optimizers[0].param_groups}
    assert lrs["backbone.blocks.2"] == 0.5 * lrs["head"]


