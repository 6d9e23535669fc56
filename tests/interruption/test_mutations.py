"""The harness can fail: each of these defects, put in on purpose, is seen by its checks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_freeze import GradualUnfreeze, ReinitTopLayers
from lightning_freeze.callbacks.fit_state import FitState
from lightning_freeze.callbacks.metric_monitor import MetricMonitor
from lightning_freeze.callbacks.trainable_param_audit import TrainableParamAudit
from lightning_freeze.checkpoints import files
from lightning_freeze.engine import flags as apply
from lightning_freeze.engine import optimizers
from tests.callbacks.test_oracle_resume import assert_equal
from tests.catalogue.harness import Do
from tests.interruption.harness import Place, check_files, fit, one_life, outcome, prepared
from tests.interruption.test_breaks import Broke, breaks_once
from tests.interruption.test_cut_off import die_at

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork"),
    pytest.mark.filterwarnings("ignore:.*no last checkpoint available"),
    pytest.mark.slow,
]


def by_steps() -> GradualUnfreeze:
    return GradualUnfreeze(start=6, every=9, unit="step", lr_decay=0.5)


def by_metric() -> GradualUnfreeze:
    return GradualUnfreeze(monitor="val_steps", patience=2)


@dataclass(frozen=True)
class Mutation:
    """A defect of the package.

    Attributes:
        defect: replaces a part of it, by `setattr` of a monkeypatch.
        while_: "saving", "resuming" or "always": in which of the two fits.
        said: what the check that sees it says.
        at: the step before which the first fit is broken off; it has saved each fourth.
        make: the schedule.
    """

    defect: Callable[[Callable[..., None]], None]
    while_: str
    said: str
    at: int = 17
    make: Callable[[], GradualUnfreeze] = by_steps


MUTATIONS: dict[str, Mutation] = {}


def mutation(while_: str, said: str, **options: Any) -> Callable[[Any], Any]:
    def keep(defect: Any) -> Any:
        MUTATIONS[defect.__name__.strip("_").replace("_", " ")] = Mutation(
            defect, while_, said, **options
        )
        return defect

    return keep


def after(call: Callable[..., Any], act: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does something more with its result and its arguments."""

    def both(*args: Any, **options: Any) -> Any:
        result = call(*args, **options)
        other = act(result, *args)
        return result if other is None else other

    return both


# What is saved


@mutation("saving", "would go back to stage")
def the_saved_stage_is_one_too_high(patch: Any) -> None:
    more = after(FitState.state, lambda state, *_: {**state, "stage": state["stage"] + 1})
    patch(FitState, "state", more)


@mutation("saving", "would go back to stage")
def the_saved_stage_is_one_too_low(patch: Any) -> None:
    less = after(FitState.state, lambda state, *_: {**state, "stage": state["stage"] - 1})
    patch(FitState, "state", less)


@mutation("saving", "AssertionError", at=9, make=by_metric)
def the_epochs_without_improvement_are_not_saved(patch: Any) -> None:
    patch(
        MetricMonitor, "state", after(MetricMonitor.state, lambda state, _: {**state, "waited": 0})
    )


@mutation("saving", "AssertionError", at=13, make=by_metric)
def the_best_value_of_the_metric_is_not_saved(patch: Any) -> None:
    patch(
        MetricMonitor, "state", after(MetricMonitor.state, lambda state, _: {**state, "best": None})
    )


@mutation("saving", "AssertionError: since", at=17)
def since_when_a_tensor_is_frozen_is_not_saved(patch: Any) -> None:
    patch(TrainableParamAudit, "state_dict", lambda self: {})


# What is made of it


@mutation("resuming", "AssertionError")
def a_resume_unfreezes_too_much_and_nobody_compares(patch: Any) -> None:
    resume = FitState.resume

    def wrong(self: Any, trainer: Any, resumed: Any) -> None:
        resume(self, trainer, resumed)
        tick = self.tick

        def late(trainer: Any) -> None:  # behind the restoring of the optimizer
            tick(trainer)
            self._switch(trainer, {cb: stage + 1 for cb, stage in self.stages.items()})

        self.tick = late

    patch(FitState, "resume", wrong)


def first_tick(act: Callable[[Any], None], patch: Any) -> None:
    """Does something before the first batch of a resume, behind all that was restored."""
    tick = FitState.tick

    def both(self: Any, trainer: Any) -> None:
        if self._resumed and not hasattr(self, "mutated"):
            self.mutated = True
            act(self)
        tick(self, trainer)

    patch(FitState, "tick", both)


@mutation("resuming", "AssertionError")
def the_optimizer_state_of_what_unfroze_last_is_not_restored(patch: Any) -> None:
    def forget(session: Any) -> None:
        [optimizer] = session.groups.optimizers
        for parameter in optimizer.param_groups[0]["params"][:2]:
            del optimizer.state[parameter]

    first_tick(forget, patch)


@mutation("resuming", "AssertionError")
def factors_are_forgotten_after_a_resume(patch: Any) -> None:
    def unscale(fit: Any) -> None:
        fit.groups._by_id.clear()

    first_tick(unscale, patch)


@mutation("resuming", "and at 1 in this run")
def a_resume_has_no_factors(patch: Any) -> None:
    merged = FitState._merged

    def without(self: Any, stages: Any) -> Any:
        plan = merged(self, stages)
        return type(plan)(plan.frozen, plan.quiet, plan.lively, plan.claimed)

    patch(FitState, "_merged", without)


@mutation("resuming", "AssertionError")
def layers_get_a_fresh_start_again(patch: Any) -> None:
    patch(ReinitTopLayers, "on_fit_start", lambda *_: None)
    patch(ReinitTopLayers, "on_train_start", ReinitTopLayers._reinit)


