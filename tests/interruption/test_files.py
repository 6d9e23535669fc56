"""Our own files: whole at any moment, also where a kill cuts off their writing."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lightning_freeze.checkpoints.files import write_json
from tests.interruption.processes import run_in_a_process

NAMES = ("fsync", "replace")

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
