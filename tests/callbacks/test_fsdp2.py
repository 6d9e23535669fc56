"""FSDP2 on two ranks (gloo, CPU): the same weights as DDP's, and resumes that end alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from lightning_freeze import (
    FreezeBackbone,
    GradualFreeze,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
)
from tests.ranks.fits import OwnData
from tests.toys import Block, same, seeded, trainer

EPOCHS = 4
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore"),
]


def adamw(module: nn.Module) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


def sgd(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


class Net(OwnData):
    """Sharded block by block, unless it is for DDP."""

    def __init__(self, optimizer: Callable[[nn.Module], Any], sharded: bool = True) -> None:
        super().__init__()
        self.optimizer, self.sharded = optimizer, sharded

    def configure_model(self) -> None:
        if self.sharded:
            mesh = self.device_mesh["data_parallel"]
            for block in self.backbone.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self)
        falling = LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return [optimizer], [{"scheduler": falling, "interval": "step"}]


class MadeLate(Net):
    """Its top block is made when the model is configured, by each rank with its own seed."""

    def configure_model(self) -> None:
        if isinstance(self.backbone.blocks[-1], nn.Identity):
            torch.manual_seed(self.global_rank)
            block = Block(8)
            block.norm, block.dropout = nn.LayerNorm(8), nn.Identity()  # type: ignore[assignment]
            self.backbone.blocks[-1] = block
            super().configure_model()


def late() -> MadeLate:
    model = MadeLate(sgd)
    model.backbone.blocks[-1] = nn.Identity()
    return model


def full(value: Any) -> Any:
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().clone() if isinstance(whole, Tensor) else whole


class Save(Callback):
    """What there is after each epoch and at the end, put together from all shards."""

    def __init__(self, folder: Path, tag: str) -> None:
        self.folder, self.tag = folder, tag

    def put(self, trainer: Any, what: Any, value: Any) -> None:
        torch.save(value, self.folder / f"{self.tag}-{trainer.global_rank}-{what}.pt")

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.put(trainer, "start", {n: full(v) for n, v in module.state_dict().items()})

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        weights = {n: full(v) for n, v in module.state_dict().items()}
        self.put(trainer, trainer.current_epoch, weights)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        names = {id(p): n for n, p in module.named_parameters()}
        optimizer = trainer.optimizers[0]
        groups = [
            {k: [names[id(p)] for p in v] if k == "params" else v for k, v in group.items()}
            for group in optimizer.param_groups
        ]
        state = {
            names[id(p)]: {k: full(v) for k, v in kept.items()}
            for p, kept in optimizer.state.items()
        }
        flags = {n: p.requires_grad for n, p in module.named_parameters()}
        self.put(trainer, "end", (groups, state, flags))


class Write(Callback):
    """One rank writes to its own shard of a frozen tensor."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            with torch.no_grad():
                module.backbone.blocks[0].linear.weight.to_local().add_(1)


def _rank(rank: int, port: int, ranks: int, fits: list[dict[str, Any]]) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for how in fits:
        _fit(rank, ranks, how)


def _fit(rank: int, ranks: int, how: dict[str, Any]) -> None:
    model = seeded(how["make"])
    strategy: Any = "ddp"
    if model.sharded:
        strategy = ModelParallelStrategy(
            data_parallel_size=ranks,
            tensor_parallel_size=1,
            save_distributed_checkpoint=how.get("in_shards", True),
        )
    run = trainer(
        *how["callbacks"],
        epochs=how.get("epochs", EPOCHS),
        strategy=strategy,
        devices=ranks,
        use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(cb, ModelCheckpoint) for cb in how["callbacks"]),
    )
    try:
        run.fit(model, ckpt_path=how.get("ckpt_path"))
    except Exception as error:
        if "log" not in how:
            raise
        (how["log"] / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        torch.save((frozen, model.backbone.training), how["log"] / f"{rank}.left")


def fit(make: Callable[[], Net], *callbacks: Callback, ranks: int = 2, **how: Any) -> None:
    """In processes of its own, so that the ranks begin like those of a launcher."""
    fit_each([{"make": make, "callbacks": callbacks, **how}], ranks)


def fit_each(fits: list[dict[str, Any]], ranks: int = 2) -> None:
    """One fit after the other in the same processes, which is faster."""
    torch.multiprocessing.start_processes(
        _rank, (find_free_network_port(), ranks, fits), nprocs=ranks, start_method="fork"
    )


def recipe(folder: Path, tag: str) -> list[Callback]:
    audit = TrainableParamAudit(table=False, every="batch")  # it raises
    return [GradualUnfreeze(lr_decay=0.5), ReinitTopLayers(1, seed=3), audit, Save(folder, tag)]


def saved(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=False)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_the_weights_are_those_of_ddp_after_each_epoch(tmp_path: Path, optimizer: Any) -> None:
    fit(lambda: Net(optimizer, sharded=False), *recipe(tmp_path, "ddp"))
    fit(lambda: Net(optimizer), *recipe(tmp_path, "fsdp"))
    moved: set[str] = set()
    for epoch in range(EPOCHS):
        one, other = (saved(tmp_path, f"{tag}-0-{epoch}") for tag in ("ddp", "fsdp"))
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)
        before = saved(tmp_path, f"fsdp-0-{epoch - 1}") if epoch else other
        moved |= {name for name in other if not same(before[name], other[name])}
    assert "backbone.blocks.1.linear.weight" in moved
    assert "backbone.embed.weight" not in saved(tmp_path, "fsdp-0-end")[1]  # control: not its turn


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):  # torch gives back a tuple of betas as a list
        return len(one) == len(other) and all(map(equal, one, other))
    return same(one, other) if isinstance(one, Tensor) else bool(one == other)


