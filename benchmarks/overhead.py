"""What the package costs beside the training itself, and where it runs.

    python -m benchmarks.overhead hooks    # microseconds that our callbacks add to a step
    python -m benchmarks.overhead audit    # bytes per second of a full audit beside torch.sum
    python -m benchmarks.overhead size     # fit start and transitions against the model's size
    python -m benchmarks.overhead memory   # what a long fit adds to Python's objects
    python -m benchmarks.overhead imports  # what our import adds to that of lightning
    python -m benchmarks.overhead cache    # an epoch with the feature cache beside one without
    python -m benchmarks.overhead matrix   # which strategies, precisions, loops ... run

Each figure is a median or a ratio within one run, in which the ways that are compared take turns.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from benchmarks._harness import Spread, hushed, quiet_trainer, show, versions
from lightning_freeze import (
    FreezeBackbone,
    FreezeError,
    FrozenFeatureCache,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
    assert_frozen,
    fingerprint,
)

# the first steps of an epoch pay for allocations
SKIPPED = 2
CLASSES = 3


def audit(**options: Any) -> TrainableParamAudit:
    return TrainableParamAudit(table=False, certificate=False, **options)


def bert_base(given: Any) -> nn.Module:
    sizes = {"num_hidden_layers": given.layers, "hidden_size": given.width}
    config = BertConfig(**sizes, intermediate_size=4 * given.width, num_labels=CLASSES)
    return BertForTokenClassification(config)  # its head is one layer


def blocks(groups: int, tensors: int) -> nn.Module:
    """So many layer groups with so many tensors in all, a head on top of them included."""
    each = [[] for _ in range(max(1, groups - 1))] if groups > 1 else []
    for number in range((tensors - 2) // 2 if each else 0):
        each[number % len(each)].append(nn.Linear(2, 2))
    parts = {"layers": nn.ModuleList(nn.Sequential(*linears) for linears in each)} if each else {}
    return nn.ModuleDict({**parts, "classifier": nn.Linear(2, CLASSES)})


class Idle(torch.optim.Optimizer):
    """Moves a head's two tensors, and does else only what surrounds every step: its hooks."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        closure()
        for group in self.param_groups:
            for parameter in group["params"][-2:]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=group["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"][-2:]:
                parameter.grad = None


