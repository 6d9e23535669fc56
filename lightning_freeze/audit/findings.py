"""What an audit says, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_freeze.errors import AuditError, FrozenWeightsChanged

CODES = (
    "frozen-changed",
    "frozen-buffer-changed",
    "flag-changed",
    "mode-changed",
    "not-in-optimizer",
    "no-gradient",
    "not-updated",
    "stale-gradient",
    "stale-optimizer-state",
    "rank-mismatch",
    "tie-split",
    "parameter-replaced",
    "scheduler-mismatch",
    "resume-mismatch",
    "nothing-trainable",
)
CHANGED = ("frozen-changed", "frozen-buffer-changed")


@dataclass(frozen=True)
class Finding:
    """One thing that the audit saw.

    Attributes:
        code: one of `CODES`.
        names: dotted names of the tensors or modules, or of optimizers and schedulers.
        epoch: counted from 0.
        step: optimizer steps so far.
        rank: the process that saw it.
        message: what is the matter, in one sentence.
        cause: what the audit found to be the reason, or that it found none.
        fix: what to do about it.
        since: epoch and step of the last look at which it was still right; None if there was none.
        severity: "warning" for what may be meant so, such as a layer that never gets a gradient:
            it is told, and never ends a fit.
        count: at how many checks in a row the same was found, by the same cause.
    """

    code: str
    names: tuple[str, ...]
    epoch: int
    step: int
    rank: int
    message: str
    cause: str = ""
    fix: str = ""
    since: tuple[int, int] | None = None
    severity: str = "error"
    count: int = 1

    def __str__(self) -> str:
        where = f"epoch {self.epoch}, step {self.step}, rank {self.rank}"
        if self.since is not None and self.since != (self.epoch, self.step):
            where += f"; right until epoch {self.since[0]}, step {self.since[1]}"
        tail = "".join(f" {text}" for text in (self.cause, self.fix) if text)
        return f"[{self.code}] {self.message} ({where}).{tail}"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Finding:
        """Back from what `to_dict` gave."""
        since = content.get("since")
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in content.items() if key in known}
        names, since = tuple(content["names"]), None if since is None else tuple(since)
        return cls(**{**values, "names": names, "since": since})

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        since = None if self.since is None else list(self.since)
        return {**asdict(self), "names": list(self.names), "since": since}


@dataclass(frozen=True)
class Seen:
    """A finding before it is known when and where it was made: the rest of a `Finding`."""

    code: str
    names: tuple[str, ...]
    message: str
    cause: str = ""
    fix: str = ""
    since: tuple[int, int] | None = None
    severity: str = "error"

    def at(self, epoch: int, step: int, rank: int) -> Finding:
        """Stamp it."""
        told = (self.message, self.cause, self.fix, self.since, self.severity)
        return Finding(self.code, self.names, epoch, step, rank, *told)


def error_for(findings: Sequence[Finding]) -> AuditError:
    """The exception that says what some findings say."""
    changed = any(finding.code in CHANGED for finding in findings)
    kind = FrozenWeightsChanged if changed else AuditError
    return kind("\n".join(str(finding) for finding in findings), findings)