@pytest.mark.parametrize("in_shards", [True, False])
def test_a_resume_from_any_checkpoint_ends_like_the_whole_run(
    tmp_path: Path, in_shards: bool
) -> None:
    step = "{epoch}-{step}"
    by_epoch = ModelCheckpoint(tmp_path, filename=f"e-{step}", save_top_k=-1, every_n_epochs=1)
    by_step = ModelCheckpoint(tmp_path, filename=f"s-{step}", save_top_k=-1, every_n_train_steps=4)
    fit(
        lambda: Net(adamw),
        *recipe(tmp_path, "whole"),
        by_epoch,
        by_step,
        in_shards=in_shards,
    )
    checkpoints = [path for path in sorted(tmp_path.glob("*.ckpt")) if "step=16" not in path.name]
    assert len(checkpoints) == 6
    tags = {f"from{number}": path for number, path in enumerate(checkpoints)}
    how = {"make": lambda: Net(adamw), "in_shards": in_shards}
    fit_each([how | {"callbacks": recipe(tmp_path, tag), "ckpt_path": tags[tag]} for tag in tags])
    for tag, path in tags.items():
        for what in (EPOCHS - 1, "end"):
            for rank in range(2):
                one, other = (saved(tmp_path, f"{t}-{rank}-{what}") for t in ("whole", tag))
                assert equal(one, other), (path.name, what)


def test_a_resume_between_two_random_draws_ends_like_the_whole_run(tmp_path: Path) -> None:
    def callbacks(tag: str) -> list[Callback]:
        audit = TrainableParamAudit(table=False)  # it raises
        return [GradualUnfreeze.lisa(2, every=3, seed=1), audit, Save(tmp_path, tag)]

    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    fit(lambda: Net(adamw), *callbacks("whole"), save)
    fit(lambda: Net(adamw), *callbacks("resumed"), ckpt_path=tmp_path / "epoch=1.ckpt")
    for what in (2, EPOCHS - 1, "end"):  # 8 steps are in the third draw
        for rank in range(2):
            one, other = (saved(tmp_path, f"{tag}-{rank}-{what}") for tag in ("whole", "resumed"))
            assert equal(one, other), what
    frozen = {name for name, trains in saved(tmp_path, "whole-0-end")[2].items() if not trains}
    assert {name.split(".")[2] for name in frozen} <= set("0123")
    assert len(frozen) == 8  # control: two of four blocks, with a matrix, a norm and two biases


def test_layers_freeze_by_the_norms_of_whole_gradients(tmp_path: Path) -> None:
    def callbacks(tag: str) -> list[Callback]:
        freeze = GradualFreeze.autofreeze(every=3, unit="step", percentile=80)
        audit = TrainableParamAudit(table=False, every="batch")  # it raises
        return [freeze, audit, Save(tmp_path, tag)]

    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    fit(lambda: Net(adamw, sharded=False), *callbacks("ddp"))
    fit(lambda: Net(adamw), *callbacks("whole"), save)
    # 8 steps are inside the third interval
    fit(lambda: Net(adamw), *callbacks("resumed"), ckpt_path=tmp_path / "epoch=1.ckpt")
    for rank in range(2):
        flags = saved(tmp_path, f"ddp-{rank}-end")[2]
        assert saved(tmp_path, f"whole-{rank}-end")[2] == flags
        for what in (2, EPOCHS - 1, "end"):
            one, other = (saved(tmp_path, f"{tag}-{rank}-{what}") for tag in ("whole", "resumed"))
            assert equal(one, other), what
    assert not flags["backbone.embed.weight"]  # control: something froze, and not everything
    assert flags["backbone.blocks.3.linear.weight"]


def test_fresh_layers_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    for ranks in (1, 2):
        fit(
            late,
            FreezeBackbone(trainable_layers=1),
            ReinitTopLayers(1, seed=3),
            Save(tmp_path, str(ranks)),
            ranks=ranks,
            epochs=1,
        )
    one, two = (saved(tmp_path, f"{ranks}-0-start") for ranks in (1, 2))
    assert {name for name in one if not same(one[name], two[name])} == set()
    fit(late, FreezeBackbone(trainable_layers=1), Save(tmp_path, "without"), epochs=1)  # control
    without = saved(tmp_path, "without-0-start")
    assert not same(
        two["backbone.blocks.3.linear.weight"], without["backbone.blocks.2.linear.weight"]
    )


def test_a_shard_that_one_rank_writes_is_found_and_all_ranks_raise(tmp_path: Path) -> None:
    for writes in (True, False):
        audit = TrainableParamAudit(table=False)
        sabotage = [Write()] if writes else []
        fit(lambda: Net(adamw), FreezeBackbone(), *sabotage, audit, epochs=2, log=tmp_path)
        told = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
        assert len(told) == (2 if writes else 0)
        for text in told:
            assert text.startswith("FrozenWeightsChanged: [frozen-changed] backbone.blocks.0.")
            assert "rank 1" in text
        for path in tmp_path.glob("*.txt"):
            path.unlink()


def test_another_schedule_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(lambda: Net(adamw), FreezeBackbone(unfreeze_at_epoch=1), keep, epochs=2)
    path = tmp_path / "epoch=1.ckpt"
    fit(lambda: Net(adamw), FreezeBackbone(), ckpt_path=path, log=tmp_path, epochs=3)
    told = [file.read_text() for file in sorted(tmp_path.glob("*.txt"))]
    assert len(told) == 2
    assert all(
        text.startswith("ResumeError: The checkpoint was written in another schedule")
        for text in told
    )
    assert [torch.load(tmp_path / f"{rank}.left") for rank in range(2)] == [([], True)] * 2
