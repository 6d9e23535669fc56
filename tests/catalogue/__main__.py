"""`python -m tests.catalogue`: run the tests of the catalogue and print how each row went."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

from tests.catalogue.conftest import OUTCOMES
from tests.catalogue.failures import FAILURES


class _Keep:
    """Holds on to what the session's conftest noted."""

    def __init__(self) -> None:
        self.outcomes: dict[str, tuple[str, str]] = {}

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        self.outcomes = dict(config.stash[OUTCOMES])


def verdict(outcome: tuple[str, str] | None) -> str:
    """How the test of a row went, in words."""
    if outcome is None:
        return "NO TEST"
    result, text = outcome
    return f"FAILED ({text})" if result == "failed" else text


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.catalogue", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    keep = _Keep()
    folder = str(Path(__file__).parent)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = pytest.main(["-q", folder], [keep])
    if status:
        print(printed.getvalue(), file=sys.stderr)
    rows = [
        (number, failure.source, failure.symptom, verdict(keep.outcomes.get(number)))
        for number, failure in FAILURES.items()
    ]
    ran = sum(keep.outcomes.get(number, ("",))[0] in ("passed", "failed") for number in FAILURES)
    if options.markdown:
        print("| id | source | symptom; root cause | here |\n| --- | --- | --- | --- |")
        for row in rows:
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("id", "symptom; root cause", "verdict")
        for number, _, symptom, text in rows:
            table.add_row(number, re.sub("`", "", symptom), text)
        Console().print(table)
    print(f"\n{len(rows)} rows, {ran} of them run here.")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
