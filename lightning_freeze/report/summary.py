"""Who trains in a model: facts -> totals -> text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_freeze.checkpoints.origin.find import find_origins
from lightning_freeze.checkpoints.origin.frozen import never_learns
from lightning_freeze.checkpoints.origin.states import UNKNOWN, Origins
from lightning_freeze.engine.optimizers import ids_held, learning_rates, listed
from lightning_freeze.errors import ArgumentError, DiscoveryError
from lightning_freeze.model.index import ModelIndex, shape_of, size_of, some
from lightning_freeze.model.layer_groups import LayerGroup, groups_of

_WIDTH = 110
# with one column more, names should still stand on one line
_WIDE = 130


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
        origin: where its values come from, such as "loaded" or "new"; see `summarize`.
        checkpoint_key: its name in the checkpoint that it was compared with, or None.
        origin_detail: what else there is to say of its origin, such as "from bfloat16".
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
    origin: str = UNKNOWN
    checkpoint_key: str | None = None
    origin_detail: str = ""


@dataclass(frozen=True)
class Summary:
    """Who trains in a model. It prints as a table; `to_text("parameter")` lists every tensor.

    Attributes:
        rows: one per tensor.
        title: a line above the table.
        notes: lines below it.
        buffers: name -> origin, of the buffers that a state dict holds (batch-norm statistics).
        unused: keys of the checkpoints given as `origin` that the model has no tensor for.
    """

    rows: tuple[Row, ...]
    title: str = ""
    notes: tuple[str, ...] = ()
    buffers: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

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
            "buffers": dict(self.buffers),
            "unused": list(self.unused),
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
        from lightning_freeze.report.html import table_to_html

        header, body = _table(self, "group")
        notes = _below(self, "group")
        return table_to_html(header, body, title=self.title, notes=notes, numeric=_NUMBERS)


def summarize(model: nn.Module, optimizer: Any = None, *, origin: Any = None) -> Summary:
    """Who trains in a model, at which learning rate, and where its values come from.

    The origin of a tensor is one of:

    - "loaded": it has the bytes of the checkpoint (converted exactly, where dtypes differ), or, as
      long as no file or state dict is given, whoever loaded the model said so;
    - "changed since": it is in the checkpoint, but has other bytes now, as after training;
    - "written since": `from_pretrained` loaded it, and something wrote to it later;
    - "new": it is missing in the checkpoint, so it was newly initialised ("new or written since"
      where it may have been trained or loaded later);
    - "re-initialised": by `reinit` or `ReinitTopLayers` ("re-initialised and changed since" where
      it has other bytes than it was given then);
    - "other shape": the checkpoint has it in another shape;
    - "in the checkpoint": name and shape fit, but there are no bytes to compare (meta device,
      shards, or what transformers puts together from several tensors);
    - "loaded elsewhere": it isn't in this checkpoint, but `from_pretrained` loaded it;
    - "unknown".

    A tied tensor is one tensor, with one origin; `tied_to` has its other names.

    Args:
        model: any module; it isn't changed.
        optimizer: one, several, or what `configure_optimizers` returns; with them the table has
            learning rates, and tells what requires a gradient but is in no optimizer.
        origin: what the model was loaded from: a checkpoint (a safetensors file, a state dict's
            file, a Lightning checkpoint, or a folder of `save_pretrained`; nothing in it is
            executed), a state dict, what `from_pretrained(..., output_loading_info=True)` or
            `load_state_dict(..., strict=False)` returned, a list of these, or a dict from the path
            of a part of the model to one of these. Without it, what the model itself tells:
            `from_pretrained` leaves marks in a transformers model, and `reinit` a record.

    Returns:
        A `Summary`, which prints as a table.

    Raises:
        ArgumentError: `origin` is none of these, or doesn't tell which part it is about.
        VerifyError: a checkpoint can't be read, is refused, or is of another model.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        >>> _ = model["backbone"].requires_grad_(False)
        >>> summary = summarize(model)
        >>> summary.trainable, summary.total, len(summary.rows)
        (3, 9, 4)
        >>> pretrained = {"weight": model["backbone"].weight.detach(), "scale": torch.ones(1)}
        >>> summary = summarize(model, origin={"backbone": pretrained})
        >>> [row.origin for row in summary.rows], summary.unused
        (['loaded', 'new', 'unknown', 'unknown'], ('scale',))
    """
    optimizers = None if optimizer is None else listed(optimizer)
    index = ModelIndex.of(model)
    origins = find_origins(index, origin)
    return Summary(
        rows_of(index, groups_or_children(index), optimizers, origins),
        notes=(*origins.notes, *never_learns(index, origins)),
        buffers={
            name: found.state for name, found in origins.buffers.items() if found.state != UNKNOWN
        },
        unused=origins.unused,
    )


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
    origins: Origins | None = None,
    rates: Mapping[str, float] | None = None,
) -> tuple[Row, ...]:
    """One row per tensor of an indexed model, layer group by layer group."""
    come_from = origins or Origins()
    lrs = learning_rates(index, optimizers or ()) if rates is None else rates
    held = set[int]().union(*map(ids_held, optimizers or ()))
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
                    shape=shape_of(parameter),
                    parameters=size_of(parameter),
                    dtype=str(parameter.dtype).removeprefix("torch."),
                    trainable=parameter.requires_grad,
                    training=index.modules[index.owner(name)].training,
                    layer_group=group.name,
                    tied_to=index.aliases.get(name, ()),
                    lr=lrs.get(name),
                    status=status,
                    origin=come_from[name].state,
                    checkpoint_key=come_from[name].key,
                    origin_detail=come_from[name].detail,
                )
            )
    return tuple(rows)


def _render(summary: Summary, by: str) -> str:
    from rich.table import Table

    table = Table(title=summary.title or None, title_justify="left", title_style="bold")
    header, body = _table(summary, by)
    for heading in header:
        first = heading == header[0]
        side: Any = "right" if heading in _NUMBERS else "left"
        table.add_column(heading, justify=side, overflow="fold" if first else "ellipsis")
    for cells in body:
        table.add_row(*cells)
    wide = "origin" in header and by == "parameter"
    return "\n".join([to_text(table, _WIDE if wide else _WIDTH), *_below(summary, by)])


_NUMBERS = ("shape", "parameters", "lr")


def _table(summary: Summary, by: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells."""
    with_lr = any(row.lr is not None for row in summary.rows)
    with_origin = any(row.origin != UNKNOWN for row in summary.rows)
    header = ["layer group", "parameters", "status"]
    if by == "parameter":
        header = ["parameter", "shape", "parameters", "status"]
    header += (["lr"] if with_lr else []) + ["mode"] + (["origin"] if with_origin else [])
    body = []
    for label, rows in _lines(summary.rows, by):
        cells = [label]
        if by == "parameter":
            cells.append("x".join(map(str, rows[0].shape)) or "scalar")
        cells += [f"{sum(row.parameters for row in rows):,}", counted(row.status for row in rows)]
        if with_lr:
            cells.append(_lrs(rows))
        cells.append(_modes(rows))
        if with_origin:
            cells.append(counted(map(origin_of if by == "parameter" else _state, rows)))
        body.append(cells)
    return header, body


