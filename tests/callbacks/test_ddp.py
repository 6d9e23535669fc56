"""Two ranks with gloo on the CPU: replicas stay equal after every change of the trainable set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import GradualUnfreeze, ReinitTopLayers, TrainableParamAudit
from tests.toys import Toy, loader, same, seeded, trainer

EPOCHS = 5


class Plain(Toy):
    """Without batch-norm and dropout, so that one process can do the same arithmetic."""

    def __init__(self, configure: Any = None) -> None:
        super().__init__(configure)
        for block in self.backbone.blocks:
            block.norm = torch.nn.LayerNorm(8)
            block.dropout = torch.nn.Identity()


class Halves:
    """A batch sampler of its own per rank: the halves of the batches that one process sees."""

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
    def train_dataloader(self) -> Any:
        whole = loader().dataset
        assert isinstance(whole, TensorDataset)
        sampler = Halves(24, 6, self.global_rank, self.trainer.world_size)
        return DataLoader(whole, batch_sampler=sampler)


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        path = self.folder / f"{trainer.world_size}-{trainer.global_rank}-{trainer.current_epoch}"
        torch.save(module.state_dict(), path)


def sgd(module: torch.nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def fit(folder: Path, ranks: int) -> None:
    model = seeded(lambda: OwnData(sgd))
    audit = TrainableParamAudit(table=False, report=folder / f"{ranks}.json")
    options: dict[str, Any] = {"use_distributed_sampler": False}
    if ranks > 1:
        options |= {"strategy": "ddp_fork", "devices": ranks}
    callbacks = [GradualUnfreeze(), ReinitTopLayers(1, seed=3), audit, Save(folder)]
    trainer(*callbacks, epochs=EPOCHS, **options).fit(model)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_ranks_stay_equal_and_equal_to_one_process(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    fit(tmp_path, 1)
    moved: set[str] = set()
    previous: dict[str, torch.Tensor] = {}
    for epoch in range(EPOCHS):
        a, b, one = (torch.load(tmp_path / f"{name}-{epoch}") for name in ("2-0", "2-1", "1-0"))
        for name in a:
            assert same(a[name], b[name]), (epoch, name)
            torch.testing.assert_close(a[name], one[name], rtol=0, atol=1e-6)
        moved |= {name for name in previous if not same(a[name], previous[name])}
        previous = a
    assert "backbone.embed.weight" in moved
    assert (tmp_path / "2.json").is_file()
