"""What an audit costs: bytes per second beside `torch.sum` and memory.

    python benchmarks/audit_cost.py

Reading: a full audit (bytes of every frozen tensor, flags, modes, gradients, ties, identity) and
`torch.sum` over the same tensors, in turns, for a BERT-base and for 10,000 small tensors. A sum
is about the least that reading can cost.

Memory: a fit of a model with 10,000 small tensors and `FreezeBackbone`, with and without an audit.

With a GPU it also reads 14 GB of bfloat16 there, and reduces them to digests.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import statistics
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel

from lightning_freeze import FreezeBackbone, TrainableParamAudit
from lightning_freeze.accelerator import reduced
from lightning_freeze.audit.ledger import Ledger
from lightning_freeze.model.index import ModelIndex

SMALL = 10_000
GIGABYTES_ON_GPU = 14
CLASSES = 6


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    repeats: int = 9
    base_layers: int = 12
    base_width: int = 768
    small: int = SMALL
    threads: int = 0


@dataclass(frozen=True)
class Reading:
    """One model, read in two ways.

    Attributes:
        what: the model.
        tensors: how many, parameters and buffers.
        size: bytes in all.
        sums: seconds of each `torch.sum` over all.
        audits: seconds of each full audit.
        kept: bytes that a ledger holds for each tensor.
        most: bytes for each tensor at the peak of an audit.
    """

    what: str
    tensors: int
    size: int
    sums: tuple[float, ...]
    audits: tuple[float, ...]
    kept: float
    most: float

    @property
    def ratio(self) -> float:
        """Bytes per second of an audit over those of a sum, of the medians."""
        return statistics.median(self.sums) / statistics.median(self.audits)


@dataclass(frozen=True)
class Result:
    """Everything that was measured.

    Attributes:
        readings: each model.
        in_a_fit: bytes for each tensor that an audit holds in a fit, beside `FreezeBackbone`.
        gpu: seconds of a sum and of a reduction.
    """

    readings: tuple[Reading, ...]
    in_a_fit: float
    gpu: tuple[float, float] | None = None


class Small(nn.Module):
    """A model of many small tensors in twenty layers."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        each = max(1, tensors // 40)
        self.layers = nn.ModuleList(
            nn.Sequential(*[nn.Linear(8, 8) for _ in range(each)]) for _ in range(20)
        )


def clocked(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def read(what: str, model: nn.Module, repeats: int) -> Reading:
    """Read a model in turns in both ways."""
    model.requires_grad_(False).eval()
    tensors = [*model.parameters(), *model.buffers()]
    index = ModelIndex.of(model)
    ledger = Ledger(model, index=index)  # warm: caches of shapes and sizes are made once
    ledger.check()
    del ledger
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    ledger = Ledger(model, index=index)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.reset_peak()
    found = ledger.check()
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    if found:
        raise SystemExit(f"The audit of an untouched model found {found}.")
    sums, audits = [], []
    for _ in range(repeats):
        # three in a row: behind a sum, torch's threads go on spinning for a while
        sums += [clocked(lambda: [torch.sum(tensor) for tensor in tensors]) for _ in range(3)]
        audits += [clocked(ledger.check) for _ in range(3)]
    return Reading(
        what=what,
        tensors=len(tensors),
        size=sum(tensor.nbytes for tensor in tensors),
        sums=tuple(sums),
        audits=tuple(audits),
        kept=kept / len(tensors),
        most=most / len(tensors),
    )


def quiet_trainer(callbacks: list[Callback]) -> Trainer:
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=callbacks,
    )


class ManySmall(LightningModule):
    """Many small tensors under a head, which alone is used."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.backbone, self.head = Small(tensors), nn.Linear(8, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Weigh(Callback):
    """Notes how much memory Python holds when training ends."""

    def on_train_end(self, *_: Any) -> None:
        gc.collect()
        self.held = tracemalloc.get_traced_memory()[0]


def held_in_a_fit(tensors: int, *audit: Callback) -> int:
    """Bytes that a fit with `FreezeBackbone` has come to hold when training ends."""
    weigh, module = Weigh(), ManySmall(tensors)
    data = DataLoader(TensorDataset(torch.randn(12, 8)), batch_size=4)
    trainer = quiet_trainer([FreezeBackbone(), *audit, weigh])
    gc.collect()
    tracemalloc.start()
    trainer.fit(module, data)
    tracemalloc.stop()
    return weigh.held


def measure_fit(tensors: int) -> float:
    """What an audit adds to the memory that a fit holds, in bytes for each tensor."""
    held: dict[bool, list[int]] = {True: [], False: []}
    for _ in range(4):
        for audited in (True, False):
            audit = [TrainableParamAudit(table=False, certificate=False)] if audited else []
            held[audited].append(held_in_a_fit(tensors, *audit))
            gc.collect()
    # the first fits fill caches, and tables of weak references grow now and then
    return (min(held[True][1:]) - min(held[False][1:])) / tensors


def measure_gpu(repeats: int) -> tuple[float, float]:
    """Seconds of a sum and of a reduction over 14 GB of bfloat16."""
    each = 256 * 1024 * 1024
    count = GIGABYTES_ON_GPU * 10**9 // (2 * each)
    tensors = [torch.randn(each, device="cuda").bfloat16() for _ in range(count)]

    def seconds(act: Callable[[], Any]) -> float:
        act()
        torch.cuda.synchronize()
        took = []
        for _ in range(repeats):
            took.append(clocked(lambda: (act(), torch.cuda.synchronize())))
        return statistics.median(took)

    return seconds(lambda: [t.sum() for t in tensors]), seconds(lambda: reduced(tensors))


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def bert_base(settings: Settings) -> nn.Module:
    config = BertConfig(
        hidden_size=settings.base_width,
        num_hidden_layers=settings.base_layers,
        num_attention_heads=12,
        intermediate_size=4 * settings.base_width,
    )
    return BertModel(config)


def show(result: Result) -> None:
    """Print the tables."""
    console = Console(width=110)
    table = Table(title="Reading all frozen tensors", title_justify="left")
    for heading in (
        "model",
        "tensors",
        "bytes",
        "torch.sum",
        "audit",
        "ratio",
        "held/tensor",
        "peak",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in result.readings:
        speeds = [row.size / statistics.median(times) / 1e9 for times in (row.sums, row.audits)]
        table.add_row(
            row.what,
            f"{row.tensors:,}",
            f"{row.size / 1e6:,.0f} MB",
            *(f"{speed:.2f} GB/s" for speed in speeds),
            f"{row.ratio:.2f}",
            f"{row.kept:.0f} B",
            f"{row.most:.0f} B",
        )
    console.print(table)
    console.print(f"In a fit with FreezeBackbone an audit adds {result.in_a_fit:.0f} B/tensor.")
    if result.gpu is None:
        console.print("GPU: none here, not measured.")
    else:
        ratio = result.gpu[1] / result.gpu[0]
        console.print(f"GPU: {GIGABYTES_ON_GPU} GB reduced in {ratio:.2f} times the time of a sum.")


def main(arguments: Sequence[str] | None = None) -> Result:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in vars(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    settings = Settings(**vars(parser.parse_args(arguments)))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with hushed():
        readings = (
            read("BERT-base", bert_base(settings), settings.repeats),
            read("small tensors", Small(settings.small), settings.repeats),
        )
        in_a_fit = measure_fit(settings.small)
        gpu = measure_gpu(settings.repeats) if torch.cuda.is_available() else None
    result = Result(readings, in_a_fit, gpu)
    show(result)
    return result


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
