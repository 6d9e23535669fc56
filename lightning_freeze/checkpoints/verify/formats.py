"""What a file is, by its first bytes: what can be opened, and why the rest can't."""

from __future__ import annotations

import tarfile
import zipfile
from difflib import get_close_matches
from pathlib import Path
from typing import IO

from lightning_freeze.errors import VerifyError

TORCH = "torch"
SAFETENSORS = "safetensors"

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_SAVE_ANEW = (
    "Open it with what wrote it, and save its weights as a state dict (`torch.save`) or with "
    "`save_pretrained`."
)
# first bytes -> what it is, what to do
_OTHERS = {
    b"version https://git-lfs": (
        "a pointer that git-lfs left in the place of the file",
        "Fetch the file itself: `git lfs pull`.",
    ),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file, as Keras and TensorFlow write it", _SAVE_ANEW),
    b"GGUF": ("a GGUF file", _SAVE_ANEW),
}
_OTHER_SUFFIXES = {
    ".msgpack": "Flax weights",
    ".h5": "Keras or TensorFlow weights",
    ".keras": "Keras weights",
    ".pb": "a TensorFlow graph",
    ".index": "a TensorFlow checkpoint",
    ".onnx": "an ONNX model",
    ".npz": "NumPy arrays",
    ".json": "a certificate, a report or an index, which belong to `--certificate` or a folder",
}


def regular(path: Path, need: str = "") -> Path:
    """The path of a file that exists and isn't empty.

    Raises:
        VerifyError: it doesn't exist, is a folder or no ordinary file, or is empty.
    """
    exists(path)
    if path.is_dir():
        raise VerifyError(f"`{path}` is a folder. {need}".rstrip())
    if not path.is_file():
        raise VerifyError(f"`{path}` is no ordinary file (a pipe or a device?). Name a file.")
    if not path.stat().st_size:
        raise VerifyError(f"`{path}` is empty. Was writing it cut off? Get it again.")
    return path


def exists(path: Path) -> None:
    """Raise a `VerifyError` that helps where there is nothing at a path."""
    if path.exists():
        return
    if path.is_symlink():
        raise VerifyError(f"`{path}` is a link to a file that is gone: `{path.readlink()}`.")
    beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    close = get_close_matches(path.name, beside, n=3)
    hint = f" Close to it: {', '.join(f'`{path.parent / name}`' for name in close)}."
    raise VerifyError(
        f"There is no file or folder `{path}`.{hint if close else ''} Give a path on this machine; "
        "a model of the Hugging Face Hub has to be downloaded first, as by `hf download NAME "
        "--local-dir FOLDER`."
    )


def describe(path: Path) -> str:
    """`TORCH`, `SAFETENSORS`, or "" for anything else."""
    with path.open("rb") as stream:
        start = stream.read(32)
    if start.startswith(_ZIP) or (start.startswith(_PICKLE) and not tarfile.is_tarfile(path)):
        return TORCH
    # the length of the header in eight bytes, then the header: JSON
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000:
        return SAFETENSORS
    return ""


def readable(path: Path) -> str:
    """Which of the two formats a file has.

    Raises:
        VerifyError: neither; the message says what it is, and what to do.
    """
    with path.open("rb") as stream:
        start = stream.read(32)
    for magic, (what, fix) in _OTHERS.items():
        if start.startswith(magic):
            raise VerifyError(f"`{path}` is {what}. {fix}")
    if path.suffix in _OTHER_SUFFIXES:
        raise VerifyError(
            f"`{path}` looks like {_OTHER_SUFFIXES[path.suffix]}; only checkpoints and state dicts "
            f"of torch and safetensors files can be read. {_SAVE_ANEW}"
        )
    if path.suffix == ".safetensors":
        return SAFETENSORS
    found = describe(path)
    if not found:
        old = start.startswith(_PICKLE)
        what = "is a tar archive, as torch wrote it before 2018" if old else "holds no weights"
        raise VerifyError(
            f"`{path}` {what}: it is neither a checkpoint or state dict that `torch.save` wrote, "
            f"nor a safetensors file, or its beginning is damaged. {_SAVE_ANEW}"
        )
    return found


def is_zip(path: Path) -> bool:
    """True for the zip archives that torch has written since version 1.6."""
    with path.open("rb") as stream:
        return stream.read(4) == _ZIP


def protocol(path: Path) -> int:
    """The pickle protocol that a file of torch was saved with, 0 where it can't be told."""
    try:
        with path.open("rb") as stream:
            if not is_zip(path):
                return _declared(stream)
            with zipfile.ZipFile(stream) as archive:
                names = [entry for entry in archive.namelist() if entry.endswith("/data.pkl")]
                with archive.open(names[0]) as inside:
                    return _declared(inside)
    except Exception:  # a damaged archive fails in any way it likes
        return 0


def _declared(stream: IO[bytes]) -> int:
    start = stream.read(2)
    return start[1] if start[:1] == _PICKLE else 0


def can_be_mapped(path: Path) -> bool:
    """Whether the tensors of a zip archive of torch lie in it as they are.

    Raises:
        VerifyError: it is cut off, TorchScript, or something else in a zip archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise VerifyError(
            f"`{path}` is cut off or damaged: its table of contents, which stands at its end, "
            f"can't be read ({error}). Get it again, or take an earlier checkpoint."
        ) from None
    inside = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in inside:
        raise VerifyError(
            f"`{path}` is a TorchScript archive: it holds code, which isn't loaded here. Where you "
            "trust it, save its weights alone: "
            f'`torch.save(torch.jit.load("{path}").state_dict(), "weights.pt")`.'
        )
    if "data.pkl" not in inside:
        raise VerifyError(
            f"`{path}` is a zip archive, but not one that `torch.save` wrote. {_SAVE_ANEW}"
        )
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
