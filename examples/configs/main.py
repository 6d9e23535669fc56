"""A LightningCLI program that knows nothing of freezing: all of that is in the configs beside it.

python examples/configs/main.py fit --config examples/configs/all.yaml
python examples/configs/main.py fit --trainer.callbacks.help=GradualUnfreeze
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# imported, a callback has its short name on the command line and in configs
from lightning_freeze import (  # noqa: F401
    FreezeBackbone,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
)


class Encoder(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.layer = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layer:
            x = x + torch.relu(layer(x))
        return x


class Classifier(LightningModule):
    """A backbone of a few layers, and a head."""

    def __init__(self, width: int = 8, layers: int = 4, lr: float = 1e-2) -> None:
        """Build the model.

        Args:
            width: of the layers.
            layers: how many.
            lr: learning rate.
        """
        super().__init__()
        self.backbone = Encoder(width, layers)
        self.head = nn.Linear(width, 3)
        self.lr = lr

    def step(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.backbone(x)), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Points(LightningDataModule):
    """Random points in three classes."""

    def loader(self, seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(0, 3, (24,), generator=generator)
        x = torch.randn(24, 4, generator=generator) + y[:, None]
        return DataLoader(TensorDataset(x, y), batch_size=6)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(1)


def main() -> LightningCLI:
    return LightningCLI(Classifier, Points)


if __name__ == "__main__":
    main()
