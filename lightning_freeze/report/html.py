"""Rows -> a table for a notebook, which takes its colours from the notebook's theme."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_freeze.audit.findings import Finding

# lines as faint as text allows: readable on white and on black
_LINE = "border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent)"
_CELL = f"padding: 0.15em 0.8em; background: transparent; color: inherit; {_LINE}"


def table_to_html(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    notes: Iterable[str] = (),
    numeric: Collection[str] = (),
) -> str:
    """A table as HTML. All text is escaped; no colour is set but the theme's own.

    Args:
        header: the columns' headings.
        rows: cells, as many in each row as there are columns.
        title: above the table.
        notes: below it.
        numeric: headings of the columns that are set flush right.

    Example:
        >>> "&lt;b&gt;" in table_to_html(["name"], [["<b>"]])
        True
    """

    def cells(kind: str, values: Sequence[object]) -> str:
        found = []
        for heading, value in zip(header, values):
            side = "right" if heading in numeric else "left"
            style = f"text-align: {side}; {_CELL}"
            found.append(f'<{kind} style="{style}">{escape(str(value))}</{kind}>')
        return f"<tr>{''.join(found)}</tr>"

    caption = "caption-side: top; text-align: left; color: inherit; font-weight: bold"
    parts = ['<table style="border-collapse: collapse; color: inherit">']
    if title:
        parts.append(f'<caption style="{caption}">{escape(title)}</caption>')
    parts.append(f"<thead>{cells('th', header)}</thead>")
    parts.append(f"<tbody>{''.join(cells('td', row) for row in rows)}</tbody></table>")
    parts += [f'<p style="margin: 0.3em 0">{escape(note)}</p>' for note in notes]
    return "\n".join(parts)


def audit_to_html(verdict: str, findings: Sequence[Finding]) -> str:
    """An audit's verdict, and a row per finding."""
    if not findings:
        return f"<p>{escape(verdict)}</p>"
    rows = [
        [f.code, f.epoch, f.step, " ".join(filter(None, (f.message, f.cause))), f.fix]
        for f in findings
    ]
    header = ["code", "epoch", "step", "what", "fix"]
    return table_to_html(header, rows, title=verdict, numeric=("epoch", "step"))
