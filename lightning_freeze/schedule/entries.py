"""What a user writes as a schedule -> entries, in the order of time. No torch, no model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Union

from lightning_freeze.arguments import positive
from lightning_freeze.errors import ArgumentError, ScheduleError

_EXAMPLE = '`{0: "classifier", 1: ["layer.10", "layer.11"], 3: "**"}`'
HOW = (
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


def parse_schedule(schedule: Union[Mapping[Any, Any], str, Path]) -> tuple[Entry, ...]:
    """Read a schedule that a user wrote, as a mapping or as the path of a YAML file.

    Args:
        schedule: epoch -> selectors, or epoch -> `{"unfreeze": selectors, "freeze": selectors,
            "lr_scale": factor}`. In one entry `freeze` comes before `unfreeze`, so that
            `{"freeze": "**", "unfreeze": "layer.11"}` trains that layer alone.

    Returns:
        `Entry` objects, sorted; several for an epoch whose list has mappings with other factors,
        as in `{3: ["layer.9", {"unfreeze": "layer.8", "lr_scale": 0.5}]}`.

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
        raise ScheduleError(f"{origin} is {schedule!r}. {HOW}")
    entries: dict[int, list[Entry]] = {}
    for key, value in schedule.items():
        at = _whole(key, origin)
        if at in entries:
            raise ScheduleError(f"{origin} names epoch {at} twice. Write one list for it.")
        entries[at] = _entries(at, value, origin)
    found = tuple(entry for at in sorted(entries) for entry in entries[at])
    _check_repeats(found, origin)
    return found


def _check_repeats(entries: Sequence[Entry], origin: str) -> None:
    """One selector twice, or frozen and unfrozen at once, is a slip."""
    named: dict[Any, int] = {}
    for at, together in groupby(entries, key=lambda entry: entry.at):
        now = tuple(together)
        frozen = {selector for entry in now for selector in entry.freeze}
        if frozen:  # which of the earlier ones it means is known with the model
            named = {}
        for selector in (name for entry in now for name in entry.selectors):
            if selector in frozen:
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
        raise ScheduleError(f"{origin} can't be read: {error.strerror or error}. {HOW}") from error
    except UnicodeDecodeError as error:
        raise ScheduleError(f"{origin} is not valid YAML: {error}. {HOW}") from error
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
        raise ScheduleError(f"{origin} is not valid YAML: {error}. {HOW}") from error


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
        raise ScheduleError(f"{origin} has the key {key!r}, which is not an epoch. {HOW}")
    if key < 0:
        raise ScheduleError(f"{origin} has the epoch {key}. Epochs count from 0.")
    return key


def _entries(at: int, value: Any, origin: str) -> list[Entry]:
    """A list may mix selectors with mappings, each of which has a factor of its own."""
    if not isinstance(value, (list, tuple)) or not any(isinstance(v, Mapping) for v in value):
        return [_entry(at, value, origin)]
    plain = [item for item in value if not isinstance(item, Mapping)]
    found = [_entry(at, plain, origin)] if plain else []
    return found + [_entry(at, item, origin) for item in value if isinstance(item, Mapping)]


def _entry(at: int, value: Any, origin: str) -> Entry:
    if not isinstance(value, Mapping):
        return Entry(at, _selectors(value, at, origin))
    unknown = sorted(map(str, set(value) - _KEYS))
    if unknown or not {"unfreeze", "freeze"}.intersection(value):
        wrong = f"the unknown key `{unknown[0]}`" if unknown else "no key `unfreeze`"
        raise ScheduleError(f"{origin} has {wrong} at epoch {at}. {HOW}")
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
        raise ScheduleError(f"{origin} has {value!r} at epoch {at}. {HOW}")
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
