"""A schedule in a configuration: checked while the file is read, so that errors say where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse.typing import Path_fr, register_type

from lightning_freeze.errors import ScheduleError
from lightning_freeze.schedule import from_yaml, parse_schedule, read_schedule


class Schedule:
    """A schedule as jsonargparse and LightningCLI read it: a mapping, or the path of a YAML file.

    A relative path counts from the folder of the configuration file that names it, or from the
    working directory on a command line. The file is read at once: what LightningCLI saves of a run
    holds the schedule itself.

    Attributes:
        content: the mapping.

    Raises:
        ScheduleError: as `parse_schedule`.

    Example:
        >>> Schedule({0: "head", 2: "**"})
        {0: 'head', 2: '**'}
        >>> Schedule("{0: head}").content
        {0: 'head'}
    """

    __slots__ = ("content",)

    def __init__(self, written: Any) -> None:
        if isinstance(written, str) and not written.lstrip().startswith("{"):
            written = _found(written)
        elif isinstance(written, str):
            written = from_yaml(written)
        parse_schedule(written)
        self.content: dict[Any, Any] = dict(
            written if isinstance(written, Mapping) else read_schedule(written)
        )

    def __repr__(self) -> str:
        return repr(self.content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.content == other.content

    __hash__ = None  # type: ignore[assignment]


def _found(path: str) -> str:
    """The absolute path of a file, in the folder that jsonargparse reads in at present."""
    try:
        return str(Path_fr(path)())
    except TypeError as error:
        raise ScheduleError(f"The schedule file `{path}` can't be read: {error}.") from error


register_type(
    Schedule,
    serializer=lambda schedule: schedule.content,
    deserializer=Schedule,
    type_check=lambda value, kind: isinstance(value, kind),
)
