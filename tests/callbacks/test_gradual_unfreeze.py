"""GradualUnfreeze: schedules by the clock, by hand, from YAML and by a metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_freeze import GradualUnfreeze, TrainableParamAudit
from tests.oracle import Oracle
from tests.toys import Toy, changed, loader, seeded, state, trainable, trainer

ORDER = ["head", "backbone.blocks.2", "backbone.blocks.1", "backbone.blocks.0", "backbone.embed"]


class Trains(Callback):
    """At each batch: the layer groups that train."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        names = trainable(module)
        self.seen.append([g for g in ORDER if any(n.startswith(g + ".") for n in names)])

    @property
    def by_epoch(self) -> list[int]:
        return [len(self.seen[i]) for i in range(0, len(self.seen), 4)]


def run(callback: GradualUnfreeze, epochs: int = 6, **options: Any) -> tuple[Trains, Toy]:
    trains, model = Trains(), seeded(Toy)
    audit = TrainableParamAudit(table=False)
    trainer(callback, trains, audit, epochs=epochs, **options).fit(model, loader(), loader(seed=2))
    assert audit.findings == []
    return trains, model


@pytest.mark.parametrize(
    ("arguments", "groups"),
    [
        ({}, [1, 2, 3, 4, 5, 5]),
        ({"start": 2}, [1, 1, 2, 3, 4, 5]),
        ({"start": 0}, [2, 3, 4, 5, 5, 5]),
        ({"every": 2}, [1, 2, 2, 3, 3, 4]),
        ({"layers_per_step": 2}, [1, 3, 5, 5, 5, 5]),
        ({"layers_per_step": 9, "start": 3}, [1, 1, 1, 5, 5, 5]),
    ],
)
def test_layer_groups_unfreeze_from_the_top_by_the_epoch(
    arguments: dict[str, int], groups: list[int]
) -> None:
    trains, _ = run(GradualUnfreeze(**arguments))
    assert trains.by_epoch == groups
    for seen in trains.seen:
        assert seen == ORDER[: len(seen)]


def test_bottom_up_unfreezes_the_lowest_group_first() -> None:
    trains, _ = run(GradualUnfreeze(order="bottom_up"), epochs=3)
    assert trains.seen[4] == ["head", "backbone.embed"]
    assert trains.seen[8] == ["head", "backbone.blocks.0", "backbone.embed"]


def test_steps_are_optimizer_steps() -> None:
    trains, _ = run(GradualUnfreeze(start=3, every=2, unit="step"), epochs=3)
    assert [len(seen) for seen in trains.seen] == [1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5]
    options = {"accumulate_grad_batches": 2}
    trains, _ = run(GradualUnfreeze(start=3, every=2, unit="step"), epochs=3, **options)
    assert [len(seen) for seen in trains.seen] == [1] * 6 + [2] * 4 + [3] * 2


def test_schedule_by_selectors_is_cumulative_and_scales_learning_rates() -> None:
    callback = GradualUnfreeze(
        {0: "head", 1: ["blocks.1", "blocks.2"], 3: {"unfreeze": "**", "lr_scale": 0.5}}
    )
    trains, model = seeded(Trains), seeded(Toy)
    oracle = Oracle(lambda name: 0.5 if "embed" in name or "blocks.0" in name else 1.0)
    trainer(callback, trains, oracle, epochs=4).fit(model, loader())
    assert trains.by_epoch == [1, 3, 3, 5]
    assert oracle.wrong == []


def test_schedule_from_yaml_is_that_of_the_mapping(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text('0: head\n1: [blocks.1, blocks.2]\n3: {unfreeze: "**", lr_scale: 0.5}\n')
    trains, model = run(GradualUnfreeze(str(path)), epochs=4)
    assert trains.by_epoch == [1, 3, 3, 5]
    other = run(
        GradualUnfreeze(
            {0: "head", 1: ["blocks.1", "blocks.2"], 3: {"unfreeze": "**", "lr_scale": 0.5}}
        ),
        epochs=4,
    )[1]
    assert changed(state(model), state(other)) == set()


def test_own_groups_unfreeze_as_one_with_their_factors() -> None:
    callback = GradualUnfreeze(
        groups=[["backbone.embed", "blocks.0"], ["blocks.1", "blocks.2"], "head"], lr_decay=0.1
    )
    trains, model = seeded(Trains), seeded(Toy)
    low = ("backbone.embed", "backbone.blocks.0")
    oracle = Oracle(lambda name: 1.0 if "head" in name else 0.1**2 if name.startswith(low) else 0.1)
    trainer(callback, trains, oracle, epochs=3).fit(model, loader())
    assert trains.by_epoch == [1, 3, 5]
    assert oracle.wrong == []


class Plateau(Toy):
    """Logs a metric that improves twice, then no more."""

    VALUES = (3.0, 2.0, 2.0, 2.0, 1.9, 1.9, 1.9)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_metric", self.VALUES[self.current_epoch])


@pytest.mark.parametrize(
    ("arguments", "groups"),
    [
        ({}, [1, 1, 1, 2, 3, 3, 4]),
        ({"patience": 2}, [1, 1, 1, 1, 2, 2, 2]),
        ({"min_delta": 0.5}, [1, 1, 1, 2, 3, 4, 5]),
        ({"mode": "max"}, [1, 1, 2, 3, 4, 5, 5]),
    ],
)
def test_next_group_unfreezes_when_the_metric_stops_improving(
    arguments: dict[str, Any], groups: list[int]
) -> None:
    trains, model = Trains(), seeded(Plateau)
    callback = GradualUnfreeze(monitor="val_metric", **arguments)
    trainer(callback, trains, epochs=7).fit(model, loader(), loader(seed=2))
    assert trains.by_epoch == groups


def test_preview_says_what_the_run_then_does() -> None:
    callback = GradualUnfreeze(layers_per_step=2, lr_decay=0.5)
    preview = callback.preview(seeded(Toy), max_epochs=2)
    assert [row.at for row in preview.rows] == [0, 1, 2]
    assert [row.reached for row in preview.rows] == [True, True, False]
    assert "never reached" in str(preview)
    _, model = run(callback, epochs=2)
    assert preview.rows[1].trainable == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


class Late(Toy):
    """Makes its model in `configure_model`, as Lightning recommends for large ones."""

    def __init__(self) -> None:
        super().__init__()
        del self.backbone

    def configure_model(self) -> None:
        if not hasattr(self, "backbone"):
            torch.manual_seed(3)
            self.backbone = Toy().backbone


def test_model_made_in_configure_model_is_frozen_and_reinitialised() -> None:
    from lightning_freeze import FreezeBackbone, ReinitTopLayers

    model = seeded(Late)
    audit = TrainableParamAudit(table=False)
    callbacks = [FreezeBackbone(trainable_layers=1), ReinitTopLayers(1, seed=0), audit]
    trainer(*callbacks, epochs=1).fit(model, loader())
    assert {".".join(name.split(".")[:3]) for name in trainable(model)} == {
        "backbone.blocks.2",
        "head.weight",
        "head.bias",
    }
    assert audit.findings == []
