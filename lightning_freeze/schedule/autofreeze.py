"""When layers may freeze, by how their gradients change: norms in, a decision out. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional

Norm = Optional[float]


def change(before: Norm, now: Norm) -> Norm:
    """The relative change of a gradient's norm from one interval to the next.

    Args:
        before: the norm in the interval before; None where there was no gradient.
        now: the norm in this interval.

    Returns:
        None where there is no gradient now, infinity where there was none before.

    Example:
        >>> change(2.0, 1.5), change(0.0, 0.0), change(None, 1.0), change(1.0, None)
        (0.25, 0.0, inf, None)
    """
    if now is None:
        return None
    if not before:
        return 0.0 if before == now else math.inf
    return abs(before - now) / before


def percentile_of(values: Sequence[float], percentile: float) -> float:
    """The value below which so many per cent lie, between two neighbours in proportion.

    >>> percentile_of([4.0, 1.0, 2.0, 3.0], 50)
    2.5
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percentile / 100
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    if low == high:  # of two infinities, too
        return low
    return min(low + (high - low) * (place - math.floor(place)), high)


def settled(changes: Sequence[Norm], percentile: float) -> int:
    """How many layers, from the bottom, have changed less than a percentile of all of them.

    Args:
        changes: of each layer that still trains, bottom to top; None where it has no gradient: it
            doesn't count, and freezes only with one above it.
        percentile: from 0 to 100.

    Returns:
        A number below that of the layers: one of them changed most.

    Example:
        >>> settled([0.1, 0.2, 0.9, 0.1, 0.7], percentile=50)
        1
        >>> settled([0.8, 0.1, 0.1, 0.1, 0.1], percentile=50)
        0
    """
    known = [value for value in changes if value is not None]
    if not known:
        return 0
    threshold = percentile_of(known, percentile)
    count = 0
    for position, value in enumerate(changes):
        if value is None:
            continue
        if value >= threshold:
            break
        count = position + 1
    return count


@dataclass(frozen=True)
class GradientClock:
    """Counts the layers that are frozen, by AutoFreeze's rule.

    Liu et al. 2021, "AutoFreeze: Automatically Freezing Model Blocks to Accelerate Fine-tuning",
    https://arxiv.org/abs/2102.01386: at the end of each interval, the lowest consecutive layers
    whose gradients' norm changed less, relative to the interval before, than a percentile of all
    layers that still train. The first interval is only compared with.

    Attributes:
        percentile: theirs is 50, the median.
        previous: the norms of the interval before, one for each layer.
        frozen: layers that are frozen, counted from the bottom. It never falls.

    Example:
        >>> clock = GradientClock(percentile=50)
        >>> for norms in [(4.0, 4.0, 4.0), (4.0, 3.0, 2.0), (9.0, 2.9, 1.0)]:
        ...     clock = clock.feed(norms)
        ...     print(clock.frozen)
        0
        1
        2
    """

    percentile: float = 50.0
    previous: tuple[Norm, ...] = ()
    frozen: int = 0

    def feed(self, norms: Sequence[Norm]) -> GradientClock:
        """The clock after one more interval. What is frozen already doesn't count."""
        if not self.previous:
            return replace(self, previous=tuple(norms))
        pairs = zip(self.previous[self.frozen :], norms[self.frozen :])
        more = settled([change(before, now) for before, now in pairs], self.percentile)
        return replace(self, previous=tuple(norms), frozen=self.frozen + more)
