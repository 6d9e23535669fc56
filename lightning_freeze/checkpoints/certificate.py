"""What was frozen, since when, and with which bytes: a value that outlives the run."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union

import xxhash

from lightning_freeze.errors import VerifyError

FORMAT = "lightning-freeze certificate"
VERSION = 1
# argument -> what a certificate calls it
DIGESTS = {
    "xxh3_128": "XXH3-128 over dtype, shape and bytes",
    "sha256": "SHA-256 over dtype, shape and bytes",
}


@dataclass(frozen=True)
class Certified:
    """One tensor that was frozen at the end of a run.

    Attributes:
        fingerprint: hex digits; 32 as of `lightning_freeze.fingerprint`, or 64 of SHA-256.
        kind: "parameter" or "buffer".
        dtype: such as "float32".
        shape: its dimensions.
        epoch: the epoch since which it has been frozen with these bytes, counted from 0.
        step: the optimizer step since then; 0 where it has never trained.
        reinitialised: whether it was re-initialised before the fit, so that it isn't what the run
            began with.
        tied_to: for another name of a tied tensor, its first name.
    """

    fingerprint: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    epoch: int
    step: int
    reinitialised: bool = False
    tied_to: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values; what is usual is left out."""
        content: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "since": {"epoch": self.epoch, "step": self.step},
        }
        if self.reinitialised:
            content["reinitialised"] = True
        if self.tied_to is not None:
            content["tied_to"] = self.tied_to
        return content


@dataclass(frozen=True)
class Certificate:
    """What a run says of its frozen tensors.

    Its checksum tells damage and slips from what was written. It is no signature: who wants to
    forge a certificate can compute a new one.

    Attributes:
        frozen: dotted name -> what is certified of the tensor.
        epoch: the epoch at which it was written, counted from 0.
        step: the optimizer steps until then.
        findings: what the audit found, as plain values.
        versions: package -> version.
        created: when, as ISO 8601.
        digest: what the fingerprints are, "xxh3_128" or "sha256".
        until: layer group that was frozen at first -> (epoch, step) at which it began to train.

    Example:
        >>> weight = Certified("00" * 16, "parameter", "float32", (2, 3), epoch=0, step=0)
        >>> certificate = Certificate({"w": weight}, 1, 8, (), {"torch": "2.4"}, "2026-01-01")
        >>> certificate.clean
        True
        >>> Certificate.from_dict(certificate.to_dict(), "here") == certificate
        True
    """

    frozen: Mapping[str, Certified]
    epoch: int
    step: int
    findings: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str]
    created: str
    digest: str = "xxh3_128"
    until: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """True where the audit found nothing."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON, with a checksum over all of them."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "created": self.created,
            "clean": self.clean,
            "epoch": self.epoch,
            "step": self.step,
            "algorithm": DIGESTS[self.digest],
            "frozen": {name: tensor.to_dict() for name, tensor in self.frozen.items()},
            "findings": [dict(finding) for finding in self.findings],
            "versions": dict(self.versions),
        }
        if self.until:
            content["until"] = {name: list(at) for name, at in self.until.items()}
        # plain down to the last value: a `torch.__version__` is no `str` to a safe unpickler
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return {**plain, "checksum": checksum(plain)}

    @classmethod
    def from_dict(cls, content: Any, where: str) -> Certificate:
        """Read back what `to_dict` gave.

        Args:
            content: plain values.
            where: what they were read from, for messages.

        Raises:
            VerifyError: they are no certificate, one of a newer version, or a damaged one.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise VerifyError(
                f"{where} is no certificate: it doesn't have `format: {FORMAT}`. Name a "
                "certificate, an audit report or a checkpoint that holds one."
            )
        version = content.get("version")
        if type(version) is int and version > VERSION:
            raise VerifyError(
                f"{where} is a certificate of format version {version}; this lightning-freeze "
                f"reads version {VERSION}. Read it with the newer version that wrote it, or "
                "upgrade: `pip install -U lightning-freeze`."
            )
        changed = f"{where}: the certificate was changed after it was written, or damaged"
        rest = {key: value for key, value in content.items() if key != "checksum"}
        try:
            fits = content.get("checksum") == checksum(rest)
        except (TypeError, ValueError, RecursionError):
            raise VerifyError(
                f"{changed}: it holds something else than plain values, such as a tensor or what "
                "holds itself."
            ) from None
        if not fits:
            raise VerifyError(
                f"{changed}: its checksum doesn't fit what it says. Get it again from where the "
                "run wrote it."
            )
        algorithm = content.get("algorithm")
        try:
            return cls(
                frozen={name: _certified(one) for name, one in content["frozen"].items()},
                epoch=int(content["epoch"]),
                step=int(content["step"]),
                findings=tuple(dict(finding) for finding in content["findings"]),
                versions=dict(content["versions"]),
                created=str(content["created"]),
                digest=next(name for name, called in DIGESTS.items() if called == algorithm),
                until={n: (int(at[0]), int(at[1])) for n, at in content.get("until", {}).items()},
            )
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
            raise VerifyError(
                f"{changed}: it has the checksum of one, but not the form "
                f"({type(error).__name__}: {error})."
            ) from None


