"""Models whose line says what to write, that have two towers, or that draw in their frozen part."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_freeze import FreezeBackbone
from tests.cache.nets import Module, assert_same, both
from tests.cache.test_exactness import Texts, texts
from tests.zoo import TRANSFORMERS


class Towers(Texts):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, mask, pixels = batch
        out = self.model(input_ids=ids, attention_mask=mask, pixel_values=pixels, return_loss=True)
        self.losses.append(float(out.loss.detach()))
        return out.loss  # type: ignore[no-any-return]


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_either_of_two_towers_is_cached(tower: str) -> None:
    t = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 50, "eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0}
    config = t.CLIPConfig(
        text_config={**sizes, **tokens, "max_position_embeddings": 10},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )

    def data() -> DataLoader[Any]:
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 48, (12, 7), generator=draw)
        ids[:, -1] = 49
        pixels = torch.randn(12, 3, 32, 32, generator=draw)
        whole = torch.utils.data.TensorDataset(ids, torch.ones_like(ids), pixels)
        return DataLoader(whole, batch_size=4)

    plain, cached, cache = both(
        lambda: Towers(t.CLIPModel(config)), lambda: [FreezeBackbone(f"model.{tower}")], data=data
    )
    assert_same(plain, cached)
    assert cache.stats.skipped == f"model.{tower}"
    assert cache.stats.hits > 24


def gpt2(**changes: Any) -> Any:
    model: Any = TRANSFORMERS["gpt2-classification"]()
    model.config.use_cache = changes.get("use_cache", False)
    model.transformer.drop.p = changes.get("drop", 0.1)
    return Texts(model)


def test_a_decoders_line_says_what_to_write_and_that_helps() -> None:
    write = r"write `model.config.use_cache = False`"
    with pytest.warns(UserWarning, match=rf"returns a DynamicCache \(.*{write}\)"):
        plain, cached, cache = both(
            lambda: gpt2(use_cache=True), lambda: [FreezeBackbone()], data=texts
        )
    assert_same(plain, cached)
    assert cache.stats.hits == 0
    write = r"write `model.transformer.drop.p = 0.0` before the fit"
    with pytest.warns(UserWarning, match=rf"before `model.transformer.drop`, .*{write}"):
        plain, cached, cache = both(gpt2, lambda: [FreezeBackbone(trainable_layers=1)], data=texts)
    assert_same(plain, cached)
    assert "transformer.h" not in cache.stats.skipped
    plain, cached, cache = both(
        lambda: gpt2(drop=0.0), lambda: [FreezeBackbone(trainable_layers=1)], data=texts
    )
    assert_same(plain, cached)
    assert cache.stats.skipped.endswith("model.transformer.h.1")
    assert cache.stats.hits > 50


class Waves(Module):
    def __init__(self, net: nn.Module) -> None:
        LightningModule.__init__(self)
        self.net, self.losses = net, []
        self.head = nn.Linear(16, 3)

    def loss(self, batch: Any) -> Tensor:
        hidden = self.net(batch[0]).last_hidden_state.mean(1)
        return nn.functional.cross_entropy(self.head(hidden), batch[1])


@pytest.mark.parametrize("masks", [True, False])
def test_random_masks_of_time_are_drawn_where_the_model_draws_them(masks: bool) -> None:
    def make() -> Waves:
        random.seed(0)
        np.random.seed(0)  # what transformers draws from
        net: Any = TRANSFORMERS["wav2vec2"]()
        net.config.apply_spec_augment = masks
        net.config.layerdrop = 0.0
        net.encoder.dropout.p = 0.0
        return Waves(net)

    def data() -> DataLoader[Any]:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(12, 400, generator=draw)
        y = torch.randint(0, 3, (12,), generator=draw)
        return DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)

    def callbacks() -> list[Callback]:
        return [FreezeBackbone("net", trainable=["net.encoder.layers.2"])]

    if masks:
        with pytest.warns(UserWarning, match="draws random numbers"):
            plain, cached, cache = both(make, callbacks, data=data)
    else:
        plain, cached, cache = both(make, callbacks, data=data)
    assert_same(plain, cached)
    assert (cache.stats.hits > 24) is not masks