def _below(summary: Summary, by: str) -> list[str]:
    lines = []
    if by == "group":
        for row in summary.rows:
            if row.tied_to:
                lines.append(f"one tensor: {row.name} = {' = '.join(row.tied_to)}")
    share = 100 * summary.trainable / summary.total if summary.total else 0.0
    lines.append(
        f"{summary.trainable:,} of {summary.total:,} parameters train ({share:.2f} %), "
        f"{sum(row.status == 'trains' for row in summary.rows)} of {len(summary.rows)} tensors."
    )
    lazy = [row.name for row in summary.rows if row.shape == (0,)]
    if lazy:
        lines.append(
            f"Not counted, as lazy layers have no shape before their first input: {some(lazy)}."
        )
    return [*lines, *beside(summary, by), *summary.notes]


def beside(summary: Summary, by: str) -> list[str]:
    """Lines on what a checkpoint holds beside the rows of a summary."""
    lines = []
    if unused := summary.unused:
        one = len(unused) == 1
        what = f"{'1 key' if one else f'{len(unused)} keys'} of the checkpoint"
        names = some(unused) if by == "group" else ", ".join(unused)
        lines.append(f"{what} {'isn' if one else 'aren'}'t used: {names}")
    if buffers := summary.buffers:
        lines.append(f"Buffers: {counted(buffers.values(), alone=True)}.")
        if by == "parameter":
            lines += [f"  {name}: {state}" for name, state in buffers.items()]
    return lines


def to_text(table: Any, width: int = _WIDTH) -> str:
    """A rich renderable as plain text."""
    from rich.console import Console

    stream = io.StringIO()
    # names are names: `layer.[ab]` isn't a style
    plain: dict[str, Any] = {"color_system": None, "emoji": False, "markup": False}
    # in a notebook rich would show the table instead of writing it to the stream
    Console(file=stream, width=width, force_jupyter=False, **plain).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def _lines(rows: Sequence[Row], by: str) -> list[tuple[str, list[Row]]]:
    if by == "parameter":
        return [(" = ".join((row.name, *row.tied_to)), [row]) for row in rows]
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.layer_group, []).append(row)
    return list(found.items())


def counted(states: Iterable[str], *, alone: bool = False) -> str:
    """`12 loaded, 2 new`; a state that all have stands alone."""
    counts: dict[str, int] = {}
    for state in states:
        counts[state] = counts.get(state, 0) + 1
    if len(counts) == 1 and not alone:
        return next(iter(counts))
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _state(row: Row) -> str:
    return row.origin


def origin_of(row: Row) -> str:
    """Where a tensor's values come from, with what else there is to say of it."""
    return f"{row.origin} ({row.origin_detail})" if row.origin_detail else row.origin


def _lrs(rows: Sequence[Row]) -> str:
    lrs = sorted({row.lr for row in rows if row.lr is not None and row.status == "trains"})
    if not lrs:
        return "-"
    return f"{lrs[0]:.3g}" if len(lrs) == 1 else f"{lrs[0]:.3g} - {lrs[-1]:.3g}"


def _modes(rows: Sequence[Row]) -> str:
    modes = {row.training for row in rows}
    return "mixed" if len(modes) > 1 else "train" if modes == {True} else "eval"
