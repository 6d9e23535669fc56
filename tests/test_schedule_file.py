"""A schedule that is written as YAML reads back to the same plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from lightning_freeze import FreezeBackbone, GradualUnfreeze, SchedulePreview, layer_groups
from lightning_freeze.errors import ScheduleError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.report.preview import trained_in
from lightning_freeze.schedule.entries import Entry, parse_schedule
from tests.zoo import TRANSFORMERS, tiny_bert, tiny_bert_lm

CALLBACKS: list[Any] = [
    GradualUnfreeze(),
    GradualUnfreeze(layers_per_step=2, lr_decay=1 / 2.6, start=2, every=3),
    GradualUnfreeze(order="bottom_up", lr_decay=0.9),
    GradualUnfreeze({1: "classifier", 3: {"unfreeze": "bert.encoder.layer.1", "lr_scale": 0.3}}),
    GradualUnfreeze({0: "**.LayerNorm.*", 2: ["re:bias$", "bert.pooler"]}, lr_decay=0.5),
    GradualUnfreeze(unit="step", start=100, every=50),
    GradualUnfreeze(monitor="val_loss", lr_decay=0.7),
    GradualUnfreeze.chain_thaw(every=2),
    GradualUnfreeze(
        {0: "**", 1: {"freeze": "re:bias$"}, 2: {"unfreeze": "re:bias$"}}, lr_decay=0.8
    ),
    FreezeBackbone(trainable_layers=1, trainable="**.LayerNorm.*"),
    FreezeBackbone(unfreeze_at_epoch=2, lr_scale=0.1, trainable="re:bias$"),
]


def read_back(model: nn.Module, callback: Any, path: Path) -> Any:
    # what a step costs isn't asked here
    index = ModelIndex.of(model)
    preview = SchedulePreview.of(index, callback.resolve(index), layer_groups(model), 9)
    path.write_text(preview.to_yaml(), encoding="utf-8")
    options = {"unit": "step"} if preview.unit == "step" else {}
    if preview.unit == "metric":
        options = {"monitor": "val_loss"}
    return GradualUnfreeze(schedule=str(path), **options)


@pytest.mark.parametrize(
    ("family", "callback"),
    [("bert-classification", callback) for callback in CALLBACKS]
    + [("bert-masked-lm", callback) for callback in CALLBACKS[:3]]
    + [("llama-classification", callback) for callback in CALLBACKS[:3]]
    + [("albert", callback) for callback in CALLBACKS[:3]],
    ids=lambda value: value if isinstance(value, str) else value.state_key,
)
def test_a_schedule_reads_back_to_the_same_plan(family: str, callback: Any, tmp_path: Path) -> None:
    model = TRANSFORMERS[family]()
    index = ModelIndex.of(model)
    again = read_back(model, callback, tmp_path / "schedule.yaml")
    first, second = callback.resolve(index), again.resolve(index)
    assert trained_in(index, first) == trained_in(index, second)
    assert [stage.at for stage in first.stages] == [stage.at for stage in second.stages]
    for trains in trained_in(index, first):
        assert {n: first.lr_scale.get(n, 1.0) for n in trains} == {
            n: second.lr_scale.get(n, 1.0) for n in trains
        }


def test_another_schedule_reads_back_to_another_plan(tmp_path: Path) -> None:
    model = tiny_bert()
    again = read_back(model, GradualUnfreeze(lr_decay=0.9), tmp_path / "schedule.yaml")
    assert again.preview(model, 9).rows != GradualUnfreeze(lr_decay=0.8).preview(model, 9).rows


def test_what_the_user_froze_is_not_written_and_stays_frozen(tmp_path: Path) -> None:
    model = tiny_bert_lm()
    model.bert.embeddings.LayerNorm.requires_grad_(False)
    again = read_back(model, GradualUnfreeze(), tmp_path / "schedule.yaml")
    rows = again.preview(model, 9).rows
    assert rows == GradualUnfreeze().preview(model, 9).rows
    assert rows[-1].share < 1


def test_whole_modules_are_written_and_single_tensors_only_where_they_must_be() -> None:
    text = GradualUnfreeze(lr_decay=0.5).preview(tiny_bert(), 9).to_yaml()
    content = yaml.safe_load(text)
    assert content[0] == ["bert.pooler", "classifier"]
    assert content[1] == {"unfreeze": ["bert.encoder.layer.2"], "lr_scale": 0.5}
    assert text.startswith("# epoch -> what begins to train then")
    by_step = GradualUnfreeze(unit="step").preview(tiny_bert(), 9).to_yaml()
    assert 'GradualUnfreeze(schedule="this file", unit="step")' in by_step


def test_all_that_an_epoch_freezes_freezes_before_anything_unfreezes() -> None:
    model = tiny_bert(2)
    told = ["classifier", {"unfreeze": "bert.pooler"}, {"freeze": "bert"}]
    schedule = GradualUnfreeze({0: "bert", 1: told}).resolve(ModelIndex.of(model))
    assert {name.split(".")[0] for name in schedule.trainable(0)} == {"bert"}
    assert schedule.trainable(1) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    with pytest.raises(ScheduleError, match="freezes and unfreezes `bert` at 1"):
        parse_schedule({0: "bert", 1: ["bert", {"freeze": "bert"}]})


def test_a_list_may_hold_mappings_with_factors_of_their_own() -> None:
    schedule = {2: ["a", {"unfreeze": ["b"], "lr_scale": 0.5}, {"unfreeze": "c", "lr_scale": 2}]}
    assert parse_schedule(schedule) == (
        Entry(2, ("a",)),
        Entry(2, ("b",), 0.5),
        Entry(2, ("c",), 2.0),
    )
    rows = GradualUnfreeze(
        {0: ["classifier", {"unfreeze": "pooler", "lr_scale": 0.5}], 2: "**"}
    ).preview(tiny_bert(), 3).rows  # fmt: skip
    assert [row.at for row in rows] == [0, 2]
    with pytest.raises(ScheduleError, match="names `b` twice at 2"):
        parse_schedule({2: ["b", {"unfreeze": "b", "lr_scale": 0.5}]})
    with pytest.raises(ScheduleError, match="has the unknown key `lr`"):
        parse_schedule({2: ["a", {"unfreeze": "b", "lr": 0.5}]})
