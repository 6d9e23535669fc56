"""What lightning-freeze, finetuning-scheduler and BackboneFinetuning do in the same situations.

    python -m benchmarks.peers              # a table in the terminal
    python -m benchmarks.peers --markdown   # the same for the README

Every cell comes from a run of a small network with a backbone of twelve layers and a head, under
each library's documented interface; where a library has another documented way, that is run, too.
fastai has a training loop of its own: its column is taken from its documentation, not measured.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from benchmarks._harness import hushed, quiet_trainer, show, versions
from lightning_freeze import (
    FreezeBackbone,
    FreezeError,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
    fingerprint,
)

FASTAI = "2.8.12"
LR = 1e-2
STEPS = 4
BATCH = 8
BACKBONE = "backbone.layer.0.linear.weight"


class Block(nn.Module):
    """A linear layer and a batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.linear(x)))


class Backbone(nn.Module):
    """Twelve layers, so that `layer.1` and `layer.10` both exist."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layer = nn.ModuleList(Block() for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layer:
            x = layer(x)
        return x


Configure = Callable[[LightningModule], Any]


class Net(LightningModule):
    """An ordinary LightningModule: nothing in it draws random numbers while it trains."""

    def __init__(self, configure: Configure) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Backbone()
        self.head = nn.Linear(8, 3)
        self.configure = configure
        self.used: list[dict[str, list[tuple[float, float]]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        # grows from epoch to epoch, so that ReduceLROnPlateau has something to do
        self.log("epochs", float(self.current_epoch), on_epoch=True, on_step=False, batch_size=1)
        return nn.functional.cross_entropy(self.head(self.backbone(x)), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.backbone(x)), y)
        self.log("val_loss", loss, batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> Any:
        made = self.configure(self)
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        optimizer.register_step_post_hook(self.note)
        return made

    def note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Keep what the step was really made with, whoever stood in for the optimizer."""
        self.used.append(options_of(self, args[0]))


class NetByStep(Net):
    """Chooses its batch by the step: after a resume amid an epoch, a plain loader begins anew."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(list(loader())[self.global_step % STEPS], batch_idx)


def one_group(net: nn.Module) -> Optimizer:
    return AdamW(net.parameters(), lr=LR)


def filtered(net: nn.Module) -> Optimizer:
    """As Lightning documents it for its finetuning callbacks."""
    return AdamW([p for p in net.parameters() if p.requires_grad], lr=LR)


def two_groups(net: nn.Module) -> Optimizer:
    """The usual two: weight decay for matrices, none and another lr for the rest."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices},
        {"params": rest, "weight_decay": 0.0, "lr": LR / 2},
    ]
    return AdamW(groups, lr=LR, weight_decay=0.1)


def two_groups_filtered(net: nn.Module) -> Optimizer:
    optimizer = two_groups(net)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return optimizer


def wanted(net: nn.Module, configure: Configure) -> dict[str, tuple[float, float]]:
    """Name -> lr and weight decay, as the user wrote them for a model of which all trains."""
    model: Any = copy.deepcopy(net).requires_grad_(True)
    return {name: held[0] for name, held in options_of(model, configure(model)).items()}


def options_of(net: nn.Module, optimizer: Optimizer) -> dict[str, list[tuple[float, float]]]:
    """Name -> lr and weight decay of each optimizer group that holds it."""
    names = {id(p): name for name, p in net.named_parameters()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names.values()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]].append((group["lr"], group["weight_decay"]))
    return found


