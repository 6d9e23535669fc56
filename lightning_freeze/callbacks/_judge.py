"""What was seen on each rank -> findings that all ranks know, raised or warned of."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from lightning_freeze.audit.findings import Finding, Seen, error_for
from lightning_freeze.audit.ranks import check_ranks, digests_of
from lightning_freeze.audit.record import Record
from lightning_freeze.audit.run import AuditRun
from lightning_freeze.callbacks._lightning import Trainer
from lightning_freeze.callbacks._papers import Papers
from lightning_freeze.engine.distributed import from_all_ranks, known_to_all, rank


class Judge:
    """Adds to one fit's record what is new."""

    def __init__(self, record: Record, papers: Papers, on_violation: str) -> None:
        self._record = record
        self._papers = papers
        self._raises = on_violation == "raise"

    def hear(
        self, trainer: Trainer, run: AuditRun, seen: list[Seen], *, alone: bool = False
    ) -> list[Finding]:
        """Keep what is new, and raise or warn: all ranks together.

        Args:
            trainer: whose clock stamps the findings.
            run: the audit that saw it.
            seen: by this rank.
            alone: the fit is over, and the ranks with it: this one speaks for itself.

        Raises:
            AuditError, FrozenWeightsChanged: with `on_violation="raise"`, for all but warnings.
        """
        mine = _stamped(trainer, seen)
        new = self._keep(trainer, run, [mine] if alone else from_all_ranks(mine, "findings"))
        serious = [finding for finding in new if finding.severity == "error"]
        if serious and self._raises:
            # not in `on_exception` alone: processes that a launcher started never get there
            self._papers.write(trainer, run)
            if not alone:
                from_all_ranks(
                    None, "the end of an audit"
                )  # the first to raise ends the others, also while they write
            raise known_to_all(error_for(serious))
        return new

    def note(self, trainer: Trainer, run: AuditRun, seen: list[Seen]) -> None:
        """Keep what is new while an exception is on its way."""
        self._keep(trainer, run, [_stamped(trainer, seen)])

    def _keep(self, trainer: Trainer, run: AuditRun, found: list[list[Finding]]) -> list[Finding]:
        listed = [finding for each in found for finding in each]
        new = self._record.keep(listed)
        if trainer.is_global_zero:
            for finding in new:
                if not self._raises or finding.severity == "warning":
                    warnings.warn(str(finding), stacklevel=3)
        return new


def _stamped(trainer: Trainer, seen: list[Seen]) -> list[Finding]:
    return [item.at(trainer.current_epoch, trainer.global_step, rank()) for item in seen]


def compare_ranks(run: AuditRun, wrapped: Collection[str]) -> list[Seen]:
    """Whether all ranks hold the same tensors; told by rank 0.

    Args:
        run: this rank's audit.
        wrapped: names of what required a gradient when the model was wrapped.
    """
    mine = digests_of(run.ledger)
    if len(set(from_all_ranks(mine.whole, "the audit of weights"))) == 1:
        return []
    each = from_all_ranks(mine, "weights that differ")
    return check_ranks(each, run.with_gradient().difference(wrapped)) if rank() == 0 else []
