"""What an audit keeps of a fit."""

from __future__ import annotations

from lightning_freeze.audit.findings import Finding
from lightning_freeze.audit.record import Record
from lightning_freeze.report.timeline import Moment


def found(*names: str, code: str = "frozen-changed", cause: str = "") -> Finding:
    return Finding(code, names, 0, 0, 0, "", cause)


def test_what_was_told_of_is_not_told_again_in_another_grouping() -> None:
    record = Record()
    assert len(record.keep([found("a"), found("b")])) == 2
    assert record.keep([found("a", "b"), found("b", "a")]) == []
    assert record.keep([found("a", "c")]) == [found("a", "c")]
    assert record.keep([found("a", "b", cause="Another.")]) != []
    assert record.keep([found("a", code="flag-changed")]) != []
    assert len(record.findings) == 5


def test_the_same_from_two_ranks_is_one_finding() -> None:
    assert len(Record().keep([found("a"), found("a")])) == 1
    assert len(Record().keep([found(code="nothing-trainable")] * 2)) == 1


def test_another_cause_is_something_new_only_in_a_hunt_and_only_for_weights() -> None:
    record = Record()
    record.keep([found("a", cause="Unknown."), found("a", code="flag-changed", cause="Unknown.")])
    assert record.keep([found("a", cause="Known.")]) == []
    assert record.keep([found("a", cause="Known.")], by_cause=True) != []
    again = found("a", code="flag-changed", cause="Known.")
    assert record.keep([again], by_cause=True) == []


def test_moments_of_one_epoch_can_be_folded_into_what_trained_at_any_time_in_it() -> None:
    record = Record()
    record.add(Moment(3, 60, {"low": None, "high": 0.1, "head": 0.1}))
    record.fold(Moment(3, 80, {"low": 0.2, "high": None, "head": 0.05}))
    record.fold(Moment(4, 90, {"low": 0.2, "high": None, "head": 0.05}))
    assert [(m.epoch, m.step, dict(m.lr)) for m in record.moments] == [
        (3, 60, {"low": 0.2, "high": 0.1, "head": 0.1}),
        (4, 90, {"low": 0.2, "high": None, "head": 0.05}),
    ]