def loader(*, train: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    count = STEPS * BATCH if train else BATCH
    x = torch.randn(count, 4, generator=generator)
    y = torch.randint(3, (count,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


@dataclass
class Contender:
    """One library: how it is asked to train the head first and the backbone from `at` on."""

    name: str
    make: Callable[..., list[Callback]]
    configure: Configure
    configure_two: Configure
    checkpoint: Any = ModelCheckpoint
    # head, upper half at epoch 1, everything at epoch 3
    stages: Callable[[], list[Callback]] | None = None

    def fit(
        self,
        net: LightningModule,
        folder: Path,
        *,
        epochs: int,
        callbacks: Sequence[Callback],
        checkpoint: dict[str, Any] | None = None,
        resume: Path | None = None,
        by_attribute: bool = False,
        **options: Any,
    ) -> Trainer:
        saving = self.checkpoint(dirpath=folder, **(checkpoint or {"save_top_k": 0}))
        run = quiet_trainer(
            [*callbacks, saving],
            epochs,
            enable_checkpointing=True,
            default_root_dir=folder,
            **options,
        )
        data = {"train_dataloaders": loader(), "val_dataloaders": loader(train=False)}
        if resume is not None and by_attribute:
            run.ckpt_path = resume
        elif resume is not None:
            data["ckpt_path"] = resume  # type: ignore[assignment]
        if "weights_only" in inspect.signature(run.fit).parameters:  # from Lightning 2.6
            data["weights_only"] = False  # type: ignore[assignment]
        run.fit(net, **data)  # type: ignore[arg-type]
        return run


def _ours(at: int = 1, *, scale: float = 1.0) -> list[Callback]:
    return [
        FreezeBackbone("backbone", unfreeze_at_epoch=at, lr_scale=scale),
        TrainableParamAudit(table=False, log_metrics=False),
    ]


def _fts(at: int = 1, *, scale: float = 1.0, **options: Any) -> list[Callback]:
    from finetuning_scheduler import FinetuningScheduler

    schedule = {
        0: {"params": ["head.*"], "max_transition_epoch": at},
        1: {"params": ["backbone.*"], "max_transition_epoch": at + 1, "lr": LR * scale},
    }
    given = {
        "ft_schedule": schedule,
        "epoch_transitions_only": True,
        "restore_best": False,
        "logging_level": logging.ERROR,
        **options,
    }
    return [FinetuningScheduler(**given)]


def _our_stages() -> list[Callback]:
    schedule = {0: "head", 1: [f"backbone.layer.{i}" for i in range(6, 12)], 3: "**"}
    return [GradualUnfreeze(schedule), TrainableParamAudit(table=False, log_metrics=False)]


def _fts_stages() -> list[Callback]:
    upper = r"backbone\.layer\.([6-9]|10|11)\..*"
    lower = r"backbone\.(embed|layer\.[0-5])\..*"
    schedule = {
        0: {"params": ["head.*"], "max_transition_epoch": 1},
        1: {"params": [upper], "max_transition_epoch": 3, "lr": LR},
        2: {"params": [lower], "max_transition_epoch": 4, "lr": LR},
    }
    return _fts(ft_schedule=schedule)


def _backbone_finetuning(at: int = 1, *, scale: float = 1.0, **options: Any) -> list[Callback]:
    # a factor that reaches the head's lr at once, to which `should_align` (its default) then keeps
    return [
        BackboneFinetuning(
            unfreeze_backbone_at_epoch=at,
            backbone_initial_ratio_lr=scale,
            lambda_func=lambda epoch: 1e6,
            **options,
        )
    ]


NOTHING = Contender("Lightning alone", lambda at=1: [], one_group, two_groups)
OURS = Contender("lightning-freeze", _ours, one_group, two_groups, stages=_our_stages)
BACKBONE_FINETUNING = Contender(
    "BackboneFinetuning", _backbone_finetuning, filtered, two_groups_filtered
)


def finetuning_scheduler() -> Contender | None:
    """The peer, where it is installed."""
    try:
        from finetuning_scheduler import FTSCheckpoint
    except ModuleNotFoundError:
        return None
    # with the filter that its own hint asks for: it doesn't have to rebuild the optimizer then
    return Contender(
        "finetuning-scheduler", _fts, filtered, two_groups_filtered, FTSCheckpoint, _fts_stages
    )


class Hook(Callback):
    """Calls a function at one hook."""

    def __init__(self, hook: str, call: Callable[..., None]) -> None:
        setattr(self, hook, call)


def brief(error: BaseException) -> str:
    """An exception in few words."""
    text = " ".join(str(error).split())
    text = text.split(". ")[0]
    return f"{type(error).__name__}: {text[:60]}{'...' if text[60:] else ''}"


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in one if one[name] != other.get(name)]


def trainable(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- the claims


def group_options(contender: Contender, folder: Path) -> str:
    def run(configure: Configure, prepare: Callable[[Net], None] = lambda net: None) -> str:
        net = Net(configure)
        prepare(net)
        contender.fit(net, folder, epochs=2, callbacks=contender.make())
        found = net.used[-1]
        right = wanted(net, two_groups)
        names = [name for name in right if name.startswith("backbone")]
        off = {}
        for position, option in enumerate(("lr", "weight decay")):
            for name in names:
                got = found[name][0][position] if found[name] else None
                if got != right[name][position]:
                    off.setdefault(option, f"{option} {right[name][position]:g} became {got:g}")
        return "no: " + ", ".join(off.values()) if off else "yes"

    cell = run(contender.configure_two)
    if contender.name == "finetuning-scheduler":

        def say_no_decay(net: Net) -> None:
            net.no_decay = ["bias", "norm"]  # type: ignore[assignment]

        cell += f"; with its `no_decay` attribute {run(contender.configure_two, say_no_decay)}"
    return cell


def _step(step: int) -> float:
    return 0.9**step


def _sequential(o: Optimizer, total: int) -> Any:
    first = lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=2)
    rest = lr_scheduler.CosineAnnealingLR(o, T_max=total - 2)
    return lr_scheduler.SequentialLR(o, [first, rest], milestones=[2])


SCHEDULERS: dict[str, Callable[[Optimizer, int], Any]] = {
    "LambdaLR": lambda o, total: lr_scheduler.LambdaLR(o, _step),
    "OneCycleLR": lambda o, total: lr_scheduler.OneCycleLR(o, 0.05, total_steps=total + 1),
    "CosineAnnealingLR": lambda o, total: lr_scheduler.CosineAnnealingLR(o, total),
    "ReduceLROnPlateau": lambda o, total: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=0),
    "SequentialLR": _sequential,
    "CyclicLR": lambda o, total: lr_scheduler.CyclicLR(
        o, 1e-3, 2e-2, step_size_up=3, cycle_momentum=False
    ),
}


def scheduler(kind: str) -> Callable[[Contender, Path], str]:
    epochs, at = 5, 2

    def lrs(
        contender: Contender, folder: Path, interval: str, callbacks: list[Callback]
    ) -> list[tuple[float, float]]:
        total = epochs * (STEPS if interval == "step" else 1)

        def configure(net: LightningModule) -> dict[str, Any]:
            optimizer = contender.configure(net)
            made = SCHEDULERS[kind](optimizer, total)
            config = {"scheduler": made, "interval": interval, "monitor": "epochs"}
            return {"optimizer": optimizer, "lr_scheduler": config}

        net = Net(configure)
        contender.fit(net, folder, epochs=epochs, callbacks=callbacks)
        unused = [(math.nan, math.nan)]
        return [(o["head.weight"][0][0], (o[BACKBONE] or unused)[0][0]) for o in net.used]

    def reference(folder: Path, interval: str) -> list[tuple[float, float]]:
        return lrs(NOTHING, folder, interval, [])

    def run(contender: Contender, folder: Path, interval: str, **options: Any) -> str:
        right = reference(folder, interval)
        try:
            got = lrs(contender, folder, interval, contender.make(at, **options))
        except Exception as error:
            if "not currently supported" in str(error):
                return "refused"
            return f"raises {type(error).__name__}"
        for step, ((head, backbone), (head_now, backbone_now)) in enumerate(zip(right, got)):
            pairs = [("head", head, head_now)]
            if step >= at * STEPS:
                pairs.append(("backbone", backbone, backbone_now))
            for part, expected, found in pairs:
                if not abs(expected - found) <= 1e-9 * expected:
                    return f"wrong: {part} {found:.1e} for {expected:.1e}"
        return "right"

    intervals = ["epoch"] if kind == "ReduceLROnPlateau" else ["step", "epoch"]

    def both(contender: Contender, folder: Path, **options: Any) -> str:
        cells = {i: run(contender, folder, i, **options) for i in intervals}
        if len(set(cells.values())) == 1:
            return next(iter(cells.values()))
        return "; ".join(f"per {interval}: {cell}" for interval, cell in cells.items())

    def probe(contender: Contender, folder: Path) -> str:
        cell = both(contender, folder)
        if contender.name != "finetuning-scheduler" or cell == "right":
            return cell
        if cell == "refused":
            return f"refused; with `allow_untested` {both(contender, folder, allow_untested=True)}"
        if kind == "LambdaLR":
            other = both(contender, folder, apply_lambdas_new_pgs=True)
            return f"{cell}; with `apply_lambdas_new_pgs` {other}"
        # the phase's own `lr`, worked out by hand from the scheduler's formula
        by_hand = {
            i: run(contender, folder, i, scale=reference(folder, i)[at * STEPS][1] / LR)
            for i in intervals
        }
        right = all(text == "right" for text in by_hand.values())
        return f"{cell}; {'right' if right else 'wrong'} with the phase's `lr` worked out by hand"

    return probe


class FrozenWithoutBatchNorm(BaseFinetuning):
    """BackboneFinetuning's documented base class, asked to freeze batch-norms, too."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=LR)


def batch_norm(contender: Contender, folder: Path) -> str:
    def run(callbacks: list[Callback]) -> tuple[bool, bool]:
        net = Net(contender.configure)
        before = dict(net.named_buffers())
        before = {name: buffer.clone() for name, buffer in before.items()}
        batch = next(iter(loader()))[0]
        still: list[bool] = []
        as_eval: list[bool] = []

        def compare(trainer: Trainer, module: Any, *_: Any) -> None:
            if trainer.current_epoch == 0:
                now, at_test = copy.deepcopy(net.backbone), copy.deepcopy(net.backbone).eval()
                with torch.no_grad():
                    as_eval.append(torch.equal(now(batch), at_test(batch)))

        def look(trainer: Trainer, module: Any) -> None:
            if trainer.current_epoch == 0:
                same = [torch.equal(b, before[n]) for n, b in net.named_buffers()]
                still.append(all(same))

        hooks = [Hook("on_train_batch_start", compare), Hook("on_train_epoch_end", look)]
        contender.fit(net, folder, epochs=2, callbacks=[*callbacks, *hooks])
        return still[0], all(as_eval)

    def say(still: bool, as_eval: bool) -> str:
        if still and as_eval:
            return "yes"
        return "yes, but it normalises by the batch" if still else "no"

    cell = say(*run(contender.make()))
    if contender.name == "finetuning-scheduler":
        other = say(*run(contender.make(frozen_bn_track_running_stats=False)))
        cell += f"; with `frozen_bn_track_running_stats=False` {other}"
    if contender.name == "BackboneFinetuning":
        option = say(*run(contender.make(train_bn=False)))
        other = say(*run([FrozenWithoutBatchNorm()]))
        cell += f"; with `train_bn=False` {option}; a `BaseFinetuning` of one's own {other}"
    return cell


def resume(contender: Contender, folder: Path) -> str:
    epochs = 5
    # BackboneFinetuning has two stages
    stages = contender.stages or (lambda: contender.make(2))
    kinds: dict[str, dict[str, Any]] = {
        "at epoch ends": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        "by step": {"every_n_train_steps": 2},
    }

    def run(by_attribute: bool) -> str:
        texts = []
        frozen = 0
        for kind, saving in kinds.items():
            place = folder / f"{kind} {by_attribute}"
            net = NetByStep(contender.configure)
            saving = {**saving, "save_top_k": -1, "filename": "{step}"}
            contender.fit(net, place, epochs=epochs, callbacks=stages(), checkpoint=saving)
            right, flags = fingerprint(net), trainable(net)
            paths = [p for p in place.glob("*.ckpt") if p.stem != f"step={epochs * STEPS}"]
            outcomes = []
            for path in paths:
                again = NetByStep(contender.configure)
                try:
                    contender.fit(
                        again,
                        folder / "again",
                        epochs=epochs,
                        callbacks=stages(),
                        resume=path,
                        by_attribute=by_attribute,
                    )
                except Exception:
                    outcomes.append(False)
                    continue
                outcomes.append(
                    not different(right, fingerprint(again)) and trainable(again) == flags
                )
                frozen += trainable(again) < flags
            texts.append(f"{kind} {sum(outcomes)} of {len(outcomes)}")
        end = f" ({frozen} runs end with layers frozen)" if frozen else ""
        return ", ".join(texts) + end

    cell = run(by_attribute=False)
    if contender.name == "finetuning-scheduler":
        cell += f"; with `trainer.ckpt_path = ...`, as documented, {run(by_attribute=True)}"
    return cell


def validate(contender: Contender, folder: Path) -> str:
    net = Net(contender.configure)
    trainer = contender.fit(net, folder, epochs=2, callbacks=contender.make())
    before = trainable(net)
    trainer.validate(net, loader(train=False), verbose=False)
    after = trainable(net)
    if after == before:
        return "yes"
    return f"no: {len(before)} trainable tensors became {len(after)}"


def second_trainer(contender: Contender, folder: Path) -> str:
    callbacks = contender.make()
    ends = []
    trained: list[int] = []
    for _ in range(2):
        net = Net(contender.configure)
        trained.clear()

        def count(trainer: Trainer, module: Any) -> None:
            trained.append(len(trainable(module)))

        hook = Hook("on_train_epoch_end", count)
        try:
            contender.fit(net, folder, epochs=3, callbacks=[*callbacks, hook])
        except Exception as error:
            return f"no: raises {brief(error)}"
        ends.append((fingerprint(net), list(trained)))
    (first, flags), (second, flags_again) = ends
    if not different(first, second):
        return "yes"
    if flags != flags_again:
        shown = " ".join(map(str, flags)), " ".join(map(str, flags_again))
        return f"no: {shown[0]} trainable tensors by epoch became {shown[1]}"
    return "no: the weights differ"


def two_ranks(contender: Contender, folder: Path) -> str:
    def run(find_unused: bool) -> str:
        # a process of its own: forking one that has used threads may hang
        report = folder / f"{contender.name}-{find_unused}.json"
        command = [sys.executable, "-m", "benchmarks.peers", "--ranks", contender.name, str(report)]
        command += ["--find-unused"] if find_unused else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command,
            env=environment,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode or not report.exists():
            lines = done.stderr.strip().splitlines() or ["no result"]
            return f"raises {lines[-1][:60]}"
        drift = json.loads(report.read_text())
        if any(drift.values()):
            shown = ", ".join(f"{value:.0e}" if value else "0" for value in drift.values())
            return f"no: they differ by {shown} after epochs 0, 1, 2"
        return "yes"

    cell = run(find_unused=False)
    if cell != "yes":
        other = run(find_unused=True)
        same = "the same" if other.startswith("no") else other
        cell += f"; with `find_unused_parameters` {same}"
    return cell


def on_two_ranks(name: str, report: Path, *, find_unused: bool) -> None:
    """In a process of its own: train on two ranks and write how far apart they are."""
    contender = next(c for c in contenders() if c.name == name)
    drift: dict[int, float] = {}

    def look(trainer: Trainer, module: Any) -> None:
        apart = 0.0
        for parameter in module.parameters():
            copies = [torch.empty_like(parameter) for _ in range(2)]
            torch.distributed.all_gather(copies, parameter.detach())
            apart = max(apart, float((copies[0] - copies[1]).abs().max()))
        drift[trainer.current_epoch] = apart
        if trainer.is_global_zero:
            report.write_text(json.dumps(drift))

    strategy = "ddp_find_unused_parameters_true" if find_unused else "ddp_fork"
    with tempfile.TemporaryDirectory() as folder, hushed():
        contender.fit(
            Net(contender.configure),
            Path(folder),
            epochs=3,
            callbacks=[*contender.make(), Hook("on_train_epoch_end", look)],
            strategy=strategy,
            devices=2,
        )


class OneLayer(BaseFinetuning):
    """Lightning's base class takes modules, not names."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module, train_bn=False)
        self.make_trainable([pl_module.head, pl_module.backbone.layer[1]])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        pass


def whole_names(contender: Contender, folder: Path) -> str:
    def run(callbacks: list[Callback]) -> str:
        net = Net(contender.configure)
        seen: list[set[str]] = []
        hook = Hook("on_train_start", lambda trainer, module: seen.append(trainable(module)))
        contender.fit(net, folder, epochs=2, callbacks=[*callbacks, hook])
        layers = {int(n.split(".")[2]) for n in seen[0] if n.startswith("backbone.layer")}
        if layers == {1}:
            return "yes"
        return f"no: layers {', '.join(map(str, sorted(layers)))}"

    if contender.name == "BackboneFinetuning":
        return f"takes modules, not names (a `BaseFinetuning` of one's own: {run([OneLayer()])})"
    if contender.name == "finetuning-scheduler":

        def schedule(name: str) -> list[Callback]:
            phases = {
                0: {"params": ["head.*", name], "max_transition_epoch": 1},
                1: {"params": ["backbone.embed.*"], "max_transition_epoch": 2},
            }
            return contender.make(ft_schedule=phases)

        escaped = run(schedule(r"backbone\.layer\.1\..*"))
        return f"{run(schedule('backbone.layer.1'))}; with `layer\\.1\\..*` {escaped}"
    return run([GradualUnfreeze({0: ["head", "backbone.layer.1"]})])


def verified(contender: Contender, folder: Path) -> str:
    net = Net(contender.configure)

    def write(trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            module.backbone.embed.weight.data.add_(1e-3)

    sabotage = Hook("on_train_batch_start", write)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            contender.fit(net, folder, epochs=2, callbacks=[*contender.make(), sabotage])
        except FreezeError as error:
            named = "backbone.embed.weight" in str(error) and ".data" in str(error)
            return f"yes: `{type(error).__name__}`" + (" with name and cause" if named else "")
    if any("embed" in str(warning.message) for warning in caught):
        return "yes: a warning"
    return "no: the fit ends without a word"


def reinitialises(contender: Contender, folder: Path) -> str:
    if contender.name != "lightning-freeze":
        kind = type(contender.make()[0])
        arguments = inspect.signature(kind.__init__).parameters
        named = [f"`{name}`" for name in arguments if "reinit" in name]
        return "no" + (f" ({' and '.join(named)} are for other things)" if named else "")
    net = Net(contender.configure)
    before = fingerprint(net)
    after: dict[str, str] = {}
    hook = Hook("on_train_start", lambda trainer, module: after.update(fingerprint(module)))
    callbacks = [ReinitTopLayers(2, seed=0), *contender.make(), hook]
    contender.fit(net, folder, epochs=2, callbacks=callbacks)
    changed = {int(n.split(".")[2]) for n in different(before, after) if "layer" in n}
    rest = [n for n in different(before, after) if "layer" not in n]
    return "yes" if changed == {10, 11} and not rest else f"no: {sorted(changed)} {rest}"


FORMS: dict[str, Configure] = {
    "all parameters": one_group,
    "a `requires_grad` filter": filtered,
    "two groups": two_groups,
}


def unchanged_optimizers(contender: Contender, folder: Path) -> str:
    """Head first, then the backbone at a tenth of the user's lr."""
    off: dict[str, str] = {}
    for form, configure in FORMS.items():
        net = Net(configure)
        try:
            contender.fit(net, folder, epochs=2, callbacks=contender.make(scale=0.1))
        except Exception as error:
            off[form] = f"raises {brief(error)}"
            continue
        expected = {
            name: (lr * (0.1 if name.startswith("backbone") else 1.0), decay)
            for name, (lr, decay) in wanted(net, configure).items()
        }
        used = net.used[STEPS]
        wrong = [
            name
            for name, right in expected.items()
            if len(used[name]) != 1 or not _close(used[name][0], right)
        ]
        if wrong:
            what = "batch-norm tensors" if all("norm" in name for name in wrong) else "tensors"
            held, right = used[wrong[0]], expected[wrong[0]]
            said = " and ".join(
                f"{option} {got:g} for {should:g}"
                for option, got, should in zip(("lr", "weight decay"), held[0], right)
                if abs(got - should) > 1e-9
            )
            off[form] = f"{len(wrong)} {what} with {said}" if len(held) == 1 else "in no group"
    count = f"{len(FORMS) - len(off)} of {len(FORMS)}"
    return count + "".join(f"; {form}: {text}" for form, text in off.items())


def _close(got: tuple[float, float], right: tuple[float, float]) -> bool:
    return all(abs(a - b) <= 1e-9 for a, b in zip(got, right))


@dataclass(frozen=True)
class Claim:
    """One row: its key on the command line, its text, what measures it, and fastai's way."""

    key: str
    text: str
    probe: Callable[[Contender, Path], str]
    fastai: str


_OWN = {"LambdaLR": "schedules of its own (`fit_one_cycle`), a new one for each fit"}
CLAIMS = [
    Claim(
        "options",
        "the user's lr and weight decay per group survive an unfreeze",
        group_options,
        "groups are fixed by a `splitter`; lr by `slice`, one `wd` for all",
    ),
    *[
        Claim(kind, f"`{kind}` after an unfreeze", scheduler(kind), _OWN.get(kind, "as above"))
        for kind in SCHEDULERS
    ],
    Claim(
        "batch-norm",
        "batch-norm statistics of a frozen part stay",
        batch_norm,
        "with `train_bn=False` and the `BnFreeze` callback",
    ),
    Claim(
        "resume",
        "`fit(ckpt_path=...)` ends bit-identical to the uninterrupted run, by kind of checkpoint",
        resume,
        "weights and optimizer by `load`, epochs skipped by `start_epoch`",
    ),
    Claim(
        "validate",
        "`validate` after a fit leaves `requires_grad` as it was",
        validate,
        "only `freeze_to` changes it",
    ),
    Claim(
        "second",
        "the same callback object starts clean in a second Trainer",
        second_trainer,
        "not a callback: `freeze_to` is called by hand",
    ),
    Claim(
        "ranks",
        "two ranks hold equal weights after an unfreeze",
        two_ranks,
        "`DistributedTrainer` wraps anew for each fit",
    ),
    Claim(
        "names",
        "`layer.1` doesn't match `layer.10`",
        whole_names,
        "a `splitter` takes modules, not names",
    ),
    Claim("verified", "frozen weights are verified", verified, "none documented"),
    Claim(
        "reinit",
        "re-initialises layers",
        reinitialises,
        "by hand, with `apply_init`",
    ),
    Claim(
        "configure",
        "`configure_optimizers` is used unchanged (3 ways to write it; backbone at a tenth of "
        "the lr)",
        unchanged_optimizers,
        "no such method: `opt_func`",
    ),
]


def contenders() -> list[Contender]:
    """Those that are installed."""
    other = finetuning_scheduler()
    return [OURS, *([other] if other is not None else []), BACKBONE_FINETUNING]


def measure(
    keys: Sequence[str] = (), say: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, str]]:
    """Claim -> library -> what happened."""
    found: dict[str, dict[str, str]] = {}
    for claim in CLAIMS:
        if keys and claim.key not in keys:
            continue
        row = found.setdefault(claim.key, {})
        for contender in contenders():
            say(f"{claim.key}: {contender.name}")
            with tempfile.TemporaryDirectory() as folder, hushed():
                row[contender.name] = claim.probe(contender, Path(folder))
    return found


def _heading(name: str) -> str:
    if name == "BackboneFinetuning":
        return f"`BackboneFinetuning` (Lightning {metadata.version('lightning')})"
    return f"{name} {metadata.version(name)}"


def table_of(found: dict[str, dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the printed table."""
    names = [contender.name for contender in contenders()]
    heads = ["", *map(_heading, names), f"fastai {FASTAI} (documented, not measured)"]
    claims = {claim.key: claim for claim in CLAIMS}
    rows = [
        [claims[key].text, *(row[name] for name in names), claims[key].fastai]
        for key, row in found.items()
    ]
    return heads, rows


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    keys = [claim.key for claim in CLAIMS]
    parser.add_argument("--only", nargs="+", choices=keys, default=[], help="some of the claims")
    parser.add_argument("--ranks", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--find-unused", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.ranks:
        name, report = given.ranks
        on_two_ranks(name, Path(report), find_unused=given.find_unused)
        return {}
    if finetuning_scheduler() is None:
        print(
            "finetuning-scheduler isn't installed, so its column is left out: see "
            "benchmarks/README.md",
            file=sys.stderr,
        )
    found = measure(given.only, lambda text: print(text, file=sys.stderr))
    show("What happens", *table_of(found), [versions()], markdown=given.markdown)
    return found


if __name__ == "__main__":
    main()
