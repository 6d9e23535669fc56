"""What an audit costs: bytes per second beside `torch.sum`, memory, and slices beside no audit.

    python benchmarks/audit_cost.py

Reading: a full audit (bytes of every frozen tensor, flags, modes, gradients, ties, identity) and
`torch.sum` over the same tensors, in turns, for a BERT-base and for 10,000 small tensors. A sum
is about the least that reading can cost.

Slices: one fit of a small BERT in which blocks of steps with `every="rolling"` and blocks without
any audit take turns, so that both have the same machine. A step lasts from the start of one batch
to the start of the next, every hook included.

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
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, BertModel

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
    blocks: int = 16
    steps: int = 10
    layers: int = 6
    width: int = 384
    batch: int = 16
    length: int = 32
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
class Slices:
    """Steps with slices beside steps without an audit.

    Attributes:
        without: seconds of each step.
        slices: the same with `every="rolling"`.
        hooks: seconds of the audit's hooks in each of those.
        steps_per_round: steps until everything was compared.
    """

    without: tuple[float, ...]
    slices: tuple[float, ...]
    hooks: tuple[float, ...]
    steps_per_round: int

    @property
    def cost(self) -> float:
        """What a median step takes longer, as a share."""
        return statistics.median(self.slices) / statistics.median(self.without) - 1

    @property
    def by_hooks(self) -> float:
        """What the hooks take of a median step, as a share: less at the mercy of the machine."""
        return sum(self.hooks) / sum(self.slices)


@dataclass(frozen=True)
class Result:
    """Everything that was measured.

    Attributes:
        readings: each model.
        slices: what they cost.
        in_a_fit: bytes for each tensor that an audit holds in a fit, beside `FreezeBackbone`.
        gpu: seconds of a sum and of a reduction.
    """

    readings: tuple[Reading, ...]
    slices: Slices
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


class Classifier(LightningModule):
    """A BERT that classifies random tokens."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=2000,
            hidden_size=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=12,
            intermediate_size=4 * settings.width,
            num_labels=CLASSES,
        )
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens, labels = batch
        return self.model(input_ids=tokens, labels=labels).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


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


class InTurns(TrainableParamAudit):
    """An audit that is there in every other block of steps, and clocks its hooks."""

    def __init__(self, block: int) -> None:
        super().__init__(every="rolling", table=False, certificate=False)
        self.block = block
        self.spent = 0.0
        self.hooks: list[float] = []

    def there(self, trainer: Trainer) -> bool:
        return trainer.global_step // self.block % 2 == 1

    def timed(self, hook: Callable[..., None], *given: Any) -> None:
        began = time.perf_counter()
        hook(*given)
        self.spent += time.perf_counter() - began

    def on_train_batch_start(self, trainer: Trainer, *given: Any) -> None:
        if self.there(trainer):
            self.spent = 0.0
            self.timed(super().on_train_batch_start, trainer, *given)

    def on_before_optimizer_step(self, trainer: Trainer, *given: Any) -> None:
        if self.there(trainer):
            self.timed(super().on_before_optimizer_step, trainer, *given)
        elif self._run is not None:
            self._run._noting = False  # nor does the hook behind the optimizer's step look

    def on_train_batch_end(self, trainer: Trainer, *given: Any) -> None:
        # the step that ends here has been counted already
        if (trainer.global_step - 1) // self.block % 2 == 1:
            self.timed(super().on_train_batch_end, trainer, *given)
            self.hooks.append(self.spent)


@dataclass
class Clock(Callback):
    """Notes how long each step takes, hooks included."""

    starts: list[float] = field(default_factory=list)

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())


def measure_slices(settings: Settings) -> Slices:
    """One fit, with and without slices in turns."""
    torch.manual_seed(7)
    steps = settings.steps * settings.blocks + 1
    rows = settings.batch * steps
    tokens = torch.randint(0, 2000, (rows, settings.length))
    data = TensorDataset(tokens, torch.randint(0, CLASSES, (rows,)))
    clock, audit = Clock(), InTurns(settings.steps)
    trainer = quiet_trainer([clock, FreezeBackbone(trainable_layers=2), audit])
    trainer.fit(Classifier(settings), DataLoader(data, batch_size=settings.batch))
    took = [after - before for before, after in zip(clock.starts, clock.starts[1:])]
    slices: list[float] = []
    without: list[float] = []
    for step, seconds in enumerate(took):
        block, place = divmod(step, settings.steps)
        if block and place:  # the first block is slow, and so is each change
            (slices if block % 2 else without).append(seconds)
    rolling = audit._run.rolling if audit._run is not None else None
    rounds = rolling.steps_per_round if rolling is not None else 0
    return Slices(tuple(without), tuple(slices), tuple(audit.hooks), rounds)


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
    slices = result.slices
    without, with_slices = (1e3 * statistics.median(t) for t in (slices.without, slices.slices))
    console.print(
        f'\nevery="rolling": median step {without:.1f} ms without an audit, {with_slices:.1f} ms '
        f"with slices: {100 * slices.cost:+.2f} %. The hooks took {100 * slices.by_hooks:.2f} % of "
        f"the steps. A full round: {slices.steps_per_round} steps."
    )
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
        slices = measure_slices(settings)
        in_a_fit = measure_fit(settings.small)
        gpu = measure_gpu(settings.repeats) if torch.cuda.is_available() else None
    result = Result(readings, slices, in_a_fit, gpu)
    show(result)
    return result


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
