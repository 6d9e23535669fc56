"""Small models whose frozen front can or can't be left out, and a fit of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import FrozenFeatureCache
from tests import toys

WIDTH = 6


def stack(layers: int = 3) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers))
    )


class Net(nn.Module):
    """Some frozen layers, some that train, a head with dropout."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.front = stack(layers)
        self.back = stack(1)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(WIDTH, 3)
        self.front.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.back(self.front(x))))


class Module(LightningModule):
    """Trains a net, and writes down its losses and how often the front's first layer ran."""

    def __init__(self, net: nn.Module, first: Callable[[Any], nn.Module] | None = None) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []
        self.calls = 0
        layer = (first or (lambda net: net.front[0][0]))(net)
        self._count(layer)

    def _count(self, layer: nn.Module) -> None:
        kind = type(layer)
        owner = self

        class Counted(kind):  # type: ignore[misc, valid-type]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                owner.calls += 1
                return super().forward(*args, **kwargs)

        layer.__class__ = Counted

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def loader(
    rows: int = 24, batch: int = 6, *, shuffle: bool = False, seed: int = 1
) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator)
    y = torch.randint(0, 3, (rows,), generator=generator)
    order = torch.Generator().manual_seed(2)
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=shuffle, generator=order)


def fitted(
    make: Callable[[], LightningModule],
    *callbacks: Callback,
    data: Callable[[], Any] = loader,
    epochs: int = 4,
    **options: Any,
) -> Any:
    torch.manual_seed(7)
    module = make()
    torch.manual_seed(8)
    trainer: Trainer = toys.trainer(*callbacks, epochs=epochs, **options)
    trainer.fit(module, data())
    return module


def both(
    make: Callable[[], LightningModule],
    callbacks: Callable[[], list[Callback]] = list,
    cache: Callable[[], FrozenFeatureCache] = FrozenFeatureCache,
    **options: Any,
) -> tuple[Any, Any, FrozenFeatureCache]:
    """The same fit without and with a cache: both modules, and the cache."""
    plain = fitted(make, *callbacks(), **options)
    made = cache()
    cached = fitted(make, *callbacks(), made, **options)
    return plain, cached, made


def assert_same(plain: Any, cached: Any) -> None:
    assert plain.losses == cached.losses
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, cached.state_dict()[name]), name
