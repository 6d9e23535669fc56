"""Unfreeze layer groups on a schedule, each with its own learning rate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Union

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_freeze.adapters import adapter_names
from lightning_freeze.apply import is_batch_norm
from lightning_freeze.arguments import call_of, one_of, positive, whole
from lightning_freeze.callbacks._freezing import FreezingCallback, key_of
from lightning_freeze.callbacks._metric import check_can_be_logged, missing_metric
from lightning_freeze.distributed import from_all_ranks
from lightning_freeze.errors import ArgumentError, DiscoveryError, SelectorError
from lightning_freeze.layers import LayerGroup, groups_of
from lightning_freeze.names import ModelIndex
from lightning_freeze.preview import SchedulePreview
from lightning_freeze.report import groups_or_children
from lightning_freeze.schedule import (
    Entry,
    MetricClock,
    UnfreezeSchedule,
    from_entries,
    from_groups,
    parse_schedule,
)
from lightning_freeze.selectors import Selector, as_selectors, select

Schedule = Union[dict[Any, Any], str, None]


_DEFAULTS: dict[str, Any] = {
    "schedule": None,
    "start": 1,
    "every": 1,
    "layers_per_step": 1,
    "order": "top_down",
    "unit": "epoch",
    "monitor": None,
    "lr_decay": 1.0,
    "groups": None,
    "train_bn": False,
    "eval_mode": True,
}


_FROZEN_HEAD = (
    "PEFT froze the head. Name it in PEFT's `modules_to_save`, or begin with the adapters of the "
    "top layer group, as in `GradualUnfreeze(start=0)`"
)


class GradualUnfreeze(FreezingCallback):
    """Head first, then layer group by layer group, without touching your optimizer or scheduler.

    Without `schedule` the head trains from epoch 0, the top `layers_per_step` layer groups join
    at `start`, and as many every `every` epochs. A group's learning rate follows its scheduler
    from the first step, so that it joins at the schedule's present value.

    Args:
        schedule: epoch (or step) -> selectors, cumulative:
            ``{0: "classifier", 1: ["layer.10", "layer.11"], 3: "**"}``. A value may also be
            ``{"unfreeze": [...], "lr_scale": 0.5}``. Or the path of a YAML file with the same.
        start: epoch (or step) of the first unfreezing.
        every: epochs (or steps) between two.
        layers_per_step: layer groups per unfreezing.
        order: "top_down", or "bottom_up" for the lowest group first.
        unit: "epoch", or "step" for optimizer steps.
        monitor: a logged metric; the next groups unfreeze when it hasn't improved by `min_delta`
            for `patience` epochs.
        mode: "min" or "max": which way the metric improves.
        patience: epochs without improvement.
        min_delta: the least change of the metric that counts as improvement.
        lr_decay: the learning rate of a group is yours times ``lr_decay ** distance`` from the
            top; ULMFiT (Howard and Ruder 2018, https://arxiv.org/abs/1801.06146) uses 1/2.6.
        groups: your own layer groups, bottom to top, each a selector or a list of them.
        train_bn: let batch-norm layers train from the start, weights and statistics.
        eval_mode: keep what is frozen in eval mode.

    Raises:
        ArgumentError, ScheduleError: at construction, or in `setup` where the model is needed.
        SelectorError, DiscoveryError, ConflictError: in `setup`; the model is left as it was.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> unfreeze = GradualUnfreeze(start=1, layers_per_step=2, lr_decay=0.9)
        >>> trainer = Trainer(callbacks=[unfreeze], logger=False)
    """

    def __init__(
        self,
        schedule: Schedule = None,
        *,
        start: int = 1,
        every: int = 1,
        layers_per_step: int = 1,
        order: str = "top_down",
        unit: str = "epoch",
        monitor: str | None = None,
        mode: str = "min",
        patience: int = 1,
        min_delta: float = 0.0,
        lr_decay: float = 1.0,
        groups: list[Any] | None = None,
        train_bn: bool = False,
        eval_mode: bool = True,
    ) -> None:
        super().__init__()
        self.entries: tuple[Entry, ...] | None = None
        if schedule is not None:
            if not isinstance(schedule, (Mapping, str, os.PathLike)):
                raise ArgumentError(
                    f"`schedule` is {schedule!r}. Write a mapping from epochs to selectors, or the "
                    "path of a YAML file."
                )
            self.entries = parse_schedule(schedule)
        self.start = whole(start, "start", least=0)
        self.every = whole(every, "every", least=1)
        self.layers_per_step = whole(layers_per_step, "layers_per_step", least=1)
        self.order = one_of(order, "order", ("top_down", "bottom_up"))
        self.unit = one_of(unit, "unit", ("epoch", "step"))
        self.monitor = monitor
        self.mode = one_of(mode, "mode", ("min", "max"))
        self.patience = whole(patience, "patience", least=1)
        if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)) or min_delta < 0:
            raise ArgumentError(f"`min_delta` is {min_delta!r}. Write a number from 0.")
        self.min_delta = float(min_delta)
        self.lr_decay = positive(lr_decay, "lr_decay")
        if groups is not None and (isinstance(groups, str) or not groups):
            raise ArgumentError(
                f"`groups` is {groups!r}. Write a list of selectors, bottom to top."
            )
        self.groups = groups
        self.train_bn = train_bn
        self.eval_mode = eval_mode
        if monitor is not None and unit == "step":
            raise ArgumentError(
                '`monitor` decides once an epoch, so `unit="step"` has no meaning with it. Leave '
                "one of them out."
            )
        self._clock = self._new_clock()
        self._fed = -1
        self._seen_before: Any = None
        # a resume from a validation at an epoch's end runs that end again, without a batch
        self._trained = False

    @property
    def state_key(self) -> str:
        """Tells this callback's state in a checkpoint from that of another `GradualUnfreeze`."""
        schedule = None
        if self.entries is not None:
            schedule = {entry.at: key_of(entry.selectors) for entry in self.entries}
        groups = self.groups and [key_of(as_selectors(group)) for group in self.groups]
        return call_of(
            "GradualUnfreeze",
            _DEFAULTS,
            schedule=schedule,
            start=self.start,
            every=self.every,
            layers_per_step=self.layers_per_step,
            order=self.order,
            unit=self.unit,
            monitor=self.monitor,
            lr_decay=self.lr_decay,
            groups=groups,
            train_bn=self.train_bn,
            eval_mode=self.eval_mode,
        )

    def resolve(self, index: ModelIndex, trainer: Trainer | None = None) -> UnfreezeSchedule:
        """The schedule for a model."""
        groups = self._layer_groups(index)
        every = frozenset(index.parameters)
        top = len(groups) - 1
        norms = {
            path: frozenset(index.within(module))
            for path, module in index.modules.items()
            if self.train_bn and is_batch_norm(module)
        }
        scale = {
            name: self.lr_decay ** (top - position)
            for position, group in enumerate(groups)
            for name in group.parameters
            if self.lr_decay != 1.0 and position != top
        }
        governed = every - frozenset().union(*norms.values())
        schedule = UnfreezeSchedule(
            governed=governed,
            stages=(),
            unit=self.unit,
            lr_scale=scale,
            eval_mode=self.eval_mode,
            lively=frozenset(norms),
            layer_group={name: group.name for group in groups for name in group.parameters},
            advice=_FROZEN_HEAD if adapter_names(index) else "",
        )
        if self.entries is not None:

            def pick(selector: Selector) -> Sequence[str]:
                return self._pick(index, groups, selector)

            schedule = from_entries(schedule, self.entries, pick)
        else:
            schedule = from_groups(
                schedule,
                [group.parameters for group in groups],
                start=self.start if self.monitor is None else 1,
                every=self.every if self.monitor is None else 1,
                layers_per_step=self.layers_per_step,
                order=self.order,
            )
        if self.monitor is not None:
            schedule = replace(schedule, unit="metric")
            if trainer is not None:
                check_can_be_logged(self.monitor, trainer)
        return schedule

    def _layer_groups(self, index: ModelIndex) -> tuple[LayerGroup, ...]:
        if self.groups is None and self.entries is not None and self.lr_decay == 1.0:
            return groups_or_children(index)
        found = groups_of(index, self.groups)
        if len(found) < 2:
            raise DiscoveryError(
                f"The model has {len(found)} layer group, so there is nothing to unfreeze "
                "gradually. Give `groups`, bottom to top, or a `schedule`."
            )
        return found

    @staticmethod
    def _pick(
        index: ModelIndex, groups: Sequence[LayerGroup], selector: Selector
    ) -> tuple[str, ...]:
        """Names that a selector of the schedule means; the name of a layer group will do."""
        try:
            return select(index, selector)
        except SelectorError:
            for group in groups:
                if group.name == selector:
                    return group.parameters
            raise

    def preview(self, model: nn.Module, max_epochs: int) -> SchedulePreview:
        """What will train when in a model, without a Trainer and without training.

        Args:
            model: any module; it isn't changed.
            max_epochs: length of the run.

        Returns:
            A `SchedulePreview`, which prints as a table; `.plot()` draws it.

        Raises:
            FreezeError: as in `setup`.
        """
        index = ModelIndex.of(model)
        return SchedulePreview.of(index, self.resolve(index), self._layer_groups(index), max_epochs)

    def _new_clock(self) -> MetricClock:
        return MetricClock(self.mode, self.patience, self.min_delta)

    def stage(self, schedule: UnfreezeSchedule, epoch: int, step: int) -> int:
        """The number of the stage now: by the clock, or by the metric."""
        if self.monitor is not None:
            return min(self._clock.stage, len(schedule.stages) - 1)
        return super().stage(schedule, epoch, step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments against the model; nothing freezes yet."""
        if trainer.state.fn == "fit":
            self._clock = self._new_clock()
            self._fed = -1
        super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """The stage, and what the metric has been so far."""
        state = super().state_dict()
        if state and self.monitor is not None:
            state["metric"] = {**asdict(self._clock), "fed": self._fed}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what the metric has been so far."""
        saved = dict(state.get("metric") or {})
        if saved and self.monitor is not None:
            self._fed = saved.pop("fed")
            kept = {name: saved[name] for name in ("best", "waited", "stage")}
            self._clock = replace(self._new_clock(), **kept)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Unfreeze what is due."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._trained = True

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first batch: a validation metric that validation doesn't log is a mistake."""
        if self.monitor is None or not self.monitor.startswith(("val", "dev", "eval")):
            return
        if not any(from_all_ranks(self.monitor in trainer.callback_metrics)):
            raise missing_metric(self.monitor, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metric, to see whether validation renews it."""
        if self.monitor is not None and not trainer.sanity_checking:
            self._seen_before = trainer.callback_metrics.get(self.monitor)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a validation metric here: a checkpoint may be saved before the epoch's end."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._feed(trainer, None if value is self._seen_before else value)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a training metric."""
        epoch = trainer.current_epoch
        if self.monitor is None or self._fed >= epoch or self._done():
            return
        fed = self._feed(trainer, trainer.callback_metrics.get(self.monitor))
        if not fed and self._trained and (epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            raise missing_metric(self.monitor, trainer)
        self._trained = False

    def _done(self) -> bool:
        session = self._session
        if session is None or self not in session.schedules:
            return True
        return self._clock.stage >= len(session.schedules[self].stages) - 1

    def _feed(self, trainer: Trainer, value: Any) -> bool:
        """Go by the mean over the ranks that logged a value, so that none moves alone.

        Returns:
            Whether any did.
        """
        if self._fed >= trainer.current_epoch:
            return True
        told = from_all_ranks(None if value is None else float(value))
        values = [each for each in told if each is not None]
        if values:
            self._fed = trainer.current_epoch
            self._clock = self._clock.feed(sum(values) / len(values))
        return bool(values)
