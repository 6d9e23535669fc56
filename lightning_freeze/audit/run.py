"""One audit of one fit: what is looked at when. It knows the clock, and no Trainer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_freeze.audit import trace as looks
from lightning_freeze.audit.baseline import Moment
from lightning_freeze.audit.declared import Declared
from lightning_freeze.audit.findings import CHANGED, Seen
from lightning_freeze.audit.gradients import GradientWatch, Probe, of_all_held
from lightning_freeze.audit.holdings import check_optimizers, held_by, hidden
from lightning_freeze.audit.ledger import Ledger
from lightning_freeze.audit.moods import is_dropout
from lightning_freeze.audit.scene import Average, Scene, nobody
from lightning_freeze.audit.switches import fell_asleep, lively
from lightning_freeze.audit.unfrozen import (
    Movement,
    by_group,
    never_stepped,
    not_moved,
    without_gradient,
)
from lightning_freeze.errors import FreezeError
from lightning_freeze.model.index import ModelIndex, some
from lightning_freeze.model.layer_groups import LayerGroup

# what was right when everything was compared last, if no look saw it going wrong
_DATED = (*CHANGED, "parameter-replaced", "tie-split")


class AuditRun:
    """What is compared in one fit, and what has been noted.

    Attributes:
        ledger: the frozen side.
        watch: gradients of the unfrozen side.
        clock: epoch and optimizer step of the last look.
        averages: gives the averaged copies of the model that callbacks keep.
        who: says which code runs between two looks.
    """

    def __init__(
        self,
        model: nn.Module,
        index: ModelIndex,
        declared: Declared,
        groups: Sequence[LayerGroup],
        optimizers: Callable[[], Sequence[Optimizer]],
        *,
        now: Moment,
        dead_after: int,
        managed: bool = False,
        omitted: frozenset[str] = frozenset(),
        averages: Callable[[], Sequence[Average]] = tuple,
        who: Callable[[str, str], str] = nobody,
        reduced: Callable[[], Collection[str]] = tuple,
        batches_per_step: Callable[[], int] = int,
        rates: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """Take the model down.

        Args:
            model: any module.
            index: its names.
            declared: what is frozen.
            groups: its layer groups.
            optimizers: gives those of the loop.
            now: epoch and optimizer step.
            dead_after: steps without a gradient after which a trainable parameter counts as dead.
            managed: whether callbacks of ours freeze and unfreeze; otherwise it is done by hand.
            omitted: names that no optimizer needs to hold.
            averages: gives averaged copies.
            who: says which code runs between two looks.
            reduced: gives names of what DistributedDataParallel gives a gradient.
            batches_per_step: gives the number of batches after which an optimizer steps; 0 where
                nobody knows.
            rates: gives name -> learning rate.
        """
        self.rates = rates
        self._reduced = reduced
        self._batches_per_step = batches_per_step
        self._idle = 0
        self._lively: tuple[str, ...] | None = None
        self.ledger = Ledger(model, declared, index=index, now=now)
        self.watch = GradientWatch(dead_after)
        self.clock = now
        self.averages = averages
        self.who = who
        self._groups = groups
        self._optimizers = optimizers
        self._omitted = omitted
        self._started = index
        self._once_held = frozenset(
            index.name_of[key] for key in held_by(optimizers()) if key in index.name_of
        )
        self._frozen_first = declared.frozen
        self._frozen_always = declared.frozen
        self._managed = managed
        self._without: Optimizer | None = None
        self._updating = False
        self._closed: set[int] = set()
        self._movement = Movement()
        self._trace = looks.Trace()
        self._probe: Probe | None = None
        self._queue: list[Seen] = []
        self._looked_for_hidden = False
        self._compared = now
        self._before_first_step = True
        self._settling = False
        self._arm(now)
        # flags were declared when the fit was set up; since then other code may have run
        self._begin(looks.BEGIN, now, self.ledger.flags)
        index.forget()

    @property
    def scene(self) -> Scene:
        """What can be looked at for causes."""
        return Scene(
            self._optimizers(),
            self._trace,
            self.averages(),
            self.who,
            self.ledger.shared,
            self._reduced(),
        )

    def with_gradient(self) -> frozenset[str]:
        """Names of what requires a gradient now, whatever was declared."""
        return frozenset(n for n, p in self.ledger.index.parameters.items() if p.requires_grad)

    @property
    def waiting(self) -> bool:
        """Whether something was seen that hasn't been told yet."""
        return bool(self._queue)

    @property
    def flipped_at_border(self) -> bool:
        """Whether flags were flipped behind an epoch's last batch or validation, only there."""
        flips = self._trace.flips.values()
        return bool(flips) and all(flip.before == looks.EPOCH_END for flip in flips)

    def _begin(
        self, label: str, now: Moment, flags: bytes | None = None, *, again: bool = False
    ) -> None:
        baseline, parameters = self.ledger.baseline, self.ledger.index.parameters
        quiet = self.ledger.quiet
        self._trace.begin(baseline, parameters, quiet, label, now, flags, again=again)

    def declare(self, declared: Declared, now: Moment) -> None:
        """Something froze or unfroze."""
        self.ledger.declare(declared, now)
        self._frozen_always &= declared.frozen
        self._lively = None
        self._before_first_step = True
        self._stop_probe()
        self._arm(now)
        self._begin(looks.EPOCH, now)

    def _arm(self, now: Moment) -> None:
        """Watch what trains now and what an optimizer holds."""
        held = held_by(self._optimizers())
        index = self.ledger.index
        trains = {
            name: parameter
            for name, parameter in index.parameters.items()
            if name not in self.ledger.declared.frozen
            and name not in self.ledger.declared.ignored
            and id(parameter) in held
        }
        self._unmade = [parameter for parameter in trains.values() if is_lazy(parameter)]
        trains = {name: parameter for name, parameter in trains.items() if not is_lazy(parameter)}
        self.watch.arm(trains)
        self._movement.arm(trains, now)

    # the parts of a step

    def batch_starts(self, now: Moment) -> None:
        """Before a batch's forward pass."""
        self.clock = now
        if self._lively is None:  # here every hook at an epoch's start has run
            self._lively = lively(self.ledger.index)
        self._trace.look(looks.START, now)
        self._trace.look_at_flags(looks.START, now)
        if self._before_first_step:
            self._before_first_step = False
            if self.ledger.watch_buffers(now):
                self._settling = True
                self._begin(looks.START, now, again=True)
        dying = self.watch.nearly_dead()
        if dying and self._probe is None:
            index = self.ledger.index
            self._probe = Probe(index, dying, self._frozen_first.intersection(dying))

    def step_starts(self, optimizer: Optimizer, now: Moment) -> None:
        """Before an optimizer's `step`, and before the closure that most of them call in it."""
        if id(optimizer) in self._closed:
            self.update_starts(optimizer, now)

    def update_starts(self, optimizer: Optimizer, now: Moment) -> None:
        """Before an optimizer changes anything."""
        self._updating = True
        params = (p for group in optimizer.param_groups for p in group["params"])
        self._without = None if any(p.grad is not None for p in params) else optimizer
        self._idle = 0
        if not all(map(is_lazy, self._unmade)):
            self._arm(now)  # the first input has made lazy layers
        self._movement.step(optimizer)
        dead = self.watch.before_step(optimizer)
        if dead:
            self._tell_of_dead(dead)
        if self.ledger.baseline.settle():
            self._begin(looks.UPDATE, now, again=True)
        self._trace.before_update(optimizer, now)

    def update_ends(self, optimizer: Optimizer, now: Moment) -> None:
        """After it."""
        self._without = None
        if not self._updating:  # it doesn't call the closure, in which `update_starts` is called
            self._closed.add(id(optimizer))
        self._updating = False
        if self._movement.due(self.watch.dead_after):
            self._movement.note_reasons(optimizer)
        self._trace.after_update(optimizer, now)

    def batch_ends(self, now: Moment) -> None:
        """After a batch."""
        self.look(looks.END, now)
        if self._settling and self.watch.asked and not self._idle:
            self._settling = False
            if self.ledger.let_move(now):
                self._begin(looks.END, now, again=True)
        if self._movement.due(self.watch.dead_after):
            self.check_movement()
        self._count_idle()

    def _count_idle(self) -> None:
        self._idle += 1
        every = self._batches_per_step()
        if every and self._idle == self.watch.dead_after * every and self.watch.waits:
            self._queue += self._never_stepped("warning")

    def _never_stepped(self, severity: str) -> list[Seen]:
        held = held_by(self._optimizers())
        ignored, parameters = self.ledger.declared.ignored, self.ledger.index.parameters
        trains = ((n, p) for n, p in parameters.items() if p.requires_grad and n not in ignored)
        names = [n for n, p in trains if id(p) in held]
        return never_stepped(self._groups, names, self._idle, severity)

    def look(self, label: str, now: Moment) -> None:
        """At any other place of the loop."""
        self.clock = now
        self._trace.look(label, now)
        self._trace.look_at_flags(label, now)

    def asleep(self) -> list[str]:
        """Paths of modules with dropout that are in eval mode although they train."""
        index = self.ledger.index
        found = []
        for path, module in index.modules.items():
            if module.training or not is_dropout(module):
                continue
            around = index.owner(path)
            if not module.p or index.modules[around].training:
                continue  # this one alone was put to sleep: somebody's decision
            if any(index.parameters[n].requires_grad for n in index.within(index.modules[around])):
                found.append(path)
        return found

    # what is told

    def look_at_weights(self, *, here: bool = False) -> list[Seen]:
        """Frozen tensors that aren't what they were.

        Args:
            here: leave out what was on an accelerator: a fit's end moves it off.
        """
        ledger = self.ledger
        baseline = ledger.baseline
        positions = [p for p in range(len(baseline)) if baseline.here(p)] if here else None
        return ledger.changes(baseline.changed(positions), self.scene, ledger.now())

    def check(
        self, now: Moment, schedulers: Iterable[Any] = (), *, flags: bool = True
    ) -> list[Seen]:
        """Compare everything; what was seen on the way comes first.

        Args:
            now: epoch and optimizer step.
            schedulers: of the loop.
            flags: also look at flags, modes and optimizers; they may be in between two states.
        """
        found = [
            item
            if item.since is not None or item.code not in _DATED
            else replace(item, since=self._compared)
            for item in self.ledger.check(self.scene, flags=flags, always=self._frozen_always)
        ]
        seen, self._queue = self._queue + found, []
        self._compared = self.clock = now
        if flags:
            index = self.ledger.now()
            seen += fell_asleep(index, self._lively or ())
            seen += check_optimizers(
                index,
                self._trains_in(index),
                self._optimizers(),
                schedulers,
                lambda name: name not in self._omitted,
                groups=self._groups,
                started=self._started,
                once_held=self._once_held,
                once_frozen=self._frozen_first,
            )
        return seen

    def _trains_in(self, index: ModelIndex) -> list[str]:
        if index is self.ledger.index and self._managed:
            return self.ledger.trainable
        # what our callbacks freeze is in no optimizer by intent, whoever turns its flag on
        declared = self.ledger.declared
        spared = declared.ignored | (declared.frozen if self._managed else frozenset())
        return [n for n, p in index.parameters.items() if p.requires_grad and n not in spared]

    def check_movement(self) -> None:
        """See what has gradients and doesn't move."""
        alive = self.watch.alive
        optimizers = self._optimizers()
        unmoved = self._movement.unmoved(optimizers)
        self._queue += not_moved(
            self._groups,
            self.ledger.index.parameters,
            {name: stuck for name, stuck in unmoved.items() if name in alive},
            optimizers,
            self.watch.dead_after,
        )

    def epoch_ends(self, now: Moment) -> None:
        """Behind an epoch's last batch and its validation."""
        self.look(looks.EPOCH_END, now)
        self._nothing_stepped(times=3)  # who accumulates gradients by hand does it for so long
        self._queue += self._lost()
        if not self._looked_for_hidden:
            self._looked_for_hidden = True
            self._queue += hidden(self.ledger.model, self._optimizers())

    def fit_ends(self) -> None:
        """Behind the last epoch."""
        self._nothing_stepped(times=1)

    def _nothing_stepped(self, *, times: int) -> None:
        least = times * self.watch.dead_after * self._batches_per_step()
        if least and self._idle >= least and not self.watch.asked:
            self._queue += self._never_stepped("error")

    def _lost(self) -> list[Seen]:
        lost = self.watch.lost()
        return [
            Seen(
                "no-gradient",
                names,
                f"{some(names)} had gradients, and has had none for "
                f"{min(lost[name] for name in names)} optimizer steps",
                "Its output isn't used in the loss any more, or is detached.",
                "Freeze what is not to train any more, through these callbacks; name it in "
                "`ignore` if it is meant to get none.",
            )
            for names in by_group(self._groups, lost).values()
        ]

    def renew(self, seen: Iterable[Seen], now: Moment) -> None:
        """Changes have been told of: from now on compare with what these tensors are now."""
        names = {name for item in seen if item.code in CHANGED for name in item.names}
        baseline = self.ledger.baseline
        positions = [p for p, name in enumerate(baseline.names) if name in names]
        if positions:
            baseline.renew(positions, now)
            self._trace.forget(names)

    def last_words(self) -> list[Seen]:
        """When an exception ends the fit: what wasn't told yet, and what is wrong now.

        Flags may be in between two states, so they count only if nothing requires a gradient.
        """
        with suppress(FreezeError, RuntimeError):  # the model may be in pieces
            self._queue += self.look_at_weights(here=True)
            if not self.with_gradient():
                self._queue += self.check(self.clock)
        if self._without is not None:
            held = {id(p) for group in self._without.param_groups for p in group["params"]}
            index = self.ledger.index
            self._tell_of_dead([name for name, p in index.parameters.items() if id(p) in held], 1)
        seen, self._queue = self._queue, []
        return seen

    def _tell_of_dead(self, dead: list[str], steps: int = 0) -> None:
        probe = self._probe or Probe(self.ledger.index, ())
        holder = of_all_held(dead, self.ledger.index, self._optimizers())
        severity = "warning" if self.watch.alive or not holder else "error"
        many = steps or self.watch.dead_after
        for seen in without_gradient(self._groups, dead, many, probe.why, severity):
            if holder:
                seen = replace(seen, cause=f"Nothing that {holder} holds has one. {seen.cause}")
            self._queue.append(seen)
        self._stop_probe()

    def _stop_probe(self) -> None:
        if self._probe is not None:
            self._probe.stop()
            self._probe = None

    def stop(self) -> None:
        """Leave the model as it was found."""
        self._stop_probe()
