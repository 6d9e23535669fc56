"""What freezing costs beside the training itself, against the size of the model.

    python benchmarks/scaling.py

Models of 10, 100, 1,000 and 10,000 tensors, many small blocks below a head, and a BERT-base from a
config (no weights are downloaded). For each one: walking it, resolving a schedule to a plan, a
transition (flags, modes and the optimizer's groups), what the callbacks look at before an ordinary
batch, and the start of a fit.

Then what `import lightning_freeze` adds to `import lightning`, in fresh processes, and what a long
fit adds to the memory: with a tiny model and all callbacks, from one step to a much later one.

Nothing is hidden from the garbage collector: it is run before each measurement, and may run in it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_freeze
from lightning_freeze import FreezeBackbone, GradualUnfreeze, TrainableParamAudit
from lightning_freeze.audit import baseline
from lightning_freeze.callbacks.fit_state import Session
from lightning_freeze.model.index import ModelIndex

TENSORS_A_BLOCK = 8
WORDS, CLASSES = 16, 3
NAMES = (
    "FreezeBackbone",
    "FrozenFeatureCache",
    "GradualFreeze",
    "GradualUnfreeze",
    "ReinitTopLayers",
    "TrainableParamAudit",
)
CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "processor": time.process_time,
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    tensors: tuple[int, ...] = (10, 100, 1_000, 10_000)
    repeats: int = 9
    processes: int = 7
    steps: tuple[int, int] = (200, 2_000)
    clock: str = "wall"
    bert: bool = True
    preload: str = ""


class Block(nn.Module):
    """A layer of a transformer, as far as its tensors go: attention, norm, feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({n: nn.Linear(width, width) for n in ("value", "out")})
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention["out"](self.attention["value"](self.norm(x)))
        return x + self.dropout(self.dense(x))


class Backbone(nn.Module):
    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(tokens).mean(1)
        for layer in self.layers:
            x = layer(x)
        return x


class Classifier(LightningModule):
    """An ordinary LightningModule."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        tokens, labels = batch
        found = self.backbone(tokens)
        pooled = found if isinstance(found, torch.Tensor) else found.pooler_output
        return nn.functional.cross_entropy(self.head(pooled), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def toy(tensors: int, width: int = 4) -> Classifier:
    """A model of about so many tensors."""
    blocks = max(1, round((tensors - 2) / TENSORS_A_BLOCK))
    return Classifier(Backbone(blocks, width), nn.Linear(width, CLASSES, bias=False))


def bert_base() -> Classifier:
    """BERT-base with random weights and a linear head."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=30522)
    return Classifier(BertModel(config), nn.Linear(config.hidden_size, CLASSES, bias=False))


class Texts(TensorDataset):
    """A few samples, over and over: a cache of features holds all of them soon."""

    def __init__(self, samples: int, different: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        which = torch.arange(samples) % different
        tokens = torch.randint(WORDS, (different, 4), generator=generator)
        labels = torch.randint(CLASSES, (different,), generator=generator)
        super().__init__(tokens[which], labels[which])


def fit(model: Classifier, callbacks: list[Callback], epochs: int, steps: int) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(Texts(2 * steps), batch_size=2))


def freezing() -> list[Callback]:
    return [FreezeBackbone("backbone.embeddings"), GradualUnfreeze()]


