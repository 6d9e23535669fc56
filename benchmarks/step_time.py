"""Time per training step of one staged run: flags set by hand, and with the four callbacks.

    python benchmarks/step_time.py --threads 1

A BERT from a config (no weights are downloaded) trains on random tokens: one epoch with the head
alone, one with the top two layers, one with everything. The same run is written twice, by hand in
the LightningModule and with the callbacks; both are repeated in turns in one process. That they
are the same run is checked: both end with the same weights, bit for bit.

A step lasts from the end of one batch to the end of the next, measured inside the Trainer, so that
it includes every hook of every callback. Beside the time on the clock, which other programs on the
machine disturb, stands the processor time of this process, which they hardly do.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import lightning_freeze
from lightning_freeze import (
    FreezeBackbone,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
    fingerprint,
    reinit,
)

STAGES = ("head only", "top 2 layers", "all layers")
CLASSES = 6
SEED = 7
# the first two steps of an epoch pay for allocations and for a change of stage
SKIPPED = 2


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark; the defaults are those of a 6-layer MiniLM."""

    steps: int = 12
    repeats: int = 7
    layers: int = 6
    width: int = 384
    heads: int = 12
    vocabulary: int = 30522
    batch: int = 16
    length: int = 32
    threads: int | None = None

    def model(self) -> BertForSequenceClassification:
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            num_labels=CLASSES,
        )
        torch.manual_seed(SEED)
        return BertForSequenceClassification(config)

    def loader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(SEED)
        size = (self.steps * self.batch, self.length)
        tokens = torch.randint(self.vocabulary, size, generator=generator)
        labels = torch.randint(CLASSES, size[:1], generator=generator)
        return DataLoader(TensorDataset(tokens, labels), batch_size=self.batch)

    def tops(self) -> list[str]:
        """The top two layers, and the pooler above them."""
        layers = [f"bert.encoder.layer.{i}" for i in range(self.layers - 2, self.layers)]
        return [*layers, "bert.pooler"]


class Classifier(LightningModule):
    """An ordinary LightningModule."""

    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        tokens, labels = batch
        return self.model(input_ids=tokens, labels=labels).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class FrozenByHand(Classifier):
    """The same, with the stages written out as one does without callbacks."""

    def __init__(self, model: BertForSequenceClassification, tops: Sequence[str]) -> None:
        super().__init__(model)
        bert = model.bert
        layers = [model.get_submodule(path) for path in tops]
        self.stages = [[model.classifier], [model.classifier, *layers], [model]]
        self.quiet = [[bert], [bert.embeddings, *bert.encoder.layer[:-2]], []]

    def setup(self, stage: str) -> None:
        self.set_flags(0)

    def set_flags(self, number: int) -> None:
        self.model.requires_grad_(False)
        for module in self.stages[number]:
            module.requires_grad_(True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=1e-4)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            before = {id(p) for p in self.parameters() if p.requires_grad}
            self.set_flags(self.current_epoch)
            new = [p for p in self.parameters() if p.requires_grad and id(p) not in before]
            self.optimizers().add_param_group({"params": new})
        self.model.train()
        for module in self.quiet[self.current_epoch]:
            module.eval()


