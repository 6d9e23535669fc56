"""One fit, in a process of its own."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import transformers
from lightning.pytorch import Callback, Trainer
from torch.profiler import ProfilerActivity, profile

from benchmarks.staged.contenders import Classifier, find
from benchmarks.staged.probe import Marks, Peak, Probe, Reduced, peaks_of
from benchmarks.staged.settings import Data, Settings, accuracy, loader
from lightning_freeze import FrozenFeatureCache

T = TypeVar("T")


@dataclass
class Fit:
    """What one fit took and gave; lists have one entry for each third of the run."""

    key: str
    seed: int
    seconds: float
    epochs: list[float]
    steps: list[float]
    peaks: list[int | None]
    optimizer: list[int]
    gradients: list[int]
    trainable: list[int]
    dropout: list[bool]
    losses: list[float]
    accuracy: float
    cache: dict[str, Any]


@dataclass
class Wire:
    """Bytes a step that one rank hands to all-reduce, and those of gradients that are needed."""

    reduced: list[int]
    gradients: list[int]
    find_unused: bool = False
    error: str = ""


def alone(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a fork of this process, which must not have trained anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *args).result()


def fit(key: str, settings: Settings, data: Data, seed: int) -> Fit:
    """Train a contender and measure it."""
    contender = find(key)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        _warm_up(settings, data, seed)
        peak = Peak()
        module = contender.module(settings.model(data.classes, seed), settings)
        callbacks = contender.callbacks(settings)
        probe = Probe(settings, peak)
        trainer = _trainer(settings, [*callbacks, probe], folder)
        batches = loader(data, settings, seed)
        torch.manual_seed(seed)
        started = time.perf_counter()
        trainer.fit(module, batches)
        seconds = time.perf_counter() - started
        caches = [c.stats.to_dict() for c in callbacks if isinstance(c, FrozenFeatureCache)]
        return Fit(
            key,
            seed,
            seconds,
            probe.epochs,
            probe.per_step(),
            probe.peaks,
            probe.optimizer,
            probe.gradients,
            probe.trainable,
            probe.dropout,
            [float(loss) for loss in module.losses],
            accuracy(module.model, data),
            caches[0] if caches else {},
        )


def wire(key: str, settings: Settings, data: Data) -> Wire:
    """The same schedule on a few samples under DistributedDataParallel, with one rank.

    With `find_unused_parameters` only where it can't do without.
    """
    few = replace(settings, batch=2, samples=4)
    rows = Data(data.train[:4], data.test[:1], data.classes)
    contender = find(key)
    if contender.by_step:
        return Wire([], [], error="what freezes depends on the steps made")
    # else Lightning lets each rank have all threads
    os.environ["OMP_NUM_THREADS"] = "1"
    errors: list[str] = []
    for find_unused in (False, True):
        module = contender.module(settings.model(data.classes, 0), few)
        counter = Reduced(few)
        # by name: finetuning-scheduler knows no other way
        strategy = "ddp_find_unused_parameters_true" if find_unused else "ddp"
        with quiet(), tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(few, [*contender.callbacks(few), counter], folder, strategy=strategy)
            try:
                trainer.fit(module, loader(rows, few, 0))
            except Exception as error:  # whatever a library says
                errors.append(" ".join(str(error).split())[:150])
            else:
                return Wire(counter.per_step, counter.gradients, find_unused)
    return Wire([], [], True, errors[-1])


def tensors(key: str, settings: Settings, data: Data) -> list[int]:
    """Peak of the memory that torch has given to tensors, by third, in a run of two steps an epoch.

    Bytes above those at the start of the fit. Unlike resident memory it doesn't depend on how the
    system gives memory out; a profile of it is too slow for a run that is timed.
    """
    os.environ["KINETO_LOG_LEVEL"] = "99"
    few = replace(settings, samples=2 * settings.batch)
    rows = Data(data.train[: few.samples], data.test[:1], data.classes)
    contender = find(key)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        module = contender.module(settings.model(data.classes, 0), few)
        trainer = _trainer(few, [*contender.callbacks(few), Marks(few)], folder)
        batches = loader(rows, few, 0)
        torch.manual_seed(0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            trainer.fit(module, batches)
        return peaks_of(found.profiler.kineto_results.events())


def _trainer(settings: Settings, callbacks: list[Callback], folder: str, **options: Any) -> Trainer:
    checkpoints = any("Checkpoint" in type(callback).__name__ for callback in callbacks)
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=settings.epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **options,
    )


def _warm_up(settings: Settings, data: Data, seed: int) -> None:
    """Libraries are loaded and kernels chosen before anything is measured."""
    module = Classifier(settings.model(data.classes, seed), settings)
    optimizer: Any = module.configure_optimizers()
    batch = next(iter(loader(data, settings, seed)))
    module.training_step(batch, 0).backward()
    optimizer.step()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own messages."""
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
