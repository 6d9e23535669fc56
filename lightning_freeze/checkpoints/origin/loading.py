"""What whoever loaded a model says of it: transformers' loading info, or torch's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_freeze.checkpoints.origin.marks import is_marked
from lightning_freeze.checkpoints.origin.states import LOADED, NEW, OTHER_SHAPE, Origin
from lightning_freeze.checkpoints.origin.tensors import Stored
from lightning_freeze.errors import ArgumentError
from lightning_freeze.model.index import some


@dataclass(frozen=True)
class Info:
    """What is said.

    Attributes:
        missing: names that the checkpoint doesn't have.
        mismatched: name -> the shape that it has in the checkpoint.
        unexpected: keys of the checkpoint that the model doesn't have.
    """

    missing: frozenset[str]
    mismatched: Mapping[str, tuple[int, ...]]
    unexpected: tuple[str, ...]


def as_info(given: Any) -> Info | None:
    """Read what was said when a model was loaded; None where it is something else.

    That is the dict of `from_pretrained(..., output_loading_info=True)`, or what
    `load_state_dict(..., strict=False)` returns.

    >>> as_info({"missing_keys": ["head.bias"], "unexpected_keys": []}).missing
    frozenset({'head.bias'})
    """

    def take(key: str) -> Any:
        if isinstance(given, Mapping):
            return given.get(key)
        return getattr(given, key, None)

    missing, unexpected = take("missing_keys"), take("unexpected_keys")
    if missing is None or unexpected is None:
        return None
    mismatched = {key: tuple(shape) for key, shape, *_ in take("mismatched_keys") or ()}
    return Info(frozenset(missing), mismatched, tuple(sorted(unexpected)))


def by_info(stored: Stored, info: Info, at: str | None = None) -> dict[str, Origin]:
    """Name -> origin, for the part of a model that was loaded.

    Args:
        stored: the model.
        info: what was said when it was loaded.
        at: path of the module that was loaded; found by the names where None.

    Raises:
        ArgumentError: the model has none of the missing names, or several parts may be meant.
    """
    path = _place(stored, info) if at is None else at
    within = stored.under(path)
    names: dict[str, set[str]] = {}
    for name, first in stored.plain.items():
        names.setdefault(first, set()).add(_relative(name, path))
    marked = any(is_marked(stored.tensors[name]) for name in within)
    found: dict[str, Origin] = {}
    for first in within:
        ours = names[first]
        # one name of a tied tensor is enough
        if other := next((info.mismatched[n] for n in ours if n in info.mismatched), None):
            found[first] = Origin(OTHER_SHAPE, detail=f"{size(other)} in the checkpoint")
        elif ours <= info.missing or (marked and not is_marked(stored.tensors[first])):
            # without transformers' mark it was made after the loading, as an adapter is
            found[first] = Origin(NEW)
        else:
            found[first] = Origin(LOADED)
    return found


def _place(stored: Stored, info: Info) -> str:
    """The module that was loaded: the one that has all of the names that are told of."""
    told = {*info.missing, *info.mismatched}
    candidates = list(dict.fromkeys([*stored.libraries, *stored.index.roots]))
    fits = {p: sum(_absolute(name, p) in stored.plain for name in told) for p in candidates}
    most = max(fits.values())
    if told and not most:
        names = some([f"`{name}`" for name in sorted(told)])
        raise ArgumentError(
            "`origin` is a loading info, but this model has none of the tensors that it calls "
            f"missing: {names}. Give the info that `from_pretrained` returned with this model, or "
            'say which part it is about: `origin={"path.of.the.part": info}`.'
        )
    best = [path for path in candidates if fits[path] == most]
    parts = [path for path in best if path in stored.libraries]
    if len(parts) > 1:
        raise ArgumentError(
            f"`origin` is a loading info that may be about {some([f'`{p}`' for p in parts])}. Say "
            f'which one it is about: `origin={{"{parts[0]}": info}}`.'
        )
    return parts[0] if parts else best[0]


def _absolute(name: str, path: str) -> str:
    return f"{path}.{name}" if path else name


def _relative(name: str, path: str) -> str:
    return name.removeprefix(f"{path}.") if path else name


def size(shape: tuple[int, ...]) -> str:
    """A shape for a message.

    >>> size((3, 2)), size(())
    ('3x2', 'a scalar')
    """
    return "x".join(map(str, shape)) or "a scalar"