class Plain(LightningModule):
    """Only the head computes, so that a step is little more than hooks; or the whole model."""

    def __init__(self, model: nn.Module, optimizer: Any = Idle) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.optimizer is not Idle:
            return self.model(input_ids=batch[0], labels=batch[1]).loss
        head: Any = self.model.get_submodule("classifier")
        return head(torch.ones(1, head.in_features)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class Clock(Callback):
    """Seconds from the end of one batch to the end of the next, and of each epoch; last."""

    def on_train_start(self, *_: Any) -> None:
        self.steps: list[float] = []
        self.epochs: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self._began, self._ends = time.perf_counter(), list[float]()

    def on_train_batch_end(self, *_: Any) -> None:
        self._ends.append(time.perf_counter())

    def on_train_epoch_end(self, *_: Any) -> None:
        self.epochs.append(time.perf_counter() - self._began)
        kept = self._ends[SKIPPED - 1 :]
        self.steps += [after - before for before, after in itertools.pairwise(kept)]


def numbers(rows: int, length: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(1000, (rows, length), generator=generator)
    return TensorDataset(tokens, torch.randint(CLASSES, (rows,), generator=generator))


def median_step(module: LightningModule, callbacks: Sequence[Callback], data: Any) -> float:
    clock = Clock()
    gc.collect()
    quiet_trainer([*callbacks, clock]).fit(module, data)
    return statistics.median(clock.steps)


# ---------------------------------------------------------------- sub-commands


def hooks(given: Any) -> None:
    """Fits of one model with each set of callbacks and with none, in turns."""
    several: dict[str, Callable[[], list[Callback]]] = {
        "head trains": lambda: [GradualUnfreeze()],
        "head trains, audit": lambda: [GradualUnfreeze(), audit()],
        "all trains, layerwise_lr_decay": lambda: [GradualUnfreeze.layerwise_lr_decay(0.95)],
    }
    scaled = {0: {"unfreeze": "**", "lr_scale": 0.5}}
    one: list[Callable[[], list[Callback]]] = [
        lambda: [GradualUnfreeze({0: "**"})],
        lambda: [GradualUnfreeze({0: "**"}), audit()],
        lambda: [GradualUnfreeze(scaled)],
    ]
    models: dict[str, Callable[[], nn.Module]] = {
        "1 group": lambda: blocks(1, 2),
        f"BERT-base, {given.layers + 2} groups": lambda: bert_base(given),
        "200 groups": lambda: blocks(200, 800),
        f"{given.tensors:,} tensors": lambda: blocks(20, given.tensors),
    }
    data = DataLoader(numbers(given.steps + SKIPPED))
    rows = []
    for name, make in models.items():
        model, cells = make(), []
        for callbacks in one if name == "1 group" else several.values():
            median_step(Plain(model), callbacks(), data)  # imports and allocations
            added, alone = [], []
            for _ in range(given.repeats):
                alone.append(median_step(Plain(model), [], data))
                added.append(median_step(Plain(model), callbacks(), data) - alone[-1])
                model.requires_grad_(True).train()
            cells.append(f"{1e6 * statistics.median(added):.0f} µs")
        rows.append([name, f"{1e6 * statistics.median(alone):.0f} µs", *cells])
    show(
        "Added to a step, hooks of the optimizer included: differences of median steps",
        ["model", "a step without computation", *several],
        rows,
        [f"Medians of {given.repeats} pairs of fits of {given.steps} steps. {versions()}."],
    )


def audits(given: Any) -> None:
    """A full audit and torch.sum over the same tensors in turns, then slices beside no audit."""
    rows = []
    models = {"BERT-base": bert_base(given), "small tensors": blocks(20, given.tensors)}
    for name, model in models.items():
        model.requires_grad_(False).eval()
        tensors = [*model.parameters(), *model.buffers()]
        sums, checks = [], []
        for _ in range(given.repeats + 1):
            guard = assert_frozen(model)
            guard.__enter__()
            began = time.perf_counter()
            guard.__exit__(None, None, None)
            between = time.perf_counter()
            for tensor in tensors:
                tensor.sum()
            checks.append(between - began)
            sums.append(time.perf_counter() - between)
        size = sum(tensor.nbytes for tensor in tensors)
        speeds = [size / statistics.median(took[1:]) / 1e9 for took in (sums, checks)]
        ratio = Spread.of([a / b for a, b in zip(sums[1:], checks[1:])])
        cells = [f"{speed:.2f} GB/s" for speed in speeds]
        rows.append([name, f"{len(tensors):,}", f"{size / 1e6:,.0f} MB", *cells, ratio.text(2)])
    heads = ["model", "tensors", "bytes", "torch.sum", "audit", "audit's speed over sum's"]
    data = DataLoader(numbers(16 * given.steps, 32), batch_size=16)
    small = BertForSequenceClassification(
        BertConfig(vocab_size=2000, hidden_size=given.width // 2, num_hidden_layers=6,
                   intermediate_size=2 * given.width, num_labels=CLASSES)
    )  # fmt: skip

    def step(*more: Callback) -> float:
        module = Plain(small, lambda parameters: torch.optim.AdamW(parameters, lr=1e-4))
        return median_step(module, [FreezeBackbone(trainable_layers=2), *more], data)

    step()
    share = Spread.of([step(audit(every=100)) / step() for _ in range(given.repeats)])
    said = f"A median step with every=100 takes {share.text(3)} of one without an audit."
    show("Reading all frozen tensors", heads, rows, [said, versions()])


class Started(Callback):
    """Seconds of other callbacks' hooks: until training starts, and at each change of a stage."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.start, self.changes = 0.0, list[float]()
        for callback in callbacks:
            for name in ("setup", "on_fit_start", "on_train_start", "on_train_epoch_start"):
                setattr(callback, name, self._timed(name, getattr(callback, name)))

    def _timed(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(trainer: Trainer, *args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            found = hook(trainer, *args, **options)
            if name != "on_train_epoch_start":
                self.start += time.perf_counter() - began
            elif trainer.current_epoch:
                self.changes.append(time.perf_counter() - began)
            return found

        return run


def size(given: Any) -> None:
    """Models of more and more small tensors in twenty groups."""
    sizes = sorted({max(100, given.tensors // by) for by in (100, 10, 1)})
    rows, starts = [], []
    for tensors in sizes:
        model, found = blocks(20, tensors), []
        for _ in range(given.repeats):
            callbacks: list[Callback] = [GradualUnfreeze(), audit()]
            found.append(Started(callbacks))
            gc.collect()
            quiet_trainer(callbacks, 4).fit(Plain(model), DataLoader(numbers(2)))
            model.requires_grad_(True).train()
        changes = [statistics.median(fit.changes) for fit in found]
        starts.append(statistics.median(fit.start for fit in found))
        figures = (starts[-1], statistics.median(changes))
        rows.append([f"{tensors:,}", *(f"{1e3 * seconds:.1f} ms" for seconds in figures)])
    said = (
        f"{sizes[-1] / sizes[-2]:.0f} times the tensors take {starts[-1] / starts[-2]:.1f} times "
        "as long at fit start."
    )
    show("GradualUnfreeze and an audit", ["tensors", "fit start", "a change"], rows, [said])


def memory(given: Any) -> None:
    """All callbacks on a tiny model, for many steps."""

    held: list[int] = []

    class Weigh(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step in (given.steps, 10 * given.steps):
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])

    callbacks = [ReinitTopLayers(1, seed=0), GradualUnfreeze(), FrozenFeatureCache(), audit()]
    tracemalloc.start()
    fit = quiet_trainer([*callbacks, Weigh()])
    fit.fit(Plain(blocks(6, 50)), DataLoader(numbers(10 * given.steps)))
    tracemalloc.stop()
    grown = held[1] - held[0]
    print(
        f"From step {given.steps:,} to step {10 * given.steps:,} Python's objects grew by "
        f"{grown:,} bytes ({grown / (9 * given.steps):.1f} a step)."
    )


def imports(given: Any) -> None:
    """In fresh processes, the files in the disk's cache."""
    code = (
        "import time; a = time.perf_counter(); import lightning; b = time.perf_counter()\n"
        "import lightning_freeze as lf; [getattr(lf, name) for name in lf.__all__]\n"
        "print(b - a, time.perf_counter() - b)"
    )
    command, times = [sys.executable, "-W", "ignore", "-c", code], []
    for _ in range(given.repeats + 1):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append([float(part) for part in done.stdout.split()[-2:]])
    lightning, ours = (1e3 * statistics.median(column) for column in zip(*times[1:]))
    print(f"import lightning: {lightning:.0f} ms; all of lightning_freeze adds {ours:.1f} ms.")


def cache(given: Any) -> None:
    """Epochs of the staged benchmark's model and texts with and without the cache, in turns."""
    from benchmarks.staged.contenders import Classifier
    from benchmarks.staged.settings import Settings, loader, read

    tiny = {"width": given.width, "vocabulary": 200} if given.width < 100 else {}
    settings = Settings(samples=given.samples, heads=12, weights=not tiny, **tiny)
    data, rows = read(settings), []
    for stage, layers in {"head only": 0, "top 2 of 6 layers": 2}.items():
        ratios, apart = [], 0.0
        for _ in range(given.repeats):
            seconds, losses = [], []
            for callbacks in ([], [FrozenFeatureCache()]):
                module, clock = Classifier(settings.model(data.classes, 7), settings), Clock()
                fit = quiet_trainer([FreezeBackbone(trainable_layers=layers), *callbacks, clock], 4)
                torch.manual_seed(7)
                fit.fit(module, loader(data, settings, 7))
                seconds.append(statistics.median(clock.epochs[1:]))
                losses.append(torch.stack(module.losses))
            ratios.append(seconds[0] / seconds[1])
            apart = max(apart, float(((losses[0] - losses[1]) / losses[0]).abs().max()))
        rows.append([stage, Spread.of(ratios).text(2), f"{apart:.0e}"])
    heads = ["what trains", "times as fast from the second epoch on", "losses apart (relative)"]
    show("FrozenFeatureCache", heads, rows, [versions()])


# ---------------------------------------------------------------- which combinations run

EPOCHS, RUNS = 4, "runs"
STRATEGIES: dict[str, tuple[int, Callable[[], Any]]] = {
    "one device": (1, lambda: SingleDeviceStrategy("cpu")),
    "DDP": (2, DDPStrategy),
    "DDP, bucket views": (2, lambda: DDPStrategy(gradient_as_bucket_view=True)),
    "FSDP2": (2, lambda: ModelParallelStrategy(2, 1)),
}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
SCHEDULERS = ("none", "LambdaLR", "OneCycleLR", "ReduceLROnPlateau")


@dataclass(frozen=True)
class Combination:
    """One cell of the matrix."""

    strategy: str
    precision: str
    compiled: bool
    manual: bool
    accumulate: int
    scheduler: str


class Layered(LightningModule):
    """Trained as a combination says."""

    def __init__(self, how: Combination) -> None:
        super().__init__()
        self.how = how
        self.automatic_optimization = not how.manual
        layers = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()) for _ in range(2)]
        self.backbone: nn.Module = nn.Sequential(nn.Linear(4, 8), *layers)
        self.head = nn.Linear(8, CLASSES)
        if how.compiled:
            self.backbone = torch.compile(self.backbone, backend="aot_eager")  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.how.strategy == "FSDP2":
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            for part in [m for m in self.modules() if isinstance(m, nn.Sequential)][1:]:
                fully_shard(part, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        x = batch[0].to(next(self.parameters()).dtype)
        loss = nn.functional.cross_entropy(self(x), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=False, sync_dist=True)
        if not self.how.manual:
            return loss
        self.manual_backward(loss / self.how.accumulate)
        if (batch_idx + 1) % self.how.accumulate == 0:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
            if self.how.scheduler in ("LambdaLR", "OneCycleLR"):
                self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]
        return None

    def on_train_epoch_end(self) -> None:
        if self.how.manual and self.how.scheduler == "ReduceLROnPlateau":
            self.lr_schedulers().step(self.trainer.callback_metrics["train_loss"])  # type: ignore[union-attr, call-arg, arg-type]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.how.scheduler == "none":
            return optimizer
        if self.how.scheduler == "ReduceLROnPlateau":
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            config = {"scheduler": plateau, "monitor": "train_loss"}
            return {"optimizer": optimizer, "lr_scheduler": config}
        total = 4 * EPOCHS // self.how.accumulate + 1
        by_step: Any = (
            lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
            if self.how.scheduler == "LambdaLR"
            else lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=total)
        )
        return [optimizer], [{"scheduler": by_step, "interval": "step"}]


