"""The model, data and fits that the tests on several ranks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.toys import Toy, loader, seeded, trainer

EPOCHS = 6  # as many stages: a head, four blocks and what embeds
ROWS, BATCH = 24, 6


class Plain(Toy):
    """Without batch-norm and dropout, so that one process can do the same arithmetic."""

    def __init__(self, configure: Any = None, blocks: int = 4) -> None:
        super().__init__(configure, blocks=blocks)
        for block in self.backbone.blocks:
            block.norm = nn.LayerNorm(8)
            block.dropout = nn.Identity()


class Halves:
    """A batch sampler of its own per rank: the halves of the batches that one process sees."""

    sampler: Any = None  # Lightning before 2.6 asks for it

    def __init__(self, rows: int, batch: int, rank: int, ranks: int) -> None:
        self.batches = [
            list(range(start + rank * batch // ranks, start + (rank + 1) * batch // ranks))
            for start in range(0, rows, batch)
        ]

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class OwnData(Plain):
    """Each rank sees rows of its own."""

    batch = BATCH

    def train_dataloader(self) -> Any:
        whole = loader(ROWS).dataset
        assert isinstance(whole, TensorDataset)
        sampler = Halves(ROWS, self.batch, self.global_rank, self.trainer.world_size)
        return DataLoader(whole, batch_sampler=sampler)


class InHalves(OwnData):
    """One process that takes the batches of two ranks one after the other."""

    batch = BATCH // 2


class WithoutLog(OwnData):
    """Dynamo can't follow `self.log` inside a step that is compiled as a whole."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


class Manual(OwnData):
    """Manual optimisation, to the same effect."""

    def __init__(self, configure: Any = None) -> None:
        super().__init__(configure)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def sgd(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def adamw(module: nn.Module) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


class Save(Callback):
    """Saves all tensors of each rank after every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        torch.save(
            module.state_dict(), self.folder / f"{trainer.global_rank}-{trainer.current_epoch}"
        )


def saved(folder: Path, rank: int, epoch: int) -> dict[str, Tensor]:
    return dict(torch.load(folder / f"{rank}-{epoch}"))


def fit(
    make: Callable[[], LightningModule],
    *callbacks: Callback,
    ranks: int = 2,
    compiled: bool = False,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    """A fit on as many ranks; the Trainer of this one."""
    given: dict[str, Any] = {"epochs": EPOCHS, "use_distributed_sampler": False}
    if ranks > 1:
        given |= {"strategy": "ddp", "devices": ranks}
    made = trainer(*callbacks, **{**given, **options})
    model = seeded(make)
    made.fit(torch.compile(model, backend="aot_eager") if compiled else model, ckpt_path=ckpt_path)
    return made
