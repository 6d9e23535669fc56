"""The stages of a schedule, told by what changes from one to the next. No torch, no model.

A schedule that unfreezes thousands of layers one by one has thousands of stages, and each trains
what the one before did. Kept as sets they would take stages x names of room and time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# what begins to train, and what is frozen again
Change = tuple[frozenset[str], frozenset[str]]


class Stage:
    """What trains from one moment on.

    Attributes:
        at: the epoch or optimizer step (counted from 0) at which the stage begins; with a
            metric-driven schedule, the stage's number.

    Example:
        >>> Stage(0, frozenset({"head"})).trainable
        frozenset({'head'})
    """

    __slots__ = ("_changes", "_number", "at")

    def __init__(self, at: int, trainable: Iterable[str]) -> None:
        """A stage by itself.

        Args:
            at: when it begins.
            trainable: names of all governed parameters that train in it.
        """
        self.at = at
        self._changes: Sequence[Change] = ((frozenset(trainable), frozenset()),)
        self._number = 0

    @property
    def trainable(self) -> frozenset[str]:
        """Names of all governed parameters that train in it, put together when asked for."""
        first, *later = self._changes[: self._number + 1]
        if not later:
            return first[0]
        if not any(removed for _, removed in later):
            return first[0].union(*(added for added, _ in later))
        trains = set(first[0])
        for added, removed in later:
            trains -= removed
            trains |= added
        return frozenset(trains)

    def change(self, before: Stage) -> Change:
        """What begins to train with this stage, and what is frozen again, after another one."""
        if self._changes is before._changes and self._number == before._number + 1:
            return self._changes[self._number]
        now, then = self.trainable, before.trainable
        return now - then, then - now

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stage):
            return NotImplemented
        return self.at == other.at and self.trainable == other.trainable

    def __hash__(self) -> int:
        return hash((self.at, self.trainable))

    def __repr__(self) -> str:
        return f"Stage(at={self.at!r}, trainable={self.trainable!r})"


def stages_of(changes: Iterable[tuple[int, Iterable[str], Iterable[str]]]) -> tuple[Stage, ...]:
    """The stages that changes lead through, one for each; at first nothing trains.

    Args:
        changes: when, what begins to train, what is frozen again. What trains already doesn't
            begin to, and what doesn't train isn't frozen again.

    Example:
        >>> stages = stages_of([(0, ["head"], []), (2, ["body", "head"], []), (3, [], ["head"])])
        >>> [(stage.at, sorted(stage.trainable)) for stage in stages]
        [(0, ['head']), (2, ['body', 'head']), (3, ['body'])]
        >>> stages[1].change(stages[0])
        (frozenset({'body'}), frozenset())
    """
    shared: list[Change] = []
    trains: set[str] = set()
    stages = []
    for at, begins, ends in changes:
        removed = trains.intersection(ends)
        added = frozenset(begins).difference(trains)
        trains -= removed
        trains |= added
        stage = Stage(at, ())
        stage._changes, stage._number = shared, len(shared)
        shared.append((added, frozenset(removed)))
        stages.append(stage)
    return tuple(stages)
