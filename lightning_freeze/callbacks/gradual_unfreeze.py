"""Unfreeze layer groups on a schedule, each with its own learning rate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Union

from torch import nn

from lightning_freeze.arguments import call_of, one_of, positive, whole
from lightning_freeze.callbacks._lightning import Trainer
from lightning_freeze.callbacks._written import Schedule, as_configured
from lightning_freeze.callbacks.base import key_of
from lightning_freeze.callbacks.metric_monitor import MetricDriven, check_can_be_logged
from lightning_freeze.engine.flags import is_batch_norm
from lightning_freeze.errors import ArgumentError, DiscoveryError
from lightning_freeze.model.discovery.adapters import adapter_names
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.layer_groups import LayerGroup, discover, groups_of, select_or_group
from lightning_freeze.model.selectors import Selector, as_selectors, select
from lightning_freeze.report.preview import SchedulePreview
from lightning_freeze.report.summary import groups_or_children
from lightning_freeze.schedule.entries import Entry, parse_schedule
from lightning_freeze.schedule.rules import AllAtOnce, OneByOne, RandomLayers
from lightning_freeze.schedule.schedule import UnfreezeSchedule, from_entries, from_groups

Written = Union[Mapping[Any, Any], str, "os.PathLike[str]", Schedule, None]
Pattern = Union[AllAtOnce, OneByOne, RandomLayers]


_DEFAULTS: dict[str, Any] = {
    "schedule": None,
    "start": 1,
    "every": 1,
    "layers_per_step": 1,
    "order": "top_down",
    "unit": "epoch",
    "monitor": None,
    "pattern": None,
    "lr_decay": 1.0,
    "groups": None,
    "train_bn": False,
    "eval_mode": True,
}


_FROZEN_HEAD = (
    "PEFT froze the head. Name it in PEFT's `modules_to_save`, or begin with the adapters of the "
    "top layer group, as in `GradualUnfreeze(start=0)`"
)


class GradualUnfreeze(MetricDriven):
    """Head first, then layer group by layer group, without touching your optimizer or scheduler.

    Without `schedule` the head trains from epoch 0, the top `layers_per_step` layer groups join
    at `start`, and as many every `every` epochs. A group's learning rate follows its scheduler
    from the first step, so that it joins at the schedule's present value.

    Args:
        schedule: epoch (or step) -> selectors, cumulative:
            `{0: "classifier", 1: ["layer.10", "layer.11"], 3: "**"}`. A value may also be
            `{"unfreeze": [...], "lr_scale": 0.5}`, or a list with such mappings in it, or hold
            `"freeze": [...]`, which freezes again and comes first:
            `{"freeze": "**", "unfreeze": "layer.3"}` trains that layer alone. Or the path of a
            YAML file with the same; in a LightningCLI config it counts from the config's folder.
        start: epoch (or step) of the first unfreezing.
        every: epochs (or steps) between two.
        layers_per_step: layer groups per unfreezing.
        order: "top_down", or "bottom_up" for the lowest group first.
        unit: "epoch", or "step" for optimizer steps.
        monitor: a logged metric; the next groups unfreeze when it hasn't improved by `min_delta`
            for `patience` epochs, or when an `EarlyStopping` would end the fit because its own
            patience is exhausted. Each stage has a stopper's whole patience; its best score stays.
        mode: "min" or "max": which way the metric improves.
        patience: epochs with a value of the metric that bring no improvement.
        min_delta: the least change of the metric that counts as improvement.
        lr_decay: the learning rate of a group is yours times `lr_decay ** distance` from the
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

    governs_all = True

    def __init__(
        self,
        schedule: Written = None,
        *,
        start: int = 1,
        every: int = 1,
        layers_per_step: int = 1,
        order: Literal["top_down", "bottom_up"] = "top_down",
        unit: Literal["epoch", "step"] = "epoch",
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        patience: int = 1,
        min_delta: float = 0.0,
        lr_decay: float = 1.0,
        groups: list[Any] | None = None,
        train_bn: bool = False,
        eval_mode: bool = True,
    ) -> None:
        super().__init__(monitor, mode, patience, min_delta)
        self.entries: tuple[Entry, ...] | None = None
        if isinstance(schedule, Schedule):
            schedule = schedule.content
        if schedule is not None:
            if not isinstance(schedule, (Mapping, str, os.PathLike)):
                raise ArgumentError(
                    f"`schedule` is {schedule!r}. Write a mapping from epochs to selectors, or the "
                    "path of a YAML file."
                )
            self.entries = parse_schedule(
                schedule if isinstance(schedule, Mapping) else os.fspath(schedule)
            )
        self.start = whole(start, "start", least=0)
        self.every = whole(every, "every", least=1)
        self.layers_per_step = whole(layers_per_step, "layers_per_step", least=1)
        self.order = one_of(order, "order", ("top_down", "bottom_up"))
        self.unit = one_of(unit, "unit", ("epoch", "step"))
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
        self.pattern: Pattern | None = None

    @property
    def state_key(self) -> str:
        """Tells this callback's state in a checkpoint from that of another `GradualUnfreeze`."""
        schedule: dict[int, Any] | None = None
        if self.entries is not None:
            schedule = {}
            for entry in self.entries:
                told = _key(entry)
                schedule[entry.at] = [schedule[entry.at], told] if entry.at in schedule else told
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
            pattern=self.pattern,
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
                return select_or_group(index, groups, selector)

            schedule = from_entries(schedule, self.entries, pick)
        elif self.pattern is not None:
            schedule = self.pattern.fill(schedule, self._turns(index, groups))
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

    def _turns(self, index: ModelIndex, groups: Sequence[LayerGroup]) -> list[tuple[str, ...]]:
        """What takes turns: every layer group, or for random layers the blocks alone."""
        if not isinstance(self.pattern, RandomLayers):
            return [group.parameters for group in groups]
        if self.groups is not None:
            return [select(index, group) for group in self.groups]
        return [block.parameters for block in discover(index).blocks]

    def preview(
        self, model: nn.Module, max_epochs: int, *, inputs: Any = None, batch: int = 1
    ) -> SchedulePreview:
        """What will train when in a model, and what a step costs, without training.

        The cost is counted in FLOPs, with torch's own counter, on tensors without content: no
        weights are needed, so a model on the meta device will do.

        Args:
            model: any module; it isn't changed.
            max_epochs: length of the run.
            inputs: a batch as the model's `forward` takes it (a tensor, a tuple, or a mapping),
                for the cost of a step; guessed where None. Only shapes count.
            batch: samples in a guessed batch.

        Returns:
            A `SchedulePreview`, which prints as a table; `.plot()` draws it.

        Raises:
            FreezeError: as in `setup`, or `max_epochs` is no whole number from 1.
        """
        index = ModelIndex.of(model)
        return SchedulePreview.with_cost(
            model,
            index,
            self.resolve(index),
            self._layer_groups(index),
            max_epochs,
            inputs=inputs,
            batch=batch,
        )

    @classmethod
    def ulmfit(
        cls, *, every: int = 1, lr_decay: float = 1 / 2.6, groups: list[Any] | None = None
    ) -> GradualUnfreeze:
        """ULMFiT: the head first, one layer group more each epoch, lower layers slower.

        Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
        https://arxiv.org/abs/1801.06146, sections 3.2 and 3.3. Their slanted triangular learning
        rate is a scheduler of yours, such as `OneCycleLR` with `pct_start=0.1`.

        Args:
            every: epochs between two unfreezings.
            lr_decay: factor on the learning rate from one layer group to the next below.
            groups: your own layer groups, bottom to top.

        Example:
            >>> GradualUnfreeze.ulmfit().state_key
            'GradualUnfreeze(lr_decay=0.3846153846153846)'
        """
        return cls(every=every, start=every, lr_decay=lr_decay, groups=groups)

    @classmethod
    def layerwise_lr_decay(
        cls, lr_decay: float = 0.95, *, groups: list[Any] | None = None
    ) -> GradualUnfreeze:
        """Everything trains from the start, each layer group slower than the one above it.

        Zhang et al. 2021, "Revisiting Few-sample BERT Fine-tuning",
        https://arxiv.org/abs/2006.05987, compare it with a fresh start for the top layers
        (`ReinitTopLayers`); the two can be combined.

        Args:
            lr_decay: factor on the learning rate from one layer group to the next below.
            groups: your own layer groups, bottom to top.

        Example:
            >>> GradualUnfreeze.layerwise_lr_decay().state_key
            'GradualUnfreeze(pattern=AllAtOnce(), lr_decay=0.95)'
        """
        made = cls(lr_decay=lr_decay, groups=groups)
        made.pattern = AllAtOnce()
        return made

    @classmethod
    def chain_thaw(
        cls,
        *,
        every: int = 1,
        unit: Literal["epoch", "step"] = "epoch",
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        patience: int = 1,
        min_delta: float = 0.0,
        groups: list[Any] | None = None,
    ) -> GradualUnfreeze:
        """Chain-thaw: the head, then each layer group alone from the bottom up, then everything.

        Felbo et al. 2017, "Using millions of emoji occurrences to learn any-domain
        representations" (DeepMoji), https://arxiv.org/abs/1708.00524, section 3.3. A layer that
        freezes again loses its momentum, and begins anew with what trains at the end. Unlike in
        their code, what is frozen is in eval mode.

        Args:
            every: epochs (or steps) per stage; there are two stages more than layers below the
                head.
            unit: "epoch", or "step" for optimizer steps.
            monitor: a logged metric; the next stage begins when it hasn't improved by `min_delta`
                for `patience` epochs, as in the paper.
            mode: "min" or "max": which way the metric improves.
            patience: epochs without improvement.
            min_delta: the least change of the metric that counts as improvement.
            groups: your own layer groups, bottom to top; the last one is the head.

        Example:
            >>> GradualUnfreeze.chain_thaw(every=2).state_key
            'GradualUnfreeze(pattern=OneByOne(every=2))'
        """
        made = cls(
            unit=unit,
            monitor=monitor,
            mode=mode,
            patience=patience,
            min_delta=min_delta,
            groups=groups,
        )
        made.pattern = OneByOne(whole(every, "every", least=1) if monitor is None else 1)
        return made

    @classmethod
    def lisa(
        cls,
        layers: int = 2,
        every: int = 20,
        seed: int = 0,
        *,
        unit: Literal["epoch", "step"] = "step",
        groups: list[Any] | None = None,
        eval_mode: bool = True,
    ) -> GradualUnfreeze:
        """LISA: a few random layers at a time, drawn anew every so many optimizer steps.

        Pan et al. 2024, "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
        Model Fine-Tuning", https://arxiv.org/abs/2403.17919. Embeddings and head always train.
        What is drawn depends on the seed and the step alone: it is the same on every rank and
        after a resume. A layer that is drawn again begins with fresh optimizer state. Under
        torch.compile each new draw compiles anew, so compile the layers, not the model.

        Args:
            layers: how many layers train at a time.
            every: optimizer steps (or epochs) between two draws.
            seed: of the draws.
            unit: "step" for optimizer steps, or "epoch".
            groups: what is drawn from, each a selector or a list of them; everything else always
                trains. The blocks of the backbone where None.
            eval_mode: keep what is frozen in eval mode; False leaves its dropout on, as theirs.

        Example:
            >>> GradualUnfreeze.lisa(every=50).state_key
            "GradualUnfreeze(unit='step', pattern=RandomLayers(layers=2, every=50, seed=0))"
        """
        made = cls(unit=unit, groups=groups, eval_mode=eval_mode)
        made.pattern = RandomLayers(
            whole(layers, "layers", least=1),
            whole(every, "every", least=1),
            whole(seed, "seed", least=0),
        )
        return made


def _key(entry: Entry) -> Any:
    unfreeze, freeze = key_of(entry.selectors), key_of(entry.freeze)
    return {"freeze": freeze, "unfreeze": unfreeze} if freeze else unfreeze


# what jsonargparse goes by: a type of its own checks a configuration while it is read
GradualUnfreeze.__init__.__annotations__["schedule"] = f"{as_configured.__name__}()"
