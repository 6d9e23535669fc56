"""Fingerprints of the same names across ranks."""

from __future__ import annotations

from lightning_freeze.audit.ledger import Ledger
from lightning_freeze.audit.ranks import check_ranks, digests_of
from lightning_freeze.fingerprint import fingerprint
from tests.audit.nets import frozen_net, only


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


def test_what_was_unfrozen_behind_the_back_of_ddp_is_told_from_other_drift() -> None:
    digests = [{"a": "1", "b": "2", "c": "3"}, {"a": "9", "b": "8", "c": "3"}]
    found = {seen.names: seen.cause for seen in check_ranks(digests, unseen={"b", "c"})}
    assert found.keys() == {("a",), ("b",)}
    assert "unfrozen after DistributedDataParallel had collected" in found[("b",)]
    assert "one rank wrote alone" in found[("a",)]


def test_all_parameters_and_the_frozen_buffers_are_compared() -> None:
    model = frozen_net()
    before = digests_of(Ledger(model))
    assert set(before.by_name) == set(fingerprint(model))
    assert before == digests_of(Ledger(model))
    model.head.bias.data.add_(1)
    after = digests_of(Ledger(model))
    assert after.whole != before.whole
    assert {n for n in before.by_name if before.by_name[n] != after.by_name[n]} == {"head.bias"}
    model.body[1].running_mean.add_(1)
    assert digests_of(Ledger(model)).whole != after.whole
