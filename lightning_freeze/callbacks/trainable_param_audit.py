"""Prove that what is frozen stays frozen and that what is unfrozen trains."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Union

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_freeze.arguments import call_of, one_of, whole
from lightning_freeze.audit.checks import GradientWatch, check_optimizers, check_ranks
from lightning_freeze.audit.findings import Finding, Seen, error_for
from lightning_freeze.audit.ledger import Declared, Ledger
from lightning_freeze.audit.record import Record
from lightning_freeze.audit.unfrozen import left_out, not_moved, without_gradient
from lightning_freeze.callbacks import _session
from lightning_freeze.callbacks._freezing import saved_state, start
from lightning_freeze.distributed import from_all_ranks, rank
from lightning_freeze.errors import ArgumentError
from lightning_freeze.fingerprint import fingerprint
from lightning_freeze.names import some
from lightning_freeze.optimizers import learning_rates
from lightning_freeze.report import Summary, groups_or_children, rows_of, write_json
from lightning_freeze.timeline import Moment


class TrainableParamAudit(Callback):
    """Check, to the bit, that frozen weights never change and that trainable ones do.

    It compares fingerprints of frozen parameters and buffers, flags, modes, gradients, optimizer
    groups, ties and ranks with what the freezing callbacks declared; alone, with what
    `requires_grad` says at fit start. It changes nothing.

    Args:
        on_violation: "raise" (`FrozenWeightsChanged`, or `AuditError` for the rest) or "warn".
        every: "epoch", "batch", or a number of optimizer steps between two checks; the end of
            each epoch and each change of the trainable set is always checked.
        table: print who trains at fit start and at each change, and the verdict at fit end.
        log_metrics: log the numbers of trainable and frozen parameters to the loggers.
        report: path of a JSON report, written at fit end and when an exception ends the fit.
        dead_after: optimizer steps without a gradient after which a trainable parameter counts
            as dead.

    Attributes:
        findings: what it saw in the last fit, as `Finding` objects.
        moments: who trained when, at which learning rate.

    Raises:
        ArgumentError: at construction.
        AuditError, FrozenWeightsChanged: in the fit, with ``on_violation="raise"``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TrainableParamAudit(every=100)], logger=False)
    """

    def __init__(
        self,
        *,
        on_violation: str = "raise",
        every: Union[str, int] = "epoch",
        table: bool = True,
        log_metrics: bool = True,
        report: Union[str, os.PathLike[str], None] = None,
        dead_after: int = 10,
    ) -> None:
        self.on_violation = one_of(on_violation, "on_violation", ("raise", "warn"))
        if isinstance(every, bool) or not isinstance(every, (int, str)):
            every = str(every)
        if isinstance(every, int):
            self.every: Union[str, int] = whole(every, "every", least=1)
        elif every in ("epoch", "batch"):
            self.every = every
        else:
            raise ArgumentError(
                f'`every` is {every!r}. Write "epoch", "batch" or a number of optimizer steps.'
            )
        self.table = table
        self.log_metrics = log_metrics
        self.report = None if report is None else Path(report)
        self.dead_after = whole(dead_after, "dead_after", least=1)
        self._reset()

    @property
    def state_key(self) -> str:
        """Tells this audit's state in a checkpoint from that of another one."""
        return call_of("TrainableParamAudit", {"every": "epoch"}, every=self.every)

    def _reset(self) -> None:
        self._record = Record()
        self._session: _session.Session | None = None
        self._ledger: Ledger | None = None
        self._declared = Declared(frozenset())
        self._omitted: frozenset[str] = frozenset()
        self._watch = GradientWatch(self.dead_after)
        self._began: dict[str, tuple[str, int]] = {}
        self._queue: list[Seen] = []
        self._last_step = 0
        self._resumed: dict[str, str] = {}

    @property
    def findings(self) -> list[Finding]:
        """What the audit saw in the last fit."""
        return self._record.findings

    @property
    def moments(self) -> list[Moment]:
        """Who trained when in the last fit, at which learning rate."""
        return self._record.moments

    @property
    def verdict(self) -> str:
        """The result of the last fit in one or two sentences."""
        return self._current().verdict

    def _current(self) -> Record:
        if self._ledger is not None:
            self._record.frozen = self._ledger.digests()
            self._record.alive = len(self._watch.alive)
        return self._record

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a new record."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._reset()
            self._session = _session.enter(trainer, pl_module, self)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """On a resume: the fingerprints that the frozen tensors had."""
        if trainer.state.fn == TrainerFn.FITTING:
            state = saved_state(self, trainer, checkpoint) or {}
            self._resumed = dict(state.get("frozen", {}))
            self._record.moments = [Moment(**moment) for moment in state.get("moments", ())]
            self._record.checks = state.get("checks", 0)

    def state_dict(self) -> dict[str, Any]:
        """Fingerprints of what is frozen, and the record so far."""
        if self._ledger is None:
            return {}
        record = self._record
        return {
            "frozen": self._ledger.digests(),
            "moments": [moment.to_dict() for moment in record.moments],
            "checks": record.checks,
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down what is declared."""
        session = self._session = start(trainer, pl_module)
        if session is None or session.index is None:
            return
        session.listeners.append(lambda _, when: self._on_change(trainer, when))
        self._record.groups = groups_or_children(session.index)
        self._declared = self._declaration()
        self._omitted = left_out(
            session.index, self._record.groups, trainer.optimizers, managed=session.managed
        )

    def _declaration(self) -> Declared:
        session = self._session
        assert session is not None
        assert session.index is not None
        if not session.managed or session.applier is None:
            return Declared.by_flags(session.index)
        kept = {id(module) for module in session.applier.quiet}
        quiet = frozenset(p for p, m in session.index.modules.items() if id(m) in kept)
        return Declared(session.plan.frozen, quiet, quiet)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fingerprint what is frozen: here weights are restored and validated with."""
        if self._session is None:
            return
        self._ledger = Ledger(pl_module, self._declared)
        changed = [n for n, d in self._ledger.digests().items() if self._resumed.get(n, d) != d]
        if changed:
            self._queue.append(
                Seen(
                    "resume-mismatch",
                    tuple(changed),
                    f"{some(changed)} should be frozen, but differs from the tensor of that name "
                    "when the checkpoint was saved",
                    "The checkpoint's weights were changed, or other weights were loaded after it.",
                    "Resume from the checkpoint as it was written.",
                )
            )
        self._arm(trainer)
        self._take_down(trainer)
        self._show(trainer)
        self._log(trainer)
        self._check(trainer)

    def _arm(self, trainer: Trainer) -> None:
        """Begin to watch what trains now."""
        assert self._ledger is not None
        index = self._ledger.index
        held = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        trains = {
            name: parameter
            for name, parameter in index.parameters.items()
            if name not in self._ledger.declared.frozen and id(parameter) in held
        }
        self._watch.arm(trains)
        self._began = {
            name: self._began.get(name) or (fingerprint(parameter), trainer.global_step)
            for name, parameter in trains.items()
        }

    def _on_change(self, trainer: Trainer, when: str) -> None:
        """Check what was, then declare what is to be."""
        if self._ledger is None:
            return
        if when == "before":
            self._check(trainer, flags=False)
            return
        self._declared = self._declaration()
        self._ledger.declare(self._declared)
        self._arm(trainer)
        self._take_down(trainer)
        self._show(trainer)
        self._log(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down the learning rates."""
        if self._session is not None and self._ledger is not None:
            self._session.tick(trainer)
            self._take_down(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """See who has a gradient."""
        dead = self._watch.before_step(optimizer)
        if dead:
            self._queue += without_gradient(self._record.groups, dead, self.dead_after)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check, if it is time."""
        if self._ledger is None:
            return
        steps = trainer.global_step - self._last_step
        due = self.every == "batch" or (isinstance(self.every, int) and steps >= self.every)
        if due or (self._queue and trainer.world_size == 1):
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, and see who never moved."""
        if self._ledger is not None:
            self._record.epochs = trainer.current_epoch + 1.0
            self._record.peak(self._group_lrs(trainer))
            self._queue += self._not_moved(trainer)
            self._check(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a last time, and report."""
        if self._ledger is not None:
            try:
                self._check(trainer)
            finally:
                self._write(trainer)
            if self.table and trainer.is_global_zero:
                print(self.verdict, flush=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Report what was found until then."""
        if self._ledger is not None:
            self._write(trainer)

    def _check(self, trainer: Trainer, *, flags: bool = True) -> None:
        assert self._ledger is not None
        assert self._session is not None
        optimizers = trainer.optimizers
        seen = [*self._queue, *self._ledger.check(optimizers, _averaging(trainer), flags=flags)]
        self._queue = []
        if flags:
            seen += self._check_optimizers(trainer)
        if trainer.world_size > 1:
            now = self._ledger.index.parameters
            digests = from_all_ranks({name: fingerprint(p) for name, p in now.items()})
            seen += check_ranks(digests) if rank() == 0 else []
        self._record.checks += 1
        self._last_step = trainer.global_step
        self._judge(trainer, seen)

    def _check_optimizers(self, trainer: Trainer) -> list[Seen]:
        assert self._ledger is not None
        assert self._session is not None
        index = self._ledger.index
        return check_optimizers(
            index,
            [name for name, p in index.parameters.items() if p.requires_grad],
            trainer.optimizers,
            [config.scheduler for config in trainer.lr_scheduler_configs],
            lambda name: name not in self._omitted,
        )

    def _not_moved(self, trainer: Trainer) -> list[Seen]:
        assert self._ledger is not None
        index = self._ledger.index
        return not_moved(
            self._record.groups,
            index.parameters,
            {name: self._began[name] for name in self._began if name in self._watch.alive},
            learning_rates(index, trainer.optimizers),
            trainer.global_step,
            self.dead_after,
        )

    def _judge(self, trainer: Trainer, seen: list[Seen]) -> None:
        """Keep what is new, and raise or warn: all ranks together."""
        mine = [item.at(trainer.current_epoch, trainer.global_step, rank()) for item in seen]
        known = {(finding.code, finding.names) for finding in self.findings}
        new: list[Finding] = []
        for finding in [f for found in from_all_ranks(mine) for f in found]:
            if (finding.code, finding.names) not in known:
                known.add((finding.code, finding.names))
                new.append(finding)
        self._record.findings += new
        if new and self.on_violation == "raise":
            raise error_for(new)
        for finding in new if trainer.is_global_zero else ():
            warnings.warn(str(finding), stacklevel=2)

    def _take_down(self, trainer: Trainer) -> None:
        lrs = self._group_lrs(trainer)
        self._record.add(Moment(trainer.current_epoch, trainer.global_step, lrs))

    def _group_lrs(self, trainer: Trainer) -> dict[str, float | None]:
        assert self._ledger is not None
        lrs = learning_rates(self._ledger.index, trainer.optimizers)
        frozen = self._ledger.declared.frozen
        now: dict[str, float | None] = {}
        for group in self._record.groups:
            trains = [lrs[name] for name in group.parameters if name in lrs and name not in frozen]
            now[group.name] = max(trains) if trains else None
        return now

    def summary(self, trainer: Trainer, title: str = "") -> Summary:
        """Who trains now, as a `Summary`."""
        assert self._ledger is not None
        rows = rows_of(self._ledger.index, self._record.groups, trainer.optimizers)
        session = self._session
        notes: list[str] = []
        applier = None if session is None else session.applier
        if applier is not None and applier.woken and not trainer.global_step:
            woken = applier.woken
            first = woken[0] or type(trainer.lightning_module).__name__
            notes.append(
                f"{len(woken)} modules (from `{first}`"
                " on) were in eval mode, as `from_pretrained` leaves them, although they train: "
                "put in train mode."
            )
        omitted = sum(row.status == "in no optimizer" for row in rows)
        if omitted:
            notes.append(f"{omitted} tensors require a gradient but are in no optimizer.")
        return Summary(rows, title, tuple(notes))

    def _show(self, trainer: Trainer) -> None:
        if self.table and trainer.is_global_zero:
            when = f"Epoch {trainer.current_epoch}, step {trainer.global_step}: who trains"
            print(f"\n{self.summary(trainer, when)}\n", flush=True)

    def _log(self, trainer: Trainer) -> None:
        if not self.log_metrics or not trainer.loggers or not trainer.is_global_zero:
            return
        assert self._ledger is not None
        counts = {"trainable": 0, "frozen": 0}
        for name, parameter in self._ledger.index.parameters.items():
            frozen = name in self._ledger.declared.frozen
            counts["frozen" if frozen else "trainable"] += parameter.numel()
        metrics = {f"freeze/{kind}_parameters": float(n) for kind, n in counts.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        import lightning
        import torch

        from lightning_freeze import __version__

        versions = {
            "lightning_freeze": __version__,
            "torch": str(torch.__version__),
            "lightning": lightning.__version__,
        }
        return self._current().to_dict(versions)

    def _write(self, trainer: Trainer) -> None:
        if self.report is not None and trainer.is_global_zero:
            write_json(self.report, self.to_dict())

    def plot(self, path: Union[str, os.PathLike[str], None] = None) -> Any:
        """Draw which layers trained when, with their learning rates.

        Args:
            path: where to save the picture; not saved where None.

        Returns:
            The matplotlib figure.
        """
        return self._record.plot(None if path is None else Path(path))


def _averaging(trainer: Trainer) -> str:
    """The name of a callback that averages weights, if there is one."""
    for callback in _session.callbacks_of(trainer):
        for kind in type(callback).__mro__:
            if kind.__name__ in ("WeightAveraging", "StochasticWeightAveraging"):
                return type(callback).__name__
    return ""
