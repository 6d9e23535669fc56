"""A model -> which layer groups it has and which rule found them, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_freeze.errors import DiscoveryError
from lightning_freeze.layers import discover
from lightning_freeze.names import ModelIndex
from lightning_freeze.report import Row, groups_or_children, rows_of, to_text


@dataclass(frozen=True)
class Inspection:
    """What is known of a model without training it.

    Attributes:
        about: which model it is.
        rule: which rule found the layer groups.
        groups: their names, bottom to top.
        rows: one per tensor; where a tensor's values come from belongs there.
        notes: lines below the table.
    """

    about: str
    rule: str
    groups: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, about: str = "", notes: Sequence[str] = ()) -> Inspection:
        """Look at a model; it isn't changed.

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
        rows = rows_of(index, groups)
        names = tuple(group.name for group in groups)
        return cls(about or type(model).__name__, rule, names, rows, tuple(said))

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
        total = sum(row.parameters for row in self.rows)
        if tensors:
            for row in self.rows:
                shape = "x".join(map(str, row.shape)) or "scalar"
                table.add_row(Text(row.name), shape, f"{row.parameters:,}", row.dtype)
        for name in () if tensors else self.groups:
            inside = [row for row in self.rows if row.layer_group == name]
            size = sum(row.parameters for row in inside)
            table.add_row(
                Text(name),
                f"{size:,}",
                str(len(inside)),
                f"{100 * size / total:.1f} %" if total else "-",
                ", ".join(dict.fromkeys(row.dtype for row in inside)),
            )
        lines = [f"{total:,} parameters in {len(self.rows)} tensors. Found by: {self.rule}."]
        for row in self.rows:
            if row.tied_to:
                lines.append(f"one tensor: {row.name} = {' = '.join(row.tied_to)}")
        lines += self.notes
        return "\n".join([to_text(table, width), *(to_text(Text(x), width) for x in lines)])
