"""What an audit keeps of a fit."""

from __future__ import annotations

from lightning_freeze.audit.findings import Finding
from lightning_freeze.audit.record import Record
from lightning_freeze.report.timeline import Moment


def found(*names: str, code: str = "frozen-changed", cause: str = "") -> Finding:
    return Finding(code, names, 0, 0, 0, "", cause)


def test_a_change_is_one_event_and_the_same_at_the_next_check_is_counted() -> None:
    record = Record()
    assert record.keep([found("a", "b")]) == [found("a", "b")]
    assert record.keep([found("a", "b")]) == record.keep([found("a")]) == []
    assert [finding.count for finding in record.findings] == [3]
    assert record.keep([found("a", cause="Another.")]) != []
    assert record.keep([found("a", "c", cause="Another.")]) != []
    assert record.keep([]) == []
    assert record.keep([found("a", "b")]) != []  # a later one
    assert [finding.count for finding in record.findings] == [3, 1, 1, 1]


def test_what_stands_is_told_once_in_a_fit_also_in_another_grouping() -> None:
    record = Record()
    first, second = found("a", code="flag-changed"), found("b", code="flag-changed")
    assert len(record.keep([first, second])) == 2
    assert record.keep([]) == []
    assert record.keep([found("a", "b", code="flag-changed")]) == []
    assert record.keep([found("a", code="flag-changed", cause="Another.")]) == []
    assert record.keep([found("a", "c", code="flag-changed")]) != []


def test_what_a_checkpoints_fit_was_told_is_told_again() -> None:
    record = Record(findings=[found("a"), found("b", code="flag-changed")], inherited=2)
    assert len(record.keep([found("a"), found("b", code="flag-changed")])) == 2


def test_the_same_from_two_ranks_is_one_finding() -> None:
    record = Record()
    assert len(record.keep([found("a"), found("a")])) == 1
    assert record.findings[0].count == 1
    assert len(record.keep([found(code="nothing-trainable")] * 2)) == 1


def test_moments_of_one_epoch_can_be_folded_into_what_trained_at_any_time_in_it() -> None:
    record = Record()
    record.add(Moment(3, 60, {"low": None, "high": 0.1, "head": 0.1}))
    record.fold(Moment(3, 80, {"low": 0.2, "high": None, "head": 0.05}))
    record.fold(Moment(4, 90, {"low": 0.2, "high": None, "head": 0.05}))
    assert [(m.epoch, m.step, dict(m.lr)) for m in record.moments] == [
        (3, 60, {"low": 0.2, "high": 0.1, "head": 0.1}),
        (4, 90, {"low": 0.2, "high": None, "head": 0.05}),
    ]
