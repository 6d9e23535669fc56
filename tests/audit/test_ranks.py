"""Fingerprints of the same names across ranks."""

from __future__ import annotations

from lightning_freeze.audit.ledger import Ledger
from lightning_freeze.audit.ranks import RankDigests, check_ranks, digests_of
from lightning_freeze.fingerprint import fingerprint
from tests.audit.nets import frozen_net, only


def ranks(*digests: dict[str, str]) -> list[RankDigests]:
    return [RankDigests(by_name) for by_name in digests]


def test_ranks_that_agree_are_silent() -> None:
    assert check_ranks(ranks({"a": "1", "b": "2"}, {"a": "1", "b": "2"})) == []
    assert check_ranks(ranks({"a": "1"})) == []


def test_ranks_that_differ_are_named() -> None:
    same = {"a": "1", "b": "2"}
    seen = only(check_ranks(ranks(same, same, {"a": "1", "b": "3"})))
    assert (seen.code, seen.names) == ("rank-mismatch", ("b",))
    assert seen.message == "b differ between rank 0 and rank 2"


def test_a_tensor_that_one_rank_alone_has_is_found() -> None:
    one, both = {"a": "1"}, {"a": "1", "b": "2"}
    for place, given in enumerate(([both, one], [one, both])):
        seen = only(check_ranks(ranks(*given)))
        assert seen.names == ("b",)
        assert seen.message == f"b is in the model on rank {place} only"


def test_what_is_frozen_on_one_rank_only_is_found_with_the_rank() -> None:
    digests = {"a": "1", "b": "2"}
    thawed, frozen = RankDigests(digests), RankDigests(digests, frozen=frozenset({"b"}))
    seen = only(check_ranks([thawed, frozen]))
    assert seen.message == "b is frozen on rank 1 only"
    assert check_ranks([frozen, frozen]) == []


def test_a_buffer_that_differs_is_explained_as_a_buffer() -> None:
    one, two = (RankDigests({"mean": d}, buffers=frozenset({"mean"})) for d in "12")
    assert "wrote to the buffer" in only(check_ranks([one, two])).cause


def test_what_was_unfrozen_behind_the_back_of_ddp_is_told_from_other_drift() -> None:
    digests = ranks({"a": "1", "b": "2", "c": "3"}, {"a": "9", "b": "8", "c": "3"})
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
