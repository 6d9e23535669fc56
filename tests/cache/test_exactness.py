"""A fit with the cache is the fit without it, to the bit, and does run less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import (
    FreezeBackbone,
    FrozenFeatureCache,
    GradualUnfreeze,
    TrainableParamAudit,
)
from tests.cache.nets import Module, Net, assert_same, both, loader
from tests.zoo import TRANSFORMERS, tiny_bert


def test_a_hand_written_freeze_is_cached_from_the_third_batch_on() -> None:
    plain, cached, cache = both(lambda: Module(Net()))
    assert_same(plain, cached)
    assert plain.calls == 16
    # one batch is traced and one tried, with a part of it on its own, twice; the traced one comes
    # back as a new one; a few rows an epoch are verified
    assert cached.calls == 1 + 3 + 2 + 1 + 3
    assert cache.stats.hits == 24 * 4 - 24 - 6
    assert cache.stats.aside == ""


def test_shuffled_samples_are_found_again() -> None:
    plain, cached, cache = both(lambda: Module(Net()), data=lambda: loader(shuffle=True))
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert cache.stats.hits > 50
    assert cached.calls < plain.calls


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_rows_come_back_whole_from_either_store(store: str) -> None:
    plain, cached, cache = both(
        lambda: Module(Net()), cache=lambda: FrozenFeatureCache("1MB", store=store)
    )
    assert_same(plain, cached)
    assert cache.stats.hits > 50


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.1},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_options_of_the_trainer_change_nothing(options: dict[str, Any]) -> None:
    class Double(Module):
        def loss(self, batch: Any) -> Tensor:
            x = batch[0].to(next(self.parameters()).dtype)
            return nn.functional.cross_entropy(self.net(x), batch[1])

    plain, cached, cache = both(lambda: Double(Net()), **options)
    assert_same(plain, cached)
    assert cache.stats.hits > 50


def test_samples_of_the_validation_set_are_cached_as_well() -> None:
    class Both(Module):
        def val_dataloader(self) -> Any:
            return loader(12, 4, seed=5)

    plain, cached, cache = both(lambda: Both(Net()))
    assert_same(plain, cached)
    assert cache.stats.hits > 80
    assert cached.trainer.callback_metrics["val_loss"] == plain.trainer.callback_metrics["val_loss"]


class Texts(LightningModule):
    """Any transformers classifier on random tokens with a mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, mask, labels = batch
        loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def texts() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (24, 10), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(24):
        mask[row, 4 + row % 6 :] = 0
    ids[mask == 0] = 0
    labels = torch.randint(0, 2, (24,), generator=generator)
    return DataLoader(TensorDataset(ids, mask, labels), batch_size=6)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_bert_is_cached_under_freeze_backbone(layers: int) -> None:
    plain, cached, cache = both(
        lambda: Texts(tiny_bert(4)), lambda: [FreezeBackbone(trainable_layers=layers)], data=texts
    )
    assert_same(plain, cached)
    assert cache.stats.hits > 50


def test_the_boundary_follows_a_gradual_unfreeze() -> None:
    def callbacks() -> list[Any]:
        return [GradualUnfreeze(start=2, every=2), TrainableParamAudit(table=False, every="batch")]

    plain, cached, cache = both(lambda: Texts(tiny_bert(3)), callbacks, data=texts, epochs=10)
    assert_same(plain, cached)
    assert cache.stats.hits > 100
    assert cache.stats.skipped == ""  # in the end all train


def test_outputs_that_a_later_stage_needs_are_kept_before() -> None:
    def misses(max_bytes: str) -> int:
        _, _, cache = both(
            lambda: Texts(tiny_bert(4)),
            lambda: [GradualUnfreeze({0: "classifier", 2: "layer.3"})],
            lambda: FrozenFeatureCache(max_bytes),
            data=texts,
        )
        return cache.stats.misses

    # 24 rows of 10 x 16 numbers for one stage are 15 kB and the keys
    assert misses("1MB") < misses("25kB")


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "deberta-v2", "modernbert"])
def test_other_families_are_the_same_with_the_cache(family: str) -> None:
    plain, cached, cache = both(
        lambda: Texts(TRANSFORMERS[family]()),
        lambda: [FreezeBackbone(trainable_layers=1)],
        data=texts,
    )
    assert_same(plain, cached)
    assert cache.stats.hits > 50, cache.stats


def test_a_key_value_cache_that_skipped_layers_fill_is_not_left_half_full() -> None:
    def make(use_cache: bool) -> Any:
        model: Any = TRANSFORMERS["llama-classification"]()
        model.config.use_cache = use_cache
        return Texts(model)

    def callbacks() -> list[Any]:
        return [FreezeBackbone(trainable_layers=1)]

    with pytest.warns(UserWarning, match="leaving it out gives another result"):
        plain, cached, cache = both(lambda: make(True), callbacks, data=texts)
    assert_same(plain, cached)
    assert cache.stats.hits == 0
    plain, cached, cache = both(lambda: make(False), callbacks, data=texts)
    assert_same(plain, cached)
    assert cache.stats.hits > 50


class Images(Module):
    def __init__(self, net: nn.Module) -> None:
        LightningModule.__init__(self)
        self.net = net
        self.losses = []


def images() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, 32, 32, generator=generator)
    y = torch.randint(0, 3, (12,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "vit"])
def test_images_are_cached(name: str) -> None:
    models = pytest.importorskip("torchvision.models")

    def make() -> Any:
        if name == "vit":
            net: Any = models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
        else:
            net = getattr(models, name)(num_classes=3)
        if name == "vgg11":  # most of its weights would be there
            net.classifier = nn.Linear(512 * 7 * 7, 3)
        return Images(net)

    plain, cached, cache = both(
        make, lambda: [FreezeBackbone(trainable_layers=1)], data=images, epochs=3
    )
    assert_same(plain, cached)
    assert cache.stats.hits > 12, cache.stats


def test_half_the_memory_is_taken_by_half_precision() -> None:
    _, _, exact = both(lambda: Module(Net()), cache=lambda: FrozenFeatureCache())
    plain, rounded, half = both(
        lambda: Module(Net()), cache=lambda: FrozenFeatureCache(dtype="float16")
    )
    assert half.stats.hits == exact.stats.hits
    assert half.stats.nbytes < exact.stats.nbytes
    assert plain.losses == pytest.approx(rounded.losses, rel=1e-2)
