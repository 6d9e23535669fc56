"""What a verification found, as values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_freeze.checkpoints.certificate import Certificate
from lightning_freeze.checkpoints.verify.certified import about_weights
from lightning_freeze.checkpoints.verify.weights import Spec

IDENTICAL = "identical"
CHANGED = "changed"
OTHER_DTYPE = "other dtype"
OTHER_SHAPE = "other shape"
ONLY_BASE = "only in BASE"
ONLY_CHECKPOINT = "only in CHECKPOINT"
NOT_COMPARED = "not compared"
UNLIKE = (CHANGED, OTHER_DTYPE, OTHER_SHAPE)
STATES = (IDENTICAL, *UNLIKE, ONLY_BASE, ONLY_CHECKPOINT)

HELD = "as certified"
BROKEN = "not as certified"
MISSING = "missing"
NOT_BASE = "not as in BASE"
FAILED = (BROKEN, MISSING, NOT_BASE)
WRONG = (BROKEN, NOT_BASE)
MARKS = (HELD, *FAILED)


@dataclass(frozen=True)
class TensorResult:
    """What was found of one tensor.

    Attributes:
        name: as in CHECKPOINT, or as it would be called there.
        group: its layer group.
        base: dtype and shape in BASE, None where it isn't there.
        checkpoint: the same in CHECKPOINT.
        status: "identical", "changed", "other dtype", "other shape", "only in BASE", "only in
            CHECKPOINT", or "not compared" without a BASE.
        difference: the largest absolute difference, where it changed.
        certified: "as certified", "not as certified", "missing", "not as in BASE", or "" where
            the certificate says nothing of it, or there is none.
        converted: whether it is, in another dtype, what BASE is when it is converted to that.
        reinitialised: whether it differs from BASE as the certificate says that it does.
    """

    name: str
    group: str
    base: Spec | None
    checkpoint: Spec | None
    status: str
    difference: float | None = None
    certified: str = ""
    converted: bool = False
    reinitialised: bool = False

    @property
    def against_base(self) -> str:
        """The status, for a reader."""
        if self.converted and self.checkpoint is not None:
            return f"as BASE, converted to {self.checkpoint.dtype}"
        return "re-initialised" if self.reinitialised else self.status

    def to_dict(self) -> dict[str, Any]:
        """As plain values; an infinite difference or one to a NaN is a string."""
        return {
            "name": self.name,
            "group": self.group,
            "base": _plain(self.base),
            "checkpoint": _plain(self.checkpoint),
            "status": self.status,
            "difference": plain_number(self.difference),
            "certified": self.certified or None,
            "converted": self.converted,
            "reinitialised": self.reinitialised,
        }


@dataclass(frozen=True)
class GroupResult:
    """The tensors of one layer group.

    Attributes:
        name: of the group.
        tensors: what was found of each.
    """

    name: str
    tensors: tuple[TensorResult, ...]

    def counts(self, states: Sequence[str]) -> dict[str, int]:
        """How many of its tensors are in which of some states, the empty ones left out."""
        found = {s: sum(s in (t.status, t.certified) for t in self.tensors) for s in states}
        return {state: count for state, count in found.items() if count}

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "name": self.name,
            "tensors": len(self.tensors),
            "against_base": self.counts(STATES),
            "certified": self.counts(MARKS),
            "difference": plain_number(largest(self.tensors)),
        }


@dataclass(frozen=True)
class Side:
    """One of the things that were compared.

    Attributes:
        path: as it was given.
        kind: what it is, in words.
        tensors: how many it holds.
        prefix: what its names begin with where the others' names don't.
    """

    path: str
    kind: str
    tensors: int
    prefix: str = ""


@dataclass(frozen=True)
class Verification:
    """What was found. It prints as a table with a verdict; `to_text(tensors=True)` has all names.

    Attributes:
        base: what the run began with, or None.
        checkpoint: what was verified.
        tensors: one result per tensor, in the order of the model.
        certificate: what says which tensors were frozen, or None.
        certificate_side: where it was read from.
        notes: what else a reader should know.
    """

    base: Side | None
    checkpoint: Side
    tensors: tuple[TensorResult, ...]
    certificate: Certificate | None = None
    certificate_side: Side | None = None
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[GroupResult, ...]:
        """The results by layer group."""
        found: dict[str, list[TensorResult]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.group, []).append(tensor)
        return tuple(GroupResult(name, tuple(tensors)) for name, tensors in found.items())

    @property
    def status(self) -> int:
        """The exit status: 0 if all is as it has to be, 1 if not, 2 if some can't be verified.

        With a certificate: 1 if a certified tensor isn't as certified, or if the run itself found
        weights that weren't as they had to be; else 2 if CHECKPOINT doesn't hold a certified
        tensor. Without: 1 if a tensor that both files have isn't identical.
        """
        if self.certificate is None:
            return int(any(t.status in UNLIKE for t in self.tensors))
        marks = {t.certified for t in self.tensors}
        if about_weights(self.certificate) or not marks.isdisjoint(WRONG):
            return 1
        return 2 if MISSING in marks else 0

    @property
    def ok(self) -> bool:
        """Whether all is as it has to be."""
        return self.status == 0

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        from lightning_freeze.checkpoints.verify.verdict import verdict

        return verdict(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, ready for JSON."""
        return {
            "format": 1,
            "ok": self.ok,
            "status": self.status,
            "verdict": self.verdict,
            "base": None if self.base is None else vars(self.base),
            "checkpoint": vars(self.checkpoint),
            "certificate": None if self.certificate is None else self._certificate(),
            "groups": [group.to_dict() for group in self.groups],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "notes": list(self.notes),
        }

    def _certificate(self) -> dict[str, Any]:
        certificate, side = self.certificate, self.certificate_side
        assert certificate is not None and side is not None
        return {
            "path": side.path,
            "tensors": side.tensors,
            "prefix": side.prefix,
            "created": certificate.created,
            "epoch": certificate.epoch,
            "step": certificate.step,
            "clean": certificate.clean,
            "findings": [dict(finding) for finding in certificate.findings],
        }

    def to_text(self, tensors: bool = False) -> str:
        """The table as text.

        Args:
            tensors: also list every tensor that isn't as it was, by name.
        """
        from lightning_freeze.checkpoints.verify.table import render

        return render(self, tensors)

    def __str__(self) -> str:
        return self.to_text()

    __repr__ = __str__


def largest(tensors: Iterable[TensorResult]) -> float | None:
    """The largest of some differences, None without any; NaN is larger than all."""
    found = [t.difference for t in tensors if t.difference is not None]
    return max(found, key=lambda d: math.inf if math.isnan(d) else d, default=None)


def worst(tensors: Sequence[TensorResult]) -> str:
    """The largest of some differences, for a reader."""
    difference = largest(tensors)
    if difference is None:
        return ""
    if math.isnan(difference):
        return "NaN against a number"
    if difference == 0 and all(t.status != OTHER_DTYPE for t in tensors):
        return "0, bits only"
    return f"{difference:.2g}"


def plain_number(difference: float | None) -> float | str | None:
    """A difference for JSON, which has no NaN and no infinity."""
    if difference is None or math.isfinite(difference):
        return difference
    return str(difference)


def _plain(spec: Spec | None) -> dict[str, Any] | None:
    return None if spec is None else {"dtype": spec.dtype, "shape": list(spec.shape)}


def tensors(count: int, what: str = "tensor") -> str:
    """A number of them, in words.

    >>> tensors(1), tensors(2, "frozen tensor")
    ('1 tensor', '2 frozen tensors')
    """
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
