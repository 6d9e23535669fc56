"""The picture of who trained when: bars where they belong, and a file that is a picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from lightning_freeze.errors import ArgumentError
from lightning_freeze.report.timeline import Moment, plot_timeline, shortened

GROUPS = ["embed", "block", "head"]
MOMENTS = [
    Moment(0, 0, {"embed": None, "block": None, "head": 1e-3}),
    Moment(1, 10, {"embed": None, "block": 5e-4, "head": 8e-4}),
    Moment(2, 20, {"embed": 1e-4, "block": 3e-4, "head": 6e-4}),
]


def bars(figure: Figure) -> list[list[tuple[float, float, str]]]:
    """Per row from the bottom: begin, end, and "frozen" or a colour."""
    rows = []
    for found in figure.axes[0].collections:
        assert isinstance(found, PolyCollection)
        row = []
        for path, colour in zip(found.get_paths(), found.get_facecolor()):
            box = path.get_extents()
            red, green, blue = (round(float(part), 2) for part in colour[:3])
            frozen = red == green == blue == 0.89
            row.append((box.x0, box.x1, "frozen" if frozen else f"{red} {green} {blue}"))
        rows.append(row)
    return rows


def test_each_group_has_a_row_and_each_moment_a_bar() -> None:
    found = bars(plot_timeline(MOMENTS, GROUPS, end=3))
    assert [[bar[:2] for bar in row] for row in found] == [[(0, 1), (1, 2), (2, 3)]] * 3
    assert [[bar[2] == "frozen" for bar in row] for row in found] == [
        [True, True, False],
        [True, False, False],
        [False, False, False],
    ]


def test_a_higher_learning_rate_has_another_colour() -> None:
    head = bars(plot_timeline(MOMENTS, GROUPS, end=3))[2]
    assert len({colour for _, _, colour in head}) == 3


def test_the_first_group_stands_at_the_bottom() -> None:
    axes = plot_timeline(MOMENTS, GROUPS).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == GROUPS
    bottom, top = axes.get_ylim()
    assert bottom < top


def test_moments_within_an_epoch_share_it() -> None:
    moments = [MOMENTS[0], Moment(1, 10, MOMENTS[1].lr), Moment(1, 15, MOMENTS[2].lr)]
    row = bars(plot_timeline(moments, GROUPS, end=2))[0]
    assert [bar[:2] for bar in row] == [(0, 1), (1, 1.5), (1.5, 2)]


def test_the_last_moment_lasts_an_epoch_where_no_end_is_given() -> None:
    assert bars(plot_timeline(MOMENTS, GROUPS))[0][-1][:2] == (2, 3)
    assert bars(plot_timeline(MOMENTS, GROUPS, end=7))[0][-1][:2] == (2, 7)
    assert bars(plot_timeline(MOMENTS, GROUPS, end=1))[0][-1][:2] == (2, 3)


@pytest.mark.parametrize(
    "lrs", [(1e-3, 1e-3), (0.0, 0.0), (0.0, 1e-3), (None, None), (1e-7, 1.0), (2e-5, 5e-5)]
)
def test_any_learning_rates_can_be_drawn(lrs: tuple[float | None, ...], tmp_path: Path) -> None:
    moments = [Moment(epoch, epoch, {"head": lr}) for epoch, lr in enumerate(lrs)]
    figure = plot_timeline(moments, ["head"], tmp_path / "x.png")
    frozen = [bar[2] == "frozen" for bar in bars(figure)[0]]
    assert frozen == [lr is None for lr in lrs]


def test_a_group_that_was_not_recorded_counts_as_frozen() -> None:
    assert bars(plot_timeline(MOMENTS, ["other"]))[0][0][2] == "frozen"


def lines(figure: Figure) -> list[float]:
    return [float(line.get_xdata()[0]) for line in figure.axes[0].lines]


def test_a_long_run_has_lines_only_where_the_set_changes() -> None:
    def moments(epochs: int) -> list[Moment]:
        return [Moment(e, e, {"head": 0.1, "low": 0.1 if e > 2 else None}) for e in range(epochs)]

    assert lines(plot_timeline(moments(5), ["low", "head"])) == [1, 2, 3, 4]
    assert lines(plot_timeline(moments(100), ["low", "head"])) == [3]


def test_labels_are_the_callers() -> None:
    figure = plot_timeline(MOMENTS, GROUPS, title="Who", unit="step", colour="factor")
    main, bar = figure.axes
    assert main.get_title(loc="left") == "Who"
    assert main.get_xlabel() == "step"
    assert bar.get_ylabel() == "factor"


def test_a_long_group_name_is_cut_at_its_front() -> None:
    name = "model.backbone.encoder.layers.encoder_layer_11"
    axes = plot_timeline(MOMENTS, [name]).axes[0]
    assert axes.get_yticklabels()[0].get_text() == "...encoder.layers.encoder_layer_11"


def test_more_groups_make_a_higher_picture() -> None:
    low = plot_timeline(MOMENTS, GROUPS)
    high = plot_timeline(MOMENTS, [f"layer.{i}" for i in range(30)])
    assert high.get_figheight() > 2 * low.get_figheight()
    assert high.get_figwidth() == low.get_figwidth()


def test_the_saved_file_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "timeline.png"
    assert isinstance(plot_timeline(MOMENTS, GROUPS, path), Figure)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [file.name for file in path.parent.iterdir()] == ["timeline.png"]


@pytest.mark.parametrize(
    ("name", "start"), [("x.svg", b"<?xml"), ("x.pdf", b"%PDF"), ("x", b"\x89PNG")]
)
def test_the_suffix_decides_the_format(tmp_path: Path, name: str, start: bytes) -> None:
    plot_timeline(MOMENTS, GROUPS, str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(start)


def test_without_moments_there_is_nothing_to_draw() -> None:
    with pytest.raises(ArgumentError, match="no moment was recorded"):
        plot_timeline([], GROUPS)


def test_drawing_leaves_pyplot_alone() -> None:
    from matplotlib import pyplot

    plot_timeline(MOMENTS, GROUPS)
    assert pyplot.get_fignums() == []


def test_a_moment_is_plain_values() -> None:
    lr = {"embed": None, "block": 5e-4, "head": 8e-4}
    content: dict[str, Any] = Moment(1, 10, lr, trainable=7).to_dict()
    assert content == {"epoch": 1, "step": 10, "lr": lr, "trainable": 7}
    assert Moment(**content) == Moment(1, 10, lr, trainable=7)
    assert Moment(1, 10, lr).to_dict()["trainable"] is None


def test_long_names_are_cut_so_that_they_still_differ() -> None:
    ends = [f"model.backbone.encoder.layers.encoder_layer_{i}" for i in range(12)]
    both = [f"model.{i}.self_attention_with_quite_a_long_name_indeed" for i in range(3)]
    inner = [f"model.backbone.encoder.block_{i}.self_attention_with_a_long_name" for i in range(3)]
    for names in (ends, both, inner):
        found = shortened(names)
        assert len(set(found)) == len(names)
        assert max(map(len, found)) <= 34
    assert shortened(inner)[0] == "...block_0..."


def luminance(colour: Any) -> float:
    return float(sum(part * share for part, share in zip(colour, (0.21, 0.72, 0.07))))


def test_the_style_of_matplotlib_decides_between_light_and_dark(tmp_path: Path) -> None:
    from matplotlib import image, pyplot

    with pyplot.style.context("dark_background"):
        dark = plot_timeline(MOMENTS, GROUPS, tmp_path / "dark.png")
    light = plot_timeline(MOMENTS, GROUPS, tmp_path / "light.png")
    corners = [image.imread(tmp_path / f"{kind}.png")[0, 0, :3] for kind in ("dark", "light")]
    assert [luminance(corner) for corner in corners] == pytest.approx([0, 1], abs=0.01)
    for figure, sign in ((dark, 1), (light, -1)):
        # the highest rate stands out most from the background, and what is frozen least
        embed, _, head = (row.get_facecolor() for row in figure.axes[0].collections)
        frozen, low, high = luminance(embed[0]), luminance(embed[2]), luminance(head[0])
        assert sign * high > sign * low > sign * luminance(figure.get_facecolor()[:3])
        assert abs(frozen - luminance(figure.get_facecolor()[:3])) < 0.25


def test_one_learning_rate_is_told_in_words_in_place_of_a_colour_bar() -> None:
    figure = plot_timeline([Moment(0, 0, {"low": None, "head": 2e-5})], ["low", "head"])
    assert len(figure.axes) == 1
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == [r"learning rate $2\times10^{-5}$", "frozen"]


def test_the_colour_bar_tells_the_lowest_and_the_highest_rate() -> None:
    bar = plot_timeline(MOMENTS, GROUPS).axes[1]
    texts = [label.get_text() for label in bar.get_yticklabels()]
    assert (texts[0], texts[-1]) == (r"$1\times10^{-4}$", r"$1\times10^{-3}$")
    low, high = bar.get_ylim()
    assert (low, high) == pytest.approx((1e-4, 1e-3))


def test_findings_are_marked_where_they_were_made() -> None:
    def marks(*found: tuple[int, str]) -> list[list[float]]:
        axes = plot_timeline(MOMENTS, GROUPS, end=3, marks=found).axes[0]
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert ("finding" in legend) == (len(axes.collections) == 4)
        return axes.collections[3].get_offsets().tolist() if len(axes.collections) == 4 else []

    assert marks() == []
    assert marks((30, "elsewhere")) == []
    assert marks((5, "embed"), (10, "head"), (25, "block")) == [[0.5, 0], [1, 2], [2.5, 1]]
    assert marks((99, "head")) == [[3, 2]]


def test_labels_of_a_run_of_any_size_lie_within_the_picture_and_not_on_each_other() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for count in (2, 48, 126):
        groups = [f"encoder.layer.{i}.{'x' * 30}" for i in range(count)]
        moments = [Moment(0, 0, dict.fromkeys(groups, 1e-5)), Moment(90_000, 90_000, {})]
        figure = plot_timeline(moments, groups, end=100_000, unit="step")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        axes, renderer = figure.axes[0], canvas.get_renderer()
        boxes = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.y1 < figure.bbox.y1 for box in boxes)
        assert all(a.y1 <= b.y0 for a, b in itertools.pairwise(boxes))
        ticks = [label.get_window_extent(renderer) for label in axes.get_xticklabels()]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(ticks))
        title = axes.title if axes.title.get_text() else axes._left_title
        legend = axes.get_legend().get_window_extent(renderer)
        assert title.get_window_extent(renderer).x1 < legend.x0


def test_many_pictures_leave_no_state_behind() -> None:
    import matplotlib
    from matplotlib import pyplot

    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    for _ in range(25):
        plot_timeline(MOMENTS, GROUPS)
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend
