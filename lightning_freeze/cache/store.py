"""Rows of tensors by key, in memory or in memory-mapped files, within a number of bytes."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from lightning_freeze.errors import ArgumentError

_CHUNK = 8 << 20
# a key, its place, and their share of a dict, measured with sys.getsizeof
ENTRY = 250

STORES = ("memory", "disk")

_UNITS = {"": 0, "b": 0, "k": 1, "kb": 1, "kib": 1, "m": 2, "mb": 2, "mib": 2}
_UNITS |= {"g": 3, "gb": 3, "gib": 3, "t": 4, "tb": 4, "tib": 4}


def as_bytes(value: Any) -> int:
    """A number of bytes as people write it.

    >>> as_bytes("2GiB"), as_bytes("1.5 MB"), as_bytes(512)
    (2147483648, 1500000, 512)

    Raises:
        ArgumentError: it isn't one.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        number = text.rstrip("bikmgt ")
        unit = text[len(number) :].strip()
        try:
            base = 1024 if "i" in unit or unit in ("", "b") else 1000
            size = float(number) * base ** _UNITS[unit]
        except (ValueError, KeyError):
            size = -1.0
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        size = float(value)
    else:
        size = -1.0
    if not 0 < size < float("inf"):
        raise ArgumentError(
            f'`max_bytes` is {value!r}. Write a number of bytes, or such as "2GiB" or "500MB".'
        )
    return int(size)


def dtype_of(value: Any) -> torch.dtype | None:
    """A floating-point type by name; None stays None.

    >>> dtype_of("bfloat16")
    torch.bfloat16

    Raises:
        ArgumentError: it isn't one.
    """
    if value is None:
        return None
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArgumentError(f'`dtype` is {value!r}. Write such as "bfloat16" or "float16".')
    return found


class Full(Exception):
    """No more rows fit; the text says of what."""


