"""One fit, in a process of its own, and what is measured while it runs."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._harness import hushed, quiet_trainer
from benchmarks.staged.contenders import Classifier, blocks, find
from benchmarks.staged.settings import STAGES, Data, Settings, accuracy, loader
from lightning_freeze import FrozenFeatureCache
from lightning_freeze.report.step_cost import step_cost

# the first steps of a stage pay for a transition and for allocations
SKIPPED = 2


@dataclass
class Fit:
    """What one fit took and gave; lists have one entry for each third of the run.

    Attributes:
        updating: seconds in the optimizer's steps, in all.
        least: share of full fine-tuning's arithmetic that the schedule can't do without.
        updated: share of its updates.
        dropout: whether it is left on in a block of which nothing trains.
    """

    key: str
    seed: int
    seconds: float
    updating: float
    epochs: list[float]
    steps: list[float]
    optimizer: list[int]
    gradients: list[int]
    trainable: list[int]
    dropout: list[bool]
    losses: list[float]
    accuracy: float
    cache: dict[str, Any]
    least: float
    updated: float


def nbytes(tensors: Iterable[Any]) -> int:
    """Of those among some values that are tensors."""
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


class Probe(Callback):
    """Takes times and sizes; last in the list, so that other callbacks' hooks are in them.

    An epoch lasts from the end of the one before: what others do at its start belongs to it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.updating = 0.0
        self.epochs: list[float] = []
        self.steps: list[list[float]] = [[] for _ in range(STAGES)]
        self.trained: list[frozenset[str]] = []
        self.optimizer: list[int] = []
        self.gradients: list[int] = []
        self.trainable: list[int] = []
        self.dropout: list[bool] = []
        self._ends: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._updates = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *given: Any) -> None:
        self._ends.append(time.perf_counter())
        self.updating += self._ends[-1] - self._updates
        last = given[-1] + 1 == trainer.num_training_batches
        if not last or (trainer.current_epoch + 1) % self.settings.epochs_per_stage:
            return
        parameters = list(pl_module.parameters())
        states = [state for o in trainer.optimizers for state in o.state.values()]
        self.optimizer.append(nbytes(v for state in states for v in state.values()))
        self.gradients.append(nbytes(p.grad for p in parameters))
        self.trainable.append(nbytes(p for p in parameters if p.requires_grad))
        self.dropout.append(dropout_left_on(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.epochs.append(time.perf_counter() - self._began)
        named = pl_module.model.named_parameters()
        self.trained.append(frozenset(name for name, p in named if p.requires_grad))
        first = trainer.current_epoch % self.settings.epochs_per_stage == 0
        kept = self._ends[SKIPPED - 1 if first else 0 :]
        stage = self.settings.stage(trainer.current_epoch)
        self.steps[stage] += [after - before for before, after in itertools.pairwise(kept)]
        self._ends = []
        self._began = time.perf_counter()


def dropout_left_on(module: Any) -> bool:
    """Whether a block of which nothing trains still draws random numbers."""
    return any(
        isinstance(part, nn.Dropout) and part.p > 0 and part.training
        for block in blocks(module.model)
        if not any(p.requires_grad for p in block.parameters())
        for part in block.modules()
    )


def least_work(model: Any, batch: Any, trained: Sequence[frozenset[str]]) -> tuple[float, float]:
    """The least that a schedule has to compute, as shares of full fine-tuning.

    Frozen layers at the bottom compute in the first epoch in which they are frozen, and are free
    after it. A backward pass goes as deep as something trains.

    Args:
        model: the BERT.
        batch: one to count with.
        trained: names of what trained in each epoch.

    Returns:
        The share of FLOPs, and that of elements updated.
    """
    inputs = dict(zip(("input_ids", "attention_mask", "labels"), batch))
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    counts = {path.partition(".")[2]: n for path, n in counter.get_flop_counts().items()}
    paths = {module: path for path, module in model.named_modules()}
    bottom = []
    for block in blocks(model):
        names = {f"{paths[block]}.{name}" for name, _ in block.named_parameters()}
        bottom.append((sum(counts.get(paths[block], {}).values()), names))
    stages = list(dict.fromkeys(trained))
    cost = step_cost(model, stages, inputs)
    assert cost.full is not None, cost.notes
    of_stage, work, before = dict(zip(stages, cost.stages)), 0, 0
    for names in trained:
        frozen = list(itertools.takewhile(lambda part: not part[1] & names, bottom))  # noqa: B023
        work += of_stage[names] - sum(flops for flops, _ in frozen[:before])
        before = len(frozen)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    updates = sum(sizes[name] for names in trained for name in names)
    return work / cost.full / len(trained), updates / sum(sizes.values()) / len(trained)


def fit(key: str, settings: Settings, data: Data, seed: int) -> Fit:
    """Train a contender and measure it."""
    contender = find(key)
    with hushed(settings.threads), tempfile.TemporaryDirectory() as folder:
        _warm_up(settings, data, seed)
        module = contender.module(settings.model(data.classes, seed), settings)
        callbacks = contender.callbacks(settings)
        probe = Probe(settings)
        run = quiet_trainer(
            [*callbacks, probe],
            settings.epochs,
            enable_checkpointing=any("Checkpoint" in type(c).__name__ for c in callbacks),
            default_root_dir=folder,
        )
        batches = loader(data, settings, seed)
        torch.manual_seed(seed)
        started = time.perf_counter()
        run.fit(module, batches)
        seconds = time.perf_counter() - started
        caches = [c.stats.to_dict() for c in callbacks if isinstance(c, FrozenFeatureCache)]
        return Fit(
            key,
            seed,
            seconds,
            probe.updating,
            probe.epochs,
            [statistics.median(steps) if steps else float("nan") for steps in probe.steps],
            probe.optimizer,
            probe.gradients,
            probe.trainable,
            probe.dropout,
            [float(loss) for loss in module.losses],
            accuracy(module.model, data),
            caches[0] if caches else {},
            *least_work(settings.model(data.classes, seed), next(iter(batches)), probe.trained),
        )


def _warm_up(settings: Settings, data: Data, seed: int) -> None:
    """Libraries are loaded and kernels chosen before anything is measured."""
    module = Classifier(settings.model(data.classes, seed), settings)
    optimizer: Any = module.configure_optimizers()
    batch = next(iter(loader(data, settings, seed)))
    module.training_step(batch, 0).backward()
    optimizer.step()
