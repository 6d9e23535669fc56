"""Who takes part: a LightningModule and the callbacks that go with it."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from transformers import BertForSequenceClassification

from benchmarks.staged.settings import LAYERS, Settings
from lightning_freeze import FrozenFeatureCache, GradualFreeze, GradualUnfreeze

HEAD = "model.classifier"
TOPS = [f"model.bert.encoder.layer.{i}" for i in range(LAYERS - 2, LAYERS)] + ["model.bert.pooler"]


class Classifier(LightningModule):
    """An ordinary LightningModule: all parameters are in its optimizer."""

    def __init__(self, model: BertForSequenceClassification, settings: Settings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.losses: list[torch.Tensor] = []

    @property
    def backbone(self) -> nn.Module:
        """What `BackboneFinetuning` looks for."""
        return self.model.bert

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        tokens, mask, labels = batch
        loss = self.model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.settings.lr)


class Filtered(Classifier):
    """With the filter that Lightning and finetuning-scheduler document for their callbacks."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.settings.lr)


class ByHand(Filtered):
    """With the stages written out, flags and modes and all, as one does for one device."""

    def __init__(self, model: BertForSequenceClassification, settings: Settings) -> None:
        super().__init__(model, settings)
        bert = model.bert
        tops = [self.get_submodule(path) for path in TOPS]
        self.trained = [[model.classifier], [model.classifier, *tops], [model]]
        self.quiet = [[bert], [bert.embeddings, *bert.encoder.layer[:-2]], []]

    def setup(self, stage: str) -> None:
        self.set_flags(0)

    def set_flags(self, number: int) -> None:
        self.model.requires_grad_(False)
        for module in self.trained[number]:
            module.requires_grad_(True)

    def on_train_epoch_start(self) -> None:
        number = self.settings.stage(self.current_epoch)
        if number and self.current_epoch % self.settings.epochs_per_stage == 0:
            before = {id(p) for p in self.parameters() if p.requires_grad}
            self.set_flags(number)
            new = [p for p in self.parameters() if p.requires_grad and id(p) not in before]
            self.optimizers().add_param_group({"params": new})
        self.model.train()
        for module in self.quiet[number]:
            module.eval()


class EvalWhereFrozen(Callback):
    """Turns dropout off in blocks of which nothing trains, as one may do beside a library."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.model.train()
        for block in blocks(pl_module.model):
            if not any(p.requires_grad for p in block.parameters()):
                block.eval()


def blocks(model: BertForSequenceClassification) -> list[nn.Module]:
    """Embeddings, layers and pooler, bottom to top."""
    return [model.bert.embeddings, *model.bert.encoder.layer, model.bert.pooler]


def _ours(settings: Settings) -> list[Callback]:
    each = settings.epochs_per_stage
    return [GradualUnfreeze({0: HEAD, each: TOPS, 2 * each: "**"})]


def _cached(settings: Settings) -> list[Callback]:
    return [*_ours(settings), FrozenFeatureCache()]


def _scheduler(settings: Settings) -> list[Callback]:
    from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint

    each = settings.epochs_per_stage
    tops = rf"model\.bert\.(encoder\.layer\.({LAYERS - 2}|{LAYERS - 1})|pooler)\..*"
    rest = rf"model\.bert\.(embeddings|encoder\.layer\.[0-{LAYERS - 3}])\..*"
    schedule = {
        0: {"params": [r"model\.classifier\..*"], "max_transition_epoch": each},
        1: {"params": [tops], "max_transition_epoch": 2 * each, "lr": settings.lr},
        2: {"params": [rest], "max_transition_epoch": 3 * each, "lr": settings.lr},
    }
    finetuning = FinetuningScheduler(
        ft_schedule=schedule,
        epoch_transitions_only=True,
        restore_best=False,
        logging_level=logging.ERROR,
    )
    return [finetuning, FTSCheckpoint(save_top_k=0)]


def _scheduler_in_eval(settings: Settings) -> list[Callback]:
    finetuning, checkpoint = _scheduler(settings)
    return [finetuning, EvalWhereFrozen(), checkpoint]


def _backbone(settings: Settings) -> list[Callback]:
    # with the head's learning rate, to which `should_align` keeps it
    return [
        BackboneFinetuning(
            unfreeze_backbone_at_epoch=2 * settings.epochs_per_stage,
            backbone_initial_lr=settings.lr,
            initial_denom_lr=1.0,
            lambda_func=lambda epoch: 1e6,
        )
    ]


def _freeze(settings: Settings) -> list[Callback]:
    schedule: dict[int, list[str]] = {}
    done = 0
    for epoch, layers in settings.freeze:
        names = [f"model.bert.encoder.layer.{i}" for i in range(done, layers)]
        schedule[epoch] = names if done else ["model.bert.embeddings", *names]
        done = layers
    return [GradualFreeze(schedule), FrozenFeatureCache()]


def _autofreeze(settings: Settings) -> list[Callback]:
    steps = settings.epochs * -(-settings.samples // settings.batch)
    # the paper's interval: a 20th of the run
    every = max(1, round(steps / 20))
    freeze = GradualFreeze.autofreeze(every=every, unit="step", percentile=settings.percentile)
    return [freeze, FrozenFeatureCache()]


def _nothing(settings: Settings) -> list[Callback]:
    return []


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    key: str
    name: str
    module: type[Classifier]
    callbacks: Callable[[Settings], list[Callback]] = field(repr=False)
    needs: str = ""
    note: str = ""


CONTENDERS = [
    Contender("hand", "hand-written loop", ByHand, _nothing),
    Contender("ours", "GradualUnfreeze", Classifier, _ours),
    Contender("cache", "GradualUnfreeze + cache", Classifier, _cached),
    Contender("fts", "finetuning-scheduler", Filtered, _scheduler, "finetuning_scheduler"),
    Contender(
        "fts-eval",
        "finetuning-scheduler, frozen in eval",
        Filtered,
        _scheduler_in_eval,
        "finetuning_scheduler",
        note="as it is, with frozen layers set to eval mode by a callback of one's own",
    ),
    Contender(
        "backbone",
        "BackboneFinetuning",
        Filtered,
        _backbone,
        note="it has no middle stage: the head for two thirds of the run, then everything",
    ),
    Contender("full", "full fine-tuning", Classifier, _nothing, note="everything trains, always"),
    Contender("freeze", "GradualFreeze + cache", Classifier, _freeze),
    Contender(
        "autofreeze",
        "autofreeze + cache",
        Classifier,
        _autofreeze,
        note="freezes when gradients settle; intervals of a 20th of the run",
    ),
]
KEYS = [contender.key for contender in CONTENDERS]


def missing(contender: Contender) -> bool:
    """Whether its library isn't installed. Where it is, it is loaded now, not in a fit."""
    if not contender.needs:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(contender.needs)
    except ModuleNotFoundError:
        return True
    return False


def find(key: str) -> Contender:
    return next(contender for contender in CONTENDERS if contender.key == key)
