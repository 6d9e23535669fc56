"""What is printed, and to whom: results to stdout, complaints to stderr."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TextIO

from lightning_freeze.errors import ArgumentError

WRONG = 2


def say(text: str) -> bool:
    """Print; False where it couldn't be written. A reader who has seen enough is no error."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal that has no lines to draw
    try:
        print(text, flush=True)
    except OSError as error:
        _give_up(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            complain(f"the result can't be printed: {error}")
            return False
    return True


def complain(text: str, label: str = "lightning-freeze") -> None:
    """Print to stderr, if that is there and can be written to: the exit status says it as well."""
    from lightning_freeze.checkpoints.verify.matching import escaped

    if sys.stderr is None:  # or it would go to stdout
        return
    try:
        print(f"{label}:", escaped(text, keep="\n"), file=sys.stderr, flush=True)
    except OSError:
        _give_up(sys.stderr)


def _give_up(stream: TextIO) -> None:
    """Let go of what can't be printed, or Python would try once more, and complain, at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def width() -> int:
    """Of the terminal, or what COLUMNS says; of a page where it is neither."""
    return max(40, min(shutil.get_terminal_size((110, 24)).columns, 160))


def check_target(option: str, path: str | None, *, replace: bool = True) -> None:
    """Before any work: a file that is to be written can be.

    Args:
        option: what the user wrote, such as `--json`.
        path: the file, if there is to be one.
        replace: whether it may be there already.

    Raises:
        ArgumentError: it can't.
    """
    if path is None:
        return
    target = Path(os.path.expanduser(path))
    if target.is_dir():
        raise ArgumentError(f"`{option} {path}` is a folder. Name a file to write.")
    if not replace and target.is_file():
        raise ArgumentError(
            f"`{option} {path}` exists already. Name another file, or add `--overwrite`."
        )
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ArgumentError(
            f"`{option} {path}` can't be written: `{folder}` is no folder that you may write to. "
            "Name another file."
        )


def write(option: str, path: str, content: bytes) -> None:
    """Write a file, or say which option to change."""
    from lightning_freeze.checkpoints.files import write_whole

    try:
        write_whole(path, content)
    except OSError as error:
        raise ArgumentError(
            f"`{option} {path}` can't be written: {error.strerror}. Name another file."
        ) from error
