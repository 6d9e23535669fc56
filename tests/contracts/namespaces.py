"""A program that uses Lightning by one of its names, and tells what came of it as JSON.

Its environment says which: NAMESPACE, ORDER ("ours first": the callbacks are imported before
Lightning), FOLDER for its checkpoints, and OTHER, a folder with those of another such program.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tests.conftest  # noqa: F401

NAMESPACE = os.environ["NAMESPACE"]
if os.environ["ORDER"] == "ours first":
    assert not {"lightning", "pytorch_lightning"} & set(sys.modules)
pl = importlib.import_module(NAMESPACE)
cli = importlib.import_module(f"{NAMESPACE}.cli")

import lightning_freeze.callbacks as ours  # noqa: E402

# class -> arguments, and what takes part beside it
TABLE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "FreezeBackbone": ({"trainable_layers": 1}, ("TrainableParamAudit",)),
    "GradualUnfreeze": ({"lr_decay": 0.5}, ("TrainableParamAudit",)),
    "GradualFreeze": ({"schedule": {1: "embed"}}, ("TrainableParamAudit",)),
    "ReinitTopLayers": ({"n_layers": 1, "seed": 0}, ("TrainableParamAudit",)),
    "TrainableParamAudit": ({"table": False}, ("FreezeBackbone",)),
    "FrozenFeatureCache": ({}, ("FreezeBackbone", "TrainableParamAudit")),
}


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential()
        self.backbone.embed = nn.Linear(4, 8)
        self.backbone.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        self.head = nn.Linear(8, 3)

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(24, 4, generator=generator)
        y = torch.randint(0, 3, (24,), generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=6)

    val_dataloader = train_dataloader


class Configured(Net):
    """Gives its callbacks itself."""

    def configure_callbacks(self) -> Any:
        return made("FreezeBackbone")


QUIET = {
    "max_epochs": 3,
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def made(name: str) -> list[Any]:
    arguments, beside = TABLE[name]
    return [
        getattr(ours, name)(**arguments),
        *(getattr(ours, other)(**TABLE[other][0]) for other in beside),
    ]


def trainer(callbacks: Any, **options: Any) -> Any:
    return pl.Trainer(callbacks=callbacks, **{**QUIET, "enable_checkpointing": False, **options})


def state(model: nn.Module) -> dict[str, Any]:
    return {name: value.tolist() for name, value in model.state_dict().items()}


def told(run: Any, model: nn.Module, before: Any) -> dict[str, Any]:
    """What a fit came to."""
    after = state(model)
    audits = [cb for cb in run.callbacks if isinstance(cb, ours.TrainableParamAudit)]
    return {
        "state": after,
        "trains": [name for name, p in model.named_parameters() if p.requires_grad],
        "moved": [name for name in after if after[name] != before[name]],
        "findings": [finding.code for audit in audits for finding in audit.findings],
    }


def row(name: str, folder: Path) -> dict[str, Any]:
    """All ways to use a callback."""
    before = state(Net())
    callbacks = made(name)
    model = Net()
    saver = pl.callbacks.ModelCheckpoint(folder / name, "{epoch}", save_top_k=-1)
    run = trainer([saver, *callbacks], enable_checkpointing=True)
    run.fit(model)
    found = {"fit": told(run, model, before)}
    if isinstance(callbacks[0], ours.FrozenFeatureCache):
        found["fit"]["hits"] = callbacks[0].stats.hits
    found["last"] = type(run.callbacks[-1]).__name__
    saved = {"resume": folder / name / "epoch=0.ckpt"}
    if "OTHER" in os.environ:
        saved["resume from the other"] = Path(os.environ["OTHER"]) / name / "epoch=0.ckpt"
    for way, path in saved.items():
        model = Net()
        run = trainer(made(name))
        run.fit(model, ckpt_path=path)
        found[way] = told(run, model, before)
    model = Net()
    run = trainer(made(name))
    metrics = run.validate(model, ckpt_path=saved["resume"], verbose=False)
    found["validate"] = {**told(run, model, before), "metrics": metrics}

    model = Net()
    run = trainer(callbacks[0])  # not in a list
    run.fit(model)
    found["alone"] = told(run, model, before)
    for way, copied in {
        "pickled": pickle.loads(pickle.dumps(callbacks)),
        "copied": copy.deepcopy(callbacks),
    }.items():
        model = Net()
        run = trainer(copied)
        run.fit(model)
        found[way] = told(run, model, before)
    for way, prefix in {"class path": "lightning_freeze.", "short name": ""}.items():
        arguments, beside = TABLE[name]
        listed = [
            {"class_path": prefix + name, "init_args": arguments},
            *({"class_path": prefix + o, "init_args": TABLE[o][0]} for o in beside),
        ]
        options = {**QUIET, "enable_checkpointing": False, "callbacks": listed}
        done = cli.LightningCLI(
            Net, save_config_callback=None, args={"subcommand": "fit", "fit": {"trainer": options}}
        )
        found[way] = told(done.trainer, done.model, before)
    return found


def others() -> dict[str, Any]:
    """What isn't about one callback."""
    before = state(Net())
    model = Configured()
    run = trainer([])
    run.fit(model)
    found: dict[str, Any] = {"configure_callbacks": told(run, model, before)}
    model = Net()
    stopper = pl.callbacks.EarlyStopping("val_loss", patience=1, min_delta=10.0)
    run = trainer([stopper, *made("FreezeBackbone")], max_epochs=9)
    run.fit(model)
    found["EarlyStopping"] = {**told(run, model, before), "epochs": run.current_epoch}
    model = Net()
    run = trainer(made("GradualUnfreeze"), strategy="ddp_spawn", devices=2)
    run.fit(model)
    found["ddp_spawn"] = told(run, model, before)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = {name: row(name, Path(os.environ["FOLDER"])) for name in TABLE}
    result = {
        "rows": rows,
        "others": others(),
        "loaded": [n for n in ("lightning", "pytorch_lightning") if n in sys.modules],
    }
    print("RESULT" + json.dumps(result))
