"""What is measured while a fit runs."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import re
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.profiler import record_function

from benchmarks.staged.contenders import blocks
from benchmarks.staged.settings import STAGES, Settings

# the first steps of a stage pay for a transition and for allocations
SKIPPED = 2


def nbytes(tensors: Iterable[Any]) -> int:
    """Of those among some values that are tensors."""
    found = (tensor for tensor in tensors if isinstance(tensor, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


class Peak:
    """The most memory that this process had resident, above what it had at first (Linux)."""

    STATUS = Path("/proc/self/status")
    REFERENCES = Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        self.base = self.restart()

    def restart(self) -> int | None:
        """Begin anew, with freed memory given back; what is resident now."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            self.REFERENCES.write_text("5")
        except OSError:
            return None
        return self._read("VmRSS")

    def read(self) -> int | None:
        """Bytes above the base."""
        peak = None if self.base is None else self._read("VmHWM")
        return None if peak is None or self.base is None else peak - self.base

    def _read(self, key: str) -> int | None:
        found = re.search(rf"^{key}:\s+(\d+) kB", self.STATUS.read_text(), re.MULTILINE)
        return None if found is None else 1024 * int(found[1])


class Probe(Callback):
    """Takes times and sizes; last in the list, so that other callbacks' hooks are in them.

    An epoch lasts from the end of the one before: what others do at its start belongs to it.
    """

    def __init__(self, settings: Settings, peak: Peak) -> None:
        self.settings = settings
        self.peak = peak
        self.epochs: list[float] = []
        self.steps: list[list[float]] = [[] for _ in range(STAGES)]
        self.peaks: list[int | None] = []
        self.optimizer: list[int] = []
        self.gradients: list[int] = []
        self.trainable: list[int] = []
        self.dropout: list[bool] = []
        self._began = 0.0
        self._ends: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._ends.append(time.perf_counter())
        each = self.settings.epochs_per_stage
        last = batch_idx + 1 == trainer.num_training_batches
        if not last or (trainer.current_epoch + 1) % each:
            return
        parameters = list(pl_module.parameters())
        states = [state for o in trainer.optimizers for state in o.state.values()]
        self.optimizer.append(nbytes(v for state in states for v in state.values()))
        self.gradients.append(nbytes(p.grad for p in parameters))
        self.trainable.append(nbytes(p for p in parameters if p.requires_grad))
        self.dropout.append(dropout_left_on(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(time.perf_counter() - self._began)
        stage = self.settings.stage(trainer.current_epoch)
        first = trainer.current_epoch % self.settings.epochs_per_stage == 0
        kept = self._ends[SKIPPED - 1 if first else 0 :]
        self.steps[stage] += [after - before for before, after in itertools.pairwise(kept)]
        self._ends = []
        if (trainer.current_epoch + 1) % self.settings.epochs_per_stage == 0:
            self.peaks.append(self.peak.read())
            self.peak.restart()
        self._began = time.perf_counter()

    def per_step(self) -> list[float]:
        """Seconds of the median step of each third."""
        return [statistics.median(steps) if steps else float("nan") for steps in self.steps]


def dropout_left_on(module: Any) -> bool:
    """Whether a block of which nothing trains still draws random numbers."""
    return any(
        isinstance(part, nn.Dropout) and part.p > 0 and part.training
        for block in blocks(module.model)
        if not any(p.requires_grad for p in block.parameters())
        for part in block.modules()
    )


class Marks(Callback):
    """Tells a profile where a third of the run begins."""

    NAME = "third of the run"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.settings.epochs_per_stage == 0:
            with record_function(self.NAME):
                pass


def peaks_of(events: Iterable[Any]) -> list[int]:
    """The most bytes of tensors in each third, above those at the start, from a profile."""
    now, peaks = 0, [0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peaks[-1] = max(peaks[-1], now)
        elif event.name() == Marks.NAME:
            peaks.append(now)
    return peaks[:STAGES]


class Reduced(Callback):
    """Counts what DistributedDataParallel hands to all-reduce, whatever reducer is built."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.per_step: list[int] = [0] * STAGES
        self.gradients: list[int] = [0] * STAGES
        self._now = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._now = 0
        model: Any = trainer.strategy.model
        if not model._comm_hooks:
            model.register_comm_hook(None, self._hook())

    def _hook(self) -> Any:
        def count(state, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations
            self._now += nbytes([bucket.buffer()])
            return allreduce_hook(None, bucket)

        return count

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        stage = self.settings.stage(trainer.current_epoch)
        self.per_step[stage] = self._now
        self.gradients[stage] = nbytes(p.grad for p in pl_module.parameters() if p.requires_grad)
