"""A schedule -> a YAML file that a person can edit and `GradualUnfreeze` reads back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_freeze.model.index import ModelIndex
from lightning_freeze.schedule.entries import Entry
from lightning_freeze.schedule.schedule import UnfreezeSchedule

if TYPE_CHECKING:
    from lightning_freeze.report.preview import SchedulePreview


def entries_of(
    index: ModelIndex, schedule: UnfreezeSchedule, stages: Sequence[Iterable[str]]
) -> tuple[Entry, ...]:
    """A schedule in the words of a user: module paths where they say it, with their factors.

    What freezes again has an entry of its own, before those of the same moment.

    Args:
        index: the model.
        schedule: for it.
        stages: names of what trains in each stage.
    """
    entries = []
    before: set[str] = set()
    for number, (stage, trains) in enumerate(zip(schedule.stages, stages)):
        added = [name for name in trains if name not in before]
        gone = before.difference(trains)
        dropped = [name for name in index.parameters if name in gone]
        before = set(trains)
        by_factor: dict[float, list[str]] = {}
        for name in added:
            by_factor.setdefault(schedule.lr_scale.get(name, 1.0), []).append(name)
        at = number if schedule.unit == "metric" else stage.at
        if dropped:
            entries.append(Entry(at, (), freeze=cover(index, dropped)))
        for factor, names in sorted(by_factor.items(), reverse=True):
            entries.append(Entry(at, cover(index, names), factor))
    return tuple(entries)


def cover(index: ModelIndex, names: Iterable[str]) -> tuple[str, ...]:
    """The fewest paths that select exactly some parameters: whole modules where possible.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> cover(ModelIndex.of(model), ["0.weight", "1.weight", "1.bias"])
        ('0.weight', '1')
    """
    wanted = set(names)
    found: dict[str, None] = {}
    left = dict.fromkeys(name for name in index.parameters if name in wanted)
    while left:
        name = next(iter(left))
        path, parts = name, name.split(".")
        for length in range(1, len(parts)):
            module = index.modules.get(".".join(parts[:length]))
            # what else it holds by another name is another module's, which trains elsewhere
            if module is not None and wanted.issuperset(index.within(module)):
                path = ".".join(parts[:length])
                break
        inside = index.within(index.modules[path]) if path in index.modules else (name,)
        for done in inside:
            left.pop(done, None)
        left.pop(name, None)
        found[path] = None
    return tuple(found)


def to_yaml(preview: SchedulePreview) -> str:
    """A preview's schedule as a file, with a line above that says how to use it."""
    import yaml

    content: dict[int, Any] = {}
    for entry in preview.entries:
        names = list(entry.selectors)
        said: Any = names
        if entry.freeze:
            said = {"freeze": list(entry.freeze)}
        elif entry.lr_scale != 1.0:
            said = {"unfreeze": names, "lr_scale": entry.lr_scale}
        content.setdefault(entry.at, []).append(said)
    shown = {at: said[0] if len(said) == 1 else _listed(said) for at, said in content.items()}
    unit = "stage" if preview.unit == "metric" else preview.unit
    option = {"step": ', unit="step"', "metric": ', monitor="val_loss"'}.get(preview.unit, "")
    about = (
        f"# {unit} -> what begins to train then, for "
        f'`GradualUnfreeze(schedule="this file"{option})`.\n'
        "# A name is a module or parameter path; `lr_scale` is a factor on your learning rate.\n"
    )
    body = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100)
    return about + (body if shown else "{}\n")


def _listed(said: list[Any]) -> list[Any]:
    """One list for an epoch: names that keep the user's rate stand in it as they are."""
    found: list[Any] = []
    for part in said:
        found += part if isinstance(part, list) else [part]
    return found
