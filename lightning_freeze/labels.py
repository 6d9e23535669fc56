"""Names of layer groups as every logger accepts them."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

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


def free(name: str, taken: Container[str]) -> str:
    """A name, or the first of `name-2`, `name-3` and so on that isn't taken.

    Example:
        >>> free("head", {"head", "head-2"})
        'head-3'
    """
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def unique(names: Iterable[str]) -> dict[str, str]:
    """Each name and what to call it: legal, and no two the same.

    Example:
        >>> unique(["a.*", "a.?", "b"])
        {'a.*': 'a._', 'a.?': 'a._-2', 'b': 'b'}
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        found[name] = free(legal(name), taken)
        taken.add(found[name])
    return found
