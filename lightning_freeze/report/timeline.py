"""Records of who trained when -> a picture."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Union

from lightning_freeze.checkpoints.files import write_whole
from lightning_freeze.errors import ArgumentError

_FROZEN = "#e4e4e4"
_FROZEN_ON_DARK = "#333333"
_MARK = "#d62728"


@dataclass(frozen=True)
class Moment:
    """Who trains from one moment on.

    Attributes:
        epoch: counted from 0.
        step: optimizer steps so far.
        lr: layer group -> highest learning rate of what trains in it, at the moment or at the
            end of its epoch; None where nothing trains.
        trainable: number of elements that train; None where that wasn't recorded.
    """

    epoch: int
    step: int
    lr: Mapping[str, float | None]
    trainable: int | None = None

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
    marks: Sequence[tuple[int, str]] = (),
) -> Any:
    """Draw which layer groups trained when, coloured by their learning rate.

    The style is matplotlib's present one: inside `plt.style.context("dark_background")` it is
    light on dark. Nothing of matplotlib's state is changed, and no figure stays open.

    Args:
        moments: in the order of time, each holding until the next.
        groups: layer groups, bottom to top, as they stand in the picture.
        path: where to save it (the suffix decides the format); not saved where None.
        end: the epoch at which the last moment ends; one epoch after it begins where None.
        title: above the picture.
        unit: label of the time axis.
        colour: label of the colour bar.
        marks: step and layer group of what an audit found.

    Returns:
        The matplotlib figure.

    Raises:
        ArgumentError: there are no moments.
    """
    if not moments:
        raise ArgumentError("There is nothing to draw: no moment was recorded. Run a fit first.")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    starts = _starts(moments)
    last = end if end is not None and end > starts[-1] else moments[-1].epoch + 1
    # rows of many groups are lower, so that the picture still fits a page
    row_height = min(0.28, max(0.11, 9 / len(groups))) if groups else 0.28
    size = (8, 1.6 + row_height * len(groups))
    figure = _shown_in_notebooks(Figure)(figsize=size, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    palette = Palette(moments, dark=_is_dark(figure.get_facecolor()))
    spans = [(left, right - left) for left, right in zip(starts, [*starts[1:], last])]
    for row, group in enumerate(groups):
        shades = [palette.shade(moment.lr.get(group)) for moment in moments]
        axes.broken_barh(spans, (row - 0.41, 0.82), facecolors=shades, linewidth=0)
    for boundary in _boundaries(moments, starts):
        axes.axvline(boundary, color=figure.get_facecolor(), linewidth=0.8)
    font = min(8.0, 72 * row_height * 0.68)
    axes.set_yticks(range(len(groups)), shortened(groups), fontsize=font)
    axes.set_xlim(0, last)
    axes.set_ylim(-0.6, len(groups) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(unit, fontsize=8)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(visible=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    found = [(_place(step, moments, spans), groups.index(g)) for step, g in marks if g in groups]
    if found:
        across, up = ([place[i] for place in found] for i in (0, 1))
        style: dict[str, Any] = {
            "marker": "X",
            "edgecolors": "white",
            "clip_on": False,
            "zorder": 4,
        }
        axes.scatter(across, up, s=46, c=_MARK, **style)
    _legend(axes, palette, colour, marked=bool(found))
    if palette.varies:
        _colour_bar(figure, axes, palette, colour)
    if path is not None:
        suffix = Path(path).suffix.lstrip(".") or "png"
        stream = io.BytesIO()
        figure.savefig(stream, format=suffix, facecolor=figure.get_facecolor())
        write_whole(path, stream.getvalue())
    return figure


class Palette:
    """Colours of learning rates: viridis, in which more stands out more from the background.

    It is uniform to the eye, and is read alike by people who don't see red and green apart.
    """

    def __init__(self, moments: Sequence[Moment], *, dark: bool) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import ListedColormap, LogNorm, Normalize

        lrs = [lr for moment in moments for lr in moment.lr.values() if lr]
        self.low, self.high = (min(lrs), max(lrs)) if lrs else (1.0, 1.0)
        self.varies = self.high > self.low * (1 + 1e-9)
        self.frozen = _FROZEN_ON_DARK if dark else _FROZEN
        scale: Any = LogNorm if self.varies else Normalize
        self.scale = scale(self.low if self.varies else 0, self.high)
        whole = colormaps["viridis" if dark else "viridis_r"]
        self.colours = ListedColormap([whole(0.12 + 0.88 * i / 255) for i in range(256)])

    def shade(self, lr: float | None) -> Any:
        """The colour of a learning rate, or of what is frozen."""
        return self.frozen if lr is None else self.colours(float(self.scale(lr or self.low)))


def _legend(axes: Any, palette: Palette, label: str, *, marked: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(facecolor=palette.frozen, label="frozen")]
    if not palette.varies:
        told = f"{label} {_number(palette.high)}"
        handles.insert(0, Patch(facecolor=palette.shade(palette.high), label=told))
    if marked:
        style: Any = {
            "marker": "X",
            "color": _MARK,
            "markeredgecolor": "white",
            "linestyle": "none",
        }
        handles.append(Line2D([], [], markersize=7, label="finding", **style))
    # a fixed distance above the bars, whatever the height of the picture
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.3,
        fontsize=7,
        frameon=False,
        ncols=len(handles),
    )


def _colour_bar(figure: Any, axes: Any, palette: Palette, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    # as wide in a high picture as in a low one
    aspect = (figure.get_figheight() - 1) / 0.08
    mappable = ScalarMappable(palette.scale, palette.colours)
    bar = figure.colorbar(mappable, ax=axes, pad=0.02, aspect=aspect)
    ratio = palette.high / palette.low
    count = 5 if figure.get_figheight() > 2.4 else 3
    values = [palette.low * ratio ** (i / (count - 1)) for i in range(count)]
    # the ends are told exactly, what is between them with as many digits as it takes
    texts = [_number(value) for value in values]
    bar.ax.yaxis.set_major_locator(FixedLocator(values))
    bar.ax.yaxis.set_major_formatter(FixedFormatter(texts))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7, which="both")
    bar.outline.set_visible(False)


def _number(value: float) -> str:
    """Scientific notation where a plain number would have many zeros."""
    if 0.01 <= value < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    shown = mantissa.rstrip("0").rstrip(".")
    return rf"${shown}\times10^{{{int(exponent)}}}$"


def _is_dark(colour: Any) -> bool:
    red, green, blue, alpha = colour
    return bool(alpha > 0 and 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5)


def _place(step: int, moments: Sequence[Moment], spans: Sequence[tuple[float, float]]) -> float:
    """Where a step lies on the axis; the length of the last moment is taken from the one before."""
    at = max((i for i, moment in enumerate(moments) if moment.step <= step), default=0)
    before = at if at + 1 < len(moments) else at - 1
    steps = moments[before + 1].step - moments[before].step if before >= 0 else 0
    share = min(1.0, max(0, step - moments[at].step) / steps) if steps > 0 else 0.5
    left, width = spans[at]
    return left + share * width


def _shown_in_notebooks(base: Any) -> Any:
    """A figure that a notebook shows, without pyplot, which would keep it open."""

    class Timeline(base):  # type: ignore[misc]
        def _repr_png_(self) -> bytes:
            stream = io.BytesIO()
            self.savefig(stream, format="png", dpi=110, facecolor=self.get_facecolor())
            return stream.getvalue()

    return Timeline


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


def shortened(names: Sequence[str], most: int = 34) -> list[str]:
    """Names cut to a length at which they still differ: at one end, in the middle, or at both.

    Example:
        >>> shortened(["model.encoder.layer.0", "model.encoder.layer.1"], most=12)
        ['....layer.0', '....layer.1']
    """
    half = (most - 3) // 2
    start = _common(names).rfind(".") + 1
    same = _common([name[::-1] for name in names]).rfind(".") + 1
    for cut in (
        lambda name: "..." + name[3 - most :],
        lambda name: f"{name[:half]}...{name[-half:]}",
        lambda name: "..." * bool(start) + name[start : len(name) - same] + "..." * bool(same),
    ):
        found = [name if len(name) <= most else cut(name) for name in names]
        if len(set(found)) == len(set(names)):
            return found
    return list(names)


def _common(names: Sequence[str]) -> str:
    """What all begin with."""
    if not names:
        return ""
    low, high = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), len(low))
    return low[:length]
