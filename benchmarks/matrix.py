"""Which combinations run: strategy, precision, compile, loop, accumulation and scheduler.

    python benchmarks/matrix.py            # a row for each strategy and precision
    python benchmarks/matrix.py --each     # a line for each combination

Each combination is a fit of a small model on the CPU with `GradualUnfreeze` and an audit that
raises, on two ranks (gloo) where the strategy has several. It runs if no finding was raised, every
layer trained when it was its turn, none before, and all ranks ended with the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_freeze import FreezeError, GradualUnfreeze, TrainableParamAudit, fingerprint

EPOCHS = 4
RUNS = "runs"
STRATEGIES = {"one device": 1, "DDP": 2, "DDP, bucket views": 2, "FSDP2": 2}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
SCHEDULERS = ("none", "LambdaLR", "OneCycleLR", "ReduceLROnPlateau")
NOT_HERE = {
    "FSDP1": "refused at fit start; not tried here, it needs a GPU",
    "DeepSpeed": "refused at fit start; not tried here, it needs a GPU",
    "XLA": "refused at fit start; not tried here, it needs a TPU",
}


@dataclass(frozen=True)
class Combination:
    """One cell of the matrix."""

    strategy: str
    precision: str
    compiled: bool
    manual: bool
    accumulate: int
    scheduler: str


class Block(nn.Module):
    """A layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.linear(x)))


