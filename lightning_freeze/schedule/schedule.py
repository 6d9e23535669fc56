"""(epoch, step) -> FreezePlan: when what unfreezes. No torch, no model: names and numbers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby
from operator import attrgetter
from typing import Any

from lightning_freeze.errors import ScheduleError
from lightning_freeze.schedule.entries import Entry
from lightning_freeze.schedule.plan import FreezePlan
from lightning_freeze.schedule.stages import Change, Stage, stages_of

__all__ = ["MetricClock", "Stage", "UnfreezeSchedule", "from_entries", "from_groups"]

_AT = attrgetter("at")


@dataclass(frozen=True)
class UnfreezeSchedule:
    """When which parameters train; a pure function from (epoch, step) to a `FreezePlan`.

    Attributes:
        governed: names that this schedule decides about; it says nothing of others.
        stages: in the order of time, the first at 0.
        unit: "epoch", "step" (optimizer steps) or "metric" (the stage is told, not read off a
            clock).
        lr_scale: name -> constant factor on the user's learning rate.
        claimed: names that a selector of the user asked to train.
        eval_mode: whether modules that are frozen belong in eval mode.
        lively: batch-norm modules that train although frozen parts surround them.
        layer_group: name -> name of its layer group.
        advice: why it may leave nothing to train, and what to write then; empty for the usual.

    Example:
        >>> schedule = UnfreezeSchedule(
        ...     governed=frozenset({"body", "head"}),
        ...     stages=(Stage(0, frozenset({"head"})), Stage(2, frozenset({"body", "head"}))),
        ... )
        >>> [sorted(schedule.plan(schedule.stage_at(epoch, 0)).frozen) for epoch in range(3)]
        [['body'], ['body'], []]
    """

    governed: frozenset[str]
    stages: tuple[Stage, ...]
    unit: str = "epoch"
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    claimed: frozenset[str] = frozenset()
    eval_mode: bool = True
    lively: frozenset[str] = frozenset()
    layer_group: Mapping[str, str] = field(default_factory=dict)
    advice: str = ""

    def stage_at(self, epoch: int, step: int) -> int:
        """The number of the stage at an epoch and optimizer step, both counted from 0."""
        clock = step if self.unit == "step" else epoch
        return max(bisect_right(self.stages, clock, key=_AT) - 1, 0)

    def trainable(self, stage: int) -> frozenset[str]:
        """What trains in a stage; a number past the last means the last."""
        return self.stages[min(stage, len(self.stages) - 1)].trainable

    def plan(self, stage: int) -> FreezePlan:
        """What this schedule wants in a stage; a number past the last means the last."""
        frozen = self.governed - self.trainable(stage)
        return FreezePlan(
            frozen=frozen,
            quiet=frozen if self.eval_mode else frozenset(),
            lively=self.lively,
            claimed=self.claimed,
            lr_scale=self.lr_scale,
        )

    def without(self, names: frozenset[str]) -> UnfreezeSchedule:
        """The same, but that it says nothing of some parameters."""
        return replace(self, governed=self.governed - names) if names else self

    def turns(self) -> dict[str, tuple[int, ...]]:
        """Name of what is governed -> numbers of the stages in which it begins to train or stops.

        It stands there once for each turn: what trains from the start has (0,), what never trains
        has (). Two parameters of the same turns freeze and unfreeze together.
        """
        found: dict[str, tuple[int, ...]] = dict.fromkeys(self.governed, ())
        changes = [(self.stages[0].trainable, frozenset[str]()), *self.changes]
        for number, change in enumerate(changes):
            longer: dict[tuple[int, ...], tuple[int, ...]] = {}
            for names in change:
                for name in names:
                    old = found.get(name)
                    if old is not None:
                        found[name] = longer.setdefault(old, (*old, number))
        return found

    def tell(self) -> dict[str, str]:
        """Name -> from when it trains or is frozen again, in words, of all that is governed."""
        words: dict[tuple[int, ...], str] = {}
        told = {}
        for name, turns in self.turns().items():
            if turns not in words:
                words[turns] = self._in_words(turns)
            told[name] = words[turns] + self._rate(name) if turns else "stays frozen"
        return told

    def _in_words(self, turns: tuple[int, ...]) -> str:
        unit = "stage" if self.unit == "metric" else self.unit
        moments = [self.stages[number].at for number in turns]
        return " and ".join(
            f"{'is frozen' if place % 2 else 'trains'} from {f'{unit} {at}' if at else 'the start'}"
            for place, at in enumerate(moments)
        )

    def _rate(self, name: str) -> str:
        scale = self.lr_scale.get(name, 1.0)
        return f" at {scale:.6g} of the rate" if scale != 1.0 else ""

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """For each stage but the first: what begins to train in it, and what is frozen again."""
        pairs = zip(self.stages, self.stages[1:])
        return tuple(after.change(before) for before, after in pairs)

    @property
    def ever(self) -> frozenset[str]:
        """Names that some stage trains."""
        return self.governed.intersection(self.stages[0].trainable.union(*self._added))

    @property
    def _added(self) -> list[frozenset[str]]:
        return [added for added, _ in self.changes]

    @cached_property
    def never(self) -> frozenset[str]:
        """Names that no stage ever unfreezes."""
        return self.governed - self.ever

    @property
    def endless(self) -> bool:
        """Whether stages go on for as long as the run does; `stages` are then the first of them."""
        return False

    @property
    def refreezes(self) -> bool:
        """Whether something that trains is frozen again later."""
        return any(removed for _, removed in self.changes)

    def arrivals(self) -> list[frozenset[str]]:
        """What trains at the start, then what begins to train with each later stage."""
        return [self.stages[0].trainable & self.governed, *self._added]


def from_entries(
    schedule: UnfreezeSchedule,
    entries: Iterable[Entry],
    select: Callable[[Any], Iterable[str]],
) -> UnfreezeSchedule:
    """Fill in the stages that a user's entries describe.

    Args:
        schedule: governs what the entries select; its stages are replaced, its factors multiplied.
        entries: from `parse_schedule`.
        select: selector -> names of parameters.

    Raises:
        ScheduleError: an entry unfreezes only what trains already, freezes what doesn't train, or
            gives what trained before another factor.
    """
    changes: list[tuple[int, Iterable[str], Iterable[str]]] = []
    given: dict[str, float] = {}
    since: dict[str, tuple[int, Any]] = {}
    for at, together in groupby(entries, key=lambda entry: entry.at):
        now = tuple(together)
        added: dict[str, None] = {}
        removed: dict[str, None] = {}
        for selector in (name for entry in now for name in entry.freeze):
            again = since.keys() & set(select(selector))
            if not again:
                raise ScheduleError(
                    f"`schedule` freezes `{selector}` at {at}, but nothing of it trains then. "
                    "Everything is frozen at first; `freeze` is for what was unfrozen before."
                )
            for name in again:
                del since[name]
                removed[name] = None
        for entry, selector in [(each, name) for each in now for name in each.selectors]:
            chosen = set(select(selector))
            if chosen <= since.keys():
                before, by = since[min(chosen)]
                raise ScheduleError(
                    f"`schedule` unfreezes `{selector}` at {at}, but it trains since {before} "
                    f"(`{by}`). Schedules are cumulative: name each layer group once."
                )
            for name in chosen - since.keys():
                since[name] = (at, selector)
                _set_factor(given, name, entry)
                if name in removed:
                    del removed[name]
                else:
                    added[name] = None
        changes.append((at, added, removed))
    if changes and changes[0][0] > 0:
        changes.insert(0, (0, (), ()))
    scale = dict(schedule.lr_scale)
    for name, factor in given.items():
        scale[name] = scale.get(name, 1.0) * factor
    return replace(schedule, stages=stages_of(changes), lr_scale=scale, claimed=frozenset(given))


def _set_factor(given: dict[str, float], name: str, entry: Entry) -> None:
    if name not in given:
        given[name] = entry.lr_scale
    elif entry.scaled and entry.lr_scale != given[name]:
        raise ScheduleError(
            f"`schedule` gives `{name}` the `lr_scale` {entry.lr_scale:.6g} at {entry.at}, but it "
            f"trained with {given[name]:.6g} before. The factor of a layer is one for the whole "
            "fit, so that your scheduler goes on: write the same, or leave it out."
        )


def from_groups(
    schedule: UnfreezeSchedule,
    groups: Sequence[tuple[str, ...]],
    *,
    start: int,
    every: int,
    layers_per_step: int,
    order: str,
) -> UnfreezeSchedule:
    """The stages of a regular schedule: the top group first, then `layers_per_step` at a time.

    Args:
        schedule: its stages are replaced.
        groups: names per layer group, bottom to top; the last one is the head.
        start: epoch or step of the first unfreezing.
        every: epochs or steps between two.
        layers_per_step: layer groups per unfreezing.
        order: "top_down" or "bottom_up".
    """
    *body, head = groups
    queue = body if order == "bottom_up" else body[::-1]
    changes: list[tuple[int, Iterable[str], Iterable[str]]] = [(0, head, ())]
    for number, position in enumerate(range(0, len(queue), layers_per_step)):
        added = chain(*queue[position : position + layers_per_step])
        changes.append((start + every * number, added, ()))
    stages = stages_of(changes)
    return replace(schedule, stages=stages[1:] if stages[1:] and not stages[1].at else stages)


@dataclass(frozen=True)
class MetricClock:
    """Counts stages by a metric: one more when it hasn't improved for `patience` epochs.

    Attributes:
        mode: "min" or "max".
        patience: epochs without improvement before the next stage.
        min_delta: a change below this is no improvement.
        best: best value so far, None before the first.
        waited: epochs without improvement.
        stage: the stage that has been reached.

    Example:
        >>> clock = MetricClock("min", patience=2)
        >>> for loss in (1.0, 0.9, 0.9, 0.95):
        ...     clock = clock.feed(loss)
        >>> clock.stage
        1
    """

    mode: str = "min"
    patience: int = 1
    min_delta: float = 0.0
    best: float | None = None
    waited: int = 0
    stage: int = 0

    def feed(self, value: float) -> MetricClock:
        """The clock after one more epoch's value. NaN is no improvement."""
        gain = 0.0
        if self.best is not None:
            gain = self.best - value if self.mode == "min" else value - self.best
        if value == value and (self.best is None or gain > self.min_delta):
            return replace(self, best=value, waited=0)
        if self.waited + 1 < self.patience:
            return replace(self, waited=self.waited + 1)
        return replace(self, waited=0, stage=self.stage + 1)
