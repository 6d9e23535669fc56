"""A schedule in a configuration: checked while the file is read, so that errors say where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Union

from lightning_freeze.errors import ScheduleError
from lightning_freeze.schedule.entries import from_yaml, parse_schedule, read_schedule


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
    from jsonargparse.typing import Path_fr

    try:
        return str(Path_fr(path)())
    except TypeError as error:
        raise ScheduleError(f"The schedule file `{path}` can't be read: {error}.") from error


def as_configured() -> Any:
    """The annotation of a `schedule`, evaluated when somebody reads a signature's types.

    jsonargparse knows `Schedule` from then on. It isn't imported before: whoever uses neither it
    nor LightningCLI doesn't pay for it.
    """
    from jsonargparse.typing import register_type

    register_type(
        Schedule,
        serializer=lambda schedule: schedule.content,
        deserializer=Schedule,
        type_check=lambda value, kind: isinstance(value, kind),
        fail_already_registered=False,
    )
    return Union[Schedule, None]
