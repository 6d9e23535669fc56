"""Findings as values, and the error that says them."""

from __future__ import annotations

import json

import pytest

from lightning_freeze import FrozenWeightsChanged
from lightning_freeze.audit.findings import CODES, Finding, Seen, error_for
from lightning_freeze.errors import AuditError, FreezeError

FINDING = Finding("frozen-changed", ("a", "b"), 2, 30, 1, "a, b changed", "Because.", "Mend it.")


def test_a_finding_reads_as_one_line() -> None:
    expected = "[frozen-changed] a, b changed (epoch 2, step 30, rank 1). Because. Mend it."
    assert str(FINDING) == expected


def test_a_finding_is_plain_values() -> None:
    assert json.loads(json.dumps(FINDING.to_dict())) == {
        "code": "frozen-changed",
        "names": ["a", "b"],
        "epoch": 2,
        "step": 30,
        "rank": 1,
        "message": "a, b changed",
        "cause": "Because.",
        "fix": "Mend it.",
        "since": None,
        "severity": "error",
        "count": 1,
    }


def test_a_finding_tells_until_when_it_was_right() -> None:
    finding = Finding("flag-changed", ("a",), 2, 30, 1, "a flipped", since=(1, 20))
    expected = "[flag-changed] a flipped (epoch 2, step 30, rank 1; right until epoch 1, step 20)."
    assert str(finding) == expected
    assert finding.to_dict()["since"] == [1, 20]


def test_what_was_seen_is_stamped_with_when_and_where() -> None:
    seen = Seen("frozen-changed", ("a", "b"), "a, b changed", "Because.", "Mend it.")
    assert seen.at(2, 30, 1) == FINDING


@pytest.mark.parametrize("code", CODES)
def test_the_error_is_about_weights_exactly_when_weights_changed(code: str) -> None:
    finding = Finding(code, (), 0, 0, 0, "something")
    error = error_for([finding])
    changed = code in ("frozen-changed", "frozen-buffer-changed")
    assert type(error) is (FrozenWeightsChanged if changed else AuditError)
    assert isinstance(error, FreezeError)
    assert error.findings == [finding]
    assert f"[{code}] something" in str(error)
