"""One fit: merges what all freezing callbacks of a Trainer want, and has it applied.

Every callback calls the same three functions: `enter` in `setup`, `start` in `on_fit_start` and
`tick` in `on_train_epoch_start` and `on_train_batch_start`. All are idempotent, so the order of
callbacks doesn't matter, and an epoch start that Lightning skips after a resume is made up for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

from lightning_freeze.callbacks._lightning import (
    Callback,
    LightningModule,
    Trainer,
    check_namespaces,
    is_overridden,
)
from lightning_freeze.callbacks._precision import check_scaler, scales
from lightning_freeze.callbacks._sharded import ShardedCheckpoints, made_apart
from lightning_freeze.callbacks._useless import warn_blocked, warn_frozen, warn_random
from lightning_freeze.engine import flags as apply
from lightning_freeze.engine import optimizers
from lightning_freeze.engine.distributed import (
    agree,
    agree_on_callbacks,
    check_supported,
    rewrap,
    several,
    together,
)
from lightning_freeze.engine.layout import Layout
from lightning_freeze.errors import ConflictError, FreezeError, ResumeError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.report.labels import Names, legal
from lightning_freeze.schedule.conflicts import check_conflicts
from lightning_freeze.schedule.plan import FreezePlan, merge
from lightning_freeze.schedule.schedule import UnfreezeSchedule

# the turns of what trains from the start, and of what a schedule says nothing about
_ALWAYS = (0,)


class Freezing(Callback):
    """What a session needs of a callback that freezes."""

    def resolve(self, index: ModelIndex, trainer: Trainer | None = None) -> UnfreezeSchedule:
        """The schedule for a model. Pure: raises where the arguments don't fit, changes nothing."""
        raise NotImplementedError

    def stage(self, schedule: UnfreezeSchedule, epoch: int, step: int) -> int:
        """The number of the stage at an epoch and an optimizer step."""
        return schedule.stage_at(epoch, step)


