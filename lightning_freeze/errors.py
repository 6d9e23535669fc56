"""What can go wrong, as exceptions.

::

    FreezeError
    ├── ArgumentError          an argument that is wrong by itself (also a ValueError)
    │   └── ScheduleError      a schedule that contradicts itself
    ├── SelectorError          a selector that matches nothing, or more than one place
    ├── DiscoveryError         no backbone, blocks or head could be found
    ├── ConflictError          callbacks that contradict each other, or nothing left to train
    ├── UnsupportedError       an optimizer, scheduler or strategy that can't be served
    ├── ReinitError            re-initialisation is impossible, or changed nothing
    ├── ResumeError            a checkpoint that doesn't fit the callbacks of this run
    ├── VerifyError            a file that can't be verified: unreadable, refused, another model
    └── AuditError             the audit found something (``.findings``)
        └── FrozenWeightsChanged   ... and it was a frozen weight
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_freeze.audit.findings import Finding


class FreezeError(RuntimeError):
    """Base class of every error that this package raises on purpose."""


class ArgumentError(FreezeError, ValueError):
    """An argument is wrong by itself; raised at construction."""


class ScheduleError(ArgumentError):
    """A schedule contradicts itself or the model."""


class SelectorError(FreezeError, LookupError):
    """A selector matches nothing, or more than one place."""


class DiscoveryError(FreezeError, LookupError):
    """No backbone, blocks or head could be found in the model."""


class ConflictError(FreezeError):
    """Callbacks contradict each other, or leave nothing to train."""


class UnsupportedError(FreezeError):
    """An optimizer, scheduler or strategy can't be served; the message says why."""


class ReinitError(FreezeError):
    """A module can't be re-initialised, or re-initialising changed nothing."""


class ResumeError(FreezeError):
    """A checkpoint doesn't fit the callbacks of this run."""


class VerifyError(FreezeError):
    """Files can't be verified: unreadable, refused, damaged, or of another model."""


class AuditError(FreezeError):
    """The audit found something.

    Attributes:
        findings: what it found, as `Finding` objects.
    """

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = list(findings)


class FrozenWeightsChanged(AuditError):
    """A frozen parameter or buffer isn't what it was."""
