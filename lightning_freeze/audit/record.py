"""What an audit saw in one fit -> a verdict, JSON and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Union

from torch.nn.parameter import is_lazy

from lightning_freeze.audit.findings import CHANGED, Finding
from lightning_freeze.audit.run import AuditRun
from lightning_freeze.checkpoints.certificate import Certificate, Certified
from lightning_freeze.model.layer_groups import LayerGroup
from lightning_freeze.report.timeline import Moment, plot_timeline


@dataclass
class Record:
    """What an audit saw in one fit.

    Attributes:
        findings: in the order in which they were found.
        inherited: how many of them are those of the checkpoint that the fit was resumed from.
        moments: who trained when; after very many changes one an epoch (see `fold`).
        groups: the layer groups, bottom to top.
        checks: how often everything was compared.
        checked: when that was done last, as ISO 8601.
        frozen: name -> fingerprint of what is frozen now.
        alive: number of trainable tensors that have had a gradient.
        epochs: epochs that have ended.
        fresh: names of what was re-initialised before the fit.
        ignored: number of tensors of which nothing is said, because the user asked for it.
        cache: what a cache of frozen features did; None without one.
        unreached: names that a schedule was to train, and that never trained.
    """

    findings: list[Finding] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    groups: tuple[LayerGroup, ...] = ()
    checks: int = 0
    checked: str = ""
    frozen: Mapping[str, str] = field(default_factory=dict)
    alive: int = 0
    epochs: float = 0.0
    inherited: int = 0
    _last: dict[tuple[str, str, str], int] = field(default_factory=dict)
    fresh: frozenset[str] = frozenset()
    ignored: int = 0
    cache: Mapping[str, Any] | None = None
    unreached: tuple[str, ...] = ()

    def count_check(self) -> None:
        """Everything has been compared once more."""
        self.checks += 1
        self.checked = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def take(self, run: AuditRun) -> None:
        """Take down where a run is."""
        self.frozen = run.ledger.digests()
        self.alive = len(run.watch.alive)

    def keep(self, findings: Iterable[Finding]) -> list[Finding]:
        """Add what is new, and return it.

        A finding is one event. That a tensor changed is told again whenever it changes again; only
        where the check before found the same by the same cause, it is counted there. What stands,
        such as a flag, is told once in a fit. What the fit of a checkpoint was told, isn't known.

        Args:
            findings: what a check found, on all ranks.
        """
        own = self.findings[self.inherited :]
        told = {(f.code, f.names, f.severity) for f in own}
        names: dict[tuple[str, str, str], set[str]] = {}
        for finding in own:
            names.setdefault(_kind(finding), set()).update(finding.names)
        last, self._last = self._last, {}
        new: list[Finding] = []
        for finding in findings:
            kind = _kind(finding)
            if finding.code in CHANGED:
                place = last.get(kind)
                if place is not None and set(finding.names) <= set(self.findings[place].names):
                    before = self.findings[place]
                    self.findings[place] = replace(before, count=before.count + 1)
                    self._last[kind] = place
                    continue
                if any(kind == _kind(f) and set(finding.names) <= set(f.names) for f in new):
                    continue  # another rank's
                self._last[kind] = len(self.findings) + len(new)
            else:
                known = names.get(kind)
                again = known is not None and known.issuperset(finding.names)
                if again or (kind[0], finding.names, kind[1]) in told:
                    continue
                told.add((kind[0], finding.names, kind[1]))
                names.setdefault(kind, set()).update(finding.names)
            new.append(finding)
        self.findings += new
        return new

    def add(self, moment: Moment) -> None:
        """Take down a moment; it replaces one of the same step."""
        if self.moments and self.moments[-1].step == moment.step:
            self.moments[-1] = moment
        else:
            self.moments.append(moment)

    def fold(self, moment: Moment) -> None:
        """Take down a moment in the last one of its epoch: what trained at any time in it."""
        last = self.moments[-1]
        if last.epoch != moment.epoch:
            self.moments.append(moment)
            return
        lrs = {
            group: max((lr for lr in (old, moment.lr.get(group)) if lr is not None), default=None)
            for group, old in last.lr.items()
        }
        self.moments[-1] = replace(last, lr=lrs)

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
            return (
                "Audit: nothing was recorded in this process: there was no fit yet, or its "
                "processes had audits of their own (see `report`)."
            )
        if self.findings:
            codes = ", ".join(sorted({finding.code for finding in self.findings}))
            many = "1 finding" if len(self.findings) == 1 else f"{len(self.findings)} findings"
            return f"Audit: {many} ({codes}) in {self.checks} checks."
        return (
            f"Audit: clean in {self.checks} checks. What was frozen was unchanged to the bit at "
            f"each of them ({len(self.frozen) or 'no'} tensors are frozen at the end); "
            f"{self.alive} trainable tensors had gradients.{self._spared}{self._late}"
        )

    @property
    def _late(self) -> str:
        if not self.unreached:
            return ""
        more = f" and {len(self.unreached) - 1} more" if self.unreached[1:] else ""
        return f" Scheduled, and never trained in this fit: `{self.unreached[0]}`{more}."

    @property
    def _spared(self) -> str:
        if not self.ignored:
            return ""
        many = "1 tensor" if self.ignored == 1 else f"{self.ignored} tensors"
        return f" `ignore` leaves out {many}."

    def certificate(self, run: AuditRun) -> Certificate:
        """What a run can say of its frozen tensors: fingerprints, and since when."""
        baseline, aliases = run.ledger.baseline, run.ledger.index.aliases
        frozen = {}
        for position, (name, digest) in enumerate(self.frozen.items()):
            tensor = baseline.tensor(position)
            # a shard isn't the tensor, and a lazy one has no bytes
            if tensor is None or hasattr(tensor, "to_local") or is_lazy(tensor):
                continue
            epoch, step = baseline.since[position]
            frozen[name] = Certified(
                fingerprint=digest,
                kind="buffer" if baseline.is_buffer(position) else "parameter",
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                epoch=epoch,
                step=step,
                reinitialised=name in self.fresh,
            )
            for alias in aliases.get(name, ()):
                frozen[alias] = replace(frozen[name], tied_to=name)
        told = {(finding.code, finding.names) for finding in self.findings}
        untold = [
            seen.at(*run.clock, 0)
            for seen in run.look_at_weights()
            if (seen.code, seen.names) not in told
        ]
        return Certificate(
            frozen=frozen,
            epoch=run.clock[0],
            step=run.clock[1],
            findings=tuple(finding.to_dict() for finding in [*self.findings, *untold]),
            versions=versions(),
            created=self.checked,
        )

    def to_dict(self, run: AuditRun | None) -> dict[str, Any]:
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
            "ignored": self.ignored,
            "certificate": None if run is None else self.certificate(run).to_dict(),
            "versions": versions(),
            **({} if self.cache is None else {"cache": dict(self.cache)}),
        }

    def plot(self, path: Union[str, Path, None] = None) -> Any:
        """Draw which layers trained when, with their learning rates, and where findings are."""
        names = [group.name for group in self.groups]
        home = {name: group.name for group in self.groups for name in group.parameters}
        marks = [
            (finding.step, group)
            for finding in self.findings
            for group in dict.fromkeys(home[name] for name in finding.names if name in home)
        ]
        return plot_timeline(self.moments, names, path, end=self.epochs or None, marks=marks)


def _kind(finding: Finding) -> tuple[str, str, str]:
    return finding.code, finding.severity, finding.cause


def versions() -> dict[str, str]:
    """What was installed, of the libraries that matter here."""
    found = {}
    for package in ("lightning-freeze", "torch", "lightning", "pytorch-lightning", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            found[package.replace("-", "_")] = metadata.version(package)
    return found
