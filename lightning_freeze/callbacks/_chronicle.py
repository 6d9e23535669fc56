"""What an audit says while a fit runs: tables, logged counts, moments of the timeline."""

from __future__ import annotations

from lightning_freeze.audit.record import Record
from lightning_freeze.audit.run import AuditRun
from lightning_freeze.callbacks._lightning import Trainer
from lightning_freeze.callbacks._loggers import Loggers
from lightning_freeze.callbacks.fit_state import FitState
from lightning_freeze.checkpoints.origin.find import find_origins
from lightning_freeze.checkpoints.origin.frozen import never_learns
from lightning_freeze.checkpoints.origin.states import Origins
from lightning_freeze.model.index import size_of
from lightning_freeze.report.labels import unique
from lightning_freeze.report.summary import Summary, rows_of
from lightning_freeze.report.timeline import Moment
from lightning_freeze.report.transitions import Transition, transition, transitions

# moments that are kept one by one; behind them one an epoch
_MOST = 1000


class Chronicle:
    """Takes down one fit's moments, prints its tables and logs its counts."""

    def __init__(
        self,
        record: Record,
        *,
        table: bool,
        log_metrics: bool,
    ) -> None:
        self._record = record
        self._table = table
        self._log_metrics = log_metrics
        self._shown = False
        self._loggers = Loggers()
        self._changes: list[Transition] | None = None
        self._names: dict[str, str] = {}
        self._logged = -1

    def change(self, trainer: Trainer, fit: FitState, run: AuditRun) -> None:
        """Take down, show and log who trains from now on.

        Where layers are drawn without end, only the first table is shown.
        """
        self.take_down(trainer, run)
        endless = any(schedule.endless for schedule in fit.schedules.values())
        if self._table and trainer.is_global_zero and not (endless and self._shown):
            self._shown = True
            when = f"Epoch {trainer.current_epoch}, step {trainer.global_step}: who trains"
            print(f"\n{self._summary(trainer, fit, run, when)}\n", flush=True)

    def take_down(self, trainer: Trainer, run: AuditRun) -> None:
        """Take down a moment, and log it; what changed in it is told as text, too."""
        moments = self._record.moments
        if self._changes is None:  # after a resume, with those before it
            self._changes = transitions(moments)
        clock = trainer.current_epoch, trainer.global_step
        moment = Moment(*clock, self._lrs(trainer, run), _trains(run))
        change = transition(moments[-1] if moments else None, moment)
        if len(moments) < _MOST:
            self._record.add(moment)
        else:
            self._record.fold(moment)
        tell = change is not None and len(self._changes) < _MOST
        if change is not None and tell:
            self._changes.append(change)
        if self._log_metrics and trainer.loggers:
            if change is not None or self._logged != clock[1]:
                self._logged = clock[1]
                self._log(trainer, run, moment)
            if tell:
                self._loggers.tell(trainer, self._changes, _size(run))

    def end_epoch(self, trainer: Trainer, run: AuditRun) -> None:
        """Raise the last moment's learning rates to those of its epoch's end."""
        self._record.epochs = trainer.current_epoch + 1.0
        self._record.peak(self._lrs(trainer, run))
        if self._log_metrics and self._changes:
            self._loggers.catch_up(trainer, self._changes, _size(run))

    def _lrs(self, trainer: Trainer, run: AuditRun) -> dict[str, float | None]:
        lrs = run.rates()
        frozen = run.ledger.declared.frozen
        now: dict[str, float | None] = {}
        for group in self._record.groups:
            trains = [lrs[name] for name in group.parameters if name in lrs and name not in frozen]
            now[group.name] = max(trains) if trains else None
        return now

    def _summary(self, trainer: Trainer, fit: FitState, run: AuditRun, title: str) -> Summary:
        index = run.ledger.index
        # later, weights are restored or trained; several ranks have written to each other's
        begins = not trainer.global_step and trainer.ckpt_path is None
        origins = find_origins(index) if begins else Origins()
        shown = origins if trainer.world_size == 1 else None
        rows = rows_of(index, self._record.groups, trainer.optimizers, shown, run.rates())
        later = (stage.trainable for s in fit.schedules.values() for stage in s.stages)
        notes = never_learns(index, origins, frozenset().union(*later))
        applier = fit.applier
        if applier is not None and applier.woken and not trainer.global_step:
            woken = applier.woken
            first = woken[0] or type(trainer.lightning_module).__name__
            notes.append(
                f"{len(woken)} modules (from `{first}`"
                " on) were in eval mode, as `from_pretrained` leaves them, although they train: "
                "put in train mode."
            )
        asleep = run.asleep()
        if asleep:
            notes.append(
                f"The dropout of what trains is off: {len(asleep)} modules, such as `{asleep[0]}`, "
                "are in eval mode. `from_pretrained` leaves a model so, and Lightning doesn't "
                "change that: call `train()` on the model before the fit."
            )
        omitted = sum(row.status == "in no optimizer" for row in rows)
        if omitted:
            notes.append(f"{omitted} tensors require a gradient but are in no optimizer.")
        return Summary(rows, title, tuple(notes))

    def _log(self, trainer: Trainer, run: AuditRun, moment: Moment) -> None:
        if not self._names:
            self._names = unique(moment.lr)
        trains = moment.trainable or 0
        metrics = {
            "freeze/trainable_parameters": float(trains),
            "freeze/frozen_parameters": float(_size(run) - trains),
            "freeze/stage": float(len(self._changes or ()) - 1),
        }
        for group, lr in moment.lr.items():
            metrics[f"freeze/lr/{self._names[group]}"] = lr or 0.0
        self._loggers.numbers(trainer, metrics)


def _trains(run: AuditRun) -> int:
    """Number of elements that train."""
    frozen, parameters = run.ledger.declared.frozen, run.ledger.index.parameters
    return sum(size_of(p) for name, p in parameters.items() if name not in frozen)


def _size(run: AuditRun) -> int:
    """Number of elements in all."""
    return sum(map(size_of, run.ledger.index.parameters.values()))