class StepTimer(Callback):
    """Takes the time at the end of each batch, last in the list of callbacks."""

    def __init__(self) -> None:
        self.ends: list[list[tuple[float, float]]] = []
        self.trainable: list[set[str]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends.append([])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.ends[-1].append((time.perf_counter(), time.process_time()))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainable.append({n for n, p in pl_module.named_parameters() if p.requires_grad})

    def steps(self, stage: int, *, cpu: bool = False) -> list[float]:
        """Seconds of each step, from the third batch on."""
        ends = [pair[cpu] for pair in self.ends[stage][SKIPPED - 1 :]]
        return [after - before for before, after in itertools.pairwise(ends)]


@dataclass
class HookClock:
    """Times the hooks of some callbacks, by hook and epoch."""

    calls: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def attach(self, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            for name in dir(Callback):
                hook = name.startswith("on_") or name == "setup"
                if hook and getattr(type(callback), name) is not getattr(Callback, name):
                    key = f"{name} of {type(callback).__name__}"
                    setattr(callback, name, self._timed(key, getattr(callback, name)))

    def _timed(self, key: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(trainer, *args, **kwargs)
            finally:
                spent = time.perf_counter() - started
                self.calls.setdefault((key, trainer.current_epoch), []).append(spent)

        return run

    def once(self, *hooks: str, epoch: int) -> float:
        """Seconds of hooks that run once an epoch, or of their first run in it."""
        return sum(
            spent[0]
            for (key, at), spent in self.calls.items()
            if at == epoch and key.split()[0] in hooks
        )

    def per_step(self, epoch: int) -> float:
        """Median seconds of the hooks that run at each step, without the first steps."""
        return sum(
            statistics.median(spent[SKIPPED:])
            for (_, at), spent in self.calls.items()
            if at == epoch and len(spent) > SKIPPED
        )


@dataclass
class Fit:
    """What one fit took, and what it ended with."""

    timer: StepTimer
    clock: HookClock
    seconds: float
    weights: dict[str, str]


def four_callbacks(settings: Settings) -> list[Callback]:
    return [
        ReinitTopLayers(1, pooler=False, seed=SEED),
        FreezeBackbone("bert.embeddings", unfreeze_at_epoch=2),
        GradualUnfreeze({0: "classifier", 1: settings.tops(), 2: "**"}),
        TrainableParamAudit(every="epoch", table=False),
    ]


def fit(settings: Settings, loader: Any, *, by_hand: bool) -> Fit:
    model = settings.model()
    timer, clock = StepTimer(), HookClock()
    callbacks: list[Callback] = []
    if by_hand:
        module: Classifier = FrozenByHand(model, settings.tops())
        reinit(module, f"model.bert.encoder.layer.{settings.layers - 1}", seed=SEED)
    else:
        module = Classifier(model)
        callbacks = four_callbacks(settings)
        clock.attach(callbacks)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=len(STAGES),
        callbacks=[*callbacks, timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(SEED)
    started = time.perf_counter()
    trainer.fit(module, loader)
    seconds = time.perf_counter() - started
    return Fit(timer, clock, seconds, fingerprint(model))


@dataclass(frozen=True)
class Spread:
    """The median of some ratios, and their middle half."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> Spread:
        ratios = sorted(after / before for before, after in pairs)
        quarter = len(ratios) // 4
        return cls(statistics.median(ratios), ratios[quarter], ratios[-1 - quarter])

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Row:
    """One stage: milliseconds a step, and the ratio of the two ways."""

    stage: str
    by_hand: float
    callbacks: float
    ratio: Spread
    cpu: float
    hooks: float


@dataclass(frozen=True)
class Result:
    """All that the benchmark prints."""

    rows: list[Row]
    fixed: dict[str, float]
    tensors: int
    megabytes: float


def measure(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> Result:
    """Run both ways in turns and compare them."""
    loader = settings.loader()
    fit(settings, loader, by_hand=True)
    hand: list[Fit] = []
    ours: list[Fit] = []
    for repeat in range(settings.repeats):
        # by turns, and the first of a pair alternates: drift of the machine favours neither
        for by_hand in (True, False) if repeat % 2 == 0 else (False, True):
            (hand if by_hand else ours).append(fit(settings, loader, by_hand=by_hand))
        progress(f"repeat {repeat + 1} of {settings.repeats}")
    check_same_run(hand[-1], ours[-1])
    rows = [_row(stage, number, hand, ours) for number, stage in enumerate(STAGES)]
    model = settings.model()
    tensors = fingerprint(model)
    start = ("setup", "on_fit_start", "on_train_start")
    tick = ("on_train_epoch_start", "on_train_batch_start")
    fixed = {
        "setup and fit start": _typical(ours, *start, epoch=0),
        "transition to the top 2 layers": _typical(ours, *tick, epoch=1),
        "transition to all layers": _typical(ours, *tick, epoch=2),
        "audit at the end of the head-only epoch": _typical(ours, "on_train_epoch_end", epoch=0),
        f"fingerprints of all {len(tensors)} tensors": statistics.median(
            _seconds(lambda: fingerprint(model)) for _ in range(5)
        ),
        "whole fit by hand": statistics.median(f.seconds for f in hand),
        "whole fit with the callbacks": statistics.median(f.seconds for f in ours),
    }
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    return Result(rows, fixed, len(tensors), size)


def _typical(fits: list[Fit], *hooks: str, epoch: int) -> float:
    return statistics.median(f.clock.once(*hooks, epoch=epoch) for f in fits)


def check_same_run(hand: Fit, ours: Fit) -> None:
    """Raise unless both trained the same tensors at each stage and ended with the same bytes."""
    if hand.timer.trainable != ours.timer.trainable:
        raise AssertionError("The two runs don't train the same tensors.")
    different = [name for name in hand.weights if hand.weights[name] != ours.weights[name]]
    if different:
        raise AssertionError(f"The two runs end with different weights, such as {different[0]}.")


def _row(stage: str, number: int, hand: list[Fit], ours: list[Fit]) -> Row:
    wall = [[statistics.median(f.timer.steps(number)) for f in fits] for fits in (hand, ours)]
    cpu = [_undisturbed(fits, number) for fits in (hand, ours)]
    return Row(
        stage,
        1e3 * statistics.median(wall[0]),
        1e3 * statistics.median(wall[1]),
        Spread.of(zip(*wall)),
        cpu[1] / cpu[0],
        1e3 * statistics.median(f.clock.per_step(number) for f in ours),
    )


def _undisturbed(fits: list[Fit], stage: int) -> float:
    """Processor time of a step that hardly anything disturbed: others can only make it longer."""
    steps = sorted(step for f in fits for step in f.timer.steps(stage, cpu=True))
    return steps[len(steps) // 4]


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def show(result: Result, settings: Settings, console: Console) -> None:
    title = (
        f"BERT {settings.layers} x {settings.width}, batch {settings.batch}, length "
        f"{settings.length}, AdamW, {torch.get_num_threads()} threads, {settings.repeats} repeats "
        f"of {settings.steps} steps a stage"
    )
    table = Table(title=title, title_justify="left")
    columns = (
        "stage",
        "by hand",
        "callbacks",
        "ratio (middle half)",
        "processor time",
        "hooks alone",
    )
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right")
    for row in result.rows:
        table.add_row(
            row.stage,
            f"{row.by_hand:.2f} ms",
            f"{row.callbacks:.2f} ms",
            str(row.ratio),
            f"{row.cpu:.3f}",
            f"{row.hooks:.3f} ms ({row.hooks / row.callbacks:.2%})",
        )
    console.print(table)
    fixed = Table(title=f"Once ({result.megabytes:.0f} MB of weights)", title_justify="left")
    fixed.add_column("what")
    fixed.add_column("time", justify="right")
    for what, seconds in result.fixed.items():
        fixed.add_row(what, f"{1e3 * seconds:.1f} ms")
    console.print(fixed)
    console.print(
        f"torch {torch.__version__}, lightning_freeze {lightning_freeze.__version__}. Both ways "
        "trained the same tensors at each stage and ended with the same weights, bit for bit."
    )


def parse(arguments: Sequence[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Settings()
    texts = {
        "steps": "training steps a stage",
        "repeats": "fits of each way",
        "layers": "layers of the BERT, at least 3",
        "width": "its hidden size",
        "heads": "its attention heads",
        "vocabulary": "its vocabulary",
        "batch": "sequences a step",
        "length": "tokens a sequence",
    }
    for name, text in texts.items():
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--threads", type=int, help="threads of torch (torch's own choice)")
    settings = Settings(**vars(parser.parse_args(arguments)))
    if settings.steps < SKIPPED + 1:
        parser.error(f"--steps is {settings.steps}; the first {SKIPPED} of a stage aren't counted")
    if settings.repeats < 1 or settings.layers < 3:
        parser.error("--repeats must be at least 1 and --layers at least 3")
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
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def main(arguments: Sequence[str] | None = None) -> Result:
    settings = parse(arguments)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    console = Console()
    console.width = max(console.width, 110)
    with hushed(), console.status("warming up") as status:
        result = measure(settings, lambda text: status.update(text))
    show(result, settings, console)
    return result


if __name__ == "__main__":
    main()
