"""A resumed fit -> does it go on with what the checkpoint's fit had?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_freeze.audit.findings import Seen
from lightning_freeze.audit.run import AuditRun
from lightning_freeze.checkpoints.certificate import Certificate
from lightning_freeze.model.index import some


@dataclass(frozen=True)
class Resumed:
    """What an audit said of itself in a checkpoint.

    Attributes:
        certificate: of what was frozen.
        trainable: names of what required a gradient.
        fresh: names of what was re-initialised.
    """

    certificate: Certificate
    trainable: frozenset[str]
    fresh: frozenset[str] = frozenset()

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Resumed | None:
        """Read a callback's state; None if it holds nothing of an audit."""
        if "certificate" not in state:
            return None
        certificate = Certificate.from_dict(state["certificate"], "the checkpoint")
        fresh = frozenset(n for n, entry in certificate.frozen.items() if entry.reinitialised)
        return cls(certificate, frozenset(state.get("trainable", ())), fresh)

    def check(self, run: AuditRun, governed: Collection[str] = ()) -> list[Seen]:
        """Compare with a run that has just begun, which then knows since when it is frozen.

        Args:
            run: has the model.
            governed: names that callbacks freeze and unfreeze; those may have another schedule.
        """
        return self._set(run, governed) + self._bytes(run)

    def _bytes(self, run: AuditRun) -> list[Seen]:
        baseline = run.ledger.baseline
        changed = []
        for position, (name, digest) in enumerate(run.ledger.digests().items()):
            saved = self.certificate.frozen.get(name)
            if saved is None:
                continue
            if saved.fingerprint == digest:
                baseline.since[position] = (saved.epoch, saved.step)
            else:
                changed.append(name)
        if not changed:
            return []
        return [
            Seen(
                "resume-mismatch",
                tuple(changed),
                f"{some(changed)} should be frozen, but differs from the tensor of that name "
                "when the checkpoint was saved",
                "The checkpoint's weights were changed, or other weights were loaded after it.",
                "Resume from the checkpoint as it was written.",
            )
        ]

    def _set(self, run: AuditRun, governed: Collection[str]) -> list[Seen]:
        certified = self.certificate.frozen.items()
        frozen = {name for name, tensor in certified if tensor.kind == "parameter"}
        frozen -= self.trainable
        parameters = run.ledger.index.parameters
        now = {name: p for name, p in parameters.items() if name not in governed}
        lost = [name for name, p in now.items() if p.requires_grad and name in frozen]
        gained = [name for name, p in now.items() if not p.requires_grad and name in self.trainable]
        cause = "This run freezes otherwise than the one that wrote the checkpoint"
        fix = (
            "Use the callbacks and the freezing code of the run that wrote it; if you want another "
            "phase, load the weights alone (`load_from_checkpoint`) and `fit` without `ckpt_path`."
        )
        found = []
        if lost:
            found.append(
                Seen(
                    "resume-mismatch",
                    tuple(lost),
                    f"{some(lost)} was frozen when the checkpoint was saved, and trains now",
                    f"{cause}: its freeze was lost.",
                    fix,
                )
            )
        if gained:
            found.append(
                Seen(
                    "resume-mismatch",
                    tuple(gained),
                    f"{some(gained)} trained when the checkpoint was saved, and is frozen now",
                    f"{cause}: what had been unfrozen is frozen again.",
                    fix,
                )
            )
        return found
