"""The catalogue is whole: one test a row, and most of them run on a CPU."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.catalogue.__main__ import verdict
from tests.catalogue.failures import FAILURES

FOLDER = Path(__file__).parent


def rows() -> dict[str, list[tuple[str, bool]]]:
    """Number -> name of each test that is marked with it, and whether it runs here."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for path in FOLDER.glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "row":
                    assert isinstance(mark.args[0], ast.Constant)
                    runs = all(keyword.arg != "needs" for keyword in mark.keywords)
                    found.setdefault(mark.args[0].value, []).append((node.name, runs))
    return found


def test_each_row_has_one_test_that_bears_its_number() -> None:
    found = rows()
    assert found.keys() == FAILURES.keys()
    for number, tests in found.items():
        assert len(tests) == 1, (number, tests)
        assert re.match(f"test_{number.lower()}_", tests[0][0]), tests


def test_the_page_in_docs_has_each_row_with_its_verdict() -> None:
    page = (FOLDER.parents[1] / "docs" / "failures.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([FMURCI]\d+) \|.*\| (\w+): [^|]+ \|$", page, re.MULTILINE)
    assert [number for number, _ in listed] == list(FAILURES)
    assert {kind for _, kind in listed} <= {"found", "impossible", "told"}


def test_most_rows_run_on_a_cpu() -> None:
    assert sum(tests[0][1] for tests in rows().values()) >= 55


def test_the_table_tells_a_failed_row_and_one_without_a_test() -> None:
    assert verdict(("passed", "found: flag-changed")) == "found: flag-changed"
    assert verdict(("failed", "found: flag-changed")) == "FAILED (found: flag-changed)"
    assert verdict(None) == "NO TEST"
