"""Do all ranks hold the same tensors, and freeze the same?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import xxhash
from torch import Tensor

from lightning_freeze.audit.findings import Seen
from lightning_freeze.audit.ledger import Ledger
from lightning_freeze.digests import digests
from lightning_freeze.model.index import some


@dataclass(frozen=True)
class RankDigests:
    """Digests of all that should be equal on every rank.

    Attributes:
        by_name: name -> digest.
        buffers: which of the names are buffers.
        frozen: names of what is frozen.
        whole: one digest over all of it, to compare first.
    """

    by_name: Mapping[str, str]
    buffers: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    whole: str = ""


def digests_of(ledger: Ledger) -> RankDigests:
    """All parameters and the frozen buffers of a model, shards left out."""
    named: dict[str, Tensor] = dict(ledger.index.parameters)
    baseline = ledger.baseline
    buffers = {}
    for position, name in enumerate(baseline.names):
        tensor = baseline.tensor(position)
        # what may be a weight, or a queue of each rank's own, isn't compared
        own = ledger.index.owner(name) in ledger.also
        if tensor is not None and baseline.is_buffer(position) and not own:
            buffers[name] = tensor
    whole = {n: t for n, t in {**named, **buffers}.items() if not hasattr(t, "to_local")}
    listed = list(whole)
    found = digests(whole.values(), listed.__getitem__)
    frozen = [name for name in named if name in ledger.declared.frozen]
    text = "\n".join([*listed, "", *frozen]).encode()
    return RankDigests(
        by_name={name: value.hex() for name, value in zip(listed, found)},
        buffers=frozenset(buffers),
        frozen=frozenset(frozen),
        whole=xxhash.xxh3_128_hexdigest(b"".join(found) + text),
    )


def check_ranks(ranks: Sequence[RankDigests], unseen: Collection[str] = ()) -> list[Seen]:
    """Compare what the ranks hold, given in their order.

    Args:
        ranks: digests of each.
        unseen: names of trainable parameters that required no gradient when the model was
            wrapped for several ranks, so that their gradients are never averaged.
    """
    first, *others = (rank.by_name for rank in ranks)
    shared = [name for name in first if all(name in other for other in others)]
    buffers = frozenset().union(*(rank.buffers for rank in ranks))
    causes: dict[tuple[str, str], list[str]] = {}
    for name in shared:
        if any(other[name] != first[name] for other in others):
            causes.setdefault(_why(name in buffers, name in unseen), []).append(name)
    found = [
        Seen(
            "rank-mismatch",
            tuple(names),
            f"{some(names)} differ between rank 0 and rank {_different(ranks, names)}",
            *why,
        )
        for why, names in causes.items()
    ]
    return found + _on_some_only(ranks)


def _different(ranks: Sequence[RankDigests], names: Sequence[str]) -> str:
    return ", ".join(
        str(rank)
        for rank, other in enumerate(ranks)
        if any(other.by_name[name] != ranks[0].by_name[name] for name in names)
    )


def _why(buffer: bool, unseen: bool) -> tuple[str, str]:
    if buffer:
        return (
            "One rank wrote to the buffer, or assigned it anew, which takes it out of what "
            "DistributedDataParallel keeps equal.",
            "Write buffers of frozen modules on no rank, or the same on all of them.",
        )
    fix = "Change the trainable set through these callbacks alone; they re-wrap the model."
    if unseen:
        return (
            "It was unfrozen after DistributedDataParallel had collected what requires a gradient, "
            "so each rank steps with its own gradient.",
            fix,
        )
    return (
        "The replicas have drifted apart: a gradient wasn't averaged, or one rank wrote alone.",
        fix,
    )


def sharded_apart(names: Sequence[str]) -> list[Seen]:
    """Frozen tensors of which each rank holds a part of its own.

    Args:
        names: what is frozen, and was made differently by the ranks before it was sharded.
    """
    if not names:
        return []
    return [
        Seen(
            "rank-mismatch",
            tuple(names),
            f"{some(names)} is frozen, and put together from parts of different models",
            "Each rank made another model and sharded its own: FSDP2 doesn't begin with rank 0's "
            "weights, as DistributedDataParallel does.",
            "Seed before the model is made (`seed_everything`), or load the same weights on every "
            "rank.",
        )
    ]


def _on_some_only(ranks: Sequence[RankDigests]) -> list[Seen]:
    """Parameters that are frozen, or in the model, on some ranks and not on others."""
    found = []
    for what, fields in (
        ("is in the model", [frozenset(rank.by_name) - rank.buffers for rank in ranks]),
        ("is frozen", [rank.frozen for rank in ranks]),
    ):
        places: dict[str, list[str]] = {}
        for name in sorted(frozenset().union(*fields)):
            where = [str(rank) for rank, names in enumerate(fields) if name in names]
            if len(where) < len(ranks):
                places.setdefault(", ".join(where), []).append(name)
        for where_only, names in places.items():
            found.append(
                Seen(
                    "rank-mismatch",
                    tuple(names),
                    f"{some(names)} {what} on rank {where_only} only",
                    "The ranks ran different code: one decided what another didn't.",
                    "Build and freeze the same on every rank; don't decide by a rank's number, or "
                    "by a metric that one rank has alone.",
                )
            )
    return found
