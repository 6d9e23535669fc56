"""A training script as a user has it: `python -m tests.ranks.launched ddp adamw weights.pt`."""

from __future__ import annotations

import tests.conftest  # noqa: F401  # torchvision's operators are declared

# isort: split

import sys
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_freeze import GradualUnfreeze, TrainableParamAudit
from tests.ranks.fits import InHalves, OwnData, adamw, sgd
from tests.toys import seeded, trainer


class WritesOnOneRank(Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 5:
            with torch.no_grad():
                module.backbone.embed.weight.add_(1e-3)


def main(strategy: str, optimizer: str, path: str, *sabotage: str) -> None:
    """Six stages on two ranks, or on one process with the same batches."""
    warnings.simplefilter("ignore")
    options: dict[str, Any] = {"accumulate_grad_batches": 2}
    if strategy != "auto":
        options = {"strategy": strategy, "devices": 2}
    callbacks = [
        GradualUnfreeze(),
        TrainableParamAudit(table=False, report=f"{path}.json"),
        *[WritesOnOneRank() for _ in sabotage],
    ]
    fit = trainer(*callbacks, epochs=6, use_distributed_sampler=False, **options)
    kind = InHalves if strategy == "auto" else OwnData
    module = seeded(lambda: kind({"sgd": sgd, "adamw": adamw}[optimizer]))
    fit.fit(module)
    if fit.is_global_zero:
        torch.save(module.state_dict(), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
