"""What a verification found, in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lightning_freeze.checkpoints.certificate import Certificate
from lightning_freeze.checkpoints.verify.certified import about_weights, code
from lightning_freeze.checkpoints.verify.result import (
    HELD,
    IDENTICAL,
    MISSING,
    ONLY_BASE,
    ONLY_CHECKPOINT,
    OTHER_DTYPE,
    UNLIKE,
    WRONG,
    TensorResult,
    Verification,
    tensors,
    worst,
)
from lightning_freeze.model.index import some


def verdict(found: Verification) -> str:
    """First what is wrong, then what is right, then what doesn't count."""
    if found.certificate is None:
        return _of_a_pair(found)
    return _of_a_certificate(found, found.certificate)


def _where(found: Sequence[TensorResult]) -> str:
    """How many, in which groups, in which dtypes, and the largest difference."""
    groups = list(dict.fromkeys(t.group for t in found))
    details = list(dict.fromkeys(_dtypes(t) for t in found if t.status == OTHER_DTYPE))
    details = [some(details, most=2)] if details else []
    if difference := worst(found):
        details.append(f"largest difference {difference}")
    text = f"{tensors(len(found))} in {some(groups)}"
    return f"{text} ({'; '.join(details)})" if details else text


def _dtypes(tensor: TensorResult) -> str:
    assert tensor.base is not None and tensor.checkpoint is not None
    text = f"{tensor.base.dtype}, now {tensor.checkpoint.dtype}"
    return f"{text}: as BASE, converted" if tensor.converted else text


def _parts(states: Iterable[str], among: Sequence[TensorResult], but: str = "") -> list[str]:
    picked = {s: [t for t in among if s in (t.status, t.certified)] for s in states}
    return [f"{state}{but}: {_where(found)}" for state, found in picked.items() if found]


def _share(some_of: int, whole: int, what: str) -> str:
    if some_of != whole:
        return f"{some_of} of {tensors(whole, what)}"
    return f"the one {what}" if whole == 1 else f"all {whole} {what}s"


def _of_a_pair(found: Verification) -> str:
    both = [t for t in found.tensors if t.base and t.checkpoint]
    same = sum(t.status == IDENTICAL for t in both)
    parts = [f"identical: {_share(same, len(both), 'tensor')} that both have"]
    parts += _parts((*UNLIKE, ONLY_BASE, ONLY_CHECKPOINT), found.tensors)
    return "; ".join(parts) + "."


def _of_a_certificate(found: Verification, certificate: Certificate) -> str:
    ours = [t for t in found.tensors if t.certified]
    free = [t for t in found.tensors if not t.certified]
    parts = []
    if bad := about_weights(certificate):
        codes = some(sorted({code(finding) for finding in bad}))
        what = "1 finding" if len(bad) == 1 else f"{len(bad)} findings"
        parts.append(f"not clean: the certificate itself records {what} ({codes})")
    parts += _parts(WRONG, ours)
    parts += [f"{part}, so not verified" for part in _parts((MISSING,), ours)]
    parts.append(_held(found, ours) if ours else "it certifies no tensor")
    return "; ".join([*parts, *_parts(UNLIKE, free, but=", but not frozen")]) + "."


def _held(found: Verification, ours: Sequence[TensorResult]) -> str:
    held = [t for t in ours if t.certified == HELD]
    text = f"as certified: {_share(len(held), len(ours), 'frozen tensor')}"
    if found.base is None:
        return text
    against = [t.against_base for t in held if t.converted or t.reinitialised]
    counts = {"identical to BASE": sum(t.status == IDENTICAL for t in held)}
    counts |= {words: against.count(words) for words in against}
    if len(ours) > 1:
        return ", ".join([text, *_of_them(counts)])
    return ", ".join([text, *(words for words, count in counts.items() if count)])


def _of_them(counts: Mapping[str, int]) -> list[str]:
    first, *others = (f"{count} of them {words}" for words, count in counts.items())
    return [first, *(text.replace(" of them", "") for text in others)]