@dataclass
class Watch:
    """Times some functions while a fit runs."""

    clock: Callable[[], float]
    transitions: list[float] = field(default_factory=list)
    ticks: dict[int, float] = field(default_factory=dict)
    wanted: Callable[[int], bool] = bool
    start: float = 0.0
    fingerprints: float = 0.0
    _inside: bool = False

    @contextlib.contextmanager
    def on(self, callbacks: Sequence[Callback]) -> Iterator[None]:
        """Time transitions and ticks, and what the callbacks do until the first epoch starts."""
        switch, tick, digests = Session._switch, Session.tick, baseline.digests

        def timed_switch(session: Session, *args: Any) -> None:
            if not self._inside:  # the first one is part of the fit's start
                gc.collect()
            self.transitions.append(self._time(switch, session, *args)[0])

        def timed_tick(session: Session, trainer: Trainer) -> None:
            known = len(self.transitions)
            seconds, _ = self._time(tick, session, trainer)
            step = trainer.global_step
            ordinary = len(self.transitions) == known and step % trainer.num_training_batches
            if ordinary and self.wanted(step):
                self.ticks[step] = self.ticks.get(step, 0.0) + seconds

        def timed_digests(*args: Any) -> Any:
            seconds, found = self._time(digests, *args)
            self.fingerprints += seconds if self._inside else 0.0
            return found

        Session._switch = timed_switch  # type: ignore[method-assign]
        Session.tick = timed_tick  # type: ignore[method-assign]
        baseline.digests = timed_digests
        for callback in callbacks:
            for name in ("setup", "on_fit_start", "on_train_start"):
                setattr(callback, name, self._counted(getattr(callback, name)))
        try:
            yield
        finally:
            Session._switch = switch  # type: ignore[method-assign]
            Session.tick = tick  # type: ignore[method-assign]
            baseline.digests = digests

    def _counted(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inside = True
            seconds, result = self._time(hook, *args, **kwargs)
            self._inside = False
            self.start += seconds
            return result

        return run

    def _time(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
        began = self.clock()
        result = call(*args, **kwargs)
        return self.clock() - began, result


@dataclass(frozen=True)
class Row:
    """One model; seconds, medians.

    Attributes:
        name: of the model.
        tensors: how many it has.
        stages: of `GradualUnfreeze`.
        index: one walk, names resolved.
        backbone: `FreezeBackbone` resolved to a schedule and a plan.
        gradual: the same for `GradualUnfreeze`.
        transition: flags, modes, optimizer groups.
        tick: all callbacks of a step, a step in which nothing is due.
        start: all callbacks in `setup`, `on_fit_start` and `on_train_start`, with an audit,
            without the fingerprints.
        fingerprints: what these take in it.
        audited: a transition with an audit, which checks before it and takes down after it.
    """

    name: str
    tensors: int
    stages: int
    index: float
    backbone: float
    gradual: float
    transition: float
    tick: float
    start: float
    fingerprints: float
    audited: float

    @property
    def whole(self) -> float:
        """Index, plan and transition together, for the slower of the two callbacks."""
        return self.index + max(self.backbone, self.gradual) + self.transition


def measure(name: str, make: Callable[[], Classifier], settings: Settings, starts: int = 3) -> Row:
    """All that is measured of one model.

    Args:
        name: of the model.
        make: makes it anew.
        settings: of the benchmark.
        starts: fits of which the start is measured.
    """
    clock = CLOCKS[settings.clock]
    model = make()

    def typical(prepare: Callable[[], Any], call: Callable[[Any], Any]) -> float:
        times = []
        for _ in range(settings.repeats):
            prepared = prepare()
            gc.collect()
            began = clock()
            call(prepared)
            times.append(clock() - began)
        return statistics.median(times)

    def plan(callback: Any) -> float:
        return typical(lambda: ModelIndex.of(model), lambda index: callback.resolve(index).plan(1))

    index = ModelIndex.of(model)
    plain = Watch(clock)
    callbacks = freezing()
    stages = len(GradualUnfreeze().resolve(index).stages)
    epochs = min(stages, settings.repeats + 1)
    with plain.on(callbacks):
        fit(make(), callbacks, epochs, 3)
    audited = [Watch(clock) for _ in range(starts)]
    for number, watch in enumerate(audited):
        callbacks = [*freezing(), TrainableParamAudit(table=False)]
        with watch.on(callbacks):
            fit(make(), callbacks, 1 if number else epochs, 1)
    return Row(
        name,
        len(index.parameters),
        stages,
        typical(lambda: None, lambda _: ModelIndex.of(model)),
        plan(FreezeBackbone()),
        plan(GradualUnfreeze()),
        statistics.median(plain.transitions[1:]),
        statistics.median(plain.ticks.values()),
        statistics.median(watch.start - watch.fingerprints for watch in audited),
        statistics.median(watch.fingerprints for watch in audited),
        statistics.median(audited[0].transitions[1:]),
    )


@dataclass(frozen=True)
class Imports:
    """Seconds in fresh processes: of `import lightning`, and of ours behind it."""

    lightning: float
    ours: float


def imports(settings: Settings) -> Imports:
    """Time the imports in processes of their own, the files in the disk's cache."""
    code = (
        f"import time; {f'import {settings.preload}' if settings.preload else 'pass'}\n"
        "a = time.perf_counter(); import lightning; b = time.perf_counter()\n"
        f"import lightning_freeze; from lightning_freeze import {', '.join(NAMES)}\n"
        "print(b - a, time.perf_counter() - b)"
    )
    times = []
    # the first one compiles, the others find that
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(settings.processes + 1):
        command = [sys.executable, "-W", "ignore", "-c", code]
        output = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        )
        times.append([float(part) for part in output.stdout.split()[-2:]])
    return Imports(*(statistics.median(column) for column in zip(*times[1:])))


@dataclass
class Memory(Callback):
    """Takes down at some steps what Python's objects hold, and what a tick takes."""

    at: tuple[int, int]
    bytes_held: list[int] = field(default_factory=list)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in self.at:
            gc.collect()
            self.bytes_held.append(tracemalloc.get_traced_memory()[0])


@dataclass(frozen=True)
class LongFit:
    """Bytes that a fit added between two steps, and a tick's seconds near each."""

    added: int
    early: float
    late: float


def long_fit(settings: Settings) -> LongFit:
    """All callbacks on a tiny model, for many steps."""
    first, last = settings.steps
    near = range(first // 2, first), range(last - first // 2, last)
    # what is noted between the two steps would count as growth: room for it is made before
    watch, memory = Watch(CLOCKS[settings.clock]), Memory(settings.steps)
    watch.ticks = dict.fromkeys([*near[0], *near[1]], 0.0)
    watch.wanted = watch.ticks.__contains__
    callbacks = [
        lightning_freeze.ReinitTopLayers(1, seed=0),
        *freezing(),
        lightning_freeze.FrozenFeatureCache(),
        TrainableParamAudit(table=False),
    ]
    tracemalloc.start()
    try:
        with watch.on([]):
            fit(toy(50), [*callbacks, memory], 1, last)
    finally:
        tracemalloc.stop()
    early, late = (statistics.median(watch.ticks[step] for step in steps) for steps in near)
    return LongFit(memory.bytes_held[1] - memory.bytes_held[0], early, late)


def show(rows: Sequence[Row], found: Imports, memory: LongFit, settings: Settings) -> None:
    console = Console()
    console.width = max(console.width, 118)
    table = Table(
        title=f"Milliseconds ({settings.clock} time, {settings.repeats} repeats)",
        title_justify="left",
    )
    table.add_column("model")
    columns = ("tensors", "stages", "index", "Freeze-\nBackbone", "Gradual-\nUnfreeze")
    columns += ("switch", "together", "tick", "fit start", "finger-\nprints", "audited\nswitch")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        times = (row.index, row.backbone, row.gradual, row.transition, row.whole)
        more = (row.start, row.fingerprints, row.audited)
        table.add_row(
            row.name,
            f"{row.tensors:,}",
            f"{row.stages:,}",
            *(f"{1e3 * seconds:.2f}" for seconds in times),
            f"{1e6 * row.tick:.0f} µs",
            *(f"{1e3 * seconds:.1f}" for seconds in more),
        )
    console.print(table)
    sized = [row for row in rows if row.name == "blocks"]
    if len(sized) > 1:
        small, large = sized[-2:]
        console.print(
            f"{large.tensors / small.tensors:.1f} times the tensors ({small.tensors:,} to "
            f"{large.tensors:,}) take {large.whole / small.whole:.1f} times as long: index, plan "
            f"and switch; {large.start / small.start:.1f} times: fit start."
        )
    first, last = settings.steps
    console.print(
        f"import: lightning {1e3 * found.lightning:.0f} ms; lightning_freeze with its callbacks "
        f"adds {1e3 * found.ours:.1f} ms (medians of {settings.processes} processes)."
    )
    console.print(
        f"A long fit: from step {first:,} to step {last:,} Python's objects grew by "
        f"{memory.added:,} bytes ({memory.added / (last - first):.1f} a step); a tick takes "
        f"{1e6 * memory.early:.0f} µs there and {1e6 * memory.late:.0f} µs here, traced."
    )


def parse(arguments: Sequence[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Settings()
    sizes = ", ".join(map(str, default.tensors))
    parser.add_argument(
        "--tensors", type=int, nargs="+", default=default.tensors, help=f"sizes ({sizes})"
    )
    parser.add_argument(
        "--repeats", type=int, default=default.repeats, help=f"of each ({default.repeats})"
    )
    parser.add_argument(
        "--processes", type=int, default=default.processes, help="that import (%(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        default=default.steps,
        help="of the long fit between which memory is compared (200 2000)",
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default=default.clock,
        help="`processor` on a busy machine (%(default)s)",
    )
    parser.add_argument("--no-bert", dest="bert", action="store_false", help="leave BERT-base out")
    parser.add_argument(
        "--preload", default="", help="a module that lightning needs to be imported after"
    )
    given = vars(parser.parse_args(arguments))
    settings = Settings(
        **{**given, "tensors": tuple(given["tensors"]), "steps": tuple(given["steps"])}
    )
    if min(settings.tensors) < 10:
        parser.error(f"--tensors has {min(settings.tensors)}; a model has at least 10")
    if settings.repeats < 1 or settings.processes < 1:
        parser.error("--repeats and --processes must be at least 1")
    if not 4 <= settings.steps[0] < settings.steps[1]:
        parser.error("--steps takes two numbers, the first at least 4, the second larger")
    return settings


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without Lightning's own messages."""
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def main(arguments: Sequence[str] | None = None) -> tuple[list[Row], Imports, LongFit]:
    settings = parse(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small: threads would only wait for each other
    try:
        with hushed():
            measure("blocks", lambda: toy(10), settings, 1)  # the first fit imports and allocates
            rows = [
                measure("blocks", lambda tensors=tensors: toy(tensors), settings)  # type: ignore[misc]
                for tensors in settings.tensors
            ]
            if settings.bert:
                rows.append(measure("BERT-base", bert_base, settings))
            memory = long_fit(settings)
    finally:
        torch.set_num_threads(threads)
    found = imports(settings)
    show(rows, found, memory, settings)
    return rows, found, memory


if __name__ == "__main__":
    main()
