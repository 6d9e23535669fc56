"""A training process that says what it is doing, so that it can be killed while it does that."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_freeze import GradualUnfreeze, ReinitTopLayers, TrainableParamAudit
from lightning_freeze.checkpoints.certificate import read_certificate
from lightning_freeze.checkpoints.verify.compare import verify
from tests.callbacks.recipes import configure
from tests.callbacks.test_oracle_resume import everything
from tests.interruption.processes import start_process
from tests.toys import ByStep, FixedDropout, Toy, loader, seeded, state, trainer

EPOCHS = 8
STEPS = 32

# what a process says when it begins to do it
BORN, FIT, BATCH, CERTIFY, WRITE, WRITTEN, VALIDATE, END, REPORT = "0fbcwxver"
NAMES = {
    BORN: "starting",
    FIT: "restoring",
    BATCH: "training",
    CERTIFY: "collecting a checkpoint and writing the certificate",
    WRITE: "writing a checkpoint",
    WRITTEN: "between a checkpoint and what follows",
    VALIDATE: "validating",
    END: "ending",
    REPORT: "reporting",
}


@dataclass(frozen=True)
class Place:
    """The files of one training that may take several processes."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "run"

    @property
    def report(self) -> Path:
        return self.folder / "report.json"

    @property
    def certificate(self) -> Path:
        return self.checkpoints / "certificate.json"

    @property
    def temporary(self) -> Path:
        """Where Lightning writes a checkpoint before it renames it: `TMPDIR`."""
        return self.folder / "tmp"

    @property
    def end(self) -> Path:
        return self.folder / "end.pt"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def last(self) -> Path | None:
        """What `ckpt_path="last"` means."""
        found = sorted(self.checkpoints.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else None

    def parts(self) -> list[str]:
        """Temporary files of ours."""
        return [path.name for path in self.folder.rglob(".*.part")]


class Tell(Callback):
    """Says what the process is doing. It comes first, so it speaks before the others act."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        self.say(FIT)
        save = trainer.strategy.save_checkpoint

        def told(*args: Any, **options: Any) -> None:
            self.say(WRITE)
            save(*args, **options)
            self.say(WRITTEN)

        trainer.strategy.save_checkpoint = told  # type: ignore[method-assign]

    def on_train_batch_start(self, *_: Any) -> None:
        self.say(BATCH)

    def on_save_checkpoint(self, *_: Any) -> None:
        self.say(CERTIFY)

    def on_validation_start(self, *_: Any) -> None:
        self.say(VALIDATE)

    def on_train_end(self, *_: Any) -> None:
        self.say(END)

    def on_fit_end(self, *_: Any) -> None:
        self.say(REPORT)


class Save(ModelCheckpoint):
    """Saves every few steps, and an epoch's last at the epoch's end.

    Lightning 2.6 by itself miscounts after a resume from a checkpoint of an epoch's last batch: if
    that fit is interrupted, too, the next runs some steps too many. See `test_breaks.py`.
    """

    def __init__(self, place: Place, every: int, save_last: Any) -> None:
        super().__init__(
            place.checkpoints,
            save_last=save_last,
            save_top_k=1,
            every_n_train_steps=every,
            save_on_train_epoch_end=True,
        )

    def on_train_batch_end(self, trainer: Trainer, *rest: Any, **named: Any) -> None:
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            super().on_train_batch_end(trainer, *rest, **named)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)


def callbacks(place: Place, *first: Callback, save: Callback) -> list[Callback]:
    """All of ours, with files, and what saves checkpoints."""
    return [
        *first,
        GradualUnfreeze(start=6, every=9, unit="step", lr_decay=0.5),  # the input layer never
        ReinitTopLayers(1, seed=3),
        TrainableParamAudit(table=False, dead_after=2, report=place.report, certificate=True),
        FixedDropout(),
        save,
    ]


def model() -> Toy:
    made: Toy = seeded(lambda: ByStep(configure("AdamW", "StepLR")))
    return made


def prepared(
    place: Place,
    *first: Callback,
    every: int = 1,
    save_last: Any = True,
    save: Callback | None = None,
    **options: Any,
) -> tuple[Trainer, Toy]:
    """A trainer and its model; options are those of the trainer."""
    made = callbacks(place, *first, save=save or Save(place, every, save_last))
    return trainer(*made, epochs=EPOCHS, enable_checkpointing=True, **options), model()


def fit(run: Trainer, module: Toy, ckpt_path: str | Path | None = "last") -> None:
    """From the last checkpoint on, if there is one."""
    run.fit(module, loader(), loader(seed=2), ckpt_path=ckpt_path)


def outcome(run: Trainer, module: Toy) -> dict[str, Any]:
    """What a training came to: weights, optimizer state and groups, lrs, flags, modes."""
    return {"weights": state(module), **everything(run, module)}


def fit_to_the_end(
    place: Place, *first: Callback, ckpt_path: str | Path | None = "last", **options: Any
) -> None:
    """Train and keep what it came to."""
    run, module = prepared(place, *first, **options)
    fit(run, module, ckpt_path)
    torch.save(outcome(run, module), place.end)


def quietly() -> None:
    """In a process of its own: no warning but one of ours that something wasn't written."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", message=".*couldn't be written")


def live(
    place: Place,
    pipe: int,
    prepare: Callable[[], Any] = lambda: None,
    first: tuple[Callback, ...] = (),
    options: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """What a training process does."""
    try:
        prepare()
        quietly()
        place.temporary.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = str(place.temporary)

        def say(what: str) -> None:
            os.write(pipe, what.encode())

        say(BORN)
        fit_to_the_end(place, Tell(say), *first, **options)
    except BaseException:
        place.log.write_text(traceback.format_exc())
        raise


@dataclass(frozen=True)
class Plan:
    """When to kill: the n-th time that a process begins something, and a fraction of it later."""

    what: str
    times: int
    fraction: float

    def __str__(self) -> str:
        return f"{NAMES[self.what]}, time {self.times}, after {self.fraction:.2f} of it"


@dataclass
class Life:
    """What became of one process.

    Attributes:
        said: all that it said it began, in order.
        lasted: how long each of these took, in seconds, with what followed.
        killed: whether it was killed before its end.
    """

    said: str = ""
    lasted: dict[str, list[float]] = field(default_factory=dict)
    killed: bool = False

    @property
    def died(self) -> str:
        """What it was doing when it was killed."""
        return self.said[-1]

    @property
    def usual(self) -> dict[str, float]:
        """How long each thing took on average."""
        return {what: sum(times) / len(times) for what, times in self.lasted.items()}


def one_life(
    place: Place,
    plan: Plan | None = None,
    usual: Mapping[str, float] = MappingProxyType({}),
    *first: Callback,
    prepare: Callable[[], Any] = lambda: None,
    **options: Any,
) -> Life:
    """Start a training process, and kill it when the plan says.

    Args:
        place: its files.
        plan: when to kill; the process runs to its end without one.
        usual: how long what it does takes, in seconds.
        first: callbacks that come before the others.
        prepare: called in the process before anything else.
        options: of `fit_to_the_end`.
    """
    reader, writer = os.pipe()
    process = start_process(live, place, writer, prepare, first, options)
    os.close(writer)
    life, seen, before = Life(), 0, time.monotonic()
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while chunk := pipe.read(1):
            what, now = chunk.decode(), time.monotonic()
            if life.said:
                life.lasted.setdefault(life.said[-1], []).append(now - before)
            life.said, before = life.said + what, now
            seen += plan is not None and what == plan.what
            if plan is not None and what == plan.what and seen == plan.times:
                time.sleep(plan.fraction * usual.get(what, 0.0))
                os.kill(process.pid, signal.SIGKILL)
                life.said += pipe.readall().decode()
                break
    process.join(60)
    life.killed = process.exitcode == -signal.SIGKILL
    told = place.log.read_text() if place.log.exists() else ""
    assert process.exitcode in (0, -signal.SIGKILL), f"exit status {process.exitcode}\n{told}"
    return life


def check_files(place: Place) -> None:
    """At any moment: what has a name is whole."""
    for path in place.folder.rglob("*.json"):
        json.loads(path.read_text())
        read_certificate(path)
    for path in place.checkpoints.glob("*.ckpt"):
        torch.load(path, weights_only=True)
    last = place.last()
    if last is not None:
        # written just before a checkpoint, it may be a step ahead of it, and still fits
        assert verify(None, last, place.certificate).ok
