"""Rows of a shorter prefix, from which the way to a longer one's outputs is short.

When more layers freeze, the rows that were kept so far are the inputs of what has frozen since:
a sample's new row takes the new layers alone, not the whole frozen part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_freeze.cache.keys import Call
from lightning_freeze.cache.probe import Fit
from lightning_freeze.cache.replay import Replay, Start
from lightning_freeze.cache.rows import Rows


class Earlier:
    """What is left of an earlier stage, in which the same module was called.

    Args:
        replayed: its prefix.
        rows: its rows.
        fit: what its replay takes.
        beside: what its rows depend on beside the call and what they are made of.
    """

    def __init__(self, replayed: Replay, rows: Rows, fit: Fit, beside: Callable[[], str]) -> None:
        self.rows = rows
        self._replayed = replayed
        self._fit = fit
        self._beside = beside

    def start(self, call: Call, rows: Sequence[int]) -> tuple[list[int], Start | None]:
        """Those of some samples whose rows are there, and how to go on from them."""
        if (call.spec, call.batched) != (self._fit.spec, self._fit.batched):
            return [], None
        space, keys = call.keys(self._beside())
        if not self.rows.knows(space):
            return [], None
        wanted = [keys[row] for row in rows]
        absent = set(self.rows.missing(space, wanted, self._fit.needed))
        there = [row for position, row in enumerate(rows) if position not in absent]
        if not there:
            return [], None
        found = [keys[row] for row in there]
        values = {leaf: self.rows.get(space, leaf, found) for leaf in self._fit.needed}
        return there, Start(self._replayed, self.rows.shaped(space, len(there)), values)
