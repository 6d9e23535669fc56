"""Schedules that follow a rule of a paper: layer groups -> stages. No torch, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b

from lightning_freeze.errors import ArgumentError
from lightning_freeze.schedule.schedule import Stage, UnfreezeSchedule

Groups = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class AllAtOnce:
    """Everything trains from the start; only the learning rates differ."""

    def fill(self, schedule: UnfreezeSchedule, groups: Groups) -> UnfreezeSchedule:
        """The schedule with its one stage."""
        return replace(schedule, stages=(Stage(0, frozenset().union(*groups)),))


@dataclass(frozen=True)
class OneByOne:
    """The head, then each layer group alone from the bottom up, then all of them: chain-thaw.

    Attributes:
        every: epochs or optimizer steps per stage.

    Example:
        >>> empty = UnfreezeSchedule(frozenset({"low", "high", "head"}), ())
        >>> filled = OneByOne(every=2).fill(empty, [("low",), ("high",), ("head",)])
        >>> [(stage.at, sorted(stage.trainable)) for stage in filled.stages]
        [(0, ['head']), (2, ['low']), (4, ['high']), (6, ['head', 'high', 'low'])]
    """

    every: int = 1

    def fill(self, schedule: UnfreezeSchedule, groups: Groups) -> UnfreezeSchedule:
        """The schedule with one stage for each layer group, and one for all."""
        *body, head = groups
        turns = [head, *body, tuple(name for group in groups for name in group)]
        stages = (Stage(self.every * i, frozenset(names)) for i, names in enumerate(turns))
        return replace(schedule, stages=tuple(stages))


@dataclass(frozen=True)
class RandomLayers:
    """Some layers at a time, drawn anew again and again; what is no layer always trains: LISA.

    Attributes:
        layers: how many are drawn.
        every: epochs or optimizer steps until the next draw.
        seed: of the draws.
    """

    layers: int = 2
    every: int = 20
    seed: int = 0

    def fill(self, schedule: UnfreezeSchedule, groups: Groups) -> RandomSchedule:
        """The schedule that draws from these groups.

        Raises:
            ArgumentError: there are fewer layers than are to be drawn.
        """
        if self.layers > len(groups):
            advice = f"Write at most {len(groups)}" if groups else "Name them in `groups`"
            raise ArgumentError(
                f"`layers={self.layers}` is beyond the {len(groups)} layers that can be drawn. "
                f"{advice}."
            )
        given = {f.name: getattr(schedule, f.name) for f in fields(UnfreezeSchedule)}
        empty = RandomSchedule(
            **given,
            always=schedule.governed.difference(*groups),
            layers=tuple(schedule.governed.intersection(group) for group in groups),
            draw=self,
        )
        first = (Stage(n * self.every, empty.trainable(n)) for n in range(_SHOWN))
        return replace(empty, stages=tuple(first))

    def drawn(self, stage: int, among: int) -> list[int]:
        """Which of so many layers train in a stage: a function of the seed and the stage alone.

        Hashes rather than Python's or torch's generator: nothing else that draws from one, no
        resume and no other version changes what is drawn, and no earlier draw has to be made.

        >>> [RandomLayers(layers=2, seed=0).drawn(stage, among=6) for stage in range(3)]
        [[0, 1], [1, 5], [0, 5]]
        """

        def rank(layer: int) -> bytes:
            text = f"{self.seed}/{stage}/{layer}".encode()
            return blake2b(text, digest_size=16).digest()

        return sorted(sorted(range(among), key=rank)[: self.layers])


# stages that are listed of a schedule that has no last one
_SHOWN = 8


@dataclass(frozen=True)
class RandomSchedule(UnfreezeSchedule):
    """A schedule without a last stage. Each one is worked out when it is asked for.

    Attributes:
        always: names that train in every stage.
        layers: the sets of names that are drawn from.
        draw: says which.
    """

    always: frozenset[str] = frozenset()
    layers: tuple[frozenset[str], ...] = ()
    draw: RandomLayers = RandomLayers()

    def stage_at(self, epoch: int, step: int) -> int:
        """The number of the draw at an epoch and optimizer step."""
        return (step if self.unit == "step" else epoch) // self.draw.every

    def trainable(self, stage: int) -> frozenset[str]:
        """What trains in a stage."""
        drawn = self.draw.drawn(stage, len(self.layers))
        return self.always.union(*(self.layers[layer] for layer in drawn))

    def tell(self) -> dict[str, str]:
        """Name -> when it trains, in words."""
        turns = (
            f"trains in {self.draw.layers} of {len(self.layers)} draws, one every "
            f"{self.draw.every} {self.unit}s with the seed {self.draw.seed}"
        )
        drawn = {name: turns for layer in self.layers for name in layer}
        return {
            name: drawn.get(name, "trains from the start") + self._rate(name)
            for name in self.governed
        }

    def turns(self) -> dict[str, tuple[int, ...]]:
        """Name -> numbers of its layers, from 1: each is drawn as one; (0,) for what is in none."""
        found: dict[str, tuple[int, ...]] = {}
        for number, layer in enumerate(self.layers, 1):
            for name in layer:
                found[name] = (*found.get(name, ()), number)
        return dict.fromkeys(self.governed, (0,)) | found

    @property
    def ever(self) -> frozenset[str]:
        """Every name: each layer is drawn some time."""
        return self.governed

    @property
    def endless(self) -> bool:
        """True: there is no last stage."""
        return True

    @property
    def refreezes(self) -> bool:
        """Whether a draw leaves any layer out."""
        return self.draw.layers < len(self.layers)

    def arrivals(self) -> list[frozenset[str]]:
        """What always trains, then each layer."""
        return [self.always, *self.layers]
