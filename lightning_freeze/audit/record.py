"""What an audit saw in one fit -> a verdict, JSON and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union

from lightning_freeze.audit.findings import Finding
from lightning_freeze.layers import LayerGroup
from lightning_freeze.timeline import Moment, plot_timeline


@dataclass
class Record:
    """What an audit saw in one fit.

    Attributes:
        findings: in the order in which they were found.
        moments: who trained when.
        groups: the layer groups, bottom to top.
        checks: how often everything was compared.
        frozen: name -> fingerprint of what is frozen now.
        alive: number of trainable tensors that have had a gradient.
        epochs: epochs that have ended.
    """

    findings: list[Finding] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    groups: tuple[LayerGroup, ...] = ()
    checks: int = 0
    frozen: Mapping[str, str] = field(default_factory=dict)
    alive: int = 0
    epochs: float = 0.0

    def add(self, moment: Moment) -> None:
        """Take down a moment; it replaces one of the same step."""
        if self.moments and self.moments[-1].step == moment.step:
            self.moments[-1] = moment
        else:
            self.moments.append(moment)

    def peak(self, lr: Mapping[str, float | None]) -> None:
        """Raise the learning rates of the last moment: a warm-up begins at zero."""
        if not self.moments:
            return
        last = self.moments[-1]
        higher = {
            group: None if old is None else max(old, lr.get(group) or 0.0)
            for group, old in last.lr.items()
        }
        self.moments[-1] = replace(last, lr=higher)

    @property
    def verdict(self) -> str:
        """The result in one or two sentences."""
        if not self.checks:
            return "Audit: no fit yet."
        if self.findings:
            codes = ", ".join(sorted({finding.code for finding in self.findings}))
            many = "1 finding" if len(self.findings) == 1 else f"{len(self.findings)} findings"
            return f"Audit: {many} ({codes}) in {self.checks} checks."
        return (
            f"Audit: clean in {self.checks} checks. What was frozen was unchanged to the bit for "
            f"as long as it was frozen ({len(self.frozen) or 'no'} tensors are at the end); "
            f"{self.alive} trainable tensors had gradients."
        )

    def to_dict(self, versions: Mapping[str, str]) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "format": 1,
            "verdict": self.verdict,
            "clean": not self.findings,
            "checks": self.checks,
            "findings": [finding.to_dict() for finding in self.findings],
            "layer_groups": [group.name for group in self.groups],
            "moments": [moment.to_dict() for moment in self.moments],
            "frozen": dict(self.frozen),
            "versions": dict(versions),
        }

    def plot(self, path: Union[str, Path, None] = None) -> Any:
        """Draw which layers trained when, with their learning rates."""
        names = [group.name for group in self.groups]
        return plot_timeline(self.moments, names, path, end=self.epochs or None)