@mutation("resuming", "[mode-changed]|AssertionError")
def frozen_modules_are_not_put_in_eval_mode(patch: Any) -> None:
    patch(apply.Applier, "reassert", lambda _: None)


@mutation("resuming", "AssertionError", at=5)
def what_is_due_inside_an_epoch_waits_for_the_next(patch: Any) -> None:
    tick = FitState.tick
    patch(
        FitState,
        "tick",
        lambda self, trainer: None if trainer.fit_loop.batch_idx else tick(self, trainer),
    )


@mutation("always", "AssertionError")
def the_state_of_the_optimizer_is_dropped_at_each_change(patch: Any) -> None:
    def forget(_: Any, groups: Any, *__: Any) -> None:
        for optimizer in groups.optimizers:
            optimizer.state.clear()

    sync = optimizers.OptimizerGroups.sync
    patch(optimizers.OptimizerGroups, "sync", after(sync, forget))


# The checks, of two fits


def planned(place: Place, make: Callable[[], GradualUnfreeze], *first: Any) -> Any:
    """What the harness prepares, with a schedule of its own."""
    run, module = prepared(place, *first, every=4)
    callbacks: list[Any] = run.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [make() if isinstance(cb, GradualUnfreeze) else cb for cb in callbacks]
    return run, module


def broken_off(place: Place, make: Callable[[], GradualUnfreeze], at: int) -> None:
    run, module = planned(place, make, Do(at=at, on_train_batch_start=breaks_once(Broke("off"))))
    with pytest.raises(Broke, match="off"):
        fit(run, module)


def resumed(place: Place, make: Callable[[], GradualUnfreeze]) -> dict[str, Any]:
    run, module = planned(place, make)
    fit(run, module)
    return outcome(run, module)


def frozen(place: Place) -> Any:
    entries = json.loads(place.report.read_text())["certificate"]["frozen"]
    return {name: entry["since"] for name, entry in entries.items()}


def compare(whole: tuple[Any, Any], ended: dict[str, Any], place: Place) -> None:
    assert_equal(whole[0], ended)
    check_files(place)
    assert json.loads(place.report.read_text())["clean"]
    assert frozen(place) == whole[1], "since"


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a schedule -> what nothing interrupts."""
    found = {}
    for make in (by_steps, by_metric):
        place = Place(tmp_path_factory.mktemp(make.__name__))
        found[make.__name__] = (resumed(place, make), frozen(place))
    return found


@pytest.fixture(scope="module")
def firsts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mutation, Path], Place]:
    """Broken-off fits of a healthy package, made once and copied."""
    made: dict[Any, Place] = {}

    def copied(which: Mutation, folder: Path) -> Place:
        key = (which.make, which.at)
        if key not in made:
            made[key] = Place(tmp_path_factory.mktemp("first"))
            broken_off(made[key], *key)
        shutil.copytree(made[key].folder, folder, dirs_exist_ok=True)
        return Place(folder)

    return copied


@pytest.mark.parametrize(
    "defect",
    {(m.make, m.at): m for m in MUTATIONS.values()}.values(),
    ids=lambda m: f"{m.make.__name__}-{m.at}",
)
def test_without_a_defect_nothing_is_seen(
    tmp_path: Path, wholes: Any, firsts: Any, defect: Mutation
) -> None:
    healthy = firsts(defect, tmp_path)
    compare(wholes[defect.make.__name__], resumed(healthy, defect.make), healthy)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_defect_of_resuming_is_seen(
    tmp_path: Path, wholes: Any, firsts: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    defect = MUTATIONS[name]
    whole = wholes[defect.make.__name__]
    with monkeypatch.context() as patch:
        if defect.while_ == "resuming":
            place = firsts(defect, tmp_path / "broken")
        else:
            place = Place(tmp_path / "broken")
            defect.defect(patch.setattr)
            broken_off(place, defect.make, defect.at)
        if defect.while_ == "saving":
            patch.undo()
        if defect.while_ == "resuming":
            defect.defect(patch.setattr)
        with pytest.raises(Exception, match=r"(?s).*") as seen:
            compare(whole, resumed(place, defect.make), place)
    told = f"{seen.type.__name__}: {seen.value}"
    assert any(said in told for said in defect.said.split("|")), told


# The checks, of files


def in_place(path: Any, content: bytes) -> Path:
    """Writes as most programs do, and dies in the middle of the first report."""
    with Path(path).open("wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        if Path(path).name == "report.json":
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(content[len(content) // 2 :])
    return Path(path)


def test_a_report_that_is_written_in_place_is_seen(tmp_path: Path) -> None:
    place = Place(tmp_path)

    def prepare() -> None:
        files.write_whole = in_place  # type: ignore[assignment]

    assert one_life(place, prepare=prepare).killed
    with pytest.raises(json.JSONDecodeError, match=r"Expecting|Unterminated|Invalid"):
        check_files(place)


def test_a_temporary_file_that_nobody_clears_up_is_seen(tmp_path: Path) -> None:
    place = Place(tmp_path)

    def prepare() -> None:
        files._clear_up = lambda _: None  # type: ignore[assignment]

    deadly = die_at("replace", 1, of=str(place.report))
    assert one_life(place, prepare=lambda: (prepare(), deadly())).killed
    assert not one_life(place, prepare=prepare).killed
    assert place.parts() != []


def test_the_wholes_differ_where_a_fit_is_cut_short(tmp_path: Path, wholes: Any) -> None:
    place = Place(tmp_path)
    broken_off(place, by_steps, 17)
    last = place.last()
    assert last is not None
    weights = torch.load(last, weights_only=True)["state_dict"]
    with pytest.raises(AssertionError, match=r"False = same\(tensor"):
        assert_equal(wholes["by_steps"][0]["weights"], weights)
