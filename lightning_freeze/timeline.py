"""Records of who trained when -> a picture."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Union

from lightning_freeze.errors import ArgumentError
from lightning_freeze.files import write_whole

_FROZEN = "#e4e4e4"


@dataclass(frozen=True)
class Moment:
    """Who trains from one moment on.

    Attributes:
        epoch: counted from 0.
        step: optimizer steps so far.
        lr: layer group -> highest learning rate of what trains in it, at the moment or at the
            end of its epoch; None where nothing trains.
    """

    epoch: int
    step: int
    lr: Mapping[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "lr": dict(self.lr)}

    @classmethod
    def read(cls, saved: Iterable[Mapping[str, Any]]) -> list[Moment]:
        """Moments from plain values; what another version wrote otherwise is left out."""
        needed = [field.name for field in fields(cls)]
        whole = [moment for moment in saved if all(name in moment for name in needed)]
        return [cls(**{name: moment[name] for name in needed}) for moment in whole]


def plot_timeline(
    moments: Sequence[Moment],
    groups: Sequence[str],
    path: Union[str, Path, None] = None,
    *,
    end: float | None = None,
    title: str = "Which layers trained when",
    unit: str = "epoch",
    colour: str = "learning rate",
) -> Any:
    """Draw which layer groups trained when, coloured by their learning rate.

    Args:
        moments: in the order of time, each holding until the next.
        groups: layer groups, bottom to top, as they stand in the picture.
        path: where to save it (the suffix decides the format); not saved where None.
        end: the epoch at which the last moment ends; one epoch after it begins where None.
        title: above the picture.
        unit: label of the time axis.
        colour: label of the colour bar.

    Returns:
        The matplotlib figure.

    Raises:
        ArgumentError: there are no moments.
    """
    if not moments:
        raise ArgumentError("There is nothing to draw: no moment was recorded. Run a fit first.")
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    starts = _starts(moments)
    last = end if end is not None and end > starts[-1] else moments[-1].epoch + 1
    ends = [*starts[1:], last]
    lrs = [lr for moment in moments for lr in moment.lr.values() if lr]
    low, high = (min(lrs), max(lrs)) if lrs else (1.0, 1.0)
    scale: Any = LogNorm(low, high) if low < high else Normalize(0, high)
    figure = Figure(figsize=(8, 1.6 + 0.28 * len(groups)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    from matplotlib import colormaps

    colours = colormaps["viridis_r"]

    def shade(lr: float | None) -> Any:
        return _FROZEN if lr is None else colours(0.12 + 0.88 * float(scale(lr or low)))

    spans = [(left, right - left) for left, right in zip(starts, ends)]
    for row, group in enumerate(groups):
        shades = [shade(moment.lr.get(group)) for moment in moments]
        axes.broken_barh(spans, (row - 0.41, 0.82), facecolors=shades, linewidth=0)
    for boundary in _boundaries(moments, starts):
        axes.axvline(boundary, color="white", linewidth=0.8)
    axes.set_yticks(range(len(groups)), [_short(group) for group in groups], fontsize=8)
    axes.set_xlim(0, last)
    axes.set_ylim(-0.6, len(groups) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(unit, fontsize=8)
    axes.set_title(title, loc="left", fontsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _colour_bar(figure, axes, scale, colours, colour)
    if path is not None:
        suffix = Path(path).suffix.lstrip(".") or "png"
        stream = io.BytesIO()
        figure.savefig(stream, format=suffix, facecolor="white")
        write_whole(path, stream.getvalue())
    return figure


def _colour_bar(figure: Any, axes: Any, scale: Any, colours: Any, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    used = ListedColormap([colours(0.12 + 0.88 * i / 255) for i in range(256)])
    # as wide in a high picture as in a low one
    aspect = (figure.get_figheight() - 1) / 0.08
    bar = figure.colorbar(ScalarMappable(scale, used), ax=axes, pad=0.02, aspect=aspect)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7, which="both")
    bar.outline.set_visible(False)
    axes.legend(
        handles=[Patch(facecolor=_FROZEN, label="frozen")],
        loc="lower right",
        bbox_to_anchor=(1.01, 0.99),
        fontsize=7,
        frameon=False,
    )


def _boundaries(moments: Sequence[Moment], starts: Sequence[float]) -> list[float]:
    """Where to draw a line: between epochs, or in a long run only where who trains changes."""
    epochs = sorted({moment.epoch for moment in moments} - {0})
    if len(epochs) <= 40:
        return [float(epoch) for epoch in epochs]
    who = [{group for group, lr in moment.lr.items() if lr is not None} for moment in moments]
    return [start for start, a, b in zip(starts[1:], who, who[1:]) if a != b]


def _starts(moments: Sequence[Moment]) -> list[float]:
    """Where each moment begins, in epochs; several in one epoch share it evenly."""
    counts: dict[int, int] = {}
    for moment in moments:
        counts[moment.epoch] = counts.get(moment.epoch, 0) + 1
    seen: dict[int, int] = {}
    starts = []
    for moment in moments:
        position = seen.get(moment.epoch, 0)
        seen[moment.epoch] = position + 1
        starts.append(moment.epoch + position / counts[moment.epoch])
    return starts


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else "..." + name[-most + 3 :]
