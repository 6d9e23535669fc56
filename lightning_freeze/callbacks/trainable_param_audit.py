"""Prove that what is frozen stays frozen and that what is unfrozen trains."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Union

from torch.nn.parameter import is_lazy

from lightning_freeze.arguments import call_of, interval, one_of, whole
from lightning_freeze.audit import trace as looks
from lightning_freeze.audit.declared import Declared, ignored_by, redeclared
from lightning_freeze.audit.findings import Finding, Seen
from lightning_freeze.audit.identity import untied
from lightning_freeze.audit.ranks import sharded_apart
from lightning_freeze.audit.record import Record
from lightning_freeze.audit.resumed import Resumed
from lightning_freeze.audit.run import AuditRun
from lightning_freeze.audit.unfrozen import left_out
from lightning_freeze.callbacks._chronicle import Chronicle
from lightning_freeze.callbacks._copies import forget_model, own_state
from lightning_freeze.callbacks._declaration import declared_by
from lightning_freeze.callbacks._hooks import StepHooks
from lightning_freeze.callbacks._judge import Judge, compare_ranks
from lightning_freeze.callbacks._lightning import (
    Callback,
    LightningModule,
    Trainer,
    is_fitting,
    rank_zero_info,
)
from lightning_freeze.callbacks._neighbours import averages_of, batches_per_step, who_runs
from lightning_freeze.callbacks._papers import Papers
from lightning_freeze.callbacks._sharded import restores_late
from lightning_freeze.callbacks.base import by_tuner, saved_state, start
from lightning_freeze.callbacks.fit_state import FitState, enter
from lightning_freeze.engine.distributed import from_all_ranks, together
from lightning_freeze.engine.optimizers import ids_held, learning_rates
from lightning_freeze.model.index import ModelIndex, some
from lightning_freeze.model.selectors import Selectors, as_selectors
from lightning_freeze.report.html import audit_to_html
from lightning_freeze.report.summary import groups_or_children
from lightning_freeze.report.timeline import Moment


class TrainableParamAudit(Callback):
    """Check, to the bit, that frozen weights never change and that trainable ones do.

    It compares fingerprints of frozen parameters and buffers, flags, modes, gradients, optimizer
    groups, ties and ranks with what the freezing callbacks declared; alone, with what
    `requires_grad` says at fit start, and at each epoch's border where whole modules are frozen or
    unfrozen by hand. It changes nothing. What it finds has a cause that was
    looked for: while a step runs it notes who writes to a frozen tensor.

    Buffers are compared where they may be weights: those of frozen modules, and the persistent ones
    of every module in which nothing trains (a quantised layer). What moves by design may move:
    running statistics in train mode, observers, and what is written in the first step.

    Args:
        on_violation: "raise" (`FrozenWeightsChanged`, or `AuditError` for the rest) or "warn". A
            layer that never gets a gradient while others do is a warning in any case.
            With "warn", a tensor that changes again after it was told of is told of again, unless
            it is by the same cause at the next check: then the finding counts it.
        every: "epoch", "batch", or a number of optimizer steps between two checks. The end of each
            epoch and each change of the trainable set is always checked.
        table: print who trains at fit start and at each change, and the verdict at fit end.
        log_metrics: log the numbers of trainable and frozen parameters to the loggers.
        report: path of a JSON report, written at fit end and when an exception ends the fit.
        dead_after: optimizer steps without a gradient after which a trainable parameter counts
            as dead.
        certificate: where to write what was frozen, since when and with which fingerprints, at
            fit end and whenever a checkpoint is saved: a path, True for `certificate.json` beside
            the checkpoints (nowhere if none are saved), or False. Each checkpoint holds one in any
            case. `lightning-freeze verify` compares a file with it.
        certificate_digest: "xxh3_128", which tells damage, or "sha256", which also tells forgery
            once the file is signed (docs/certificates.md); that is worked out at fit end, until
            then the file holds the former. The certificate says which it has.
        ignore: selectors of parameters and buffers that may change although they require no
            gradient, because the module itself writes them: a momentum encoder (MoCo, BYOL, DINO),
            a codebook. Nothing is said of them.

    Attributes:
        findings: what it saw in the last fit, as `Finding` objects.
        moments: who trained when, at which learning rate.

    Raises:
        ArgumentError: at construction.
        AuditError, FrozenWeightsChanged: in the fit, with ``on_violation="raise"``.
        SelectorError: in `setup`, where a selector of `ignore` matches nothing.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TrainableParamAudit(every=100)], logger=False)
    """

    def __init__(
        self,
        *,
        on_violation: Literal["raise", "warn"] = "raise",
        every: Union[str, int] = "epoch",
        table: bool = True,
        log_metrics: bool = True,
        report: Union[str, os.PathLike[str], None] = None,
        dead_after: int = 10,
        certificate: Union[bool, str, os.PathLike[str]] = True,
        certificate_digest: Literal["xxh3_128", "sha256"] = "xxh3_128",
        ignore: Selectors = (),
    ) -> None:
        self.on_violation = one_of(on_violation, "on_violation", ("raise", "warn"))
        self.every = interval(every)
        self.table = table
        self.log_metrics = log_metrics
        self.report = None if report is None else Path(report).expanduser()
        self.dead_after = whole(dead_after, "dead_after", least=1)
        self.certificate: Union[bool, Path] = (
            certificate if isinstance(certificate, bool) else Path(certificate).expanduser()
        )
        self.certificate_digest = one_of(
            certificate_digest, "certificate_digest", ("xxh3_128", "sha256")
        )
        self.ignore = as_selectors(ignore, "ignore")
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying: what was seen, without the fit in which it was."""
        self._current()
        return own_state(self, _fit=None, _run=None, _hooks=StepHooks())

    @property
    def state_key(self) -> str:
        """Tells this audit's state in a checkpoint from that of another one."""
        return call_of("TrainableParamAudit", {"every": "epoch"}, every=self.every)

    def _reset(self) -> None:
        self._record = Record()
        self._papers = Papers(self._record, self.report, self.certificate, self.certificate_digest)
        self._judge = Judge(self._record, self._papers, self.on_violation)
        self._chronicle = Chronicle(self._record, table=self.table, log_metrics=self.log_metrics)
        self._fit: FitState | None = None
        self._run: AuditRun | None = None
        self._declared = Declared(frozenset())
        self._resumed: Resumed | None = None
        self._hooks = StepHooks()
        self._wrapped: frozenset[str] = frozenset()
        self._ignored: frozenset[str] = frozenset()
        self._last_step = 0
        self._ended = False
        self._trained = False
        self._at_border = False
        self._saved: dict[str, Any] = {}

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
        if self._run is not None:
            self._record.take(self._run)
        return self._record

    # before the first batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a new record."""
        if is_fitting(trainer):
            self._reset()
            self._papers.check(trainer)
            self._fit = enter(trainer, pl_module, self)
            if self.ignore and not self._fit.late:
                ignored_by(ModelIndex.of(pl_module), self.ignore)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """On a resume: what was frozen, with which fingerprints."""
        if is_fitting(trainer) and not by_tuner(trainer):
            state = saved_state(self, trainer, checkpoint) or {}
            self._resumed = Resumed.of(state)
            if self._resumed is not None:
                told = self._resumed.certificate.findings
                self._record.findings = [Finding.from_dict(finding) for finding in told]
                self._record.inherited = len(told)
                self._record.fresh = self._resumed.fresh
            self._record.moments = Moment.read(state.get("moments", ()))
            self._record.checks = state.get("checks", 0)

    def state_dict(self) -> dict[str, Any]:
        """A certificate of what is frozen, and the record so far."""
        if self._run is None:
            return dict(self._saved)
        record = self._current()
        return {
            "certificate": record.certificate(self._run).to_dict(),
            "trainable": list(self._run.with_gradient()),
            "moments": [moment.to_dict() for moment in record.moments],
            "checks": record.checks,
        }

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the certificate beside the checkpoint."""
        if self._run is None or self._ended:
            return
        self._run.look(looks.SAVED, self._now(trainer))
        self._papers.certify(trainer, saved_state(self, trainer, checkpoint) or {})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down what is declared."""
        fit = self._fit = start(trainer, pl_module)
        if fit is None or fit.index is None:
            return
        fit.listeners.append(lambda _, when: self._on_change(trainer, when))
        self._ignored = ignored_by(fit.index, self.ignore)
        self._record.ignored = len(self._ignored)
        self._record.groups = groups_or_children(fit.index)
        self._declared = declared_by(fit, self._ignored)
        self._record.fresh |= fit.fresh
        self._wrapped = fit.wrapped_with
        parameters = fit.index.parameters.values()
        restored = trainer.ckpt_path is None and not restores_late(trainer)
        if restored and not any(is_lazy(p) for p in parameters):
            self._begin(trainer, pl_module, fit)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """On a resume, fingerprint what is frozen here, where it has been restored; then check."""
        fit = self._fit
        if fit is None or fit.index is None:
            return
        if self._run is None:
            self._begin(trainer, pl_module, fit)
        assert self._run is not None
        fit.settle()
        self._adopt(trainer)
        self._run.look(looks.FIT, self._now(trainer))
        for optimizer in trainer.optimizers:
            self._hooks.add(optimizer, self._run, lambda: self._now(trainer))
        self._last_step = trainer.global_step
        self._chronicle.change(trainer, fit, self._run)
        if self._resumed is None or fit.managed:
            self._first_check(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, fit: FitState) -> None:
        assert fit.index is not None
        self._run = AuditRun(
            pl_module,
            fit.index,
            self._declared,
            self._record.groups,
            lambda: trainer.optimizers,
            now=self._now(trainer),
            dead_after=self.dead_after,
            managed=fit.managed,
            omitted=left_out(
                fit.index, self._record.groups, _held(trainer, fit), managed=fit.managed
            ),
            rates=lambda: _rates(trainer, fit),
            averages=lambda: averages_of(trainer, ended=self._ended),
            who=lambda after, before: who_runs(trainer, self, after, before),
            reduced=lambda: self._wrapped if trainer.world_size > 1 else (),
            batches_per_step=lambda: batches_per_step(trainer),
        )

    def _first_check(self, trainer: Trainer) -> None:
        assert self._run is not None
        assert self._fit is not None
        resumed, self._resumed = self._resumed, None
        schedules = self._fit.schedules.values()
        governed = frozenset[str]().union(*(schedule.governed for schedule in schedules))
        seen = [] if resumed is None else resumed.check(self._run, governed)
        frozen = self._declared.frozen - self._record.fresh
        seen += sharded_apart(sorted(self._fit.apart & frozen))
        self._check(trainer, seen + untied(self._fit.tied, self._run.ledger.index))

    def _adopt(self, trainer: Trainer) -> None:
        """Where no callback of ours freezes: take flags that were set by hand as declared."""
        fit, run = self._fit, self._run
        assert fit is not None
        assert run is not None
        index = run.ledger.index
        if fit.managed:
            return
        new = None
        if run.ledger.now() is index:
            new = redeclared(self._declared, index, trained=self._trained)
        if trainer.world_size > 1:
            each = from_all_ranks(None if new is None else new.frozen, "what is frozen by hand")
            new = new if all(frozen == each[0] for frozen in each) else None
        if new is None:
            return
        if self._trained:
            self._check(trainer, flags=False)
        on, off = self._declared.frozen - new.frozen, new.frozen - self._declared.frozen
        self._declared = new
        run.declare(new, self._now(trainer))
        if not self._trained:
            if self._at_border:
                self._chronicle.take_down(trainer, run)
            return
        told = [
            f"{some(sorted(names))} {verb}"
            for names, verb in ((on, "train"), (off, "is frozen"))
            if names
        ]
        rank_zero_info(
            f"Audit: {' and '.join(told)} from epoch {trainer.current_epoch} on: other code set "
            "`requires_grad` at the epoch's border."
        )
        self._chronicle.change(trainer, fit, run)

    def _on_change(self, trainer: Trainer, when: str) -> None:
        """Check what was, then declare what is to be."""
        fit = self._fit
        if fit is None:
            return
        if when == "end":
            self._say_last_words(trainer)
            return
        if when == "before":
            if self._run is not None:
                self._check(trainer, flags=False)
            return
        self._wrapped = fit.wrapped_with
        self._declared = declared_by(fit, self._ignored)
        if self._run is not None:
            self._run.declare(self._declared, self._now(trainer))
            self._chronicle.change(trainer, fit, self._run)

    # while it runs

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down the learning rates."""
        if self._fit is not None and self._run is not None:
            self._fit.tick(trainer)
            self._at_border = True
            self._run.look(looks.EPOCH, self._now(trainer))
            self._chronicle.take_down(trainer, self._run)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note what is so before the step."""
        if self._fit is None or self._run is None:
            return
        self._fit.tick(trainer)
        if self._at_border:
            self._adopt(trainer)
        self._at_border, self._trained = False, True
        if self._resumed is not None:
            # a freeze by hand is often put back at an epoch's start, behind `on_train_start`
            self._first_check(trainer)
        self._run.batch_starts(self._now(trainer))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """See who has a gradient."""
        run = self._run
        if run is None:
            return
        self._hooks.add(optimizer, run, lambda: self._now(trainer))
        run.update_starts(optimizer, self._now(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check, if it is time."""
        if self._run is None:
            return
        self._run.batch_ends(self._now(trainer))
        steps = trainer.global_step - self._last_step
        due = self.every == "batch" or (isinstance(self.every, int) and steps >= self.every)
        if due or (trainer.world_size == 1 and self._run.waiting):
            self._check(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what is so before a validation."""
        if self._run is not None and self._fitting(trainer):
            self._run.look(looks.VALIDATION, self._now(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what it has changed."""
        if self._run is not None and self._fitting(trainer):
            self._run.look(looks.VALIDATED, self._now(trainer))

    @staticmethod
    def _fitting(trainer: Trainer) -> bool:
        return is_fitting(trainer) and not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, and see who never moved."""
        run = self._run
        if run is None:
            return
        run.epoch_ends(self._now(trainer))
        border = run.flipped_at_border
        if trainer.world_size > 1:
            border = all(from_all_ranks(border, "flags at an epoch's end"))
        if border:
            self._adopt(trainer)
        self._chronicle.end_epoch(trainer, run)
        self._check(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a last time, all ranks together."""
        if self._run is not None:
            self._ended = True
            self._run.fit_ends()
            self._check(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once more, behind the other callbacks' last hooks, and report."""
        fit, run = self._fit, self._run
        if run is None and fit is not None and fit.index is not None:
            # resumed with nothing left to train, which skips the hooks of training: the fit may
            # have been killed before it reported
            self._ended = True
            self._begin(trainer, pl_module, fit)
            self._first_check(trainer)
            run = self._run
        if run is None:
            return
        self._record.unreached = () if fit is None else fit.never_trained()
        try:
            run.look(looks.FIT_END, self._now(trainer))
            self._judge.hear(trainer, run, run.look_at_weights(here=True), alone=True)
        finally:
            self._finish(trainer)
        if self.table and trainer.is_global_zero:
            print(self.verdict, flush=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Report what was found until then."""
        self._say_last_words(trainer)
        self._leave()

    def _say_last_words(self, trainer: Trainer) -> None:
        """Where an exception ends the fit, before modes and groups are the user's again."""
        if self._run is None or self._ended:
            return
        self._ended = True
        try:
            try:
                self._judge.note(trainer, self._run, self._run.last_words())
            finally:
                self._finish(trainer)
        except Exception as error:
            # the user's own error is on its way, and must not be replaced
            warnings.warn(
                f"The audit couldn't look at the model when the fit broke off: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep what was seen, and nothing of the model."""
        if is_fitting(trainer):
            self._leave()

    def _leave(self) -> None:
        if self._run is not None:
            with suppress(Exception):  # the model may be in pieces
                self._saved = self.state_dict()  # a checkpoint may be saved behind the fit
        self._run = None
        fit, self._fit = self._fit, None
        if fit is not None:
            fit.stop()
        forget_model(self)

    def _finish(self, trainer: Trainer) -> None:
        self._hooks.remove()
        if self._run is not None:
            self._run.stop()
            self._papers.write(trainer, self._run)

    # what was found

    @staticmethod
    def _now(trainer: Trainer) -> tuple[int, int]:
        return trainer.current_epoch, trainer.global_step

    def _check(
        self, trainer: Trainer, first: list[Seen] | None = None, *, flags: bool = True
    ) -> list[Finding]:
        run = self._run
        assert run is not None
        if flags and self._fit is not None and self._fit.applier is not None:
            self._fit.applier.reassert()  # before the next forward pass it does so, too
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        with together(end=False):
            seen = (first or []) + run.check(self._now(trainer), schedulers, flags=flags)
            if trainer.world_size > 1:
                seen += compare_ranks(run, self._wrapped)
            self._record.count_check()
            self._last_step = trainer.global_step
            new = self._judge.hear(trainer, run, seen)
        run.renew(seen, self._now(trainer))
        return new

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        told = self._current().to_dict(self._run)
        return (
            told
            if self._run is not None
            else {**told, "certificate": self._saved.get("certificate")}
        )

    def _repr_html_(self) -> str:
        return audit_to_html(self.verdict, self.findings)

    def plot(self, path: Union[str, os.PathLike[str], None] = None) -> Any:
        """Draw which layers trained when, with their learning rates.

        Args:
            path: where to save the picture; not saved where None.

        Returns:
            The matplotlib figure.
        """
        return self._record.plot(None if path is None else Path(path))


def _rates(trainer: Trainer, fit: FitState) -> dict[str, float]:
    """Name -> the learning rate that it trains at, or would if it weren't frozen."""
    if fit.groups is not None:
        return fit.groups.rates()
    assert fit.index is not None
    return learning_rates(fit.index, trainer.optimizers)


def _held(trainer: Trainer, fit: FitState) -> set[int]:
    """Ids of what the optimizers hold, frozen or not."""
    if fit.groups is None:
        return set().union(*map(ids_held, trainer.optimizers))
    return {id(p) for lists in fit.groups.whole_lists() for params in lists for p in params}
