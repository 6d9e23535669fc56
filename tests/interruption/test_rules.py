"""A resume that isn't quite that of the run before: it works, or an error says what to do.

The rules are those of docs/resuming.md; others of them are in tests/catalogue/test_resume.py.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import StepLR

from lightning_freeze import (
    FreezeBackbone,
    GradualUnfreeze,
    ReinitTopLayers,
    ResumeError,
    TrainableParamAudit,
)
from lightning_freeze.checkpoints.certificate import read_certificate
from tests.toys import Toy, changed, loader, same, seeded, state, trainable, trainer

STAYS_FROZEN = "ignore:.*random values, but they stay frozen"
NO_FRESH_START = "ignore:.*gives nothing a fresh start"


def stepwise(module: Any) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    scheduler = {"scheduler": StepLR(optimizer, 3, gamma=0.7), "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Forgiving(Toy):
    """Takes the weights that it knows."""

    strict_loading = False


class Watch(Callback):
    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.trained: set[str] = set()
        self.batches = 0

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if not self.batches:
            self.start, self.trained = state(module), trainable(module)
        self.batches += 1


def first(
    folder: Path,
    *callbacks: Callback,
    weights_only: bool = False,
    configure: Any = stepwise,
    **options: Any,
) -> Path:
    """Two epochs of four steps, and the checkpoint of their end."""
    save = ModelCheckpoint(
        folder, filename="first", save_on_train_epoch_end=True, save_weights_only=weights_only
    )
    run = trainer(*callbacks, save, epochs=2, enable_checkpointing=True, **options)
    run.fit(seeded(lambda: Toy(configure)), loader(), loader(seed=2))
    return folder / "first.ckpt"


def second(
    path: Path,
    *callbacks: Callback,
    make: Any = Toy,
    blocks: int = 3,
    configure: Any = stepwise,
    **options: Any,
) -> tuple[Watch, Toy]:
    """Two epochs more."""
    watch = Watch()
    model = seeded(lambda: make(configure, blocks=blocks))
    run = trainer(*callbacks, watch, epochs=4, **options)
    try:
        run.fit(model, loader(), loader(seed=2), ckpt_path=path)
    except Exception:
        assert watch.batches == 0
        raise
    return watch, model


def audit() -> TrainableParamAudit:
    return TrainableParamAudit(table=False)


# Another schedule


@pytest.mark.parametrize(
    ("before", "after", "trains"),
    [
        # at epoch 2 as at the end, that of the new schedule
        (GradualUnfreeze(start=3), GradualUnfreeze(), ("blocks.1", "blocks.0")),
        (GradualUnfreeze(), GradualUnfreeze(every=2), ("blocks.2", "blocks.1")),
        (GradualUnfreeze(), GradualUnfreeze(unit="step"), ("embed", "embed")),
        (FreezeBackbone(), FreezeBackbone(unfreeze_at_epoch=3), ("", "embed")),
        (FreezeBackbone(), FreezeBackbone(trainable_layers=1), ("blocks.2", "blocks.2")),
        (
            GradualUnfreeze(monitor="val_steps", patience=1),
            GradualUnfreeze(monitor="val_steps", patience=9),
            ("blocks.2", "blocks.2"),
        ),
    ],
)
def test_a_schedule_that_unfreezes_at_other_times_goes_on_from_where_it_is(
    tmp_path: Path, before: Any, after: Any, trains: tuple[str, str]
) -> None:
    path = first(tmp_path, before, audit())
    watching = audit()
    watch, model = second(path, after, watching)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert changed(saved, watch.start) == set()
    for names, lowest in zip((watch.trained, trainable(model)), trains):
        order = ["head", "blocks.2", "blocks.1", "blocks.0", "embed"]
        wanted = order[: order.index(lowest) + 1] if lowest else ["head"]
        assert {part for part in order if any(part in name for name in names)} == set(wanted)
    assert watching.findings == []


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            GradualUnfreeze(),
            GradualUnfreeze(monitor="val_loss"),
            r"would go back to stage 0.*Use the schedule of the run that wrote it",
        ),
        (
            GradualUnfreeze(),
            GradualUnfreeze(order="bottom_up"),
            r"would freeze 4 parameters again, such as `backbone.blocks.2.linear.bias`",
        ),
        (
            GradualUnfreeze(),
            GradualUnfreeze(lr_decay=0.5),
            r"`backbone.embed.weight` trains at 1 of the learning rate there, and at 0.0625 in "
            r"this run. Use the `lr_decay` and `lr_scale`",
        ),
        (GradualUnfreeze(lr_decay=0.5), GradualUnfreeze(), "at 0.0625 .* and at 1 in this"),
        (GradualUnfreeze(lr_decay=0.5), GradualUnfreeze(lr_decay=0.8), "at 0.4096 in this"),
        (
            FreezeBackbone(unfreeze_at_epoch=1, lr_scale=0.5),
            FreezeBackbone(unfreeze_at_epoch=1, lr_scale=0.1),
            r"at 0.1 in this run.*or load its weights alone: `Model.load_from_checkpoint",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(
    tmp_path: Path, before: Any, after: Any, message: str
) -> None:
    path = first(tmp_path, before)
    with pytest.raises(ResumeError, match=message):
        second(path, after, audit())


# A callback more or less


def test_an_audit_may_come_or_go(tmp_path: Path) -> None:
    without = first(tmp_path / "without", GradualUnfreeze())
    watching = audit()
    second(without, GradualUnfreeze(), watching)
    assert watching.findings == []
    watch, _ = second(first(tmp_path / "with", GradualUnfreeze(), audit()), GradualUnfreeze())
    assert watch.batches == 8


@pytest.mark.parametrize(
    ("before", "after", "trains"),
    [
        ([], [GradualUnfreeze()], {"head", "blocks.2", "blocks.1"}),
        ([], [FreezeBackbone()], {"head"}),
        (
            [GradualUnfreeze(start=3)],
            [GradualUnfreeze(start=3), FreezeBackbone("backbone.embed")],
            {"head"},
        ),
        ([FreezeBackbone()], [GradualUnfreeze(start=3)], {"head"}),
        (
            [FreezeBackbone("head", unfreeze_at_epoch=9), FreezeBackbone("backbone.embed")],
            [FreezeBackbone("backbone.embed")],
            {"head", "blocks.2", "blocks.1", "blocks.0"},
        ),
        ([GradualUnfreeze()], [], {"head", "blocks.2", "blocks.1", "blocks.0", "embed"}),
    ],
)
def test_a_freezing_callback_may_come_or_go_where_nothing_freezes_again(
    tmp_path: Path, before: list[Callback], after: list[Callback], trains: set[str]
) -> None:
    path = first(tmp_path, *before)
    watch, _ = second(path, *after)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert changed(saved, watch.start) == set()
    parts = ("head", "blocks.2", "blocks.1", "blocks.0", "embed")
    assert {part for part in parts if any(part in name for name in watch.trained)} == trains
    assert watch.batches == 8


def test_a_freezing_callback_that_freezes_what_has_begun_to_train_is_refused(
    tmp_path: Path,
) -> None:
    path = first(tmp_path, GradualUnfreeze())
    with pytest.raises(ResumeError, match=r"FreezeBackbone\(\) would .*freeze 4 parameters again"):
        second(path, FreezeBackbone())


@pytest.mark.filterwarnings(STAYS_FROZEN, NO_FRESH_START)
def test_layers_are_not_given_a_fresh_start_on_a_resume_and_one_that_asks_for_it_is_told(
    tmp_path: Path,
) -> None:
    plain = first(tmp_path / "plain", FreezeBackbone())
    with pytest.warns(UserWarning, match=r"ReinitTopLayers\(.*gives nothing a fresh start.*fit`"):
        watch, _ = second(plain, FreezeBackbone(), ReinitTopLayers(params="backbone.embed"))
    saved = torch.load(plain, weights_only=True)["state_dict"]
    assert changed(saved, watch.start) == set()
    again = first(tmp_path / "again", FreezeBackbone(), ReinitTopLayers(1, seed=1))
    with pytest.warns(UserWarning, match=r"`backbone.blocks.1.linear.weight` and 3 more"):
        second(again, FreezeBackbone(), ReinitTopLayers(2, seed=1))
    with warnings.catch_warnings():  # controls: the same, and none
        warnings.filterwarnings("error", message=".*a fresh start")
        for other in ("Be aware that when using `ckpt_path`", ".*but they stay frozen"):
            warnings.filterwarnings("ignore", message=other)
        for callbacks in ([ReinitTopLayers(1, seed=1)], []):
            watch, _ = second(again, FreezeBackbone(), *callbacks)
    saved = torch.load(again, weights_only=True)["state_dict"]
    assert changed(saved, watch.start) == set()


@pytest.mark.filterwarnings(STAYS_FROZEN, NO_FRESH_START)
def test_what_got_no_fresh_start_is_not_certified_as_if_it_had(tmp_path: Path) -> None:
    path = first(tmp_path, FreezeBackbone("backbone"), audit())
    watching = TrainableParamAudit(table=False, certificate=tmp_path / "c.json")
    fresh = ReinitTopLayers(params="backbone.embed")
    second(path, fresh, FreezeBackbone("backbone"), watching)
    frozen = read_certificate(tmp_path / "c.json").frozen
    assert not frozen["backbone.embed.weight"].reinitialised


# Without our callbacks


@pytest.mark.parametrize("after", [audit, lambda: ReinitTopLayers(1, seed=1)])
@pytest.mark.filterwarnings(NO_FRESH_START)
def test_a_checkpoint_without_our_callbacks_goes_on_with_those_that_freeze_nothing(
    tmp_path: Path, after: Callable[[], Callback]
) -> None:
    path = first(tmp_path)
    watch, _ = second(path, after())
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert changed(saved, watch.start) == set()
    assert watch.batches == 8


# Another model


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors take no notes")
@pytest.mark.parametrize(("blocks", "differs"), [(2, "Unexpected key"), (4, "Missing key")])
def test_another_number_of_layers(tmp_path: Path, blocks: int, differs: str) -> None:
    path = first(tmp_path, GradualUnfreeze())
    with pytest.raises(
        RuntimeError, match=rf"(?s){differs}.*blocks\.[23].*Build the model as the run that wrote"
    ):
        second(path, GradualUnfreeze(), blocks=blocks)


def test_another_number_of_layers_where_the_model_takes_what_it_knows(tmp_path: Path) -> None:
    path = first(tmp_path, GradualUnfreeze())
    with pytest.raises(ResumeError, match=r"hold \[\[16\]\] tensors, those of this run \[\[12"):
        second(path, GradualUnfreeze(), make=Forgiving, blocks=2)


# Weights alone


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors take no notes")
def test_a_checkpoint_of_weights_alone_is_no_resume(tmp_path: Path) -> None:
    path = first(tmp_path, GradualUnfreeze(), weights_only=True)
    with pytest.raises(KeyError, match=r"(?s)only the model.*Load its weights alone: `Model.load"):
        second(path, GradualUnfreeze())


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_warm_start_from_a_later_phase_begins_with_the_first(
    tmp_path: Path, weights_only: bool
) -> None:
    path = first(tmp_path, GradualUnfreeze(unit="step"), weights_only=weights_only)  # all trains
    saved = torch.load(path, weights_only=True)["state_dict"]
    model = Toy.load_from_checkpoint(path, configure=stepwise)
    watch, watching = Watch(), audit()
    trainer(GradualUnfreeze(), watching, watch, epochs=2).fit(model, loader(), loader(seed=2))
    assert changed(saved, watch.start) == set()
    assert watch.trained == {"head.weight", "head.bias"}
    assert same(saved["backbone.embed.weight"], model.backbone.embed.weight)
    assert watching.findings == []


def test_each_row_of_the_documentation_is_a_test() -> None:
    folder = Path(__file__).parents[1]
    text = (folder.parent / "docs" / "resuming.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    told = [row.rsplit("|", 2)[1].strip() for row in rows]
    names = {name.strip("`") for name in told if name != "Test"}
    others = [folder / "callbacks/test_oracle_resume.py", folder / "ranks/test_kills.py"]
    sources = [*Path(__file__).parent.glob("test_*.py"), *others]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert len(names) > 20
    assert {name for name in names if f"def {name}(" not in code} == set()