@dataclass
class _Shelf:
    """Rows of one shape, found by key: chunks of memory, filled one after the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int
    chunks: list[Tensor] = field(default_factory=list)
    used: int = 0
    places: dict[bytes, tuple[int, int]] = field(default_factory=dict)


class RowStore:
    """Keeps rows of tensors.

    Args:
        max_bytes: for rows, and for the keys that they are found by.
        store: "memory", or "disk" for memory-mapped files, which the operating system keeps in
            memory where there is room.
        folder: where to make these files; a temporary folder where None.
        dtype: what floating-point rows are kept as; as they are where None.
    """

    def __init__(
        self,
        max_bytes: int,
        store: str = "memory",
        folder: Union[str, Path, None] = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.max_bytes = max_bytes
        self.store = store
        self.dtype = dtype
        self.nbytes = 0
        self._parent = folder
        self._folder: Path | None = None
        self._files = 0
        self._shelves: dict[Any, _Shelf] = {}

    def __len__(self) -> int:
        return sum(len(shelf.places) for shelf in self._shelves.values())

    def missing(self, space: Any, keys: Sequence[bytes]) -> list[int]:
        """Positions of the keys that aren't there."""
        shelf = self._shelves.get(space)
        known: Any = () if shelf is None else shelf.places
        return [position for position, key in enumerate(keys) if key not in known]

    def put(self, space: Any, keys: Sequence[bytes], rows: Tensor) -> None:
        """Keep some rows; those that are there already stay as they are.

        Args:
            space: what the keys belong to; all its rows have one shape and dtype.
            keys: one for each row.
            rows: of shape (number of keys, ...).

        Raises:
            Full: not all fit; the first of them may be there.
            OSError: a file can't be made.
        """
        rows = rows.detach()
        if not len(rows):
            return
        shelf = self._shelves.get(space)
        if shelf is None:
            dtype = self.dtype if self.dtype and rows.dtype.is_floating_point else rows.dtype
            size = max(1, rows[0].numel() * dtype.itemsize)
            shelf = self._shelves[space] = _Shelf(tuple(rows.shape[1:]), dtype, size)
        dtype = self.dtype if self.dtype and rows.dtype.is_floating_point else rows.dtype
        if shelf.shape != tuple(rows.shape[1:]) or shelf.dtype != dtype:
            raise ValueError(f"rows of {shelf.shape} and of {tuple(rows.shape[1:])} for one name")
        if dtype == torch.float16 and rows.dtype != dtype and rows.numel():
            largest = rows[rows.isfinite()].abs()
            if largest.numel() and float(largest.max()) > torch.finfo(dtype).max:
                raise ValueError("float16 is too narrow for its values: write bfloat16")
        new = {key: position for position, key in enumerate(keys) if key not in shelf.places}
        if len(new) < len(keys):
            keys = list(new)
            rows = rows[torch.tensor(list(new.values()), dtype=torch.long, device=rows.device)]
        done = 0
        while done < len(keys):
            if not shelf.chunks or shelf.used == len(shelf.chunks[-1]):
                shelf.chunks.append(self._chunk(shelf, len(keys) - done))
                shelf.used = 0
            room = min(len(shelf.chunks[-1]) - shelf.used, len(keys) - done)
            shelf.chunks[-1][shelf.used : shelf.used + room].copy_(rows[done : done + room])
            for position in range(room):
                shelf.places[keys[done + position]] = (len(shelf.chunks) - 1, shelf.used + position)
            shelf.used += room
            done += room

    def get(
        self, space: Any, keys: Sequence[bytes], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The rows of some keys, as a new tensor.

        Raises:
            KeyError: one isn't there.
        """
        shelf = self._shelves[space]
        places = [shelf.places[key] for key in keys]
        chunks = {chunk for chunk, _ in places}
        if len(chunks) == 1:
            index = torch.tensor([row for _, row in places])
            found = shelf.chunks[chunks.pop()].index_select(0, index)
        else:
            found = torch.empty((len(places), *shelf.shape), dtype=shelf.dtype)
            for position, (chunk, row) in enumerate(places):
                found[position] = shelf.chunks[chunk][row]
        return found.to(device=device, dtype=dtype)

    def keep(self, wanted: Callable[[Any], bool]) -> None:
        """Forget the rows of all spaces but some."""
        for space in [space for space in self._shelves if not wanted(space)]:
            shelf = self._shelves.pop(space)
            self.nbytes -= sum(len(chunk) * (shelf.size + ENTRY) for chunk in shelf.chunks)

    def clear(self) -> None:
        """Forget all rows, and remove the files."""
        self._shelves = {}
        self.nbytes = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _chunk(self, shelf: _Shelf, wanted: int) -> Tensor:
        """Room for rows: as many as there are already, but not less than is wanted now."""
        each = shelf.size + ENTRY
        rows = max(wanted, min(len(shelf.places), _CHUNK // shelf.size))
        rows = min(rows, (self.max_bytes - self.nbytes) // each)
        if rows <= 0:
            raise Full(f"{len(self)} rows, {self.nbytes} bytes")
        with torch.inference_mode(False):
            if self.store == "memory":
                chunk = torch.empty((rows, *shelf.shape), dtype=shelf.dtype)
            else:
                chunk = self._mapped(shelf, rows)
        self.nbytes += rows * each
        return chunk

    def _mapped(self, shelf: _Shelf, rows: int) -> Tensor:
        if self._folder is None:
            if self._parent is not None:
                Path(self._parent).mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(".frozen", "lightning-", self._parent))
        path = self._folder / str(self._files)
        self._files += 1
        numel = rows * math.prod(shelf.shape)
        try:
            with path.open("wb") as file:
                # a full disk says so here; writing to a map would end the process
                _reserve(file.fileno(), max(1, numel * shelf.dtype.itemsize))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        flat = torch.from_file(str(path), shared=True, size=numel, dtype=shelf.dtype)
        path.unlink()  # the map holds it; a killed process leaves nothing
        return flat.view(rows, *shelf.shape)


def _reserve(handle: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:  # Windows, macOS
        block = bytes(1 << 20)
        for start in range(0, size, len(block)):
            os.write(handle, block[: size - start])
