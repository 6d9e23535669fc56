"""A model -> one row of the table of families, and what is odd about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_freeze.errors import FreezeError
from lightning_freeze.model.discovery.anatomy import Anatomy, LayerGroup
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.layer_groups import discover


@dataclass(frozen=True)
class Row:
    """What discovery finds in one model.

    Attributes:
        family: a name of the library's.
        kind: the model's class.
        rule: which rule found it, or the error.
        stacks: each tower's blocks, as `bert.encoder.layer.0-3 (4)`.
        sizes: number of blocks of each.
        above: the parts above the blocks.
        head: the parts outside the backbone.
        partition: whether every parameter is in exactly one layer group.
    """

    family: str
    kind: str
    rule: str
    stacks: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    above: str = ""
    head: str = ""
    partition: bool = True

    def cells(self) -> list[str]:
        """The row as texts."""
        return [self.family, self.kind, self.rule, "; ".join(self.stacks), self.above, self.head]


def row_of(family: str, model: nn.Module) -> Row:
    """Look at a model."""
    index = ModelIndex.of(model)
    kind = type(model).__name__
    try:
        found = discover(index)
    except FreezeError as error:
        return Row(family, kind, str(error))
    names = [name for group in found.groups for name in group.parameters]
    return Row(
        family,
        kind,
        _short(found),
        tuple(_span(stack.blocks) for stack in found.stacks),
        tuple(len(stack.blocks) for stack in found.stacks),
        _parts(index, found.above),
        _parts(index, found.head) or (f"tied: {found.tied[0]}" if found.tied else ""),
        len(names) == len(set(names)) and set(names) == set(index.parameters),
    )


def _short(found: Anatomy) -> str:
    """The rule without the stacks, which have a column of their own."""
    rule = found.rule.partition(": stacks")[0]
    return rule + (", stacks side by side" if found.parallel else "")


def _span(blocks: Sequence[LayerGroup]) -> str:
    """`encoder.layer.0` to `encoder.layer.3` as `encoder.layer.0-3 (4)`."""
    first, last = blocks[0].name, blocks[-1].name
    many = f"({len(blocks)})"
    if len(blocks) == 1:
        return f"{first} {many}"
    a, b = (re.fullmatch(r"(.*?)(\d+)", name) for name in (first, last))
    if a and b and a[1] == b[1]:
        return f"{first}-{b[2]} {many}"
    return f"{first} ... {last} {many}"


def _parts(index: ModelIndex, names: Iterable[str], most: int = 3) -> str:
    """The outermost modules that hold these parameters and no others."""
    listed = tuple(names)
    members = set(listed)
    parts: dict[str, None] = {}
    for name in listed:
        path = ""
        for component in name.split("."):
            path = f"{path}.{component}" if path else component
            module = index.modules.get(path)
            if module is not None and members.issuperset(index.within(module)):
                break
        parts[path] = None
    shown = list(parts)[:most]
    more = len(parts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
