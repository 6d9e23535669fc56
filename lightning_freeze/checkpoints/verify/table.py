"""What a verification found -> text that a newcomer understands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_freeze.checkpoints.verify.result import (
    CHANGED,
    FAILED,
    MARKS,
    STATES,
    UNLIKE,
    GroupResult,
    Side,
    TensorResult,
    tensors,
    worst,
)
from lightning_freeze.checkpoints.verify.spelling import printable_lines
from lightning_freeze.report.summary import to_text

if TYPE_CHECKING:
    from lightning_freeze.checkpoints.verify.result import Verification

# names get copied: room for long ones to stay whole
_WIDTH = 160


def render(found: Verification, every: bool) -> str:
    """The table, what it was made of above it, notes and verdict below it."""
    parts = [*_head(found), _by_group(found)]
    if every:
        parts.append(_by_tensor(found))
    return printable_lines("\n".join([*parts, *found.notes, found.verdict]))


def _head(found: Verification) -> list[str]:
    lines = []
    if found.base is not None:
        lines.append(_side("BASE", found.base))
    lines.append(_side("CHECKPOINT", found.checkpoint))
    if found.certificate is not None and found.certificate_side is not None:
        at = f"epoch {found.certificate.epoch}, step {found.certificate.step}"
        lines.append(f"{_side('certificate', found.certificate_side)}, written at {at}")
    return lines


def _side(label: str, side: Side) -> str:
    prefix = f", names under `{side.prefix}`" if side.prefix else ""
    return f"{label:<12}{side.path} ({side.kind}, {tensors(side.tensors)}{prefix})"


def _by_group(found: Verification) -> str:
    from rich.table import Table

    table = Table()
    table.add_column("layer group", overflow="fold")
    table.add_column("tensors", justify="right")
    if found.certificate is not None:
        table.add_column("frozen tensors")
    if found.base is not None:
        table.add_column("against BASE")
        table.add_column("largest difference", justify="right")
    for group in found.groups:
        cells = [group.name, str(len(group.tensors))]
        if found.certificate is not None:
            cells.append(_frozen(group))
        if found.base is not None:
            cells += [_against_base(group), worst(group.tensors)]
        table.add_row(*cells)
    return to_text(table, _WIDTH)


def _against_base(group: GroupResult) -> str:
    listed = [t for state in STATES for t in group.tensors if t.status == state]
    words = [tensor.against_base for tensor in listed]
    return _counts({text: words.count(text) for text in words}, len(group.tensors))


def _counts(found: Mapping[str, int], whole: int) -> str:
    if len(found) == 1 and whole in found.values():
        return next(iter(found))
    return ", ".join(f"{count} {words}" for words, count in found.items()) or "-"


def _frozen(group: GroupResult) -> str:
    marks = _counts(group.counts(MARKS), len(group.tensors))
    free = sum(not tensor.certified for tensor in group.tensors)
    if free == len(group.tensors):
        return "not frozen"
    return f"{marks}, {free} not frozen" if free else marks


def _by_tensor(found: Verification) -> str:
    from rich.table import Table

    listed = [t for t in found.tensors if t.status in UNLIKE or t.certified in FAILED]
    if not listed:
        return "No tensor changed."
    table = Table()
    table.add_column("tensor", overflow="fold")
    if found.certificate is not None:
        table.add_column("frozen")
    if found.base is not None:
        table.add_column("against BASE")
        table.add_column("largest difference", justify="right")
    for tensor in listed:
        cells = [tensor.name]
        if found.certificate is not None:
            cells.append(tensor.certified or "not frozen")
        if found.base is not None:
            cells += [_detail(tensor), worst([tensor])]
        table.add_row(*cells)
    return to_text(table, _WIDTH)


def _detail(tensor: TensorResult) -> str:
    if tensor.status in UNLIKE and tensor.status != CHANGED:
        return f"{tensor.against_base}: {tensor.base}, now {tensor.checkpoint}"
    return tensor.against_base if tensor.status in STATES else "-"
