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
    '`{"unfreeze": [...], "lr_scale": 0.5}`.'
)


@dataclass(frozen=True)
class Entry:
    """One line of a schedule as the user wrote it.

    Attributes:
        at: the epoch (or optimizer step) from which it holds.
        selectors: what to unfreeze.
        lr_scale: factor on the user's learning rate for those.
    """

    at: int
    selectors: tuple[Any, ...]
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Stage:
    """What trains from one moment on.

    Attributes:
        at: the epoch or optimizer step (counted from 0) at which the stage begins; with a
            metric-driven schedule, the stage's number.
        trainable: names of all governed parameters that train in it, earlier ones included.
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
        return max(sum(stage.at <= clock for stage in self.stages) - 1, 0)

    def plan(self, stage: int) -> FreezePlan:
        """What this schedule wants in a stage; a number past the last means the last."""
        stage = min(stage, len(self.stages) - 1)
        frozen = self.governed - self.stages[stage].trainable
        return FreezePlan(
            frozen=frozen,
            quiet=frozen if self.eval_mode else frozenset(),
            lively=self.lively,
            claimed=self.claimed,
            lr_scale=self.lr_scale,
        )

    def tell(self) -> dict[str, str]:
        """Name -> from when it trains, in words, of all that is governed."""
        first = {name: stage.at for stage in reversed(self.stages) for name in stage.trainable}
        unit = "stage" if self.unit == "metric" else self.unit
        told = {}
        for name in self.governed:
            at = first.get(name)
            when = f"trains from {unit} {at}" if at else "trains from the start"
            scale = self.lr_scale.get(name, 1.0)
            rate = f" at {scale:.6g} of the rate" if scale != 1.0 else ""
            told[name] = "stays frozen" if at is None else when + rate
        return told

    @property
    def never(self) -> frozenset[str]:
        """Names that no stage ever unfreezes."""
        return self.governed.difference(*(stage.trainable for stage in self.stages))


def parse_schedule(schedule: Union[Mapping[Any, Any], str, Path]) -> tuple[Entry, ...]:
    """Read a schedule that a user wrote, as a mapping or as the path of a YAML file.

    Args:
        schedule: epoch -> selectors, or epoch -> `{"unfreeze": selectors, "lr_scale": factor}`.

    Returns:
        One `Entry` per epoch, sorted.

    Raises:
        ScheduleError: an epoch is not a whole number from 0, a value is not selectors, a key is
            unknown, or one selector is named twice.

    Example:
        >>> parse_schedule({1: {"unfreeze": "layer.11", "lr_scale": 0.5}, 0: "classifier"})
        (Entry(at=0, selectors=('classifier',), lr_scale=1.0), \
Entry(at=1, selectors=('layer.11',), lr_scale=0.5))
    """
    origin = "`schedule`"
    if isinstance(schedule, (str, Path)):
        origin = f"The schedule file `{schedule}`"
        schedule = _read_yaml(Path(schedule))
    if not isinstance(schedule, Mapping) or not schedule:
        raise ScheduleError(f"{origin} is {schedule!r}. {_HOW}")
    entries: dict[int, Entry] = {}
    named: dict[Any, int] = {}
    for key, value in schedule.items():
        at = _whole(key, origin)
        if at in entries:
            raise ScheduleError(f"{origin} names epoch {at} twice. Write one list for it.")
        entry = _entry(at, value, origin)
        for selector in entry.selectors:
            if selector in named:
                where = "twice at" if named[selector] == at else f"at {named[selector]} and"
                raise ScheduleError(
                    f"{origin} names `{selector}` {where} {at}. Schedules are cumulative: what "
                    "is unfrozen stays so. Name each layer group once."
                )
            named[selector] = at
        entries[at] = entry
    return tuple(entries[at] for at in sorted(entries))


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), _strict_loader())
    except OSError as error:
        raise ScheduleError(
            f"The schedule file `{path}` can't be read: {error.strerror or error}. {_HOW}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ScheduleError(
            f"The schedule file `{path}` is not valid YAML: {error}. {_HOW}"
        ) from error


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
    scale: Any = 1.0
    if isinstance(value, Mapping):
        unknown = sorted(map(str, set(value) - {"unfreeze", "lr_scale"}))
        if unknown or "unfreeze" not in value:
            wrong = f"the unknown key `{unknown[0]}`" if unknown else "no key `unfreeze`"
            raise ScheduleError(f"{origin} has {wrong} at epoch {at}. {_HOW}")
        scale = value.get("lr_scale", 1.0)
        value = value["unfreeze"]
    try:
        factor = positive(scale, f"lr_scale` at epoch {at} of `schedule")
    except ArgumentError as error:
        raise ScheduleError(str(error)) from error
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
    return Entry(at, tuple(value), factor)


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
        ScheduleError: an entry unfreezes only what an earlier one did.
    """
    stages: list[Stage] = []
    trainable: frozenset[str] = frozenset()
    scale = dict(schedule.lr_scale)
    since: dict[str, tuple[int, Any]] = {}
    for entry in entries:
        added: set[str] = set()
        for selector in entry.selectors:
            chosen = set(select(selector))
            if chosen <= since.keys():
                at, by = since[min(chosen)]
                raise ScheduleError(
                    f"`schedule` unfreezes `{selector}` at {entry.at}, but it trains since {at} "
                    f"(`{by}`). Schedules are cumulative: name each layer group once."
                )
            new = chosen - since.keys()
            since.update(dict.fromkeys(new, (entry.at, selector)))
            added |= new
        for name in added:
            scale[name] = scale.get(name, 1.0) * entry.lr_scale
        trainable |= added
        stages.append(Stage(entry.at, trainable))
    if stages and stages[0].at > 0:
        stages.insert(0, Stage(0, frozenset()))
    return replace(schedule, stages=tuple(stages), lr_scale=scale, claimed=trainable)


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
