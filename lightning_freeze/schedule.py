"""(epoch, step) -> FreezePlan: when what unfreezes. No torch, no model: names and numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union

from lightning_freeze.arguments import positive
from lightning_freeze.errors import ArgumentError, ScheduleError
from lightning_freeze.plan import FreezePlan

_EXAMPLE = '`{0: "classifier", 1: ["layer.10", "layer.11"], 3: "**"}`'
_HOW = (
    f"A schedule maps an epoch to selectors, as in {_EXAMPLE}; a value may also be "
    '`{"unfreeze": [...], "lr_scale": 0.5}`. `"freeze": [...]` in it freezes again.'
)
_KEYS = {"unfreeze", "freeze", "lr_scale"}


@dataclass(frozen=True)
class Entry:
    """One line of a schedule as the user wrote it.

    Attributes:
        at: the epoch (or optimizer step) from which it holds.
        selectors: what to unfreeze.
        lr_scale: factor on the user's learning rate for those.
        freeze: what to freeze again; before `selectors` unfreeze.
        scaled: whether the user wrote an `lr_scale`.
    """

    at: int
    selectors: tuple[Any, ...]
    lr_scale: float = 1.0
    freeze: tuple[Any, ...] = ()
    scaled: bool = field(default=False, repr=False, compare=False)


@dataclass(frozen=True)
class Stage:
    """What trains from one moment on.

    Attributes:
        at: the epoch or optimizer step (counted from 0) at which the stage begins; with a
            metric-driven schedule, the stage's number.
        trainable: names of all governed parameters that train in it.
    """

    at: int
    trainable: frozenset[str]


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

    def stage_at(self, epoch: int, step: int) -> int:
        """The number of the stage at an epoch and optimizer step, both counted from 0."""
        clock = step if self.unit == "step" else epoch
        return max(sum(stage.at <= clock for stage in self.stages) - 1, 0)

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

    def tell(self) -> dict[str, str]:
        """Name -> from when it trains or is frozen again, in words, of all that is governed."""
        unit = "stage" if self.unit == "metric" else self.unit
        told = {}
        for name in self.governed:
            turns: list[str] = []
            for stage in self.stages:
                trains = name in stage.trainable
                if trains != bool(len(turns) % 2):
                    what = "trains" if trains else "is frozen"
                    turns.append(f"{what} from {f'{unit} {stage.at}' if stage.at else 'the start'}")
            told[name] = " and ".join(turns) + self._rate(name) if turns else "stays frozen"
        return told

    def _rate(self, name: str) -> str:
        scale = self.lr_scale.get(name, 1.0)
        return f" at {scale:.6g} of the rate" if scale != 1.0 else ""

    @property
    def ever(self) -> frozenset[str]:
        """Names that some stage trains."""
        return self.governed.intersection(frozenset().union(*(s.trainable for s in self.stages)))

    @property
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
        pairs = zip(self.stages, self.stages[1:])
        return any(earlier.trainable - later.trainable for earlier, later in pairs)

    def arrivals(self) -> list[frozenset[str]]:
        """What trains at the start, then what begins to train with each later stage."""
        pairs = zip(self.stages, self.stages[1:])
        later = [after.trainable - before.trainable for before, after in pairs]
        return [self.stages[0].trainable & self.governed, *later]

    def apart(self) -> list[frozenset[str]]:
        """Sets of names: two names that are in the same ones freeze and unfreeze together."""
        return [self.plan(number).frozen for number in range(len(self.stages))]


def parse_schedule(schedule: Union[Mapping[Any, Any], str, Path]) -> tuple[Entry, ...]:
    """Read a schedule that a user wrote, as a mapping or as the path of a YAML file.

    Args:
        schedule: epoch -> selectors, or epoch -> `{"unfreeze": selectors, "freeze": selectors,
            "lr_scale": factor}`. In one entry `freeze` comes before `unfreeze`, so that
            `{"freeze": "**", "unfreeze": "layer.11"}` trains that layer alone.

    Returns:
        One `Entry` per epoch, sorted.

    Raises:
        ScheduleError: an epoch is not a whole number from 0, a value is not selectors, a key is
            unknown, or one selector is named twice without being frozen in between.

    Example:
        >>> for entry in parse_schedule({1: {"freeze": "head", "unfreeze": "body"}, 0: "head"}):
        ...     print(entry)
        Entry(at=0, selectors=('head',), lr_scale=1.0, freeze=())
        Entry(at=1, selectors=('body',), lr_scale=1.0, freeze=('head',))
    """
    origin = "`schedule`"
    if isinstance(schedule, (str, Path)):
        origin = f"The schedule file `{schedule}`"
        schedule = read_schedule(schedule)
    if not isinstance(schedule, Mapping) or not schedule:
        raise ScheduleError(f"{origin} is {schedule!r}. {_HOW}")
    entries: dict[int, Entry] = {}
    for key, value in schedule.items():
        at = _whole(key, origin)
        if at in entries:
            raise ScheduleError(f"{origin} names epoch {at} twice. Write one list for it.")
        entries[at] = _entry(at, value, origin)
    found = tuple(entries[at] for at in sorted(entries))
    _check_repeats(found, origin)
    return found


def _check_repeats(entries: Sequence[Entry], origin: str) -> None:
    """One selector twice, or frozen and unfrozen at once, is a slip."""
    named: dict[Any, int] = {}
    for entry in entries:
        at = entry.at
        if entry.freeze:  # which of the earlier ones it means is known with the model
            named = {}
        for selector in entry.selectors:
            if selector in entry.freeze:
                raise ScheduleError(
                    f"{origin} freezes and unfreezes `{selector}` at {at}. Leave one of them out."
                )
            if selector in named:
                where = "twice at" if named[selector] == at else f"at {named[selector]} and"
                raise ScheduleError(
                    f"{origin} names `{selector}` {where} {at}. Schedules are cumulative: what "
                    "is unfrozen stays so. Name each layer group once."
                )
            named[selector] = at


def read_schedule(path: Union[str, Path]) -> Any:
    """What stands in a schedule file, not yet checked; a key that stands twice raises."""
    origin = f"The schedule file `{path}`"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ScheduleError(f"{origin} can't be read: {error.strerror or error}. {_HOW}") from error
    except UnicodeDecodeError as error:
        raise ScheduleError(f"{origin} is not valid YAML: {error}. {_HOW}") from error
    return from_yaml(text, origin)


def from_yaml(text: str, origin: str = "`schedule`") -> Any:
    """What a YAML text says, not yet checked.

    Raises:
        ScheduleError: it isn't YAML, or a key stands twice.
    """
    import yaml

    try:
        return yaml.load(text, _strict_loader())
    except yaml.YAMLError as error:
        raise ScheduleError(f"{origin} is not valid YAML: {error}. {_HOW}") from error


def _strict_loader() -> Any:
    """YAML's safe loader, which would let a key that stands twice win in silence, made to raise."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: list[Any] = []  # not a set: a key may be a list, which YAML itself refuses
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice", key_node.start_mark
                    )
                seen.append(key)
            return super().construct_mapping(node, deep)

    return Loader


