"""Fits that stop before their end: what they leave, and that the next one goes on exactly."""

from __future__ import annotations

import errno
import json
import os
import signal
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, Timer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_freeze import GradualUnfreeze, ReinitTopLayers, TrainableParamAudit
from lightning_freeze.checkpoints.certificate import read_certificate
from lightning_freeze.checkpoints.verify.compare import verify
from tests.callbacks.test_oracle_resume import assert_equal
from tests.catalogue.harness import Do
from tests.interruption.harness import (
    STEPS,
    Place,
    check_files,
    fit,
    fit_to_the_end,
    one_life,
    outcome,
    prepared,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no last checkpoint available"),
    pytest.mark.slow,
]


def goes_on(place: Place, uninterrupted: dict[str, Any], **options: Any) -> None:
    """The next fit trains to the end, and it is the end that it would have been."""
    check_files(place)
    assert place.parts() == []
    run, module = prepared(place)
    fit(run, module, **options)
    assert_equal(uninterrupted, outcome(run, module))
    check_files(place)
    assert json.loads(place.report.read_text())["clean"]
    assert read_certificate(place.certificate).step == STEPS


def test_a_fit_that_has_nothing_left_to_train_writes_the_report_that_is_missing(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    fit_to_the_end(place)
    whole = json.loads(place.report.read_text())
    # as a kill between the last checkpoint and the fit's end leaves it
    place.report.unlink()
    place.certificate.unlink()
    fit_to_the_end(place)
    report = json.loads(place.report.read_text())
    assert report["clean"]
    assert report["frozen"] == whole["frozen"]
    assert report["moments"] == whole["moments"]
    assert report["certificate"]["frozen"] == whole["certificate"]["frozen"]
    assert read_certificate(place.certificate).step == STEPS


# An exception


class Broke(Exception):
    pass


def breaks_once(error: BaseException) -> Any:
    errors = [error]

    def act(*_: Any) -> None:
        while errors:
            raise errors.pop()

    return act


@pytest.mark.parametrize("again", ["same trainer", "new trainer"])
@pytest.mark.parametrize(
    "hook",
    [
        "on_train_epoch_start",  # step 16 is the first of an epoch; step 15 was an unfreeze
        "on_train_batch_start",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_validation_start",
        "on_train_epoch_end",
    ],
)
def test_an_exception_in_a_fit(
    tmp_path: Path, uninterrupted: dict[str, Any], hook: str, again: str
) -> None:
    place = Place(tmp_path)
    breaks = Do(at=16, **{hook: breaks_once(Broke("broken off"))})
    run, module = prepared(place, breaks)
    with pytest.raises(Broke, match="broken off"):
        fit(run, module)
    report = json.loads(place.report.read_text())
    assert report["clean"]
    assert report["certificate"]["step"] in (15, 16)  # broken off before the audit saw the end
    if again == "new trainer":
        goes_on(place, uninterrupted)
        return
    fit(run, module)
    assert_equal(uninterrupted, outcome(run, module))
    check_files(place)


@pytest.mark.parametrize("again", ["same trainer", "new trainer"])
def test_ctrl_c(tmp_path: Path, uninterrupted: dict[str, Any], again: str) -> None:
    place = Place(tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    try:
        run, module = prepared(place, Do(at=9, on_after_backward=breaks_once(KeyboardInterrupt())))
        with pytest.raises(SystemExit, match="1"):
            fit(run, module)
    finally:
        signal.signal(signal.SIGINT, handler)
    if again == "new trainer":
        goes_on(place, uninterrupted)
        return
    fit(run, module)
    assert_equal(uninterrupted, outcome(run, module))


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_checkpoint_that_is_saved_because_of_an_exception(
    tmp_path: Path, uninterrupted: dict[str, Any], hook: str
) -> None:
    place = Place(tmp_path)
    saves = OnExceptionCheckpoint(tmp_path / "broken")
    breaks = Do(at=14, **{hook: breaks_once(Broke("broken off"))})
    run, module = prepared(place, breaks, saves, every=100)
    with pytest.raises(Broke, match="broken off"):
        fit(run, module)
    path = tmp_path / "broken" / "on_exception.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 14
    goes_on(place, uninterrupted, ckpt_path=path)


# A limit on the time, a signal


def test_max_time(
    tmp_path: Path, uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    # inside epochs: the end of an epoch that was cut short counts as a whole one to Lightning
    save = ModelCheckpoint(
        place.checkpoints,
        save_last=True,
        every_n_train_steps=1,
        save_on_train_epoch_end=False,
    )
    run, module = prepared(place, max_time=timedelta(hours=14), save=save)
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: 3600.0 * run.global_step)
    fit(run, module)
    assert run.global_step == 14  # an epoch has 4
    assert json.loads(place.report.read_text())["clean"]
    monkeypatch.undo()
    goes_on(place, uninterrupted)


def test_sigterm(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    place = Place(tmp_path)
    terminate = Do(at=9, on_after_backward=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    run, module = prepared(place, terminate)
    with pytest.raises(SystemExit, match=r"^$"):
        fit(run, module)
    assert run.global_step == 10  # Lightning ends the batch first
    goes_on(place, uninterrupted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
@pytest.mark.parametrize(
    "hook",
    ["on_train_batch_start", "on_train_batch_end", "on_validation_start"],
)
def test_a_save_that_a_signal_of_slurm_asks_for(
    tmp_path: Path, uninterrupted: dict[str, Any], hook: str
) -> None:
    place = Place(tmp_path)

    def requeue(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)  # saves, then asks for another turn
        os.kill(os.getpid(), signal.SIGKILL)  # as slurm does a little later

    def prepare() -> None:
        os.environ.update(SLURM_JOB_ID="1", SLURM_JOB_NAME="train", SLURM_NTASKS="1")
        os.environ.update(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", PATH="")

    options = {
        "plugins": [SLURMEnvironment(auto_requeue=True)],
        "default_root_dir": place.folder,
    }
    life = one_life(place, None, {}, Do(at=16, **{hook: requeue}), prepare=prepare, **options)
    assert life.killed
    path = place.folder / "hpc_ckpt_1.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 16
    goes_on(place, uninterrupted, ckpt_path=path)


# A full disk


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_for_our_files_costs_no_training(
    tmp_path: Path, uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    fills = Do(at=9, on_train_batch_start=lambda *_: monkeypatch.setattr(os, "fsync", full))
    breaks = Do(at=20, on_train_batch_start=breaks_once(Broke("broken off")))
    run, module = prepared(place, fills, breaks)
    with (
        pytest.warns(UserWarning, match="couldn't be written: .*No space left"),
        pytest.raises(Broke, match="broken off"),
    ):
        fit(run, module)
    assert read_certificate(place.certificate).step == 9  # the last that was written
    assert not place.report.exists()
    assert place.parts() == []
    monkeypatch.undo()
    # the certificate in a checkpoint is always its own
    last = place.last()
    assert last is not None
    assert verify(None, last, last).ok
    run, module = prepared(place)
    fit(run, module)
    assert_equal(uninterrupted, outcome(run, module))
    check_files(place)


def test_a_disk_that_is_full_for_a_checkpoint_leaves_the_last_one(
    tmp_path: Path, uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    fills = Do(
        at=9, on_train_batch_start=lambda *_: monkeypatch.setattr(LocalFileOpener, "write", full)
    )
    run, module = prepared(place, fills)
    with pytest.raises(OSError, match="No space left"):
        fit(run, module)
    monkeypatch.undo()
    last = place.last()
    assert last is not None
    assert torch.load(last, weights_only=True)["global_step"] == 9
    goes_on(place, uninterrupted)


# What Lightning itself does not do; should one of these fail in a newer Lightning, then
# `harness.Save` and docs/resuming.md can say less


def alone(run: Trainer) -> None:
    """Take our callbacks out of a trainer."""
    kinds = (GradualUnfreeze, ReinitTopLayers, TrainableParamAudit)
    run.callbacks = [cb for cb in run.callbacks if not isinstance(cb, kinds)]


def test_lightning_runs_too_many_steps_after_two_interruptions_and_we_add_none(
    tmp_path: Path,
) -> None:
    counts = {}
    for ours in (False, True):
        place = Place(tmp_path / str(ours))
        for stop in (4, 6, None):
            breaks = Do(at=stop, on_train_batch_start=breaks_once(Broke("stop")))
            save = ModelCheckpoint(
                place.checkpoints, save_last=True, every_n_train_steps=1, save_top_k=0
            )
            run, module = prepared(place, *([breaks] if stop else []), save=save)
            if not ours:
                alone(run)
            with pytest.raises(Broke, match="stop") if stop else nullcontext():
                fit(run, module)
        counts[ours] = run.global_step
    assert counts == {False: STEPS + 2, True: STEPS + 2}


def test_lightning_skips_an_epoch_that_was_saved_at_its_start_and_we_skip_no_other(
    tmp_path: Path,
) -> None:
    path = tmp_path / "start.ckpt"

    def save(run: Any, _: Any) -> None:
        run.save_checkpoint(path)
        raise Broke("stop")

    counts = {}
    for ours in (False, True):
        place = Place(tmp_path / str(ours))
        for first in ([Do(at=16, on_train_epoch_start=save)], []):
            run, module = prepared(place, *first)
            if not ours:
                alone(run)
            with pytest.raises(Broke, match="stop") if first else nullcontext():
                fit(run, module, None if first else path)
        counts[ours] = run.global_step
    assert counts == {False: STEPS - 4, True: STEPS - 4}
