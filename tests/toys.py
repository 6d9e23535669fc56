"""Small models, data and trainers that the callback tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    """A layer with everything that can go wrong: weights, batch-norm statistics, dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.relu(self.norm(self.linear(x))))


class Backbone(nn.Module):
    """An input layer and some blocks."""

    def __init__(self, width: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


Configure = Callable[["Toy"], Any]


class Toy(LightningModule):
    """A LightningModule with a backbone and a head that knows nothing of these callbacks."""

    def __init__(self, configure: Configure | None = None, blocks: int = 3) -> None:
        super().__init__()
        self.backbone = Backbone(blocks=blocks)
        self.head = nn.Linear(8, 3)
        self.configure = configure

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        # metrics that don't depend on the weights; to log takes longer than a step
        if self.follows("tick"):
            self.log("tick", float(self.global_step))
        if self.follows("steps"):
            self.log("steps", float(self.global_step // 4), on_epoch=True, on_step=False)
        return loss

    def follows(self, name: str) -> bool:
        """Whether a callback or a scheduler of this fit goes by a metric."""
        followers = [*self.trainer.callbacks, *self.trainer.lr_scheduler_configs]
        return any(getattr(follower, "monitor", None) == name for follower in followers)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))
        self.log("val_steps", float(self.global_step // 4))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        if self.configure is None:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)
        return self.configure(self)


class ByStep(Toy):
    """Takes its batch by the global step: a mid-epoch resume begins its loader anew."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batches = list(loader())  # it draws a number, as a loop by hand does
        return super().training_step(batches[self.global_step % len(batches)], batch_idx)


def loader(rows: int = 24, batch: int = 6, seed: int = 1) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator)
    y = torch.randint(0, 3, (rows,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def trainer(*callbacks: Callback, epochs: int = 3, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def seeded(make: Callable[[], LightningModule]) -> Any:
    """The same model every time."""
    torch.manual_seed(7)
    return make()


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return copy.deepcopy(model.state_dict())


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: NaN equals itself, -0.0 differs from 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return bool(torch.equal(left, right))


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that differ in any bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not same(before[name], after[name])}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


class FixedDropout(Callback):
    """Makes dropout a function of the global step, so that resumed runs draw the same."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        torch.manual_seed(1000 + trainer.global_step)