class Layers(Callback):
    """Fingerprints of each layer after each epoch, whole or of this rank's shards."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.seen.append(fingerprint(module))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.seen.append(fingerprint(module))

    def verdict(self) -> str:
        """Whether each layer trained from its epoch on, and none before."""
        order = ("head.", "backbone.2.", "backbone.1.", "backbone.0.")
        for (turn, inside), epoch in itertools.product(enumerate(order), range(EPOCHS)):
            before, after = self.seen[epoch : epoch + 2]
            moved = {before[name] != after[name] for name in after if name.startswith(inside)}
            if epoch < turn and moved != {False}:
                return f"`{inside}*` moved in epoch {epoch}, although it is unfrozen in {turn}"
            if epoch >= turn and True not in moved:
                return f"`{inside}*` didn't move in epoch {epoch}"
        return RUNS


def attempt(how: Combination, rank: int) -> str:
    """Fit; "runs", or what was refused or went wrong."""
    ranks, strategy = STRATEGIES[how.strategy]
    torch.manual_seed(7)
    data = TensorDataset(torch.randn(16 * ranks, 4), torch.randint(0, CLASSES, (16 * ranks,)))
    sampler = DistributedSampler(data, ranks, rank, shuffle=False)
    layers = Layers()
    try:
        quiet_trainer(
            [GradualUnfreeze(), audit(every="batch"), layers],
            EPOCHS,
            strategy=strategy(),
            devices=ranks,
            precision=how.precision,
            accumulate_grad_batches=1 if how.manual else how.accumulate,
            use_distributed_sampler=False,
        ).fit(Layered(how), DataLoader(data, batch_size=4, sampler=sampler))
    except FreezeError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return layers.verdict()


def rank_of(rank: int, port: int, folder: str, asked: Sequence[Combination]) -> None:
    """One rank: all combinations, one after the other."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with hushed(), Path(folder, str(rank)).open("w") as file:
        for how in asked:
            torch.compiler.reset()
            print(json.dumps(attempt(how, rank)), file=file, flush=True)