class Session:
    """The freezing side of one fit.

    Attributes:
        of: the trainer.
        index: the model, from `on_fit_start` on.
        plan: what holds now.
        stages: callback -> number of its stage.
        managed: whether any callback freezes; without one, nothing is changed.
        late: whether the module may make parts of itself after `setup` of the callbacks.
        fresh: names of what was re-initialised before the fit.
        apart: names of what the ranks made differently, where each shards its own.
        tied: name of a tensor -> its other names, in `setup`.
        listeners: called before and after each change, as `listener(session, "before")`.
    """

    def __init__(self) -> None:
        self.of: ref[Trainer] | None = None
        self.entered: set[int] = set()
        self.started = False
        self.late = False
        self.index: ModelIndex | None = None
        self.plan = FreezePlan()
        self.schedules: dict[Any, UnfreezeSchedule] = {}
        self.stages: dict[Any, int] = {}
        self.fresh: frozenset[str] = frozenset()
        self.tied: dict[str, tuple[str, ...]] = {}
        self.groups: optimizers.OptimizerGroups | None = None
        self.applier: apply.Applier | None = None
        self.listeners: list[Callable[[Session, str], None]] = []
        self._before: frozenset[str] = frozenset()
        self.sharded: ShardedCheckpoints | None = None
        self.apart: frozenset[str] = frozenset()
        self._resumed: dict[Any, int] = {}
        self._wrapped_with: Mapping[str, bool] = {}
        self._first_trained: bytes | None = None
        self._snapshot: apply.Snapshot | None = None
        self._prepared: ModelIndex | None = None
        self._settled = False
        self._agreed = -1

    @property
    def managed(self) -> bool:
        """Whether any callback of the trainer freezes."""
        return bool(self.schedules)

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """In `setup`: check everything that can be checked, then undo what an earlier fit froze.

        What is made in the module's own `setup` or `configure_model` doesn't exist yet: then what
        doesn't match is looked for again in `on_fit_start`.
        """
        index = self._prepared = ModelIndex.of(module)
        self.late = is_overridden("setup", module) or is_overridden("configure_model", module)
        claimed: frozenset[str] = frozenset()
        deferred = False
        try:
            claimed = self._resolve(trainer, index)
            for callback in callbacks_of(trainer):
                if hasattr(callback, "reinit_names"):
                    warn_frozen(self.schedules, callback.reinit_names(index))
        except FreezeError:
            if not self.late:
                raise
            deferred = True
        warn_blocked({label(cb): s for cb, s in self.schedules.items()}, self._before)
        if trainer.ckpt_path is None:
            warn_random(self.schedules, index)
        self._snapshot = apply.Snapshot.of(index)
        if self.managed or deferred:
            apply.release(index, claimed)
            optimizers.release(index)
        self.tied = index.aliases
        self.apart = made_apart(trainer, index)
        self._wrapped_with = {name: p.requires_grad for name, p in index.parameters.items()}

    @property
    def wrapped_with(self) -> frozenset[str]:
        """What required a gradient when the model was wrapped for several ranks."""
        assert self.index is not None
        names = self.index.parameters
        if self.managed or self._first_trained is None:  # it was wrapped anew, or came later
            return frozenset(n for n, p in names.items() if p.requires_grad)
        return frozenset(name for name, flag in zip(names, self._first_trained) if flag)

    def _settle(self) -> None:
        """Once the fit can't fail to start any more: keep nothing that isn't needed."""
        assert self.index is not None
        if self.index.parameters.keys() == self._wrapped_with.keys():
            self._first_trained = bytes(self._wrapped_with[name] for name in self.index.parameters)
        self._wrapped_with = {}
        self._settled = True

    def undo(self) -> None:
        """The fit can't start: flags and modes as they were before `setup`."""
        self.stop()
        if self._snapshot is not None and self.index is not None:
            self._snapshot.restore(self.index)

    def _resolve(self, trainer: Trainer, index: ModelIndex) -> frozenset[str]:
        freezing = [cb for cb in callbacks_of(trainer) if isinstance(cb, Freezing)]
        schedules = {cb: cb.resolve(index, trainer) for cb in freezing}
        self._before = apply.frozen_by_user(index)
        if schedules:
            trains = [n for n, p in index.parameters.items() if apply.can_train(p)]
            check_conflicts({label(cb): s for cb, s in schedules.items()}, trains, self._before)
        self.schedules = schedules
        return frozenset().union(*(s.claimed for s in schedules.values()))

    def start(self, trainer: Trainer, module: LightningModule, resumed: Mapping[Any, Any]) -> None:
        """In `on_fit_start`: split the optimizers and apply the first plan.

        It comes after `configure_optimizers`, so that one that filters on `requires_grad` sees
        all that will ever train, and before optimizer state is restored.
        """
        if self.started:
            return
        self.started = True
        with together():
            self._start(trainer, module, resumed)

    def _start(self, trainer: Trainer, module: LightningModule, resumed: Mapping[Any, Any]) -> None:
        # what was found out in `setup` still holds unless any part of the model is another one now
        self.index, self._prepared = ModelIndex.of(module, self._prepared), None
        try:
            claimed = self._resolve(trainer, self.index)
            if several():
                agree(self._history(claimed), "is under no freezing callback")
            if not self.managed:
                self.plan = FreezePlan(frozen=self._before)
                self._settle()
                return
            check_supported(trainer.strategy)
            apply.release(self.index, claimed & self._before)
            self.groups = optimizers.OptimizerGroups(
                self.index,
                trainer.optimizers,
                [config.scheduler for config in trainer.lr_scheduler_configs],
                self._partition(),
                self._merged(dict.fromkeys(self.schedules, 0)).lr_scale,
            )
            never = (self._before - claimed).union(*(s.never for s in self.schedules.values()))
            self.applier = apply.Applier(self.index, self.groups.held - never)
            if scales(trainer):
                for stages in self._ahead():
                    check_scaler(self.groups, self._merged(stages).frozen)
            self.resume(trainer, resumed)
            self._settle()
        except BaseException:
            self.undo()
            raise

    def resume(self, trainer: Trainer, resumed: Mapping[Any, Any]) -> None:
        """Take up the stages of a checkpoint; without one, those that the clock says.

        Args:
            trainer: whose fit it is.
            resumed: callback -> what it saved.

        Raises:
            ResumeError: the optimizer groups would have another shape than the saved ones.
        """
        assert self.groups is not None
        self._resumed = {cb: s["stage"] for cb, s in resumed.items() if "stage" in s}
        clock = (trainer.current_epoch, trainer.global_step)
        stages = {
            cb: resumed.get(cb, {}).get("stage", cb.stage(schedule, *clock))
            for cb, schedule in self.schedules.items()
        }
        self._agree(stages, -1)
        self._switch(trainer, stages)
        self._check_layout(resumed)
        for saved in resumed.values():
            self.groups.restore_idle(saved.get("idle", ()))

    def tick(self, trainer: Trainer) -> None:
        """Bring the plan up to the trainer's clock, and frozen modules back to eval mode."""
        if self._settled and self.index is not None:
            self.index.forget()  # by now all that asks much of it has asked
            self._settled = False
        if self.applier is None:
            return
        epoch, step = trainer.current_epoch, trainer.global_step
        stages = {cb: cb.stage(schedule, epoch, step) for cb, schedule in self.schedules.items()}
        if stages != self.stages or epoch != self._agreed:
            self._agree(stages, epoch)
        if stages != self.stages:
            self._check_direction(stages)
            self._check_something_trains(stages, trainer)
            self._switch(trainer, stages)
        else:
            self.applier.reassert()

    def upcoming(self) -> Iterator[frozenset[str]]:
        """What will be frozen in each of the stages to come, soonest first, one at a time."""
        later = sorted(
            (stage.at, number, place)
            for place, (callback, schedule) in enumerate(self.schedules.items())
            for number, stage in enumerate(schedule.stages)
            if number > self.stages.get(callback, 0)
        )
        callbacks, stages = list(self.schedules), dict(self.stages)
        for _, number, place in later:
            stages[callbacks[place]] = number
            yield self._merged(stages).frozen

    def _ahead(self) -> Iterator[dict[Any, int]]:
        """The start, and each stage in which a schedule may freeze more than then."""
        first = dict.fromkeys(self.schedules, 0)
        yield first
        for callback, schedule in self.schedules.items():
            if schedule.refreezes:
                yield from ({**first, callback: n} for n in range(1, len(schedule.stages)))

    def _check_something_trains(self, stages: Mapping[Any, int], trainer: Trainer) -> None:
        """Where schedules of several clocks freeze again, only the clock shows what is left."""
        assert self.index is not None
        if not any(schedule.refreezes for schedule in self.schedules.values()):
            return
        left = self._merged(stages).trainable(self.index.parameters)
        if not any(apply.can_train(self.index.parameters[name]) for name in left):
            raise ConflictError(
                f"Nothing is left to train from epoch {trainer.current_epoch}, step "
                f"{trainer.global_step} on: {', '.join(map(label, self.schedules))} freeze all of "
                "it at this moment. Freeze less in one of them, or unfreeze at the same time."
            )

    def _history(self, claimed: frozenset[str]) -> dict[str, str]:
        """Name -> from when it trains, for the other ranks; empty where no callback freezes."""
        assert self.index is not None
        if not self.managed:
            return {}
        told = dict.fromkeys(self.index.parameters, "")
        for schedule in self.schedules.values():
            for name, text in schedule.tell().items():
                told[name] += f" and {text}" if told[name] else text
        told |= dict.fromkeys(self._before - claimed, "was frozen before the fit")
        return {name: text or "trains from the start" for name, text in told.items()}

    def _agree(self, stages: Mapping[Any, int], epoch: int) -> None:
        """Each epoch and before each change: a rank that moved alone would wait for ever."""
        self._agreed = epoch
        if several():
            frozen = sorted(self._merged(stages).frozen)
            agree(dict.fromkeys(frozen, "is frozen"), "trains")

    def _check_direction(self, stages: Mapping[Any, int]) -> None:
        """A resume with a later schedule would freeze again what has begun to train."""
        for callback, saved in self._resumed.items():
            if stages[callback] >= saved:
                continue
            schedule = self.schedules[callback]
            again = schedule.plan(stages[callback]).frozen - schedule.plan(saved).frozen
            if not again and not schedule.refreezes:
                continue
            frozen = f"freeze {len(again)} parameters again, such as `{min(again, default='')}`"
            raise ResumeError(
                f"The checkpoint was written in stage {saved} of its schedule, and "
                f"{label(callback)} would go back to stage {stages[callback]}: it would "
                f"{frozen if again else 'train again what it has been through'}. Use the "
                "schedule of the run that wrote it, or load its weights alone: "
                "`Model.load_from_checkpoint(path)` and `fit` without `ckpt_path`."
            )

    def _merged(self, stages: Mapping[Any, int]) -> FreezePlan:
        plans = [schedule.plan(stages[cb]) for cb, schedule in self.schedules.items()]
        return merge(plans, self._before)

    def _switch(self, trainer: Trainer, stages: dict[Any, int]) -> None:
        assert self.applier is not None
        assert self.groups is not None
        for listener in self.listeners:
            listener(self, "before")
        self.stages = stages
        self.plan = self._merged(stages)
        with together():
            changed = self.applier.apply(self.plan)
            self.groups.sync(self.plan.frozen)
        if changed:
            rewrap(trainer.strategy)
        for listener in self.listeners:
            listener(self, "after")

    def _partition(self) -> dict[str, str]:
        """Name -> layer group, so fine that all of a group freezes and unfreezes together."""
        assert self.index is not None
        found: dict[str, str] = {}
        keys: dict[tuple[Any, ...], str] = {}
        give = Names()
        turns = [schedule.turns() for schedule in self.schedules.values()]
        for name in self.index.parameters:
            history = tuple(known.get(name, _ALWAYS) for known in turns)
            labels = [s.layer_group[name] for s in self.schedules.values() if name in s.layer_group]
            shown = min(labels, key=lambda text: text == "rest") if labels else "rest"
            key = (*labels, history, name in self._before)
            if key not in keys:
                keys[key] = give(legal(shown))
            found[name] = keys[key]
        return found

    def state(self, callback: Any) -> dict[str, Any]:
        """What a callback saves: its stage, and what the optimizer state in the file is for."""
        if callback not in self.stages or self.groups is None:
            return {}
        state = {"stage": self.stages[callback], **Layout.of(self.groups).to_dict()}
        return {**state, "idle": self.groups.idle()} if self.sharded is not None else state

    def _check_layout(self, resumed: Mapping[Any, Any]) -> None:
        assert self.groups is not None
        layout = Layout.of(self.groups)
        for callback, saved in resumed.items():
            differs = layout.difference(saved)
            if differs:
                raise ResumeError(
                    f"The checkpoint doesn't fit {label(callback)}: {differs}, or load its weights "
                    "alone: `Model.load_from_checkpoint(path)` and `fit` without `ckpt_path`."
                )

    def give_back(self, module: LightningModule) -> None:
        """If the fit broke off before it started: flags and modes as they were before `setup`."""
        if self._snapshot is not None and not self.started:
            self._snapshot.restore(ModelIndex.of(module))

    def stop(self) -> None:
        """At the end of the fit: take the guards off; flags and groups stay as they are."""
        if self.applier is not None:
            self.applier.stop()
        if self.sharded is not None:
            self.sharded.stop()


