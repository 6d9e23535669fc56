"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Union

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def write_json(path: Union[str, Path], content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all, as `write_whole` does. NaN and infinities become strings.

    Args:
        path: where to; a URL that fsspec knows, such as `s3://bucket/certificate.json`, too.
        content: plain values.

    Raises:
        OSError: the folder can't be written to; an older file at `path` is untouched.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(content), indent=2, allow_nan=False)
    if "://" not in str(path):
        write_whole(path, (text + "\n").encode())
        return
    import fsspec  # type: ignore[import-untyped]

    with fsspec.open(str(path), "w", encoding="utf-8") as file:
        file.write(text + "\n")


def _without_nan(content: Any) -> Any:
    """Plain values for JSON, which has no number for NaN and the infinities."""
    if isinstance(content, float) and not math.isfinite(content):
        return str(float(content))
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return content


def write_whole(path: Union[str, Path], content: bytes) -> None:
    """Write a file whole or not at all: to a temporary file beside it, then renamed.

    `~` is the home folder, and a link stays one: what it points to is written. What isn't a file,
    such as `/dev/stdout` or a pipe, is written to as it is, and never replaced.
    """
    named = Path(os.path.expanduser(path))
    stream = _stream_at(named)
    if stream is not None:
        with stream:
            stream.write(content)
        return
    target = Path(os.path.realpath(named))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    # made anew, it has the rights that the umask leaves
    handle = os.open(temporary, _NEW, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
