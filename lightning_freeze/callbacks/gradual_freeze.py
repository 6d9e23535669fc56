"""Freeze layer groups from the bottom, on a schedule or when their gradients settle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Union

from torch import nn

from lightning_freeze.arguments import call_of, one_of, whole
from lightning_freeze.callbacks._gradient_driven import GradientDriven
from lightning_freeze.callbacks._lightning import Trainer
from lightning_freeze.callbacks._written import Schedule, as_configured
from lightning_freeze.callbacks.base import key_of
from lightning_freeze.errors import ArgumentError, DiscoveryError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.layer_groups import LayerGroup, groups_of, select_or_group
from lightning_freeze.model.selectors import as_selectors
from lightning_freeze.report.preview import SchedulePreview
from lightning_freeze.report.summary import groups_or_children
from lightning_freeze.schedule.entries import Entry
from lightning_freeze.schedule.freezing import freeze_entries, freeze_groups, parse_freezing
from lightning_freeze.schedule.schedule import UnfreezeSchedule

Written = Union[Mapping[Any, Any], str, "os.PathLike[str]", Schedule, None]

_DEFAULTS: dict[str, Any] = {
    "schedule": None,
    "start": 1,
    "every": 1,
    "layers_per_step": 1,
    "unit": "epoch",
    "monitor": None,
    "percentile": 50.0,
    "groups": None,
    "eval_mode": True,
}


class GradualFreeze(GradientDriven):
    """Everything trains at first; layer groups freeze from the bottom, and the head never does.

    The mirror of `GradualUnfreeze`. At `start` the lowest `layers_per_step` layer groups freeze,
    and as many every `every` epochs. What freezes gives its gradients and optimizer state back at
    once, no graph is built below the lowest layer that trains, and it never trains again.
    A tensor that the head shares with a layer below, as in masked language models, freezes with
    that layer.

    Args:
        schedule: epoch (or step) -> selectors of what freezes then, cumulative:
            `{1: "embeddings", 2: ["layer.0", "layer.1"]}`. A value may also be
            `{"freeze": [...]}`. Or the path of a YAML file with the same; in a LightningCLI config
            it counts from the config's folder.
        start: epoch (or step) of the first freezing.
        every: epochs (or steps) between two; with `monitor` the length of an interval.
        layers_per_step: layer groups per freezing.
        unit: "epoch", or "step" for optimizer steps.
        monitor: "gradient" to freeze when gradients settle; see `autofreeze`.
        percentile: with `monitor`, what a layer's change must be below: a percentile of the
            changes of all layers that still train.
        groups: your own layer groups, bottom to top, each a selector or a list of them; the last
            one is the head.
        eval_mode: keep what is frozen in eval mode: dropout off, batch-norm statistics still.

    Raises:
        ArgumentError, ScheduleError: at construction, or in `setup` where the model is needed.
        SelectorError, DiscoveryError, ConflictError: in `setup`; the model is left as it was.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradualFreeze(start=2, layers_per_step=3)], logger=False)
    """

    governs_all = True

    def __init__(
        self,
        schedule: Written = None,
        *,
        start: int = 1,
        every: int = 1,
        layers_per_step: int = 1,
        unit: Literal["epoch", "step"] = "epoch",
        monitor: Literal["gradient"] | None = None,
        percentile: float = 50.0,
        groups: list[Any] | None = None,
        eval_mode: bool = True,
    ) -> None:
        self.entries: tuple[Entry, ...] | None = None
        if isinstance(schedule, Schedule):
            schedule = schedule.content
        if schedule is not None:
            if not isinstance(schedule, (Mapping, str, os.PathLike)):
                raise ArgumentError(
                    f"`schedule` is {schedule!r}. Write a mapping from epochs to selectors, or the "
                    "path of a YAML file."
                )
            self.entries = parse_freezing(schedule)
        self.start = whole(start, "start", least=0)
        self.every = whole(every, "every", least=1)
        self.layers_per_step = whole(layers_per_step, "layers_per_step", least=1)
        self.unit = one_of(unit, "unit", ("epoch", "step"))
        if groups is not None and (isinstance(groups, str) or not groups):
            raise ArgumentError(
                f"`groups` is {groups!r}. Write a list of selectors, bottom to top."
            )
        self.groups = groups
        self.eval_mode = eval_mode
        super().__init__(monitor, _per_cent(percentile))
        self._check_monitor(schedule)

    def _check_monitor(self, schedule: Any) -> None:
        if self.monitor not in (None, "gradient"):
            raise ArgumentError(
                f'`monitor` is {self.monitor!r}. Write "gradient", or leave it out to freeze on a '
                "clock."
            )
        given = {"schedule": schedule, "start": self.start, "layers_per_step": self.layers_per_step}
        useless = [name for name, value in given.items() if value != _DEFAULTS[name]]
        if self.monitor is not None and useless:
            raise ArgumentError(
                f'`{useless[0]}` has no meaning with `monitor="gradient"`, which finds out what '
                "freezes when. Leave one of them out."
            )
        if self.monitor is None and self.percentile != _DEFAULTS["percentile"]:
            raise ArgumentError(
                '`percentile` is for `monitor="gradient"`, which is not given. Add it, or leave '
                "`percentile` out."
            )

    @property
    def state_key(self) -> str:
        """Tells this callback's state in a checkpoint from that of another `GradualFreeze`."""
        schedule = None
        if self.entries is not None:
            schedule = {entry.at: key_of(entry.freeze) for entry in self.entries}
        return call_of(
            "GradualFreeze",
            _DEFAULTS,
            schedule=schedule,
            start=self.start,
            every=self.every,
            layers_per_step=self.layers_per_step,
            unit=self.unit,
            monitor=self.monitor,
            percentile=self.percentile,
            groups=self.groups and [key_of(as_selectors(group)) for group in self.groups],
            eval_mode=self.eval_mode,
        )

    def resolve(self, index: ModelIndex, trainer: Trainer | None = None) -> UnfreezeSchedule:
        """The schedule for a model."""
        groups = self._layer_groups(index)
        schedule = UnfreezeSchedule(
            governed=frozenset(index.parameters),
            stages=(),
            unit=self.unit,
            eval_mode=self.eval_mode,
            layer_group={name: group.name for group in groups for name in group.parameters},
        )
        body = [group.parameters for group in groups[:-1]]
        if self.entries is not None:
            return freeze_entries(
                schedule, self.entries, lambda selector: select_or_group(index, groups, selector)
            )
        if self.monitor is not None:  # one layer of the body changes most, and is never frozen
            return replace(freeze_groups(schedule, body[:-1]), unit="metric")
        return freeze_groups(
            schedule,
            body,
            start=self.start,
            every=self.every,
            layers_per_step=self.layers_per_step,
        )

    def measured(self, index: ModelIndex) -> Sequence[Sequence[str]]:
        """Names of the layers whose gradients count: all but the head."""
        return [group.parameters for group in self._layer_groups(index)[:-1]]

    def _layer_groups(self, index: ModelIndex) -> tuple[LayerGroup, ...]:
        if self.groups is None and self.entries is not None:
            return groups_or_children(index)
        found = groups_of(index, self.groups)
        least = 2 if self.monitor is None else 3
        if len(found) < least:
            raise DiscoveryError(
                f"The model has {len(found)} layer group{'' if len(found) == 1 else 's'}, so there "
                f"is nothing to freeze gradually: it takes {least}, with the head. Give `groups`, "
                "bottom to top, or a `schedule`."
            )
        return found

    def preview(
        self, model: nn.Module, max_epochs: int, *, inputs: Any = None, batch: int = 1
    ) -> SchedulePreview:
        """What will train when in a model, and what a step costs, without training.

        Args:
            model: any module; it isn't changed.
            max_epochs: length of the run.
            inputs: what the model is called with; found by itself where None.
            batch: samples in it, where it is found by itself.

        Returns:
            A `SchedulePreview`, which prints as a table; `.plot()` draws it. With `monitor` it
            shows the layers one by one: the gradients may freeze several at once, or none.

        Raises:
            FreezeError: as in `setup`.
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
    def autofreeze(
        cls,
        *,
        every: int = 1,
        unit: Literal["epoch", "step"] = "epoch",
        percentile: float = 50.0,
        groups: list[Any] | None = None,
        eval_mode: bool = True,
    ) -> GradualFreeze:
        """AutoFreeze: the lowest layers freeze once their gradients have settled.

        Liu et al. 2021, "AutoFreeze: Automatically Freezing Model Blocks to Accelerate
        Fine-tuning", https://arxiv.org/abs/2102.01386. At the end of each interval but the first,
        the norm of each layer's gradient is compared with that of the interval before; the lowest
        consecutive layers whose relative change is below the percentile (the median, in the paper)
        of all layers that still train freeze. The layer that changed most stays, and so does the
        head, which isn't measured.

        Unlike in their code: a norm is the mean of the norms (L2) of the interval's optimizer
        steps, not the norm (L1) of the sum of its gradients, which would hold one more copy of the
        model in memory and in each checkpoint; what stands below the blocks counts as a layer; what
        is frozen is in eval mode; and the optimizer goes on, where theirs begins anew.

        Args:
            every: epochs (or steps) of an interval; theirs is a 20th of the run in steps.
            unit: "epoch", or "step" for optimizer steps.
            percentile: above 0, at most 100; a higher one freezes sooner.
            groups: your own layer groups, bottom to top; the last one is the head.
            eval_mode: keep what is frozen in eval mode.

        Example:
            >>> GradualFreeze.autofreeze(every=500, unit="step").state_key
            "GradualFreeze(every=500, unit='step', monitor='gradient')"
        """
        return cls(
            every=every,
            unit=unit,
            monitor="gradient",
            percentile=percentile,
            groups=groups,
            eval_mode=eval_mode,
        )


def _per_cent(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 100:
        raise ArgumentError(f"`percentile` is {value!r}. Write a number above 0, at most 100.")
    return float(value)


# what jsonargparse goes by: a type of its own checks a configuration while it is read
GradualFreeze.__init__.__annotations__["schedule"] = f"{as_configured.__name__}()"
