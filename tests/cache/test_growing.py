"""A frozen part that grows: rows of the shorter one are where the longer one's begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_freeze import FrozenFeatureCache, GradualFreeze, TrainableParamAudit
from tests.cache.nets import WIDTH, Module, assert_same, both, loader, stack
from tests.cache.test_exactness import Texts, texts
from tests.zoo import tiny_bert


class Deep(nn.Module):
    """Blocks, a skip around two of them, and a head with dropout."""

    def __init__(self, blocks: int = 5, *, skip: bool = True) -> None:
        super().__init__()
        self.blocks = stack(blocks)
        self.skip = skip
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        before = x
        for number, block in enumerate(self.blocks):
            x = block(x) + (before if number == 3 and self.skip else 0.0)
            before = x if number == 1 else before
        return self.head(self.dropout(x))


class AllTrain(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Depths(Callback):
    """Freezes so many blocks in each epoch, by hand."""

    def __init__(self, depths: Sequence[int]) -> None:
        self.depths = depths

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        depth = self.depths[trainer.current_epoch]
        for number, block in enumerate(pl_module.net.blocks):
            block.requires_grad_(number >= depth)
            for parameter in block.parameters():
                parameter.grad = None


def deep(*, skip: bool = True) -> AllTrain:
    return AllTrain(Deep(skip=skip), lambda net: net.blocks[0][0])


def depths(*found: int) -> dict[str, Any]:
    return {"callbacks": lambda: [Depths(found)], "epochs": len(found)}


def test_layers_that_freeze_go_on_from_the_rows_of_those_below() -> None:
    plain, cached, cache = both(deep, **depths(2, 2, 3, 3, 4, 4))
    assert_same(plain, cached)
    # of each of the two changes: 24 samples, but those of the batches that are traced and tried
    assert cache.stats.shortened == 2 * 12 + 2 * 6
    assert plain.calls == 24
    # the first block ran for a stage's traced and tried batch (three times), twice as itself in
    # the first epoch and once in the second, and for what is verified
    assert cached.calls < 24
    assert cache.stats.hits > 40


def test_with_one_more_group_an_epoch_each_epoch_begins_at_the_last_boundary() -> None:
    def callbacks() -> list[Any]:
        return [GradualFreeze(), TrainableParamAudit(table=False, every="batch")]

    plain, cached, cache = both(lambda: Texts(tiny_bert(4)), callbacks, data=texts, epochs=8)
    assert_same(plain, cached)
    assert cache.stats.shortened >= 3 * 12
    assert cache.stats.aside == ""


@pytest.mark.filterwarnings("ignore:FrozenFeatureCache did nothing")  # where nothing froze
@given(st.lists(st.integers(0, 5), min_size=3, max_size=6))
@settings(max_examples=12, deadline=None)
def test_however_the_boundary_moves_the_run_is_the_same(found: list[int]) -> None:
    plain, cached, _ = both(deep, **depths(*found))
    assert_same(plain, cached)


def test_shuffled_samples_of_which_some_are_known_are_put_together() -> None:
    def data() -> Any:
        return loader(shuffle=True)

    plain, cached, cache = both(deep, data=data, **depths(2, 3, 3, 4, 4))
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert cache.stats.shortened > 0


@pytest.mark.parametrize("room", ["8kB", "11kB", "14kB"])
def test_where_there_isnt_room_for_both_the_earlier_rows_go(room: str) -> None:
    plain, cached, cache = both(
        deep, cache=lambda: FrozenFeatureCache(room), **depths(2, 2, 3, 3, 4, 4)
    )
    # some rows of a batch are computed without the others
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert cache.stats.hits > 0
    assert cache.stats.nbytes <= int(room.removesuffix("kB")) * 1000


def test_earlier_rows_are_let_go_of_once_all_samples_have_new_ones() -> None:
    sizes: list[int] = []
    made: list[FrozenFeatureCache] = []

    class Sizes(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            run = made[-1]._run
            sizes.append(0 if run is None else run.store.nbytes)

    def cache() -> FrozenFeatureCache:
        made.append(FrozenFeatureCache())
        return made[-1]

    def callbacks() -> list[Any]:
        return [Depths((2, 2, 3, 3, 3, 3)), *([Sizes()] if made else [])]

    made.append(FrozenFeatureCache())
    both(lambda: deep(skip=False), callbacks, cache, epochs=6)
    sizes = sizes[-6:]
    assert sizes[2] > sizes[1]
    assert sizes[5] == sizes[1]


@pytest.mark.parametrize("how", ["data", "exchanged", "in place"])
def test_rows_of_layers_that_were_written_since_arent_used(how: str) -> None:
    class Writes(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch != 2:
                return
            layer = pl_module.net.blocks[0][0]
            if how == "data":
                layer.weight.data.mul_(1.5)
            elif how == "exchanged":
                layer.weight = nn.Parameter(1.5 * layer.weight.detach(), requires_grad=False)
            else:
                with torch.no_grad():
                    layer.weight.mul_(1.5)

    plain, cached, cache = both(deep, lambda: [Depths((2, 2, 3, 3, 4, 4)), Writes()], epochs=6)
    assert_same(plain, cached)
    assert plain.losses != both(deep, **depths(2, 2, 3, 3, 4, 4))[0].losses
    # the second change finds what was kept since
    assert cache.stats.shortened == 12 + 6


@pytest.mark.parametrize("found", [(2, 2, 3, 3), (3, 3, 2, 2)], ids=["freezes", "unfreezes"])
def test_a_write_just_before_a_stage_is_tried_out_makes_earlier_rows_stale(
    found: tuple[int, ...],
) -> None:
    class Writes(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            # where more freezes one batch is traced before, where less does none is
            if trainer.current_epoch == 2 and batch_idx == int(found[2] > found[0]):
                pl_module.written = True

    class Written(AllTrain):
        written = False

        def loss(self, batch: Any) -> Tensor:
            if self.written:
                self.written = False
                with torch.no_grad():
                    self.net.blocks[0][0].weight.mul_(1.5)
            return super().loss(batch)

    plain, cached, cache = both(
        lambda: Written(Deep(), lambda net: net.blocks[0][0]),
        lambda: [Depths(found), Writes()],
        epochs=4,
    )
    assert_same(plain, cached)
    assert cache.stats.hits > 0
