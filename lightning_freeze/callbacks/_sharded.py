"""Checkpoints of strategies that shard the model: right groups and flags before state is loaded.

`ModelParallelStrategy` (FSDP2) restores weights and optimizers behind `on_fit_start`, by
torch.distributed.checkpoint. That drops the state of what requires no gradient, and refuses
optimizers with several empty groups. So the stage is read from the checkpoint beforehand, and
while optimizer state is saved or loaded, empty groups are out of the way.
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


def saved_callbacks(path: Any, **how: Any) -> Mapping[str, Any]:
    """The states of the callbacks in a checkpoint, a file or a folder of shards."""
    place = Path(path)
    file = place / "meta.pt" if place.is_dir() else place
    content: Mapping[str, Any] = torch.load(
        file, map_location="cpu", mmap=True, weights_only=how.get("weights_only")
    )
    found: Mapping[str, Any] = content.get("callbacks") or {}
    return found


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
    """Wraps a strategy's functions for optimizer state until `stop`."""

    def __init__(
        self,
        strategy: Any,
        groups: OptimizerGroups,
        resume: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """Begin.

        Args:
            strategy: the trainer's.
            groups: empty ones are taken out while state is saved or loaded.
            resume: takes up what the callbacks have saved, before anything is loaded.
        """
        self._strategy = strategy
        save, load = strategy.optimizer_state, strategy.load_checkpoint

        def optimizer_state(*given: Any, **named: Any) -> Any:
            with groups.without_empty():
                return save(*given, **named)

        def load_checkpoint(path: Any, *given: Any, **named: Any) -> Any:
            place = strategy.broadcast(path)
            with together():
                resume(saved_callbacks(place, **named))
            with groups.without_empty():
                return load(path, *given, **named)

        strategy.optimizer_state = optimizer_state
        strategy.load_checkpoint = load_checkpoint

    def stop(self) -> None:
        """Give the strategy its own functions back."""
        for name in ("optimizer_state", "load_checkpoint"):
            vars(self._strategy).pop(name, None)
