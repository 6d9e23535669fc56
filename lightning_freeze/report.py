"""Facts -> totals -> text, JSON and pictures."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Union

from torch import nn
from torch.optim import Optimizer

from lightning_freeze.errors import ArgumentError, DiscoveryError
from lightning_freeze.html import summary_to_html
from lightning_freeze.layers import LayerGroup, groups_of
from lightning_freeze.names import ModelIndex
from lightning_freeze.optimizers import learning_rates, listed, whole_groups

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass(frozen=True)
class Row:
    """One tensor of a model.

    Attributes:
        name: dotted name; a tied tensor has one row, under its first name.
        shape: its dimensions.
        parameters: number of elements.
        dtype: such as `float32`.
        trainable: `requires_grad`.
        training: whether the module that owns it is in train mode.
        layer_group: name of its layer group.
        tied_to: its other names, if it has several.
        lr: its learning rate now, None without an optimizer.
        status: "trains", "frozen", or "in no optimizer" (frozen by omission).
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    dtype: str
    trainable: bool
    training: bool
    layer_group: str
    tied_to: tuple[str, ...]
    lr: float | None
    status: str


@dataclass(frozen=True)
class Summary:
    """Who trains in a model. It prints as a table; `to_text("parameter")` lists every tensor.

    Attributes:
        rows: one per tensor.
        title: a line above the table.
        notes: lines below it.
    """

    rows: tuple[Row, ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    @property
    def trainable(self) -> int:
        """Number of elements that train."""
        return sum(row.parameters for row in self.rows if row.status == "trains")

    @property
    def total(self) -> int:
        """Number of elements in all; a tied tensor counts once."""
        return sum(row.parameters for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, ready for JSON."""
        return {
            "title": self.title,
            "trainable": self.trainable,
            "total": self.total,
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def to_text(self, by: str = "group") -> str:
        """The table as text.

        Args:
            by: "group" for one line per layer group, "parameter" for one per tensor.

        Raises:
            ArgumentError: `by` is neither.
        """
        if by not in ("group", "parameter"):
            raise ArgumentError(f'`by` is {by!r}. Write "group" or "parameter".')
        return _render(self, by)

    def __str__(self) -> str:
        return self.to_text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return summary_to_html(self)


def summarize(model: nn.Module, optimizer: Any = None) -> Summary:
    """Who trains in a model, and at which learning rate.

    Args:
        model: any module.
        optimizer: one, several, or what `configure_optimizers` returns; with them the table has
            learning rates, and tells what requires a gradient but is in no optimizer.

    Returns:
        A `Summary`, which prints as a table.

    Example:
        >>> model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> _ = model["backbone"].requires_grad_(False)
        >>> summary = summarize(model)
        >>> summary.trainable, summary.total, len(summary.rows)
        (3, 9, 4)
    """
    optimizers = None if optimizer is None else listed(optimizer)
    index = ModelIndex.of(model)
    return Summary(rows_of(index, groups_or_children(index), optimizers))


def groups_or_children(index: ModelIndex) -> tuple[LayerGroup, ...]:
    """Layer groups where they can be found, otherwise the top-level modules."""
    try:
        return groups_of(index)
    except DiscoveryError:
        found: dict[str, list[str]] = {}
        for name in index.parameters:
            found.setdefault(name.split(".")[0] if "." in name else "", []).append(name)
        return tuple(LayerGroup(key or "(own)", tuple(names)) for key, names in found.items())


def rows_of(
    index: ModelIndex,
    groups: Iterable[LayerGroup],
    optimizers: Sequence[Optimizer] | None = None,
) -> tuple[Row, ...]:
    """One row per tensor of an indexed model, layer group by layer group."""
    lrs = learning_rates(index, optimizers or ())
    held = {id(p) for o in optimizers or () for params in whole_groups(o) for p in params}
    rows = []
    for group in groups:
        for name in group.parameters:
            parameter = index.parameters[name]
            status = "trains" if parameter.requires_grad else "frozen"
            if optimizers is not None and parameter.requires_grad and id(parameter) not in held:
                status = "in no optimizer"
            rows.append(
                Row(
                    name=name,
                    shape=tuple(parameter.shape),
                    parameters=parameter.numel(),
                    dtype=str(parameter.dtype).removeprefix("torch."),
                    trainable=parameter.requires_grad,
                    training=index.modules[index.owner(name)].training,
                    layer_group=group.name,
                    tied_to=index.aliases.get(name, ()),
                    lr=lrs.get(name),
                    status=status,
                )
            )
    return tuple(rows)


def _render(summary: Summary, by: str) -> str:
    from rich.table import Table

    table = Table(title=summary.title or None, title_justify="left", title_style="bold")
    first = "layer group" if by == "group" else "parameter"
    table.add_column(first, overflow="fold")
    with_lr = any(row.lr is not None for row in summary.rows)
    if by == "parameter":
        table.add_column("shape", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("status")
    if with_lr:
        table.add_column("lr", justify="right")
    table.add_column("mode")
    for label, rows in _lines(summary.rows, by):
        cells = [label]
        if by == "parameter":
            cells.append("x".join(map(str, rows[0].shape)) or "scalar")
        cells += [f"{sum(row.parameters for row in rows):,}", _status(rows)]
        if with_lr:
            cells.append(_lrs(rows))
        table.add_row(*cells, _modes(rows))
    lines = [to_text(table)]
    if by == "group":
        for row in summary.rows:
            if row.tied_to:
                lines.append(f"one tensor: {row.name} = {' = '.join(row.tied_to)}")
    share = 100 * summary.trainable / summary.total if summary.total else 0.0
    lines.append(
        f"{summary.trainable:,} of {summary.total:,} parameters train ({share:.2f} %), "
        f"{sum(row.status == 'trains' for row in summary.rows)} of {len(summary.rows)} tensors."
    )
    return "\n".join([*lines, *summary.notes])


def to_text(table: Any, width: int = 110) -> str:
    """A rich renderable as plain text."""
    from rich.console import Console

    stream = io.StringIO()
    # names are names: `layer.[ab]` isn't a style
    Console(file=stream, width=width, color_system=None, emoji=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def _lines(rows: Sequence[Row], by: str) -> list[tuple[str, list[Row]]]:
    if by == "parameter":
        return [(" = ".join((row.name, *row.tied_to)), [row]) for row in rows]
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.layer_group, []).append(row)
    return list(found.items())


def _status(rows: Sequence[Row]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _lrs(rows: Sequence[Row]) -> str:
    lrs = sorted({row.lr for row in rows if row.lr is not None and row.status == "trains"})
    if not lrs:
        return "-"
    return f"{lrs[0]:.3g}" if len(lrs) == 1 else f"{lrs[0]:.3g} - {lrs[-1]:.3g}"


def _modes(rows: Sequence[Row]) -> str:
    modes = {row.training for row in rows}
    return "mixed" if len(modes) > 1 else "train" if modes == {True} else "eval"


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
