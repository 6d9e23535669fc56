"""What every benchmark needs: quiet fits, processes of their own, figures, tables."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, Trainer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

T = TypeVar("T")


@contextlib.contextmanager
def hushed(threads: int | None = 1) -> Iterator[None]:
    """Without the libraries' own messages, on so many threads (as it is where None)."""
    names = ("lightning.pytorch", "lightning.fabric", "torch.distributed", "transformers")
    names += tuple(f"{name}.utilities.rank_zero" for name in names[:2])
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers], torch.get_num_threads()
    torch.set_num_threads(threads or before[1])
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before[1])
        for logger, level in zip(loggers, before[0]):
            logger.setLevel(level)


def quiet_trainer(callbacks: Sequence[Callback], epochs: int = 1, **options: Any) -> Trainer:
    """A Trainer for one CPU that prints, logs and saves nothing."""
    given: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**given, **options})


def alone(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a fork of this process, which must not have trained anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *args).result()


@dataclass(frozen=True)
class Spread:
    """The median of some figures, and their range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def plus_minus(values: Sequence[float]) -> str:
    """Mean ± standard error; the mean alone of a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return f"{statistics.mean(values):.2f}" + ("" if error is None else f" ± {error:.2f}")


def show(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    *,
    markdown: bool = False,
) -> None:
    """Print a table with what is to be said below it, for the terminal or for the README."""
    if markdown:
        lines = [list(heads), ["---"] + ["---:"] * (len(heads) - 1), *rows]
        cells = [[c.replace("|", "\\|").replace("\n", "<br>") for c in line] for line in lines]
        table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        print("\n\n".join([title, table, *notes]))
        return
    console = Console()
    console.width = max(console.width, 160)
    shown = Table(title=title, title_justify="left", show_lines=True, box=box.ROUNDED)
    for position, head in enumerate(heads):
        shown.add_column(head, justify="right" if position else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
    for note in notes:
        console.print(escape(note), soft_wrap=True, highlight=False)


def versions() -> str:
    """Of Python and of the libraries that are measured."""
    shown = [f"Python {platform.python_version()}"]
    names = ("lightning-freeze", "finetuning-scheduler", "lightning", "torch", "transformers")
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            shown.append(f"{name} {metadata.version(name)}")
    return ", ".join(shown)
