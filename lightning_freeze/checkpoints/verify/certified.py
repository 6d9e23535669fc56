"""What a certificate says, by the names of CHECKPOINT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_freeze.checkpoints.certificate import Certificate, Certified
from lightning_freeze.checkpoints.verify.align import (
    CERTIFICATE,
    Alignment,
    SeveralPlacesError,
    Shapes,
    align,
)
from lightning_freeze.checkpoints.verify.spelling import printable, tidy
from lightning_freeze.errors import VerifyError
from lightning_freeze.model.index import some

# findings that say of a tensor that it isn't what it was, or not the one that was meant
ABOUT_WEIGHTS = frozenset(
    {
        "frozen-changed",
        "frozen-buffer-changed",
        "parameter-replaced",
        "tie-split",
        "resume-mismatch",
        "rank-mismatch",
    }
)
_SIDES = (CERTIFICATE, "CHECKPOINT")
_MOST = 8


@dataclass(frozen=True)
class Promises:
    """What a certificate says.

    Attributes:
        left: what the names of the certificate begin with where those of CHECKPOINT don't.
        entries: name in CHECKPOINT -> what is certified of the tensor.
        tied: name in CHECKPOINT -> the other certified names of the same tensor.
    """

    left: str
    entries: Mapping[str, Certified]
    tied: Mapping[str, tuple[str, ...]]


def promises(certificate: Certificate, right: Shapes, prefix: str | None) -> Promises:
    """Find what is certified among the tensors of CHECKPOINT.

    Args:
        certificate: that of a run.
        right: name -> shape, of CHECKPOINT.
        prefix: where the common part begins, if it stands there several times.

    Raises:
        VerifyError: it certifies nothing, or the tensors of another model.
    """
    if not certificate.frozen:
        if about_weights(certificate):
            return Promises("", {}, {})
        raise VerifyError(_of_nothing(certificate))
    short = tidy(certificate.frozen)
    frozen = {short[name]: entry for name, entry in certificate.frozen.items()}
    found = _align({name: entry.shape for name, entry in frozen.items()}, right, prefix)
    return Promises(
        found.left,
        {found.names[name]: entry for name, entry in frozen.items()},
        {
            found.names[short[name]]: tuple(found.names[short[other]] for other in others)
            for name, others in _ties(certificate.frozen).items()
        },
    )


def _align(frozen: Shapes, right: Shapes, prefix: str | None) -> Alignment:
    try:
        return align(frozen, right, None, _SIDES)
    except SeveralPlacesError:
        if prefix is None:
            raise
    except VerifyError:
        # a checkpoint may hold little of what was frozen, under its own names
        here = [name for name in frozen if name in right]
        if here and all(frozen[name] == right[name] for name in here):
            return Alignment("", "", {name: name for name in frozen})
        if prefix is None:
            raise
    # a prefix says where BASE stands; here it only decides what is open
    return align(frozen, right, prefix, _SIDES)


def _ties(frozen: Mapping[str, Certified]) -> dict[str, tuple[str, ...]]:
    """Name -> the others of one tensor, as far as what is certified of them agrees."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, entry in frozen.items():
        first = entry.tied_to or name
        groups.setdefault((first, entry.fingerprint, entry.dtype, entry.shape), []).append(name)
    return {
        name: tuple(other for other in names if other != name)
        for names in groups.values()
        for name in names
        if len(names) > 1
    }


def about_weights(certificate: Certificate) -> tuple[Mapping[str, object], ...]:
    """The findings that mean that weights aren't what they have to be."""
    return tuple(f for f in certificate.findings if code(f) in ABOUT_WEIGHTS)


def findings(certificate: Certificate) -> list[str]:
    """What the run found, one line each, the first few."""
    told = [
        f"the certificate records [{code(finding)}] {_told(finding)}".rstrip()
        for finding in certificate.findings
    ]
    more = len(told) - _MOST
    return told if more <= 0 else [*told[:_MOST], f"and {more} more"]


def code(finding: Mapping[str, object]) -> str:
    """What kind of finding it is."""
    return printable(str(finding.get("code", "?")))


def _told(finding: Mapping[str, object]) -> str:
    if message := finding.get("message"):
        return printable(str(message))
    names = finding.get("names")
    return _first([printable(str(n)) for n in names]) if isinstance(names, (list, tuple)) else ""


def _first(names: Iterable[str]) -> str:
    return some([f"`{name}`" for name in names], most=2)


def _of_nothing(certificate: Certificate) -> str:
    lines = findings(certificate)
    return "\n".join(
        [
            "The certificate certifies no tensor: nothing was frozen when it was written. Compare "
            "with the weights that the run began with instead: `verify BASE CHECKPOINT`.",
            *lines,
        ]
    )
