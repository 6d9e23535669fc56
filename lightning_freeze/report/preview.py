"""A schedule and a model -> what will train when, and what it costs, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from torch import nn

from lightning_freeze.arguments import whole
from lightning_freeze.engine.flags import can_train, frozen_by_user
from lightning_freeze.errors import ArgumentError
from lightning_freeze.model.index import ModelIndex, size_of
from lightning_freeze.model.layer_groups import LayerGroup
from lightning_freeze.report.timeline import Moment, plot_timeline
from lightning_freeze.schedule.entries import Entry
from lightning_freeze.schedule.plan import merge
from lightning_freeze.schedule.schedule import UnfreezeSchedule

if TYPE_CHECKING:
    from lightning_freeze.report.step_cost import StepCost


@dataclass(frozen=True)
class PreviewRow:
    """One stage.

    Attributes:
        at: epoch or optimizer step at which it begins; the stage's number if a metric decides.
        unfrozen: layer groups that begin to train (part of a group counts).
        trainable: elements that train.
        share: of all the model's elements, from 0 to 1.
        gradient_bytes: memory of their gradients.
        optimizer_bytes: memory of two moments each (Adam, AdamW).
        lr_scale: layer group -> factor on the user's learning rate, of what trains in it; the
            largest if there are several.
        reached: whether a run of the given length gets there.
        flops: of one training step, None where they couldn't be counted.
        cost: those, relative to a step that trains the whole model.
        frozen: layer groups that trained in the stage before and no longer do (part of a group
            counts).
    """

    at: int
    unfrozen: tuple[str, ...]
    trainable: int
    share: float
    gradient_bytes: int
    optimizer_bytes: int
    lr_scale: dict[str, float]
    reached: bool
    flops: int | None = None
    cost: float | None = None
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class SchedulePreview:
    """What trains when, and what it costs. It prints as a table; `plot()` draws it.

    In a notebook it shows as a table, too, and rich prints it as one.

    Attributes:
        rows: one per stage.
        groups: names of the layer groups, bottom to top.
        total: elements of the whole model.
        unit: "epoch", "step" or "metric".
        max_epochs: length of the run.
        full_flops: of a training step that trains the whole model; None where not counted.
        inputs: the batch that FLOPs were counted for, in words.
        notes: what to know about the numbers, or why some are missing and what to do.
        entries: the same as a schedule, see `to_yaml`.
    """

    rows: tuple[PreviewRow, ...]
    groups: tuple[str, ...]
    total: int
    unit: str
    max_epochs: int
    full_flops: int | None = None
    inputs: str = ""
    notes: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()

    @classmethod
    def of(
        cls,
        index: ModelIndex,
        schedule: UnfreezeSchedule,
        groups: Sequence[LayerGroup],
        max_epochs: int,
    ) -> SchedulePreview:
        """Look ahead; what a step costs isn't counted.

        Raises:
            ArgumentError: `max_epochs` is no whole number from 1.
        """
        from lightning_freeze.schedule.files import entries_of

        whole(max_epochs, "max_epochs", least=1)
        rows = []
        before: set[str] = set()
        total = sum(map(size_of, index.parameters.values()))
        stages = trained_in(index, schedule)
        for number, (stage, trains) in enumerate(zip(schedule.stages, stages)):
            tensors = index.tensors(trains)
            size = sum(size_of(tensor) * tensor.dtype.itemsize for tensor in tensors)
            elements = sum(map(size_of, tensors))
            now = set(trains)
            rows.append(
                PreviewRow(
                    at=number if schedule.unit == "metric" else stage.at,
                    unfrozen=tuple(g.name for g in groups if (now - before) & set(g.parameters)),
                    trainable=elements,
                    share=elements / total if total else 0.0,
                    gradient_bytes=size,
                    optimizer_bytes=2 * size,
                    lr_scale={
                        g.name: max(schedule.lr_scale.get(n, 1.0) for n in g.parameters if n in now)
                        for g in groups
                        if now & set(g.parameters)
                    },
                    reached=schedule.unit != "epoch" or stage.at < max_epochs,
                    frozen=tuple(g.name for g in groups if (before - now) & set(g.parameters)),
                )
            )
            before = now
        return cls(
            tuple(rows),
            tuple(g.name for g in groups),
            total,
            schedule.unit,
            max_epochs,
            notes=(_ENDLESS,) if schedule.endless else (),
            entries=entries_of(index, schedule, stages),
        )

    @classmethod
    def with_cost(
        cls,
        model: nn.Module,
        index: ModelIndex,
        schedule: UnfreezeSchedule,
        groups: Sequence[LayerGroup],
        max_epochs: int,
        *,
        inputs: Any = None,
        batch: int = 1,
    ) -> SchedulePreview:
        """Look ahead, and count what a step costs in each stage (see `step_cost`)."""
        from lightning_freeze.report.step_cost import step_cost

        whole(batch, "batch", least=1)
        plain = cls.of(index, schedule, groups, max_epochs)
        stages = [frozenset(names) for names in trained_in(index, schedule)]
        return plain._priced(step_cost(model, stages, inputs, batch))

    def _priced(self, cost: StepCost) -> SchedulePreview:
        if cost.full is None:
            return replace(self, notes=self.notes + cost.notes)
        rows = tuple(
            replace(row, flops=flops, cost=flops / cost.full)
            for row, flops in zip(self.rows, cost.stages)
        )
        return replace(
            self,
            rows=rows,
            full_flops=cost.full,
            inputs=cost.inputs,
            notes=self.notes + cost.notes,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        content = asdict(self)
        del content["entries"]  # they may hold callables
        return content

    def to_text(self, width: int = 110) -> str:
        """The table as text, with fewer columns where it is narrow.

        Args:
            width: in characters.
        """
        from lightning_freeze.report.preview_text import text

        return text(self, width)

    def to_yaml(self) -> str:
        """The schedule as YAML, for `GradualUnfreeze(schedule="file.yaml")`; edit it as you like.

        Read back, it gives the same plan: the same names and learning-rate factors in each stage.
        """
        from lightning_freeze.schedule.files import to_yaml

        return to_yaml(self)

    def __str__(self) -> str:
        return self.to_text()

    __repr__ = __str__

    def __rich__(self) -> Any:
        from lightning_freeze.report.preview_text import renderable

        return renderable(self)

    def _repr_html_(self) -> str:
        from lightning_freeze.report.preview_text import html

        return html(self)

    def plot(self, path: Union[str, Path, None] = None) -> Any:
        """Draw which layer group trains when, coloured by its factor on the learning rate.

        Args:
            path: where to save the picture; not saved where None.

        Returns:
            The matplotlib figure.
        """
        if not self.groups:
            raise ArgumentError("There is nothing to draw: the model has no parameters.")
        moments = [
            Moment(row.at, row.at, {group: row.lr_scale.get(group) for group in self.groups})
            for row in self.rows
            if row.reached
        ]
        # how many steps a run has isn't known here: the last stage is drawn like the one before
        gap = moments[-1].epoch - moments[-2].epoch if len(moments) > 1 else 1
        return plot_timeline(
            moments,
            self.groups,
            path,
            end=self.max_epochs if self.unit == "epoch" else moments[-1].epoch + gap,
            title="Which layers will train when",
            unit={"metric": "stage"}.get(self.unit, self.unit),
            colour="factor on the learning rate",
        )


_ENDLESS = (
    "The schedule goes on in this way for as long as the run does; its first stages are shown."
)


def trained_in(index: ModelIndex, schedule: UnfreezeSchedule) -> list[tuple[str, ...]]:
    """Names of what trains in each stage.

    What the user froze stays frozen unless a selector names it, and integers can't train.
    """
    before = frozen_by_user(index)
    able = [name for name, parameter in index.parameters.items() if can_train(parameter)]
    plans = [merge([schedule.plan(number)], before) for number in range(len(schedule.stages))]
    return [plan.trainable(able) for plan in plans]
