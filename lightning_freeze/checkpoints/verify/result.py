"""What a verification found: values, a table, and a verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_freeze.checkpoints.certificate import Certificate
from lightning_freeze.checkpoints.verify.files import Spec
from lightning_freeze.checkpoints.verify.matching import escaped, printable
from lightning_freeze.model.index import some

IDENTICAL = "identical"
CHANGED = "changed"
OTHER_DTYPE = "other dtype"
OTHER_SHAPE = "other shape"
ONLY_BASE = "only in BASE"
ONLY_CHECKPOINT = "only in CHECKPOINT"
NOT_COMPARED = "not compared"
UNLIKE = (CHANGED, OTHER_DTYPE, OTHER_SHAPE)

HELD = "as certified"
BROKEN = "not as certified"
MISSING = "missing"
NOT_BASE = "not as in BASE"
WRONG = (BROKEN, NOT_BASE)

# what a verdict begins with, by exit status
LABELS = ("OK", "CHANGED", "CANNOT VERIFY")

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
_MOST = 8
# names get copied: room for long ones to stay whole
_WIDTH = 160


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
        """As plain values."""
        return {**asdict(self), "certified": self.certified or None}


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

    def __str__(self) -> str:
        prefix = f", names under `{self.prefix}`" if self.prefix else ""
        return f"{escaped(self.path)} ({self.kind}, {counted(self.tensors)}{prefix})"


@dataclass(frozen=True)
class Verification:
    """What was found. It prints as a table with a verdict; `to_text(tensors=True)` has all names.

    Attributes:
        base: what the run began with, or None.
        checkpoint: what was verified.
        tensors: one result per tensor.
        certificate: what says which tensors were frozen, or None.
        certificate_side: where it was read from.
        notes: what else a reader should know.
    """

    base: Side | None
    checkpoint: Side
    tensors: tuple[TensorResult, ...]
    certificate: Certificate | None
    certificate_side: Side
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> dict[str, list[TensorResult]]:
        """The results by layer group."""
        found: dict[str, list[TensorResult]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.group, []).append(tensor)
        return found

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
        """The result in one sentence: first what is wrong, then what is right, then the rest."""
        parts = _of_a_pair(self) if self.certificate is None else _of_a_certificate(self)
        return f"{LABELS[self.status]}: {'; '.join(parts)}."

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, ready for JSON but for differences that are no numbers."""
        told, held = self.certificate, None
        if told is not None:
            held = {
                **vars(self.certificate_side),
                "created": told.created,
                "digest": told.digest,
                "epoch": told.epoch,
                "step": told.step,
                "clean": told.clean,
                "findings": [dict(finding) for finding in told.findings],
            }
        return {
            "format": 1,
            "ok": self.ok,
            "status": self.status,
            "verdict": self.verdict,
            "base": None if self.base is None else vars(self.base),
            "checkpoint": vars(self.checkpoint),
            "certificate": held,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "notes": list(self.notes),
        }

    def to_text(self, tensors: bool = False) -> str:
        """The table as text.

        Args:
            tensors: also list every tensor that isn't as it was, by name.
        """
        listed = [_line(t) for t in self.tensors if t.status in UNLIKE or t.certified not in _FINE]
        lines = [*_head(self), _table(self), *(listed if tensors else ()), *self.notes]
        return escaped("\n".join([*lines, self.verdict]), keep="\n")

    def __str__(self) -> str:
        return self.to_text()

    __repr__ = __str__


_FINE = ("", HELD)


def about_weights(certificate: Certificate) -> tuple[Mapping[str, object], ...]:
    """The findings that mean that weights aren't what they have to be."""
    return tuple(f for f in certificate.findings if _code(f) in ABOUT_WEIGHTS)


def findings(certificate: Certificate | None) -> list[str]:
    """What the run found, one line each, the first few."""
    found = certificate.findings if certificate else ()
    told = [
        f"the certificate records [{_code(one)}] {printable(str(one.get('message', '')))}".rstrip()
        for one in found[:_MOST]
    ]
    return told if len(found) <= _MOST else [*told, f"and {len(found) - _MOST} more"]


def released(certificate: Certificate) -> str:
    """What was frozen until when, of a certificate that certifies nothing."""
    at = f"nothing was frozen when it was written, at {_moment(certificate)}"
    groups: dict[tuple[int, int], list[str]] = {}
    for group, moment in certificate.until.items():
        groups.setdefault(moment, []).append(printable(group))
    until = [
        f"{some(names)} until epoch {epoch}, step {step}"
        for (epoch, step), names in sorted(groups.items())
    ]
    return f"{at}; frozen were {', '.join(until)}" if until else f"{at}, nor before"


def counted(count: int, what: str = "tensor") -> str:
    """A number of them, in words.

    >>> counted(1), counted(2, "frozen tensor")
    ('1 tensor', '2 frozen tensors')
    """
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _moment(certificate: Certificate) -> str:
    return f"epoch {certificate.epoch}, step {certificate.step}"


def _code(finding: Mapping[str, object]) -> str:
    return printable(str(finding.get("code", "?")))


