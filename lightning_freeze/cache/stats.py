"""What a cache has done in a fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class CacheStats:
    """What a cache has done in a fit.

    Attributes:
        hits: samples whose frozen part wasn't computed.
        misses: samples whose frozen part was computed, and kept where there was room.
        shortened: of the misses, those that began with what an earlier stage had kept: only the
            layers that have frozen since were computed.
        nbytes: the most memory (or disk) that rows and keys took.
        seconds_saved: time that the frozen part would have taken, less that of looking up.
        skipped: what is left out now, in words; "" if nothing.
        aside: why the cache does nothing any more; "" if it does.
    """

    hits: int = 0
    misses: int = 0
    shortened: int = 0
    nbytes: int = 0
    seconds_saved: float = 0.0
    skipped: str = ""
    aside: str = ""

    @property
    def hit_rate(self) -> float:
        """Share of the samples whose frozen part wasn't computed."""
        return self.hits / max(1, self.hits + self.misses)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "hit_rate": self.hit_rate}
