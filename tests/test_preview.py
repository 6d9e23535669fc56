"""What will train when: a table and a picture, without a Trainer."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_freeze import FreezeBackbone, GradualUnfreeze, layer_groups
from lightning_freeze.errors import ArgumentError, SelectorError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.report.preview import SchedulePreview
from lightning_freeze.schedule.schedule import Stage, UnfreezeSchedule
from tests.goldens import assert_golden
from tests.zoo import tiny_bert

BODY = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
MODEL = nn.ModuleDict({"backbone": BODY, "head": nn.Linear(3, 1)})
LOW = ("backbone.0.weight", "backbone.0.bias")
HIGH = ("backbone.1.weight", "backbone.1.bias")
HEAD = ("head.weight", "head.bias")


def preview(
    stages: Sequence[tuple[int, tuple[str, ...]]], max_epochs: int = 5, **kwargs: Any
) -> SchedulePreview:
    index = ModelIndex.of(MODEL)
    schedule = UnfreezeSchedule(
        frozenset(index.parameters),
        tuple(Stage(at, frozenset(names)) for at, names in stages),
        **kwargs,
    )
    return SchedulePreview.of(index, schedule, layer_groups(MODEL), max_epochs)


THREE = [(0, HEAD), (1, HEAD + HIGH), (3, HEAD + HIGH + LOW)]


def test_each_stage_has_a_row() -> None:
    found = preview(THREE)
    assert [row.at for row in found.rows] == [0, 1, 3]
    assert [row.unfrozen for row in found.rows] == [("head",), ("backbone.1",), ("backbone.0",)]
    assert [row.trainable for row in found.rows] == [4, 16, 25]
    assert found.total == 25
    assert found.groups == ("backbone.0", "backbone.1", "head")


def test_memory_is_that_of_gradients_and_two_moments() -> None:
    row = preview(THREE).rows[1]
    assert (row.gradient_bytes, row.optimizer_bytes) == (64, 128)
    half = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)}).half()
    index = ModelIndex.of(half)
    schedule = UnfreezeSchedule(frozenset(), (Stage(0, frozenset()),))
    assert SchedulePreview.of(index, schedule, layer_groups(half), 1).rows[0].gradient_bytes == 18


def test_a_group_that_unfreezes_in_parts_is_named_each_time() -> None:
    found = preview([(0, HEAD), (1, (*HEAD, HIGH[0])), (2, HEAD + HIGH)])
    assert [row.unfrozen for row in found.rows] == [("head",), ("backbone.1",), ("backbone.1",)]


def test_factors_are_those_of_what_trains() -> None:
    scale = dict.fromkeys(HIGH, 0.5) | dict.fromkeys(LOW, 0.25)
    found = preview(THREE, lr_scale=scale)
    assert found.rows[0].lr_scale == {"head": 1.0}
    assert found.rows[2].lr_scale == {"backbone.0": 0.25, "backbone.1": 0.5, "head": 1.0}


def test_the_largest_factor_stands_for_a_group_of_several() -> None:
    found = preview([(0, HEAD)], lr_scale={"head.weight": 0.1})
    assert found.rows[0].lr_scale == {"head": 1.0}


def test_stages_after_the_last_epoch_are_never_reached() -> None:
    found = preview(THREE, max_epochs=3)
    assert [row.reached for row in found.rows] == [True, True, False]
    text = str(found)
    assert "3 (never)" in text
    assert "1 of 3 stages begin after the last epoch (2) and are never reached." in text
    assert "never" not in str(preview(THREE, max_epochs=4))


def test_steps_and_metrics_are_not_compared_with_epochs() -> None:
    assert all(row.reached for row in preview(THREE, max_epochs=1, unit="step").rows)
    metric = preview(THREE, max_epochs=1, unit="metric")
    assert [row.at for row in metric.rows] == [0, 1, 2]
    assert all(row.reached for row in metric.rows)


def test_table_of_a_gradual_unfreeze_is_golden() -> None:
    callback = GradualUnfreeze(layers_per_step=2, lr_decay=0.5)
    assert_golden("preview/bert-gradual.txt", str(callback.preview(tiny_bert(6), max_epochs=4)))


def test_table_of_a_linear_probe_is_golden() -> None:
    callback = FreezeBackbone(unfreeze_at_epoch=2, lr_scale=0.1)
    assert_golden(
        "preview/bert-linear-probe.txt", repr(callback.preview(tiny_bert(), max_epochs=5))
    )


def test_a_preview_changes_nothing_of_the_model() -> None:
    model = tiny_bert()
    before = {name: (p.requires_grad, p._version) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    found = GradualUnfreeze().preview(model, max_epochs=9)
    assert found.rows[0].trainable < found.total == found.rows[-1].trainable
    assert {n: (p.requires_grad, p._version) for n, p in model.named_parameters()} == before
    assert [module.training for module in model.modules()] == modes


def test_a_model_on_the_meta_device_can_be_previewed() -> None:
    with torch.device("meta"):
        model = tiny_bert(12, hidden_size=768, intermediate_size=3072, vocab_size=30522)
    found = GradualUnfreeze(layers_per_step=4).preview(model, max_epochs=4)
    assert found.total > 109_000_000
    assert "MiB" in str(found)


def test_a_bad_selector_is_an_error() -> None:
    with pytest.raises(SelectorError, match="No parameter matches `hed`"):
        GradualUnfreeze({0: "hed"}).preview(tiny_bert(), max_epochs=3)


def test_a_preview_is_plain_values() -> None:
    content = json.loads(json.dumps(preview(THREE).to_dict()))
    assert content["rows"][0]["unfrozen"] == ["head"]
    assert content["unit"] == "epoch"


def bar_ends(figure: Any) -> list[float]:
    return [float(path.get_extents().x1) for path in figure.axes[0].collections[0].get_paths()]


@pytest.mark.parametrize(
    ("kwargs", "ends"),
    [
        ({}, [1, 3, 5]),
        ({"max_epochs": 3}, [1, 3]),
        ({"unit": "metric"}, [1, 2, 3]),
        ({"unit": "step"}, [1, 3, 5]),
    ],
)
def test_the_picture_has_a_bar_for_each_stage_that_is_reached(
    kwargs: dict[str, Any], ends: list[float]
) -> None:
    assert bar_ends(preview(THREE, **kwargs).plot()) == ends


def test_the_last_stage_is_as_wide_as_the_one_before_where_steps_count() -> None:
    stages = [(0, HEAD), (100, HEAD + HIGH), (300, HEAD + HIGH + LOW)]
    assert bar_ends(preview(stages, unit="step").plot()) == [100, 300, 500]


def test_the_picture_is_saved(tmp_path: Path) -> None:
    preview(THREE).plot(tmp_path / "preview.png")
    assert (tmp_path / "preview.png").read_bytes()[:4] == b"\x89PNG"


def test_each_stage_says_what_a_step_costs() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    found = GradualUnfreeze().preview(model, max_epochs=2, batch=3)
    assert [row.flops for row in found.rows] == [3 * 128, 3 * 224]
    assert [row.cost for row in found.rows] == [128 / 224, 1.0]
    assert (found.full_flops, found.inputs) == (3 * 224, "3x4")
    assert "57.1 %" in str(found)
    assert "672 FLOPs a step (inputs: 3x4)" in str(found)
    given = GradualUnfreeze().preview(model, max_epochs=2, inputs=torch.zeros(5, 7, 4))
    assert given.full_flops == 35 * 224


def test_an_unknown_cost_says_why_and_the_rest_is_there() -> None:
    found = GradualUnfreeze().preview(MODEL, max_epochs=4)
    assert [row.cost for row in found.rows] == [None, None, None]
    assert "unknown" in str(found)
    assert "no inputs could be guessed for ModuleDict" in str(found)
    assert [row.trainable for row in found.rows] == [4, 16, 25]


def test_a_linear_probe_has_two_stages_and_runs_as_long_as_they_take() -> None:
    model = tiny_bert()
    found = FreezeBackbone(unfreeze_at_epoch=3, lr_scale=0.1).preview(model)
    assert found.max_epochs == 4
    assert [row.at for row in found.rows] == [0, 3]
    assert (found.rows[0].cost or 1) < (found.rows[1].cost or 0) == 1.0
    assert len(FreezeBackbone().preview(model).rows) == 1
    assert len(FreezeBackbone().preview(model, 7, batch=2).rows) == 1


@pytest.mark.parametrize("length", [0, -1, 1.5, True])
def test_a_run_without_epochs_is_an_error(length: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`max_epochs` is .* Write a whole number from 1"):
        GradualUnfreeze().preview(tiny_bert(), length)
    with pytest.raises(ArgumentError, match=r"`batch` is .* Write a whole number from 1"):
        FreezeBackbone().preview(tiny_bert(), batch=length)


def test_what_the_user_froze_and_integers_do_not_count_as_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    model[1].bias.requires_grad = False
    model[0].register_parameter(
        "codes", nn.Parameter(torch.zeros(5, dtype=torch.int8), requires_grad=False)
    )
    found = GradualUnfreeze().preview(model, 2)
    assert [row.trainable for row in found.rows] == [16, 56]
    assert found.total == 63


def test_a_narrow_table_keeps_the_numbers_whole() -> None:
    found = GradualUnfreeze(layers_per_step=2, lr_decay=0.5).preview(tiny_bert(6), max_epochs=4)
    assert_golden("preview/bert-gradual-60.txt", found.to_text(60))
    assert max(map(len, found.to_text(60).splitlines())) <= 60


def test_a_notebook_gets_a_table_in_which_names_are_only_names() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "<b>": nn.Linear(2, 1)})
    found = GradualUnfreeze(groups=["backbone", "<b>"]).preview(model, 1)
    text = found._repr_html_()
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert text.count("<tr") == 3
    assert 'class="lf-never"' in text
    bars = GradualUnfreeze().preview(tiny_bert(), 9)._repr_html_()
    assert 'style="width:100.0%"' in bars


def test_rich_prints_it_as_a_table() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(GradualUnfreeze().preview(tiny_bert(), 9))
    text = console.export_text()
    assert "step cost" in text
    assert "bert.encoder.layer.2" in text


def test_what_freezes_again_and_what_goes_on_for_ever_is_said() -> None:
    thaw = GradualUnfreeze.chain_thaw().preview(tiny_bert(2), max_epochs=5)
    assert [row.frozen for row in thaw.rows] == [
        (),
        ("head",),
        ("bert.embeddings",),
        ("bert.encoder.layer.0",),
        (),
    ]
    assert "freezes" in str(thaw)
    assert ">freezes<" in thaw._repr_html_()
    drawn = GradualUnfreeze.lisa(layers=1).preview(tiny_bert(2), max_epochs=5)
    assert "goes on in this way for as long as the run does" in str(drawn)
    plain = GradualUnfreeze().preview(tiny_bert(2), max_epochs=5)
    assert "freezes" not in str(plain).replace("unfreezes", "")
    assert "goes on" not in str(plain)
