"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Union

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_json(path: Union[str, Path], content: Mapping[str, Any]) -> Path:
    """Write JSON whole or not at all, as `write_whole` does. NaN and infinities become strings.

    Raises:
        OSError: the folder can't be written to; an older file at `path` is untouched.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(content), indent=2, allow_nan=False)
    return write_whole(path, (text + "\n").encode())


def _without_nan(content: Any) -> Any:
    """Plain values for JSON, which has no number for NaN and the infinities."""
    if isinstance(content, float) and not math.isfinite(content):
        return str(float(content))
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return content


def write_whole(path: Union[str, Path], content: bytes) -> Path:
    """Write a file whole or not at all: to a temporary file beside it, then renamed.

    `~` is the home folder, and a link stays one: what it points to is written. What isn't a file,
    such as `/dev/stdout` or a pipe, is written to as it is, and never replaced. Temporary files of
    `path` that killed processes have left are removed.
    """
    named = Path(os.path.expanduser(path))
    stream = _stream_at(named)
    if stream is not None:
        with stream:
            stream.write(content)
        return named
    target = Path(os.path.realpath(named))
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_up(target)
    with _temporary(target) as (handle, temporary):
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    return named


@contextmanager
def _temporary(target: Path) -> Iterator[tuple[int, str]]:
    """A new file beside another one, locked until it has its name, so that nobody clears it up."""
    while True:
        handle, temporary = tempfile.mkstemp(".part", f".{target.name}.", target.parent)
        held = None if fcntl is None else os.dup(handle)  # Windows renames no open file
        if held is None or not _lock(held, wait=True) or os.fstat(held).st_nlink:
            break
        os.close(handle)  # cleared up between its making and its locking
        os.close(held)
    try:
        yield handle, temporary
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        if held is not None:
            os.close(held)


def _clear_up(target: Path) -> None:
    """Remove temporary files of a target that no living process has locked."""
    ours = re.compile(re.escape(f".{target.name}.") + r"[a-z0-9_]{8}\.part")
    with suppress(OSError):
        for name in filter(ours.fullmatch, os.listdir(target.parent)):
            path = target.parent / name
            with suppress(OSError), path.open("rb") as file:
                if _lock(file.fileno(), wait=False):
                    path.unlink()


def _lock(handle: int, *, wait: bool) -> bool:
    """Lock an open file; False where that is impossible, or another process has locked it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _stream_at(path: Path) -> BinaryIO | None:
    """What to write to where a path isn't that of a file, or of one that is being printed to."""
    if not path.exists():
        return None
    for number, printed in ((1, sys.stdout), (2, sys.stderr)):
        # its own end of the file, or what is printed later would be written over this
        if printed is not None and _is_open_as(number, path):
            printed.flush()
            return open(number, "wb", closefd=False)
    return None if path.is_file() else path.open("wb")


def _is_open_as(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except OSError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
