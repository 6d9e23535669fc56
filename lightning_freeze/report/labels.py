"""Names of layer groups as every logger accepts them."""

from __future__ import annotations

import re
from collections.abc import Iterable

# MLflow allows no others in the name of a metric
_FORBIDDEN = re.compile(r"[^a-zA-Z0-9_/. -]+")
_NUMBERED = re.compile(r" \((\d+)\)$")


def legal(name: str) -> str:
    """A name with nothing in it that a logger refuses.

    Example:
        >>> legal("bert.encoder.layer.0"), legal("encoder.*.norm"), legal("head (2)")
        ('bert.encoder.layer.0', 'encoder._.norm', 'head-2')
    """
    return _FORBIDDEN.sub("_", _NUMBERED.sub(r"-\1", name)) or "_"


class Names:
    """Gives names away, each once: a name, or the first of `name-2`, `name-3` that is left.

    Example:
        >>> give = Names()
        >>> [give("head"), give("head-2"), give("head"), give("head")]
        ['head', 'head-2', 'head-3', 'head-4']
    """

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._last: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        """Give one away."""
        found, number = name, self._last.get(name, 1)
        while found in self._given:
            number += 1
            found = f"{name}-{number}"
        self._last[name] = number
        self._given.add(found)
        return found


def unique(names: Iterable[str]) -> dict[str, str]:
    """Each name and what to call it: legal, and no two the same.

    Example:
        >>> unique(["a.*", "a.?", "b"])
        {'a.*': 'a._', 'a.?': 'a._-2', 'b': 'b'}
    """
    give = Names()
    return {name: give(legal(name)) for name in names}
