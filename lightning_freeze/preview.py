"""A schedule and a model -> what will train when, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Union

from lightning_freeze.layers import LayerGroup
from lightning_freeze.names import ModelIndex
from lightning_freeze.report import to_text
from lightning_freeze.schedule import UnfreezeSchedule
from lightning_freeze.timeline import Moment, plot_timeline


@dataclass(frozen=True)
class PreviewRow:
    """One stage.

    Attributes:
        at: epoch or optimizer step at which it begins; the stage's number if a metric decides.
        unfrozen: layer groups that begin to train (part of a group counts).
        trainable: elements that train.
        gradient_bytes: memory of their gradients.
        optimizer_bytes: memory of two moments each (Adam, AdamW).
        lr_scale: layer group -> factor on the user's learning rate, of what trains in it; the
            largest if there are several.
        reached: whether a run of the given length gets there.
        refrozen: layer groups that trained in the stage before and no longer do (part of a group
            counts).
    """

    at: int
    unfrozen: tuple[str, ...]
    trainable: int
    gradient_bytes: int
    optimizer_bytes: int
    lr_scale: dict[str, float]
    reached: bool
    refrozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class SchedulePreview:
    """What trains when. It prints as a table; `plot()` draws it.

    Attributes:
        rows: one per stage.
        groups: names of the layer groups, bottom to top.
        total: elements of the whole model.
        unit: "epoch", "step" or "metric".
        max_epochs: length of the run.
    """

    rows: tuple[PreviewRow, ...]
    groups: tuple[str, ...]
    total: int
    unit: str
    max_epochs: int

    @classmethod
    def of(
        cls,
        index: ModelIndex,
        schedule: UnfreezeSchedule,
        groups: Sequence[LayerGroup],
        max_epochs: int,
    ) -> SchedulePreview:
        """Look ahead."""
        rows = []
        before: set[str] = set()
        for number, stage in enumerate(schedule.stages):
            frozen = schedule.plan(number).frozen
            trains = [name for name in index.parameters if name not in frozen]
            size = sum(
                index.parameters[n].numel() * index.parameters[n].element_size() for n in trains
            )
            now = set(trains)
            rows.append(
                PreviewRow(
                    at=number if schedule.unit == "metric" else stage.at,
                    unfrozen=tuple(g.name for g in groups if (now - before) & set(g.parameters)),
                    trainable=sum(index.parameters[name].numel() for name in trains),
                    gradient_bytes=size,
                    optimizer_bytes=2 * size,
                    lr_scale={
                        g.name: max(schedule.lr_scale.get(n, 1.0) for n in g.parameters if n in now)
                        for g in groups
                        if now & set(g.parameters)
                    },
                    reached=schedule.unit != "epoch" or stage.at < max_epochs,
                    refrozen=tuple(g.name for g in groups if (before - now) & set(g.parameters)),
                )
            )
            before = now
        total = sum(parameter.numel() for parameter in index.parameters.values())
        return cls(tuple(rows), tuple(g.name for g in groups), total, schedule.unit, max_epochs)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        from rich.table import Table

        table = Table(
            title=f"{_count(len(self.rows), 'stage')} in {_count(self.max_epochs, 'epoch')}",
            title_justify="left",
        )
        table.add_column({"metric": "stage"}.get(self.unit, self.unit), justify="right")
        unfreezes = any(row.unfrozen for row in self.rows[1:]) or len(self.rows) == 1
        freezes = any(row.refrozen for row in self.rows)
        if unfreezes:
            table.add_column("unfreezes", overflow="fold")
        if freezes:
            table.add_column("freezes", overflow="fold")
        for heading in ("trainable", "share", "gradients", "optimizer", "lr factor"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            factors = sorted(set(row.lr_scale.values()))
            spread = "-" if not factors else f"{factors[0]:.3g}"
            if len(factors) > 1:
                spread += f" - {factors[-1]:.3g}"
            table.add_row(
                str(row.at) if row.reached else f"{row.at} (never)",
                *([_joined(row.unfrozen)] if unfreezes else []),
                *([_joined(row.refrozen)] if freezes else []),
                f"{row.trainable:,}",
                f"{100 * row.trainable / self.total:.1f} %",
                _size(row.gradient_bytes),
                _size(row.optimizer_bytes),
                spread,
            )
        lines = [to_text(table)]
        never = [row for row in self.rows if not row.reached]
        if never:
            lines.append(
                f"{len(never)} of {len(self.rows)} stages begin after the last epoch "
                f"({self.max_epochs - 1}) and are never reached."
            )
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self, path: Union[str, Path, None] = None) -> Any:
        """Draw which layer group trains when, coloured by its factor on the learning rate.

        Args:
            path: where to save the picture; not saved where None.

        Returns:
            The matplotlib figure.
        """
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


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _joined(names: Sequence[str], most: int = 3) -> str:
    if len(names) <= most:
        return ", ".join(names) or "-"
    return f"{names[0]} ... {names[-1]} ({len(names)} groups)"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return ""
