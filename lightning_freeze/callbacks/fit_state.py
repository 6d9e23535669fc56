"""One fit: merges what all freezing callbacks of a Trainer want, and has it applied.

Every callback calls the same functions: `enter` in `setup`, `start` in `on_fit_start`, `tick` in
`on_train_epoch_start` and `on_train_batch_start`. All are idempotent, so the order of callbacks
doesn't matter, and an epoch start that Lightning skips after a resume is made up for. The state of
a fit hangs from its Trainer, and goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from lightning_freeze.callbacks._lightning import (
    Callback,
    LightningModule,
    Trainer,
    check_namespaces,
    is_overridden,
    rank_zero_warn,
)
from lightning_freeze.callbacks._sharded import ShardedCheckpoints, made_apart
from lightning_freeze.callbacks._useless import (
    warn_blocked,
    warn_frozen,
    warn_left_out,
    warn_random,
    warn_unreached,
    warn_unreached_by_batches,
)
from lightning_freeze.engine import flags
from lightning_freeze.engine.distributed import (
    agree,
    agree_on_callbacks,
    check_supported,
    rewrap,
    several,
    together,
)
from lightning_freeze.engine.optimizers import OptimizerGroups
from lightning_freeze.errors import ConflictError, FreezeError, ResumeError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.schedule.conflicts import check_conflicts
from lightning_freeze.schedule.plan import FreezePlan, merge
from lightning_freeze.schedule.schedule import UnfreezeSchedule

# where a Trainer holds the state of its present or last fit
_HELD_AS = "_lightning_freeze_fit"


class Freezing(Callback):
    """What a fit needs of a callback that freezes.

    Attributes:
        governs_all: whether its schedule is about the whole model, but for what the user froze and
            no selector names.
    """

    governs_all = False

    def resolve(self, index: ModelIndex, trainer: Trainer | None = None) -> UnfreezeSchedule:
        """The schedule for a model. Pure: raises where the arguments don't fit, changes nothing."""
        raise NotImplementedError

    def stage(self, schedule: UnfreezeSchedule, epoch: int, step: int) -> int:
        """The number of the stage at an epoch and an optimizer step."""
        return schedule.stage_at(epoch, step)


