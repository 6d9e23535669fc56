"""A preview -> a table: as text, for rich, and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lightning_freeze.report.summary import to_text

if TYPE_CHECKING:
    from lightning_freeze.report.preview import PreviewRow, SchedulePreview

_NARROW, _NARROWER = 100, 80


def text(preview: SchedulePreview, width: int) -> str:
    """The table and what is to be said of it."""
    from rich.text import Text

    lines = [to_text(_table(preview, width), width)]
    lines += [to_text(Text(line), width) for line in _below(preview)]
    return "\n".join(lines)


def renderable(preview: SchedulePreview) -> Any:
    """The same for rich's own printing, which fits it to the terminal."""
    from rich.console import Group
    from rich.text import Text

    return Group(_table(preview, _NARROW), *(Text(line) for line in _below(preview)))


def _title(preview: SchedulePreview) -> str:
    return f"{_count(len(preview.rows), 'stage')} in {_count(preview.max_epochs, 'epoch')}"


def _unit(preview: SchedulePreview) -> str:
    return {"metric": "stage"}.get(preview.unit, preview.unit)


def _below(preview: SchedulePreview) -> list[str]:
    lines = []
    never = [row for row in preview.rows if not row.reached]
    if never:
        lines.append(
            f"{len(never)} of {len(preview.rows)} stages begin after the last epoch "
            f"({preview.max_epochs - 1}) and are never reached."
        )
    if preview.full_flops is not None:
        lines.append(
            f"Step cost: relative to training everything, {_flops(preview.full_flops)} a step "
            f"(inputs: {preview.inputs})."
        )
    return [*lines, *preview.notes]


def _cells(preview: SchedulePreview, row: PreviewRow) -> dict[str, str]:
    factors = sorted(set(row.lr_scale.values()))
    spread = "-" if not factors else f"{factors[0]:.3g}"
    if len(factors) > 1:
        spread += f" - {factors[-1]:.3g}"
    cells = {
        _unit(preview): str(row.at) if row.reached else f"{row.at} (never)",
        "unfreezes": _joined(row.unfrozen),
        "freezes": _joined(row.frozen),
        "trainable": f"{row.trainable:,}",
        "share": f"{100 * row.share:.1f} %",
        "gradients": _size(row.gradient_bytes),
        "optimizer": _size(row.optimizer_bytes),
        "memory": _size(row.gradient_bytes + row.optimizer_bytes),
        "step cost": "unknown" if row.cost is None else f"{100 * row.cost:.1f} %",
        "lr factor": spread,
    }
    if preview.full_flops is None and not preview.notes:
        del cells["step cost"]  # nobody asked
    if not any(row.frozen for row in preview.rows):
        del cells["freezes"]
    elif not any(row.unfrozen for row in preview.rows[1:]):
        del cells["unfreezes"]  # all train at first
    return cells


_NAMES = ("unfreezes", "freezes")
# what is left out
_WIDE = ("memory",)
_SLIM = ("trainable", "gradients", "optimizer")
_SLIMMEST = (*_SLIM, "memory")


def _table(preview: SchedulePreview, width: int) -> Any:
    from rich.box import ROUNDED
    from rich.table import Table
    from rich.text import Text

    narrow = width < _NARROW
    rows = [_cells(preview, row) for row in preview.rows]
    wide = not narrow and "freezes" not in rows[0]  # two columns of names
    left_out = _WIDE if wide else _SLIM if width >= _NARROWER else _SLIMMEST
    shown = [heading for heading in rows[0] if heading not in left_out]
    look: dict[str, Any] = {"box": ROUNDED, "padding": (0, 0)} if narrow else {}
    table = Table(title=Text(_title(preview)), title_justify="left", **look)
    for heading in shown:
        number = heading not in _NAMES
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for cells in rows:
        # names are names: `layer.[ab]` isn't a style
        table.add_row(*(Text(cells[heading]) for heading in shown))
    return table


_STYLE = (
    ".lf-preview{border-collapse:collapse;font-size:13px}"
    ".lf-preview caption{text-align:left;font-weight:600;padding:4px 0}"
    ".lf-preview th,.lf-preview td{padding:3px 10px;text-align:right;white-space:nowrap;"
    "background:none;border-bottom:1px solid rgba(128,128,128,.3)}"
    ".lf-preview .lf-names{text-align:left;white-space:normal}"
    ".lf-preview .lf-never{opacity:.5}"
    ".lf-bar{display:inline-block;width:60px;height:8px;margin-left:6px;"
    "background:rgba(128,128,128,.25)}"
    ".lf-bar>span{display:block;height:8px;background:#3b7dd8}"
    ".lf-note{font-size:12px;opacity:.8;margin:4px 0}"
)


def html(preview: SchedulePreview) -> str:
    """The table for a notebook: it takes the page's own colours, light or dark."""
    rows = [_cells(preview, row) for row in preview.rows]
    headings = [heading for heading in rows[0] if heading not in _WIDE]

    def side(heading: str) -> str:
        return ' class="lf-names"' if heading in _NAMES else ""

    top = "".join(f"<th{side(h)}>{escape(h)}</th>" for h in headings)
    body = []
    for row, cells in zip(preview.rows, rows):
        bars = {"share": row.share, "step cost": row.cost}
        inside = ""
        for heading in headings:
            said = f"{escape(cells[heading])}{_bar(bars.get(heading))}"
            names = ""
            if heading in _NAMES:
                listed = row.unfrozen if heading == "unfreezes" else row.frozen
                names = f' title="{escape(", ".join(listed), quote=True)}"'
            inside += f"<td{side(heading)}{names}>{said}</td>"
        never = "" if row.reached else ' class="lf-never"'
        body.append(f"<tr{never}>{inside}</tr>")
    notes = "".join(f'<p class="lf-note">{escape(line)}</p>' for line in _below(preview))
    return (
        f'<div><style>{_STYLE}</style><table class="lf-preview">'
        f"<caption>{escape(_title(preview))}</caption>"
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>{notes}</div>"
    )


def _bar(share: float | None) -> str:
    if share is None:
        return ""
    return f'<span class="lf-bar"><span style="width:{100 * min(share, 1.0):.1f}%"></span></span>'


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _joined(names: Sequence[str], most: int = 3) -> str:
    if len(names) <= most:
        return ", ".join(names) or "-"
    return f"{names[0]} ... {names[-1]} ({len(names)} groups)"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return ""


def _flops(number: float) -> str:
    for unit in ("", "K", "M", "G", "T"):
        if number < 1000 or unit == "T":
            return f"{number:.0f} FLOPs" if not unit else f"{number:,.1f} {unit}FLOPs"
        number /= 1000
    return ""
