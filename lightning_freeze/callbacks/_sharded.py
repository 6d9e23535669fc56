"""Checkpoints of strategies that shard the model: the right flags before state is loaded.

`ModelParallelStrategy` (FSDP2) restores weights and optimizers behind `on_fit_start`, by
torch.distributed.checkpoint, which drops the state of what requires no gradient. So the stage is
read from the checkpoint beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from lightning_freeze.callbacks._lightning import Trainer
from lightning_freeze.digests import digests
from lightning_freeze.engine.distributed import from_all_ranks, together
from lightning_freeze.engine.optimizers import OptimizerGroups
from lightning_freeze.model.index import ModelIndex


def restores_late(trainer: Trainer) -> bool:
    """Whether the strategy restores weights and optimizers behind `on_fit_start`."""
    return bool(trainer.strategy.restore_checkpoint_after_setup)


def metadata_of(path: Any, **how: Any) -> Mapping[str, Any]:
    """What a checkpoint, a file or a folder of shards, holds beside weights: callbacks, clock."""
    place = Path(path)
    file = place / "meta.pt" if place.is_dir() else place
    content: Mapping[str, Any] = torch.load(
        file, map_location="cpu", mmap=True, weights_only=how.get("weights_only")
    )
    return content


def made_apart(trainer: Trainer, index: ModelIndex) -> frozenset[str]:
    """In `setup`: names of parameters that the ranks made differently, where each keeps its own.

    DistributedDataParallel begins with rank 0's weights; FSDP2 doesn't (pytorch/torchtitan 1777).
    """
    if trainer.world_size == 1 or not restores_late(trainer):
        return frozenset()
    made = {name: p for name, p in index.parameters.items() if p.device.type != "meta"}
    listed = list(made)
    found = digests(made.values(), listed.__getitem__)
    if len(set(from_all_ranks(xxhash.xxh3_128_digest(b"".join(found)), "weights as made"))) == 1:
        return frozenset()
    each = from_all_ranks(dict(zip(listed, found)), "weights made apart")
    return frozenset(name for name in listed if len({rank.get(name) for rank in each}) > 1)


class ShardedCheckpoints:
    """Wraps a strategy's `load_checkpoint` until `stop`."""

    def __init__(
        self,
        strategy: Any,
        groups: OptimizerGroups,
        resume: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """Begin.

        Args:
            strategy: the trainer's.
            groups: have whole lists while state is loaded.
            resume: takes up what the checkpoint says of callbacks and clock, before all else.
        """
        self._strategy = strategy
        load = strategy.load_checkpoint

        def load_checkpoint(path: Any, *given: Any, **named: Any) -> Any:
            place = strategy.broadcast(path)
            with together():
                resume(metadata_of(place, **named))
            with groups.loading():
                return load(path, *given, **named)

        strategy.load_checkpoint = load_checkpoint

    def stop(self) -> None:
        """Give the strategy its own function back."""
        vars(self._strategy).pop("load_checkpoint", None)