class FitState:
    """What one fit needs to remember.

    Attributes:
        index: the model, from `on_fit_start` on.
        plan: what holds now.
        schedules: callback -> its schedule.
        stages: callback -> number of its stage.
        entered: ids of the callbacks that take part, and `entered_last` those of the fit before.
        managed: whether any callback freezes; without one, nothing is changed.
        late: whether the module may make parts of itself after `setup` of the callbacks.
        fresh: names of what was re-initialised before the fit.
        apart: names of what the ranks made differently, where each shards its own.
        tied: name of a tensor -> its other names, in `setup`.
        groups: the optimizers, where a callback freezes.
        applier: writes flags and modes, where a callback freezes.
        listeners: called before and after each change and at the end, as
            `listener(state, "before")`.
    """

    def __init__(self) -> None:
        self.entered: set[int] = set()
        self.entered_last: set[int] = set()
        self.started = False
        self.late = False
        self.index: ModelIndex | None = None
        self.plan = FreezePlan()
        self.schedules: dict[Any, UnfreezeSchedule] = {}
        self.stages: dict[Any, int] = {}
        self.fresh: frozenset[str] = frozenset()
        self.tied: dict[str, tuple[str, ...]] = {}
        self.groups: OptimizerGroups | None = None
        self.applier: flags.Applier | None = None
        self.listeners: list[Callable[[FitState, str], None]] = []
        self.sharded: ShardedCheckpoints | None = None
        self.apart: frozenset[str] = frozenset()
        self._before: frozenset[str] = frozenset()
        self._resumed: dict[Any, int] = {}  # the stages of callbacks with the same arguments
        self._trained_before: frozenset[str] = frozenset()
        self._trained: frozenset[str] = frozenset()
        self._saved_clock: tuple[int, int] | None = None
        self._wrapped_with: frozenset[str] = frozenset()
        self._snapshot: flags.Snapshot | None = None
        self._prepared: ModelIndex | None = None
        self._agreed = -1
        self._told_unreached = False
        self._first_step: int | None = -1  # None once the optimizers' hooks were seen to run

    def __reduce__(self) -> Any:
        """In copies of a Trainer, as for a launcher: a fit that hasn't begun."""
        return FitState, ()

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
        asked: dict[Any, UnfreezeSchedule] = {}
        deferred = False
        try:
            asked = self._resolve(trainer, index)
            for callback in callbacks_of(trainer):
                if hasattr(callback, "reinit_names"):
                    warn_frozen(self.schedules, callback.reinit_names(index))
        except FreezeError:
            if not self.late:
                raise
            deferred = True
        told = {label(cb): s for cb, s in asked.items()}
        warn_blocked(told, self._before)
        warn_unreached(trainer, told)
        if trainer.ckpt_path is None:
            warn_random(self.schedules, index)
        self._snapshot = flags.Snapshot.of(index)
        if self.managed or deferred:
            flags.release(index, _claimed(asked))
        self.tied = index.aliases
        self.apart = made_apart(trainer, index)
        self._wrapped_with = frozenset(n for n, p in index.parameters.items() if p.requires_grad)

    @property
    def wrapped_with(self) -> frozenset[str]:
        """What required a gradient when the model was wrapped for several ranks."""
        assert self.index is not None
        if self.late or self.managed:  # it came later, or was wrapped anew
            return frozenset(n for n, p in self.index.parameters.items() if p.requires_grad)
        return self._wrapped_with

    def undo(self) -> None:
        """The fit can't start: flags and modes as they were before `setup`."""
        snapshot, index = self._snapshot, self.index
        self.stop()
        if snapshot is not None and index is not None:
            snapshot.restore(index)

    def _resolve(self, trainer: Trainer, index: ModelIndex) -> dict[Any, UnfreezeSchedule]:
        """What each callback asks for; what of it concerns this model is kept in `schedules`."""
        freezing = [cb for cb in callbacks_of(trainer) if isinstance(cb, Freezing)]
        asked = {cb: cb.resolve(index, trainer) for cb in freezing}
        self._before = flags.frozen_by_user(index)
        if asked:
            trains = [n for n, p in index.parameters.items() if flags.can_train(p)]
            check_conflicts({label(cb): s for cb, s in asked.items()}, trains, self._before)
        others = self._before - _claimed(asked)
        self.schedules = {
            cb: schedule.without(others) if cb.governs_all else schedule
            for cb, schedule in asked.items()
        }
        return asked

    def start(self, trainer: Trainer, module: LightningModule, resumed: Mapping[Any, Any]) -> None:
        """In `on_fit_start`: take the optimizers and apply the first plan.

        It comes after `configure_optimizers`, so that one that filters on `requires_grad` sees
        all that will ever train, and before optimizer state is restored. Fresh values come first:
        an audit takes down what is there behind this.
        """
        if self.started:
            return
        self.started = True
        for callback in callbacks_of(trainer):
            if hasattr(callback, "start_afresh"):
                callback.start_afresh(trainer, module)
        with together():
            self._start(trainer, module, resumed)

    def _start(self, trainer: Trainer, module: LightningModule, resumed: Mapping[Any, Any]) -> None:
        # what was found out in `setup` still holds unless any part of the model is another one now
        self.index, self._prepared = ModelIndex.of(module, self._prepared), None
        try:
            claimed = _claimed(self._resolve(trainer, self.index))
            if several():
                agree(self._history(claimed), "is under no freezing callback")
            if not self.managed:
                self.plan = FreezePlan(frozen=self._before)
                return
            check_supported(trainer.strategy)
            flags.release(self.index, claimed & self._before)
            factors = self._merged(dict.fromkeys(self.schedules, 0)).lr_scale
            self.groups = OptimizerGroups(self.index, trainer.optimizers, factors)
            warn_left_out({label(cb): s for cb, s in self.schedules.items()}, self.groups.held)
            never = (self._before - claimed).union(*(s.never for s in self.schedules.values()))
            modes = any(schedule.eval_mode for schedule in self.schedules.values())
            self.applier = flags.Applier(self.index, self.groups.held - never if modes else ())
            if getattr(trainer.precision_plugin, "scaler", None) is not None:
                for stages in self._ahead():
                    self.groups.check_scaler(self._merged(stages).frozen)
            self.resume(trainer, resumed)
            if trainer.ckpt_path is not None:
                self.groups.make_whole()  # optimizer state is loaded next
        except BaseException:
            self.undo()
            raise

    def resume(self, trainer: Trainer, resumed: Mapping[Any, Any]) -> None:
        """Take up the stages of a checkpoint; without one, those that the clock says.

        Args:
            trainer: whose fit it is.
            resumed: callback -> what it saved.

        Raises:
            ResumeError: optimizer state would go to other tensors than those it is of.
        """
        assert self.groups is not None
        for callback, saved in resumed.items():
            differs = self.groups.difference(saved.get("optimizers", {}))
            if differs:
                raise ResumeError(
                    f"The checkpoint doesn't fit {label(callback)}: {differs}, or load its weights "
                    "alone: `Model.load_from_checkpoint(path)` and `fit` without `ckpt_path`."
                )
            self.groups.restore(saved.get("optimizers", {}))
            if saved.get("callback", callback.state_key) == callback.state_key:
                self._resumed[callback] = saved["stage"]
        clock = self._saved_clock or (trainer.current_epoch, trainer.global_step)
        stages = {
            callback: self._resumed.get(callback, callback.stage(schedule, *clock))
            for callback, schedule in self.schedules.items()
        }
        self._agree(stages, -1)
        self._check_direction(stages)
        self._switch(trainer, stages)

    def take_down(self, checkpoint: Mapping[str, Any]) -> None:
        """On a resume: when the checkpoint was written, and what trained then.

        Args:
            checkpoint: as Lightning's hooks hand it over.
        """
        self._saved_clock = checkpoint.get("epoch", 0), checkpoint.get("global_step", 0)
        for state in (checkpoint.get("callbacks") or {}).values():
            if isinstance(state, dict) and "stage" in state:
                self._trained_before = frozenset(state.get("trains", ()))

    def settle(self) -> None:
        """Once optimizer state has been saved or loaded: no list holds what is frozen."""
        if self.groups is not None:
            self.groups.settle()

    def tick(self, trainer: Trainer) -> None:
        """Bring the plan up to the trainer's clock, and frozen modules back to eval mode."""
        if self.applier is None or self.groups is None:
            return
        epoch, step = trainer.current_epoch, trainer.global_step
        self._follow_optimizers(trainer)
        self.groups.settle()
        stages = {cb: cb.stage(schedule, epoch, step) for cb, schedule in self.schedules.items()}
        if stages != self.stages or epoch != self._agreed:
            self._agree(stages, epoch)
        if stages != self.stages:
            self._check_direction(stages)
            self._check_something_trains(stages, trainer)
            self._switch(trainer, stages)
        else:
            if self.groups.loaded:
                self._check_direction(stages)
                self.groups.sync(self.plan.frozen)
            self.applier.reassert()

    def _follow_optimizers(self, trainer: Trainer) -> None:
        """Take optimizers that were put in the place of others, and see that the hooks run."""
        assert self.groups is not None
        assert self.index is not None
        held = self.groups.optimizers
        now = trainer.optimizers
        if len(now) != len(held) or any(one is not other for one, other in zip(now, held)):
            self.groups.stop()
            self.groups = OptimizerGroups(self.index, now, self.groups.factors)
            self.groups.sync(self.plan.frozen)
        if self._first_step is None or not self.groups.factors:
            return
        if self._first_step < 0:
            self._first_step = trainer.global_step
        elif self.groups.steps:
            self._first_step = None
        elif trainer.global_step > self._first_step:
            self._first_step = None
            rank_zero_warn(
                "`lr_decay` and `lr_scale` have no effect: the optimizers stepped without their "
                "step hooks. Something calls `step` of another object, or a `step` that was set on "
                "the optimizer itself. Call `optimizer.step()`, or leave the factors at 1.0."
            )

    def train_starts(self, trainer: Trainer) -> None:
        """In `on_train_start`: optimizer state is loaded, and an epoch's batches are known."""
        self.settle()
        if self.managed and not self._told_unreached:
            self._told_unreached = True
            told = {label(cb): s for cb, s in self.schedules.items()}
            warn_unreached_by_batches(trainer, told)

    def never_trained(self) -> tuple[str, ...]:
        """Names that a schedule was to train, and that haven't trained so far."""
        schedules = [schedule for schedule in self.schedules.values() if not schedule.endless]
        ever = frozenset[str]().union(*(schedule.ever for schedule in schedules))
        never = frozenset[str]().union(*(s.never for s in self.schedules.values()))
        names = () if self.index is None else self.index.parameters
        return tuple(n for n in names if n in ever - never - self._trained - self._before)

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
        if not any(flags.can_train(self.index.parameters[name]) for name in left):
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
        """A resume with another schedule would freeze again what has begun to train."""
        for callback, schedule in self.schedules.items():
            saved, stage = self._resumed.get(callback), stages[callback]
            again = self._trained_before & schedule.plan(stage).frozen
            back = saved is not None and stage < saved
            if not back and (schedule.refreezes or not again):
                continue
            what = f"freeze {len(again)} parameters again, such as `{min(again, default='')}`"
            raise ResumeError(
                f"The checkpoint was written in "
                f"{'another schedule' if saved is None else f'stage {saved} of its schedule'}, "
                f"and {label(callback)} would go back to stage {stage}: it would "
                f"{what if again else 'train again what it has been through'}. Use the "
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
        assert self.index is not None
        self.stages = stages
        self.plan = self._merged(stages)
        self._trained |= self._trained_before.union(self.plan.trainable(self.index.parameters))
        with together():
            changed = self.applier.apply(self.plan)
            self.groups.sync(self.plan.frozen)
        if changed:
            rewrap(trainer.strategy)
        for listener in self.listeners:
            listener(self, "after")

    def state(self, callback: Any) -> dict[str, Any]:
        """What a callback saves: its stage, what trains, and what the optimizers hold.

        The lists of the optimizers become whole: Lightning saves their state next.
        """
        if callback not in self.stages or self.groups is None:
            return {}
        self.groups.make_whole()
        assert self.index is not None
        return {
            "callback": callback.state_key,
            "stage": self.stages[callback],
            "trains": list(self.plan.trainable(self.index.parameters)),
            "optimizers": self.groups.state(),
        }

    def give_back(self, module: LightningModule) -> None:
        """If the fit broke off before it started: flags and modes as they were before `setup`."""
        if self._snapshot is not None and not self.started:
            self._snapshot.restore(ModelIndex.of(module))

    def stop(self) -> None:
        """At the end of the fit: the optimizers' lists are whole and modes what they were."""
        for listener in self.listeners:
            listener(self, "end")
        self.listeners = []
        if self.applier is not None:
            self.applier.stop()
        if self.groups is not None:
            self.groups.stop()
        if self.sharded is not None:
            self.sharded.stop()
        self.index = self._prepared = self.applier = self.groups = self.sharded = None
        self._snapshot = None


def enter(trainer: Trainer, module: LightningModule, callback: Callback) -> FitState:
    """In `setup`: the state of the fit that begins; the first callback to enter makes it."""
    state = fit_state_of(trainer)
    if state is None or id(callback) in state.entered or state.started:
        last, state = state, FitState()
        state.entered_last = set() if last is None else last.entered
        with together():
            check_namespaces(trainer)
            agree_on_callbacks(_talk(trainer))
            state.prepare(trainer, module)
        vars(trainer)[_HELD_AS] = state
    state.entered.add(id(callback))
    return state


def fit_state_of(trainer: Trainer) -> FitState | None:
    """The state of a trainer's present or last fit."""
    return vars(trainer).get(_HELD_AS)


def _claimed(schedules: Mapping[Any, UnfreezeSchedule]) -> frozenset[str]:
    """Names that a selector of the user's asked to train."""
    return frozenset[str]().union(*(schedule.claimed for schedule in schedules.values()))


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


def callbacks_of(trainer: Trainer) -> list[Any]:
    """The trainer's callbacks; Lightning doesn't annotate them."""
    return list(cast("Any", trainer).callbacks)


def label(callback: Any) -> str:
    """A callback as its class and position-free arguments, for messages."""
    return str(callback.state_key)
