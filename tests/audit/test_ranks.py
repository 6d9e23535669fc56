"""Fingerprints of the same names across ranks."""

from __future__ import annotations

from lightning_freeze.audit.ranks import check_ranks
from tests.audit.nets import only


def test_ranks_that_agree_are_silent() -> None:
    assert check_ranks([{"a": "1", "b": "2"}] * 3) == []
    assert check_ranks([{"a": "1"}]) == []


def test_ranks_that_differ_are_named() -> None:
    seen = only(check_ranks([{"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "1", "b": "3"}]))
    assert (seen.code, seen.names) == ("rank-mismatch", ("b",))
    assert seen.message == "b differ between rank 0 and rank 2"


def test_a_tensor_that_one_rank_alone_has_is_found() -> None:
    assert only(check_ranks([{"a": "1"}, {"a": "1", "b": "2"}])).names == ("b",)
    assert only(check_ranks([{"a": "1", "b": "2"}, {"a": "1"}])).names == ("b",)
