"""Who trains in a model: facts -> totals -> text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_freeze.errors import ArgumentError, DiscoveryError
from lightning_freeze.layers import LayerGroup, groups_of
from lightning_freeze.names import ModelIndex
from lightning_freeze.optimizers import learning_rates, listed, whole_groups


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
