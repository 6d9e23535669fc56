"""What was frozen, since when, and with which bytes: a value that outlives the run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Union

import xxhash

from lightning_freeze.errors import VerifyError

FORMAT = "lightning-freeze certificate"
VERSION = 1
ALGORITHM = "XXH3-128 over dtype, shape and bytes"

_FINGERPRINT = re.compile("[0-9a-f]{32}")
_KINDS = ("parameter", "buffer")
_NEEDED: Any = object()


@dataclass(frozen=True)
class Certified:
    """One tensor that was frozen at the end of a run.

    Attributes:
        fingerprint: 32 hex digits, as of `lightning_freeze.fingerprint`.
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
            "algorithm": ALGORITHM,
            "frozen": {name: tensor.to_dict() for name, tensor in self.frozen.items()},
            "findings": [dict(finding) for finding in self.findings],
            "versions": dict(self.versions),
        }
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
        fields = _Fields(content, where)
        version = fields.count("version")
        if version > VERSION:
            raise VerifyError(
                f"{where} is a certificate of format version {version}; this lightning-freeze "
                f"reads version {VERSION}. Read it with the newer version that wrote it, or "
                "upgrade: `pip install -U lightning-freeze`."
            )
        found = cls(
            frozen={
                name: _certified(_Fields(entry, where, f"frozen.{name}."))
                for name, entry in fields.take("frozen", dict).items()
            },
            epoch=fields.count("epoch"),
            step=fields.count("step"),
            findings=tuple(fields.take("findings", list)),
            versions=dict(fields.take("versions", dict)),
            created=fields.take("created", str),
        )
        fields.check("findings", all(isinstance(finding, Mapping) for finding in found.findings))
        fields.check("versions", all(isinstance(v, str) for v in found.versions.values()))
        fields.check("clean", fields.take("clean", bool) == found.clean)
        fields.check("algorithm", fields.take("algorithm", str) == ALGORITHM)
        rest = {key: value for key, value in content.items() if key != "checksum"}
        if fields.take("checksum", str) != checksum(rest):
            raise VerifyError(
                f"{where}: the certificate was changed after it was written, or damaged: its "
                "checksum doesn't fit what it says. Get it again from where the run wrote it."
            )
        return found


def checksum(content: Mapping[str, Any]) -> str:
    """XXH3-128 over the canonical JSON of some plain values.

    >>> checksum({"a": 1, "b": [2]}) == checksum({"b": [2], "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128(text.encode()).hexdigest()


def read_certificate(path: Union[str, Path]) -> Certificate:
    """Read a certificate from a file.

    Args:
        path: a certificate as JSON, an audit report as JSON that holds one, or a Lightning
            checkpoint that was saved with one.

    Raises:
        VerifyError: the file can't be read, or holds no certificate that is whole.
    """
    from lightning_freeze.checkpoints.verify.formats import describe, regular

    file = regular(Path(path), "The certificate is read from one file.")
    where = f"`{path}`"
    if describe(file) == "torch":
        return _in_checkpoint(file, where)
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        why = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
        raise VerifyError(
            f"{where} holds no certificate: it is neither JSON{why} nor a checkpoint. Name a "
            "certificate, an audit report or a checkpoint that holds one."
        ) from None
    if (
        isinstance(content, Mapping)
        and content.get("format") != FORMAT
        and "certificate" in content
    ):
        return _inside(content["certificate"], f"the audit report {where}")
    return Certificate.from_dict(content, where)


def _in_checkpoint(path: Path, where: str) -> Certificate:
    from lightning_freeze.checkpoints.verify.pickles import load

    checkpoint = load(path)
    callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, Mapping) else None
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    found = [s["certificate"] for s in states if isinstance(s, Mapping) and s.get("certificate")]
    read = [_inside(content, f"the checkpoint {where}") for content in found]
    if any(certificate.frozen != read[0].frozen for certificate in read):
        raise VerifyError(
            f"{where} holds {len(read)} certificates that contradict each other. Name the "
            "certificate's own file instead."
        )
    if not read:
        return _inside(None, f"the checkpoint {where}")
    # several audits of one run: what any of them found counts
    findings = [finding for certificate in read for finding in certificate.findings]
    once = [finding for place, finding in enumerate(findings) if finding not in findings[:place]]
    return replace(read[0], findings=tuple(once))


def _inside(content: Any, where: str) -> Certificate:
    if content is None:
        raise VerifyError(
            f"{where} holds no certificate. One is written by a run with `TrainableParamAudit` "
            "that has frozen something; name its file, its report or its checkpoint."
        )
    return Certificate.from_dict(content, where)


def _certified(fields: _Fields) -> Certified:
    since = _Fields(fields.take("since", dict), fields.where, f"{fields.inside}since.")
    fingerprint, kind = fields.take("fingerprint", str), fields.take("kind", str)
    fields.check("fingerprint", _FINGERPRINT.fullmatch(fingerprint) is not None)
    fields.check("kind", kind in _KINDS)
    shape = fields.take("shape", list)
    fields.check("shape", all(type(size) is int and size >= 0 for size in shape))
    return Certified(
        fingerprint,
        kind,
        fields.take("dtype", str),
        tuple(shape),
        since.count("epoch"),
        since.count("step"),
        reinitialised=fields.take("reinitialised", bool, False),
        tied_to=fields.take("tied_to", str, None),
    )


class _Fields:
    """Keys of a mapping that must be there and of a type."""

    def __init__(self, content: Any, where: str, inside: str = "") -> None:
        self.content = content
        self.where = where
        self.inside = inside

    def take(self, key: str, kind: type, default: Any = _NEEDED) -> Any:
        if default is not _NEEDED and key not in self.content:
            return default
        if not isinstance(self.content, Mapping) or key not in self.content:
            raise VerifyError(
                f"{self.where}: the certificate lacks `{self.inside}{key}`. It was changed after "
                "it was written, or damaged."
            )
        value = self.content[key]
        # a bool is an int to isinstance
        self.check(key, type(value) is kind)
        return value

    def count(self, key: str) -> int:
        value: int = self.take(key, int)
        self.check(key, value >= 0)
        return value

    def check(self, key: str, holds: bool) -> None:
        if not holds:
            shown = repr(self.content.get(key))
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise VerifyError(
                f"{self.where}: `{self.inside}{key}` of the certificate can't be {shown}. It was "
                "changed after it was written, or damaged."
            )