def _certified(entry: Mapping[str, Any]) -> Certified:
    return Certified(
        fingerprint=str(entry["fingerprint"]),
        kind=str(entry["kind"]),
        dtype=str(entry["dtype"]),
        shape=tuple(map(int, entry["shape"])),
        epoch=int(entry["since"]["epoch"]),
        step=int(entry["since"]["step"]),
        reinitialised=entry.get("reinitialised") is True,
        tied_to=str(entry["tied_to"]) if "tied_to" in entry else None,
    )


def checksum(content: Mapping[str, Any]) -> str:
    """XXH3-128 over the canonical JSON of some plain values.

    >>> checksum({"a": 1, "b": [2]}) == checksum({"b": [2], "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128(text.encode()).hexdigest()


def sha256(tensor: Any) -> str | None:
    """SHA-256 over dtype, shape and the bytes of a tensor, in the order of its elements.

    None of one that has no bytes of its own (sparse, or made of several).

    >>> import torch
    >>> text = b"torch.float32|2,1|" + bytes(8)
    >>> sha256(torch.zeros(2, 1)) == hashlib.sha256(text).hexdigest()
    True
    """
    from lightning_freeze.digests import dense

    flat = dense(tensor, lambda: "the tensor")
    if isinstance(flat, bytes):
        return None
    hasher = hashlib.sha256(f"{flat.dtype}|{','.join(map(str, flat.shape))}|".encode())
    if flat.nbytes:
        hasher.update((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))
    return hasher.hexdigest()


def until(moments: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Layer group that was frozen at first -> (epoch, step) at which it began to train.

    Args:
        moments: as plain values, in the order of time: epoch, step, and the learning rate of each
            layer group, None where it is frozen.

    Example:
        >>> first = {"epoch": 0, "step": 0, "lr": {"body": None, "head": 0.1}}
        >>> until([first, {"epoch": 2, "step": 8, "lr": {"body": 0.1, "head": 0.1}}])
        {'body': (2, 8)}
    """
    found: dict[str, tuple[int, int]] = {}
    frozen: set[str] | None = None
    for moment in moments:
        at, rates = (moment["epoch"], moment["step"]), moment["lr"]
        if frozen is None:
            frozen = {group for group, rate in rates.items() if rate is None}
        began = [group for group in frozen - found.keys() if rates.get(group) is not None]
        found.update(dict.fromkeys(sorted(began), at))
    return found


def read_certificate(path: Union[str, Path]) -> Certificate:
    """Read a certificate from a file.

    Args:
        path: a certificate as JSON, an audit report as JSON that holds one, or a Lightning
            checkpoint that was saved with one.

    Raises:
        VerifyError: the file can't be read, or holds no certificate that is whole.
    """
    from lightning_freeze.checkpoints.verify.files import TORCH, format_of, load, regular
    from lightning_freeze.checkpoints.verify.matching import quoted

    where = quoted(path)
    file = regular(Path(path))
    if format_of(file) == TORCH:
        found = certificate_in(load(file), where)
        if found is None:
            raise VerifyError(_NONE.format(f"the checkpoint {where}"))
        return found
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise VerifyError(
            f"{where} holds no certificate: it is neither JSON nor a checkpoint. Name a "
            "certificate, an audit report or a checkpoint that holds one."
        ) from None
    if isinstance(content, dict) and content.get("format") != FORMAT and "certificate" in content:
        content, where = content["certificate"], f"the audit report {where}"
        if content is None:
            raise VerifyError(_NONE.format(where))
    return Certificate.from_dict(content, where)


def certificate_in(checkpoint: Any, where: str) -> Certificate | None:
    """The certificate in the content of a checkpoint, None where it holds none.

    Args:
        checkpoint: what `torch.load` gave.
        where: what messages call it.

    Raises:
        VerifyError: it is damaged, or several of them contradict each other.
    """
    callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, Mapping) else None
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    holders = [s for s in states if isinstance(s, Mapping) and s.get("certificate") is not None]
    read = [Certificate.from_dict(s["certificate"], f"the checkpoint {where}") for s in holders]
    if not read:
        return None
    if any(certificate.frozen != read[0].frozen for certificate in read):
        raise VerifyError(
            f"{where} holds {len(read)} certificates that contradict each other. Name the "
            "certificate's own file instead."
        )
    # several audits of one run: what any of them found counts
    findings = [finding for certificate in read for finding in certificate.findings]
    once = [finding for place, finding in enumerate(findings) if finding not in findings[:place]]
    try:
        told = until(holders[0].get("moments", ()))
        told = {str(group): (int(epoch), int(step)) for group, (epoch, step) in told.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        told = {}  # of another version; no checksum is over it, and nothing depends on it
    return replace(read[0], findings=tuple(once), until=told)


_NONE = (
    "{} holds no certificate. One is written by a run with `TrainableParamAudit` that has frozen "
    "something; name its file, its report or its checkpoint."
)
