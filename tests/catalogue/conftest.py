"""Keeps how the test of each row went, for the table."""

from __future__ import annotations

from typing import Any

import pytest

OUTCOMES = pytest.StashKey[dict[str, tuple[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    marker = item.get_closest_marker("row")
    if marker is not None and (report.when == "call" or report.outcome != "passed"):
        number, verdict = marker.args
        known = item.config.stash[OUTCOMES].get(number)
        if known is None or known[0] != "failed":  # one of several that fails is a failure
            item.config.stash[OUTCOMES][number] = (report.outcome, verdict)
    return report
