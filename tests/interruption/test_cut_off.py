"""Training that is killed in the middle of writing a file, at each step of that."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.test_oracle_resume import assert_equal
from tests.interruption.harness import REPORT, Place, check_files, one_life

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork"),
    pytest.mark.slow,
]


def die_at(
    name: str, time: int, *, after: bool = False, of: str = "", module: Any = os
) -> Callable[[], None]:
    """Makes a process kill itself at the n-th call of a function, or at that for a file."""

    def prepare() -> None:
        call, calls = getattr(module, name), []

        def deadly(*args: Any, **options: Any) -> Any:
            calls.extend([1] if of in map(str, args) or not of else [])
            if len(calls) < time:
                return call(*args, **options)
            if after:
                call(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        setattr(module, name, deadly)

    return prepare


def goes_on(place: Place, uninterrupted: dict[str, Any], **options: Any) -> None:
    """The next process trains to the end, and it is the end that it would have been."""
    assert not one_life(place, **options).killed
    assert_equal(uninterrupted, torch.load(place.end, weights_only=True))
    check_files(place)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_kill_while_a_certificate_is_written(
    tmp_path: Path, uninterrupted: dict[str, Any], name: str, after: bool
) -> None:
    place = Place(tmp_path)
    life = one_life(place, prepare=die_at(name, 12, after=after))
    assert life.killed
    assert life.died == "c"
    check_files(place)
    renamed = name == "replace" and after
    assert len(place.parts()) == (0 if renamed else 1)
    goes_on(place, uninterrupted)


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_while_the_report_is_written(
    tmp_path: Path, uninterrupted: dict[str, Any], after: bool
) -> None:
    place = Place(tmp_path)
    life = one_life(place, prepare=die_at("replace", 1, after=after, of=str(place.report)))
    assert life.died == REPORT
    assert place.report.exists() is after
    check_files(place)
    goes_on(place, uninterrupted)
    assert place.report.exists()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("time", [7, 8])  # that of the best and that of `last.ckpt`
def test_a_kill_while_lightning_renames_a_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, Any], time: int, after: bool
) -> None:
    place = Place(tmp_path)
    life = one_life(place, prepare=die_at("rename", time, after=after))
    assert life.died == "w"
    check_files(place)
    # Lightning's own temporary file: nothing ever clears it up
    assert len(list(place.temporary.iterdir())) == (0 if after else 1)
    goes_on(place, uninterrupted)


def test_where_lightning_copies_a_checkpoint_it_may_be_cut_off_and_the_other_one_is_whole(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """Lightning writes to `TMPDIR` first: on another file system it can't rename."""

    def cut_off(source: str, target: str, **_: Any) -> None:
        content = Path(source).read_bytes()
        if Path(target).name == "last.ckpt" and Path(target).exists():
            Path(target).write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        Path(target).write_bytes(content)

    def no_rename(*_: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def prepare() -> None:
        os.rename = no_rename  # type: ignore[assignment]
        shutil.copy2 = cut_off  # type: ignore[assignment]
        shutil.move.__defaults__ = (cut_off,)  # type: ignore[attr-defined]

    place = Place(tmp_path)
    assert one_life(place, prepare=prepare).killed
    with pytest.raises(AssertionError, match="exit status 1"):
        one_life(place)
    [whole] = set(place.checkpoints.glob("*.ckpt")) - {place.last()}
    goes_on(place, uninterrupted, ckpt_path=whole)


def test_a_link_to_the_last_checkpoint_may_be_missing_and_what_it_named_is_there(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """With `save_last="link"`, Lightning removes the old link before it makes the new one."""
    place = Place(tmp_path)
    assert one_life(place, prepare=die_at("symlink", 4), save_last="link").killed
    assert place.last() is None  # so that "last" would begin anew
    [whole] = place.checkpoints.glob("*.ckpt")
    goes_on(place, uninterrupted, ckpt_path=whole)
