"""Do all ranks hold the same tensors?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import xxhash
from torch import Tensor

from lightning_freeze.audit.findings import Seen
from lightning_freeze.audit.ledger import Ledger
from lightning_freeze.digests import digests
from lightning_freeze.names import some


def check_ranks(digests: Sequence[Mapping[str, str]], unseen: Collection[str] = ()) -> list[Seen]:
    """Compare fingerprints of the same names across ranks, given in the order of ranks.

    Args:
        digests: name -> fingerprint, for each rank.
        unseen: names of trainable parameters that required no gradient when the model was
            wrapped for several ranks, so that their gradients are never averaged.
    """
    every = dict.fromkeys(name for digest in digests for name in digest)
    different = [name for name in every if len({digest.get(name) for digest in digests}) > 1]
    causes: dict[tuple[str, str], list[str]] = {}
    for name in different:
        causes.setdefault(_why(name in unseen), []).append(name)
    return [
        Seen(
            "rank-mismatch",
            tuple(names),
            f"{some(names)} differ between rank 0 and rank {_ranks(digests, names)}",
            *why,
        )
        for why, names in causes.items()
    ]


def _ranks(digests: Sequence[Mapping[str, str]], names: Sequence[str]) -> str:
    return ", ".join(
        str(rank)
        for rank, other in enumerate(digests)
        if any(other.get(name) != digests[0].get(name) for name in names)
    )


def _why(unseen: bool) -> tuple[str, str]:
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


@dataclass(frozen=True)
class RankDigests:
    """Digests of all that should be equal on every rank.

    Attributes:
        by_name: name -> digest.
        whole: one digest over all of them, to compare first.
    """

    by_name: Mapping[str, str]
    whole: str


def digests_of(ledger: Ledger) -> RankDigests:
    """All parameters and the frozen buffers of a model, shards left out."""
    named: dict[str, Tensor] = dict(ledger.index.parameters)
    baseline = ledger.baseline
    for position, name in enumerate(baseline.names):
        tensor = baseline.tensor(position)
        if tensor is not None and baseline.is_buffer(position):
            named[name] = tensor
    whole = {name: tensor for name, tensor in named.items() if not hasattr(tensor, "to_local")}
    listed = list(whole)
    found = digests(whole.values(), listed.__getitem__)
    joined = xxhash.xxh3_128_hexdigest(b"".join(found) + "\n".join(listed).encode())
    return RankDigests({name: value.hex() for name, value in zip(listed, found)}, joined)
