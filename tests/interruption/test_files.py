"""Our own files: whole at any moment, and nothing left of those that a kill cut off."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lightning_freeze.checkpoints import files
from lightning_freeze.checkpoints.files import write_json
from tests.interruption.processes import run_in_a_process

NAMES = ("fsync", "chmod", "replace")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


def die_at(name: str, *, after: bool) -> None:
    """From now on this process kills itself before or after a call of `os`."""
    call = getattr(os, name)

    def deadly(*args: Any, **options: Any) -> None:
        if after:
            call(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, deadly)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_while_a_file_is_written_leaves_the_old_or_the_new_one(
    tmp_path: Path, name: str, after: bool
) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"run": 1})

    def killed() -> None:
        die_at(name, after=after)
        write_json(path, {"run": 2})

    assert run_in_a_process(killed) == -signal.SIGKILL
    done = name == "replace" and after
    assert json.loads(path.read_text()) == {"run": 2 if done else 1}
    assert len(list(tmp_path.iterdir())) == (1 if done else 2)
    write_json(path, {"run": 3})
    assert json.loads(path.read_text()) == {"run": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_what_another_process_is_writing_and_what_is_not_ours_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    theirs = [".report.json.original", ".report.json.12345678", ".other.json.12345678.part"]
    for name in theirs:
        (tmp_path / name).write_text("mine")
    replace = os.replace
    seen = []

    def meanwhile(*names: Any) -> None:
        """Another process writes the same file before this one comes to an end."""
        monkeypatch.setattr(os, "replace", replace)
        seen.append(len(list(tmp_path.glob(".report.json.*.part"))))
        assert run_in_a_process(lambda: write_json(path, {"run": "other"})) == 0
        assert json.loads(path.read_text()) == {"run": "other"}
        replace(*names)

    monkeypatch.setattr(os, "replace", meanwhile)
    write_json(path, {"run": "this"})
    assert seen == [1]
    assert json.loads(path.read_text()) == {"run": "this"}
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", *theirs}


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    assert files.fcntl is not None
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    leftover = tmp_path / ".report.json.abcd_123.part"
    leftover.write_text("")
    write_json(tmp_path / "report.json", {"run": 1})
    monkeypatch.setattr(files, "fcntl", None)
    write_json(tmp_path / "report.json", {"run": 2})
    assert json.loads((tmp_path / "report.json").read_text()) == {"run": 2}
    # nobody can tell whether it is being written
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", leftover.name}
    monkeypatch.undo()
    write_json(tmp_path / "report.json", {"run": 3})
    assert not leftover.exists()


def test_a_leftover_that_cannot_be_removed_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".report.json.abcd_123.part").mkdir()
    write_json(tmp_path / "report.json", {"run": 1})
    assert json.loads((tmp_path / "report.json").read_text()) == {"run": 1}


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"run": 1})

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(os, "fdopen", full)
        else:
            patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"run": 2})
    assert json.loads(path.read_text()) == {"run": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_file_that_is_cleared_up_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = files._lock

    def late(handle: int, *, wait: bool) -> bool:
        """The other process comes first."""
        if wait and not done:
            done.append(True)
            [path] = tmp_path.glob(".report.json.*.part")
            path.unlink()
        return lock(handle, wait=wait)

    done: list[bool] = []
    monkeypatch.setattr(files, "_lock", late)
    write_json(tmp_path / "report.json", {"run": 1})
    assert done
    assert json.loads((tmp_path / "report.json").read_text()) == {"run": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