_sessions: WeakKeyDictionary[Trainer, Session] = WeakKeyDictionary()


def enter(trainer: Trainer, module: LightningModule, callback: Callback) -> Session:
    """In `setup`: the session of the fit that begins; the first callback to enter makes it."""
    session = _sessions.get(trainer)
    if session is None or id(callback) in session.entered or session.started:
        session = Session()
        session.of = ref(trainer)
        with together():
            check_namespaces(trainer)
            agree_on_callbacks(_talk(trainer))
            session.prepare(trainer, module)
        _sessions[trainer] = session
    session.entered.add(id(callback))
    return session


def _talk(trainer: Trainer) -> str:
    """Our callbacks, with those of their arguments that decide when ranks communicate."""
    told = []
    for callback in callbacks_of(trainer):
        if type(callback).__module__.startswith("lightning_freeze.") or isinstance(
            callback, Freezing
        ):
            words = ("every", "monitor", "on_violation")
            given = {word: vars(callback).get(word) for word in words}
            shown = ", ".join(f"{word}={value!r}" for word, value in given.items() if value)
            told.append(f"{type(callback).__name__}({shown})")
    return ", ".join(told)


def session_of(trainer: Trainer) -> Session | None:
    """The session of a trainer's present or last fit."""
    return _sessions.get(trainer)


def callbacks_of(trainer: Trainer) -> list[Any]:
    """The trainer's callbacks; Lightning doesn't annotate them."""
    return list(cast("Any", trainer).callbacks)


def label(callback: Any) -> str:
    """A callback as its class and position-free arguments, for messages."""
    return str(callback.state_key)