def _head(found: Verification) -> list[str]:
    told, side = found.certificate, found.certificate_side
    lines = [] if found.base is None else [f"BASE        {found.base}"]
    lines.append(f"CHECKPOINT  {found.checkpoint}")
    if told is not None:
        made = f"made {printable(told.created)}, {counted(side.tensors)}, {told.digest}"
        at = f"{escaped(side.path)} ({made}), written at {_moment(told)}"
        lines.append(f"certificate {at}")
    return lines


def _table(found: Verification) -> str:
    from rich.table import Table

    from lightning_freeze.report.summary import to_text

    table = Table()
    table.add_column("layer group", overflow="fold")
    table.add_column("tensors", justify="right")
    if found.certificate is not None:
        table.add_column("frozen tensors")
    if found.base is not None:
        table.add_column("against BASE")
        table.add_column("largest difference", justify="right")
    for group, tensors in found.groups.items():
        cells = [group, str(len(tensors))]
        if found.certificate is not None:
            cells.append(_counts(t.certified or "not frozen" for t in tensors))
        if found.base is not None:
            cells += [_counts(t.against_base for t in tensors), _worst(tensors)]
        table.add_row(*cells)
    return to_text(table, _WIDTH)


def _counts(words: Iterable[str]) -> str:
    found = Counter(words)
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{count} {word}" for word, count in found.most_common())


def _line(tensor: TensorResult) -> str:
    told = [word for word in (tensor.certified, tensor.against_base) if word]
    if tensor.status in UNLIKE and tensor.base != tensor.checkpoint:
        told.append(f"{tensor.base}, now {tensor.checkpoint}")
    if worst := _worst([tensor]):
        told.append(f"largest difference {worst}")
    return f"  {tensor.name}: {'; '.join(told)}"


def _worst(tensors: Sequence[TensorResult]) -> str:
    """The largest of some differences, for a reader; NaN is larger than all."""
    found = [t.difference for t in tensors if t.difference is not None]
    if not found:
        return ""
    largest = max(found, key=lambda d: math.inf if math.isnan(d) else d)
    if math.isnan(largest):
        return "NaN against a number"
    if largest == 0 and all(t.status != OTHER_DTYPE for t in tensors):
        return "0, bits only"
    return f"{largest:.2g}"


def _parts(states: Iterable[str], among: Sequence[TensorResult], but: str = "") -> list[str]:
    """What is so, how many are, in which groups, in which dtypes, and the largest difference."""
    told = []
    for state in states:
        picked = [t for t in among if state in (t.status, t.certified)]
        if picked:
            groups = some(list(dict.fromkeys(t.group for t in picked)))
            details = list(dict.fromkeys(_dtypes(t) for t in picked if t.status == OTHER_DTYPE))
            details = [some(details, most=2)] if details else []
            if worst := _worst(picked):
                details.append(f"largest difference {worst}")
            text = f"{state}{but}: {counted(len(picked))} in {groups}"
            told.append(f"{text} ({'; '.join(details)})" if details else text)
    return told


def _dtypes(tensor: TensorResult) -> str:
    assert tensor.base is not None and tensor.checkpoint is not None
    text = f"{tensor.base.dtype}, now {tensor.checkpoint.dtype}"
    return f"{text}: as BASE, converted" if tensor.converted else text


def _of_a_pair(found: Verification) -> list[str]:
    both = [t for t in found.tensors if t.base and t.checkpoint]
    same = sum(t.status == IDENTICAL for t in both)
    first = f"identical: {_share(same, len(both), 'tensor')} that both have"
    return [first, *_parts((*UNLIKE, ONLY_BASE, ONLY_CHECKPOINT), found.tensors)]


def _of_a_certificate(found: Verification) -> list[str]:
    assert found.certificate is not None
    ours = [t for t in found.tensors if t.certified]
    free = [t for t in found.tensors if not t.certified]
    parts = []
    if bad := about_weights(found.certificate):
        codes = some(sorted({_code(finding) for finding in bad}))
        many = counted(len(bad), "finding")
        parts.append(f"not clean: the certificate itself records {many} ({codes})")
    parts += _parts(WRONG, ours)
    parts += [f"{part}, so not verified" for part in _parts((MISSING,), ours)]
    held = [t for t in ours if t.certified == HELD]
    text = f"as certified: {_share(len(held), len(ours), 'frozen tensor')}"
    if found.base is not None and held:
        against = Counter(t.against_base for t in held if t.base)
        words = [f"{against.pop(IDENTICAL, 0)} identical to BASE"]
        words += [f"{count} {word}" for word, count in against.items()]
        text += f" ({', '.join(words)})"
    parts.append(text if ours else "it certifies no tensor")
    return [*parts, *_parts(UNLIKE, free, but=", but not frozen")]


def _share(some_of: int, whole: int, what: str) -> str:
    if some_of != whole:
        return f"{some_of} of {counted(whole, what)}"
    return f"the one {what}" if whole == 1 else f"all {whole} {what}s"