def tried(strategy: str, asked: Sequence[Combination]) -> Iterable[str]:
    """What became of some combinations of one strategy, in processes of their own."""
    ranks = STRATEGIES[strategy][0]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            rank_of, (find_free_network_port(), folder, asked), nprocs=ranks, start_method="fork"
        )
        told = [Path(folder, str(rank)).read_text().splitlines() for rank in range(ranks)]
    for results in zip(*told):
        yield next((text for text in map(json.loads, results) if text != RUNS), RUNS)


def matrix(given: Any) -> None:
    """Small fits with `GradualUnfreeze` and an audit, on two ranks (gloo) where there are several.

    A combination runs if no finding was raised, and every layer trained when it was its turn and
    none before.
    """
    axes = ((False, True), (False, True), (1, 2), given.schedulers)
    rows, reasons = [], dict[str, set[str]]()
    for strategy in given.strategies:
        asked = [
            Combination(strategy, *values) for values in itertools.product(given.precisions, *axes)
        ]
        found = dict(zip(asked, tried(strategy, asked)))
        for precision in given.precisions:
            cells = []
            for manual, compiled in itertools.product((False, True), repeat=2):
                key = (strategy, precision, compiled, manual)
                of = [text for how, text in found.items() if astuple(how)[:4] == key]
                cells.append(f"{of.count(RUNS)} of {len(of)}")
                for text in set(of) - {RUNS}:
                    reasons.setdefault(text, set()).add(f"{strategy} {precision}")
            rows.append([strategy, precision, *cells])
    heads = ["strategy", "precision", "automatic", "automatic, compiled", "manual"]
    notes = [f"{', '.join(sorted(where))}: {why}" for why, where in reasons.items()]
    notes.append("FSDP1, DeepSpeed and XLA are refused at fit start; they need a GPU or a TPU.")
    title = "Combinations of accumulation and scheduler that run"
    show(title, [*heads, "manual, compiled"], rows, notes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description=str(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chosen = parser.add_subparsers(dest="which", required=True)
    commands: dict[str, tuple[Callable[[Any], None], dict[str, int]]] = {
        "hooks": (hooks, {"tensors": 10_000, "steps": 200, "repeats": 7}),
        "audit": (audits, {"tensors": 10_000, "steps": 20, "repeats": 9}),
        "size": (size, {"tensors": 10_000, "repeats": 7}),
        "memory": (memory, {"steps": 200}),
        "imports": (imports, {"repeats": 7}),
        "cache": (cache, {"samples": 640, "repeats": 3, "width": 384}),
        "matrix": (matrix, {}),
    }
    for name, (command, options) in commands.items():
        one = chosen.add_parser(name, help=str(command.__doc__).splitlines()[0])
        one.set_defaults(run=command)
        one.add_argument("--threads", type=int, default=1, help="of torch (1)")
        if name in ("hooks", "audit"):  # those of a BERT-base
            options = {**options, "layers": 12, "width": 768}
        for option, default in options.items():
            one.add_argument(f"--{option}", type=int, default=default, help="(%(default)s)")
        for option, values in (
            ("strategies", tuple(STRATEGIES)),
            ("precisions", PRECISIONS),
            ("schedulers", SCHEDULERS),
        ):
            if name == "matrix":
                one.add_argument(f"--{option}", nargs="+", default=values, choices=values)
    given = parser.parse_args(arguments)
    with hushed(given.threads):
        given.run(given)


if __name__ == "__main__":
    main()
