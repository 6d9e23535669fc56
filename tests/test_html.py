"""Tables in a notebook: whole, escaped, and in the theme's own colours."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import torch
from torch import nn

from lightning_freeze import TrainableParamAudit, freeze, summarize
from lightning_freeze.audit.findings import Finding
from lightning_freeze.report.html import audit_to_html, table_to_html
from tests.toys import Toy


class Cells(HTMLParser):
    """The text of each row; fails on tags that don't close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_a_summary_shows_each_layer_group_as_its_text_does() -> None:
    model = Toy()
    freeze(model, "backbone")
    summary = summarize(model, torch.optim.SGD(model.head.parameters(), lr=0.1))
    rows = Cells(summary._repr_html_()).rows
    assert rows[0] == ["layer group", "parameters", "status", "lr", "mode"]
    assert rows[1] == ["backbone.embed", "40", "frozen", "-", "eval"]
    assert rows[-1] == ["head", "27", "trains", "0.1", "train"]
    assert "27 of 331 parameters train (8.16 %)" in summary._repr_html_()
    for row in rows[1:]:
        assert row[0] in str(summary)


def test_names_are_escaped() -> None:
    model = nn.ModuleDict({"<script>alert(1)</script>": nn.Linear(1, 1)})
    page = summarize(model)._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    finding = Finding("no-gradient", ("a",), 1, 2, 0, "`<i>` & more", fix="<b>")
    page = audit_to_html("<u>", [finding, finding])
    assert not re.search("<[iub]>", page)
    assert Cells(page).rows[1] == ["no-gradient", "1", "2", "`<i>` & more", "<b>"]


def test_colours_are_those_of_the_theme() -> None:
    page = table_to_html(["a"], [[1]], title="t", notes=["n"]) + summarize(Toy())._repr_html_()
    assert not re.search(r"#[0-9a-f]{3,6}\b|\brgb|white|black", page)
    colours = set(re.findall(r"(?<![\w-])(?:color|background): ([^;\"]+)", page))
    assert colours == {"inherit", "transparent"}


def test_an_audit_shows_its_verdict() -> None:
    audit = TrainableParamAudit()
    assert "nothing was recorded" in audit._repr_html_()
