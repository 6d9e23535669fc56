"""A model -> which layer groups it has and which rule found them, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_freeze.checkpoints.origin import UNKNOWN, find_origins
from lightning_freeze.errors import DiscoveryError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.layer_groups import discover
from lightning_freeze.report.summary import (
    Row,
    Summary,
    beside,
    counted,
    groups_or_children,
    origin_of,
    rows_of,
    to_text,
)


@dataclass(frozen=True)
class Inspection:
    """What is known of a model without training it.

    Attributes:
        about: which model it is.
        rule: which rule found the layer groups.
        groups: their names, bottom to top.
        rows: one per tensor.
        notes: lines below the table.
        unused: keys of the checkpoint given as `origin` that the model has no tensor for.
    """

    about: str
    rule: str
    groups: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        about: str = "",
        notes: Sequence[str] = (),
        origin: Any = None,
    ) -> Inspection:
        """Look at a model; it isn't changed.

        Args:
            model: any module.
            about: which it is, for the title.
            notes: more lines below the table.
            origin: where its values come from, as for `summarize`.

        Example:
            >>> model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
            >>> Inspection.of(model).rule
            'the attribute `backbone`'
        """
        index = ModelIndex.of(model)
        said = list(notes)
        rule = "none: there are no parameters"
        try:
            if index.parameters:
                rule = discover(index).rule
        except DiscoveryError as error:
            rule = "none: these are the top-level modules"
            said.append(str(error))
        groups = groups_or_children(index)
        origins = find_origins(index, origin)
        rows = rows_of(index, groups, origins=origins)
        names = tuple(group.name for group in groups)
        said += origins.notes
        title = about or type(model).__name__
        return cls(title, rule, names, rows, tuple(said), tuple(origins.unused))

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def to_text(self, *, tensors: bool = False, width: int = 110) -> str:
        """The table as text.

        Args:
            tensors: one line per tensor instead of one per layer group.
            width: in characters.
        """
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.about), title_justify="left")
        table.add_column("tensor" if tensors else "layer group", overflow="fold")
        if tensors:
            table.add_column("shape", justify="right", overflow="fold")
        table.add_column("parameters", justify="right", overflow="fold")
        if not tensors:
            table.add_column("tensors", justify="right", overflow="fold")
            table.add_column("share", justify="right", overflow="fold")
        table.add_column("dtype", overflow="fold")
        known = any(row.origin != UNKNOWN for row in self.rows)
        if known:
            table.add_column("origin", overflow="fold")
        total = sum(row.parameters for row in self.rows)
        if tensors:
            for row in self.rows:
                shape = "x".join(map(str, row.shape)) or "scalar"
                cells = [shape, f"{row.parameters:,}", row.dtype]
                table.add_row(Text(row.name), *cells, *([origin_of(row)] if known else []))
        for name in () if tensors else self.groups:
            inside = [row for row in self.rows if row.layer_group == name]
            size = sum(row.parameters for row in inside)
            table.add_row(
                Text(name),
                f"{size:,}",
                str(len(inside)),
                f"{100 * size / total:.1f} %" if total else "-",
                ", ".join(dict.fromkeys(row.dtype for row in inside)),
                *([counted(row.origin for row in inside)] if known else []),
            )
        lines = [f"{total:,} parameters in {len(self.rows)} tensors. Found by: {self.rule}."]
        for row in self.rows:
            if row.tied_to:
                lines.append(f"one tensor: {row.name} = {' = '.join(row.tied_to)}")
        by = "parameter" if tensors else "group"
        lines += [*beside(Summary(self.rows, unused=self.unused), by), *self.notes]
        return "\n".join([to_text(table, width), *(to_text(Text(x), width) for x in lines)])