def _whole(key: Any, origin: str) -> int:
    if isinstance(key, str) and re.fullmatch(r"\s*-?[0-9]+\s*", key):
        key = int(key)
    if isinstance(key, bool) or not isinstance(key, int):
        raise ScheduleError(f"{origin} has the key {key!r}, which is not an epoch. {_HOW}")
    if key < 0:
        raise ScheduleError(f"{origin} has the epoch {key}. Epochs count from 0.")
    return key


def _entry(at: int, value: Any, origin: str) -> Entry:
    if not isinstance(value, Mapping):
        return Entry(at, _selectors(value, at, origin))
    unknown = sorted(map(str, set(value) - _KEYS))
    if unknown or not {"unfreeze", "freeze"}.intersection(value):
        wrong = f"the unknown key `{unknown[0]}`" if unknown else "no key `unfreeze`"
        raise ScheduleError(f"{origin} has {wrong} at epoch {at}. {_HOW}")
    scaled = "lr_scale" in value
    if scaled and "unfreeze" not in value:
        raise ScheduleError(
            f"{origin} has `lr_scale` at epoch {at}, where nothing unfreezes. It is the factor of "
            "what `unfreeze` names beside it; leave it out."
        )
    try:
        factor = positive(value.get("lr_scale", 1.0), f"lr_scale` at epoch {at} of `schedule")
    except ArgumentError as error:
        raise ScheduleError(str(error)) from error
    chosen, frozen = (
        _selectors(value[key], at, origin) if key in value else () for key in ("unfreeze", "freeze")
    )
    return Entry(at, chosen, factor, frozen, scaled)


def _selectors(value: Any, at: int, origin: str) -> tuple[Any, ...]:
    if isinstance(value, str) or callable(value):
        value = [value]
    valid = isinstance(value, Sequence) and value
    if not valid or not all((isinstance(s, str) and s.strip()) or callable(s) for s in value):
        raise ScheduleError(f"{origin} has {value!r} at epoch {at}. {_HOW}")
    for selector in value:
        if isinstance(selector, str) and selector.startswith("re:"):
            try:
                re.compile(selector[3:])
            except re.error as error:
                raise ScheduleError(
                    f"{origin} has `{selector}` at epoch {at}, which is not a regular "
                    f"expression: {error}."
                ) from error
    return tuple(value)


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
    stages: list[Stage] = []
    given: dict[str, float] = {}
    since: dict[str, tuple[int, Any]] = {}
    for entry in entries:
        for selector in entry.freeze:
            again = since.keys() & set(select(selector))
            if not again:
                raise ScheduleError(
                    f"`schedule` freezes `{selector}` at {entry.at}, but nothing of it trains "
                    "then. Everything is frozen at first; `freeze` is for what was unfrozen before."
                )
            for name in again:
                del since[name]
        for selector in entry.selectors:
            chosen = set(select(selector))
            if chosen <= since.keys():
                at, by = since[min(chosen)]
                raise ScheduleError(
                    f"`schedule` unfreezes `{selector}` at {entry.at}, but it trains since {at} "
                    f"(`{by}`). Schedules are cumulative: name each layer group once."
                )
            for name in chosen - since.keys():
                since[name] = (entry.at, selector)
                _set_factor(given, name, entry)
        stages.append(Stage(entry.at, frozenset(since)))
    if stages and stages[0].at > 0:
        stages.insert(0, Stage(0, frozenset()))
    scale = dict(schedule.lr_scale)
    for name, factor in given.items():
        scale[name] = scale.get(name, 1.0) * factor
    return replace(schedule, stages=tuple(stages), lr_scale=scale, claimed=frozenset(given))


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
    trainable = frozenset(head)
    stages = [Stage(0, trainable)]
    for position in range(0, len(queue), layers_per_step):
        added = queue[position : position + layers_per_step]
        trainable = trainable.union(*added)
        stages.append(Stage(start + every * (position // layers_per_step), trainable))
    if stages[1:] and stages[1].at == 0:
        del stages[0]
    return replace(schedule, stages=tuple(stages))


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