class Backbone(nn.Module):
    """An input layer and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block(8), Block(8)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class Model(LightningModule):
    """Trained as a combination says."""

    def __init__(self, how: Combination) -> None:
        super().__init__()
        self.how = how
        self.automatic_optimization = not how.manual
        self.backbone: nn.Module = Backbone()
        self.head = nn.Linear(8, 3)
        if how.compiled:
            self.backbone = torch.compile(self.backbone, backend="aot_eager")  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.how.strategy == "FSDP2":
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            for part in self.modules():
                if isinstance(part, Block):
                    fully_shard(part, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        x, y = batch
        x = x.to(next(self.parameters()).dtype)
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_epoch=True, on_step=False, sync_dist=True)
        if not self.how.manual:
            return loss
        self.manual_backward(loss / self.how.accumulate)
        if (batch_idx + 1) % self.how.accumulate == 0:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
            scheduler: Any = self.lr_schedulers()
            if self.how.scheduler in ("LambdaLR", "OneCycleLR"):
                scheduler.step()
        return None

    def on_train_epoch_end(self) -> None:
        if self.how.manual and self.how.scheduler == "ReduceLROnPlateau":
            scheduler: Any = self.lr_schedulers()
            scheduler.step(self.trainer.callback_metrics["train_loss"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        steps = 4 * EPOCHS // self.how.accumulate
        if self.how.scheduler == "none":
            return optimizer
        if self.how.scheduler == "ReduceLROnPlateau":
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "train_loss"},
            }
        by_step: Any = (
            lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
            if self.how.scheduler == "LambdaLR"
            else lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)
        )
        return [optimizer], [{"scheduler": by_step, "interval": "step"}]


class Layers(Callback):
    """Fingerprints of each layer after each epoch, whole or of this rank's shards."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    def take(self, module: LightningModule) -> None:
        self.seen.append(fingerprint(module))

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.take(module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.take(module)


def moved(layers: Layers, epoch: int, inside: str) -> set[bool]:
    """Whether each tensor of a layer moved in an epoch."""
    before, after = layers.seen[epoch], layers.seen[epoch + 1]
    return {before[name] != after[name] for name in after if name.startswith(inside)}


def judge(layers: Layers) -> str:
    """Whether each layer trained from its epoch on, and none before."""
    order = ("head.", "backbone.blocks.1.", "backbone.blocks.0.", "backbone.embed.")
    for turn, inside in enumerate(order):
        for epoch in range(EPOCHS):
            found = moved(layers, epoch, inside)
            if epoch < turn and found != {False}:
                return f"`{inside}*` moved in epoch {epoch}, although it is unfrozen in {turn}"
            if epoch >= turn and True not in found:
                return f"`{inside}*` didn't move in epoch {epoch}"
    return RUNS


def strategy_of(name: str) -> Any:
    if name == "FSDP2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    if name.startswith("DDP"):
        return DDPStrategy(gradient_as_bucket_view="views" in name)
    return SingleDeviceStrategy("cpu")


def attempt(how: Combination, rank: int) -> str:
    """Fit; returns "runs", or what was refused or went wrong."""
    ranks = STRATEGIES[how.strategy]
    torch.manual_seed(7)
    data = TensorDataset(torch.randn(16 * ranks, 4), torch.randint(0, 3, (16 * ranks,)))
    sampler = DistributedSampler(data, ranks, rank, shuffle=False)
    layers = Layers()
    try:
        trainer = Trainer(
            max_epochs=EPOCHS,
            strategy=strategy_of(how.strategy),
            accelerator="cpu",
            devices=ranks,
            precision=how.precision,  # type: ignore[arg-type]
            accumulate_grad_batches=1 if how.manual else how.accumulate,
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[GradualUnfreeze(), TrainableParamAudit(table=False, every="batch"), layers],
        )
        trainer.fit(Model(how), DataLoader(data, batch_size=4, sampler=sampler))
    except FreezeError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return judge(layers)


def quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def work(rank: int, port: int, folder: str, combinations: Sequence[Combination]) -> None:
    """One rank: all combinations, one after the other."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    quiet()
    with Path(folder, f"{rank}.jsonl").open("w") as file:
        for how in combinations:
            torch.compiler.reset()
            print(json.dumps([asdict(how), attempt(how, rank)]), file=file, flush=True)


def measure(combinations: Iterable[Combination]) -> dict[Combination, str]:
    """Try them, strategy by strategy, in processes of their own."""
    found: dict[Combination, str] = {}
    by_strategy = itertools.groupby(combinations, lambda how: how.strategy)
    for strategy, group in by_strategy:
        asked = list(group)
        with tempfile.TemporaryDirectory() as folder:
            ranks = STRATEGIES[strategy]
            torch.multiprocessing.start_processes(
                work, (find_free_network_port(), folder, asked), nprocs=ranks, start_method="fork"
            )
            told = [
                [
                    json.loads(line)[1]
                    for line in Path(folder, f"{rank}.jsonl").read_text().splitlines()
                ]
                for rank in range(ranks)
            ]
        for how, results in zip(asked, zip(*told)):
            found[how] = next((text for text in results if text != RUNS), RUNS)
    return found


def combinations(
    strategies: Sequence[str], precisions: Sequence[str], schedulers: Sequence[str]
) -> Iterator[Combination]:
    axes = (strategies, precisions, (False, True), (False, True), (1, 2), schedulers)
    return (Combination(*values) for values in itertools.product(*axes))


def show(results: dict[Combination, str], *, each: bool) -> None:
    """Print the table, and what refused or failed, once for each reason."""
    console = Console(width=120)
    columns = [
        (f"{'manual' if manual else 'automatic'}{', compiled' if compiled else ''}", key)
        for key in itertools.product((False, True), (False, True))
        for manual, compiled in [key]
    ]
    table = Table(title="Combinations of accumulation and scheduler that run", title_justify="left")
    for heading in ("strategy", "precision", *(text for text, _ in columns)):
        table.add_column(heading)
    reasons: dict[str, list[str]] = {}
    for row in dict.fromkeys((how.strategy, how.precision) for how in results):
        cells = []
        for _, (manual, compiled) in columns:
            of = [
                text
                for how, text in results.items()
                if (how.strategy, how.precision, how.manual, how.compiled)
                == (*row, manual, compiled)
            ]
            for text in dict.fromkeys(of):
                if text != RUNS:
                    reasons.setdefault(text, []).append(" ".join(row))
            runs = of.count(RUNS)
            whole = "refused" if all(text.startswith("refused") for text in of) else "none"
            cells.append(f"{runs} of {len(of)}" if runs else whole)
        table.add_row(*row, *cells)
    console.print(table)
    for name, why in NOT_HERE.items():
        console.print(f"{name}: {why}", markup=False)
    for reason, rows in reasons.items():
        console.print(f"{', '.join(dict.fromkeys(rows))}: {reason}", markup=False)
    if each:
        for how, text in results.items():
            print(*asdict(how).values(), text, sep=" | ")


def main(arguments: Sequence[str] | None = None) -> dict[Combination, str]:
    """Try the combinations and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--strategies", nargs="+", default=tuple(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--schedulers", nargs="+", default=SCHEDULERS, choices=SCHEDULERS)
    parser.add_argument("--each", action="store_true", help="also print each combination")
    given = parser.parse_args(arguments)
    results = measure(combinations(given.strategies, given.precisions, given.schedulers))
    show(results, each=given.each)
    return results


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
