"""Names of two sides: as they are compared and printed, and which of one is which of the other.

The rule: exact names, then one common prefix on each side, else an error that asks.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from lightning_freeze.errors import VerifyError
from lightning_freeze.model.index import clean, some

Shapes = Mapping[str, tuple[int, ...]]
_Pair = tuple[str, str]

CERTIFICATE = "the certificate"
# PEFT moves what it adapts under these: `query.weight` becomes `query.base_layer.weight`
_ADAPTED = frozenset({"base_layer", "original_module"})
# what TensorFlow calls the weight and bias of a LayerNorm; BERT's first checkpoints have them
_LEGACY = {"gamma": "weight", "beta": "bias"}
# components that a prefix may have
_DEEPEST = 32


def tidy(names: Iterable[str]) -> dict[str, str]:
    """Raw name -> name without the components that wrappers and adapters put in, fit to be printed.

    Names that would become one keep them.

    >>> tidy(["_orig_mod.q.base_layer.weight", "q.lora_A.weight"])
    {'_orig_mod.q.base_layer.weight': 'q.weight', 'q.lora_A.weight': 'q.lora_A.weight'}
    """
    raw = list(names)
    bare = {n: ".".join(part for part in clean(n).split(".") if part not in _ADAPTED) for n in raw}
    count = Counter(bare.values())
    return {name: printable(bare[name] if count[bare[name]] == 1 else name) for name in raw}


def printable(text: str) -> str:
    r"""A text on one line in which nothing acts on a terminal; different ones stay different.

    >>> print(printable("layer.\x1b[31m.weight"))
    layer.\x1b[31m.weight
    """
    return escaped(text.replace("\\", "\\\\"))


def escaped(text: str, keep: str = "") -> str:
    """A text without characters that act on a terminal, but for those to keep."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def quoted(path: Union[str, Path]) -> str:
    """A path for a message."""
    return f"`{escaped(str(path))}`"


@dataclass(frozen=True)
class Match:
    """Which name of one side is which of the other.

    Attributes:
        left: what the names of the left side begin with where the two correspond.
        right: the same for the right side.
        names: every name of the left side -> what it is, or would be, called on the right; no two
            become one.
    """

    left: str
    right: str
    names: Mapping[str, str]


class SeveralPlacesError(VerifyError):
    """One side stands at several places of the other.

    Attributes:
        place: one of the places, without a dot at its end.
    """

    def __init__(self, message: str, place: str) -> None:
        super().__init__(message)
        self.place = place


def match(
    left: Shapes,
    right: Shapes,
    prefix: str | None = None,
    sides: tuple[str, str] = ("BASE", "CHECKPOINT"),
) -> Match:
    """Find which names correspond: the same ones, or those under one prefix on each side.

    Args:
        left: name -> shape.
        right: the same for the other side.
        prefix: where the common part begins, in whichever side holds it several times.
        sides: what messages call them. Of `CERTIFICATE` one exact name is enough: a checkpoint may
            hold little of what was frozen.

    Raises:
        VerifyError: they are different models, or one stands at several places of the other.

    Example:
        >>> found = match({"bert.w": (2,)}, {"model.bert.w": (2,), "model.head.w": (3,)})
        >>> found.left, found.right, found.names
        ('', 'model.', {'bert.w': 'model.bert.w'})
    """
    half = (min(len(left), len(right)) + 1) // 2
    certified = sides[0] == CERTIFICATE
    same = sum(name in right for name in left)
    if prefix is None and same >= (1 if certified else half):
        pair = ("", "")
    else:
        # a few names such as `weight` fit anywhere: what was saved without the rest isn't accused
        need = (len(left) + 1) // 2 if certified and prefix is None else half
        pair = _place(left, right, need, prefix, sides)
    names = _names(pair, left, right, sides[0], forced=prefix is not None)
    fitting = sum(right.get(new) == left[name] for name, new in names.items())
    if fitting < half and not (certified and (same or prefix is not None)):
        raise VerifyError(_other_model(names, left, right, fitting, sides))
    return Match(*pair, names)


def _place(
    left: Shapes, right: Shapes, need: int, prefix: str | None, sides: tuple[str, str]
) -> _Pair:
    forced = None if prefix is None else _forced(prefix, left, right, sides)
    scores = {
        pair: score
        for at in _prefixes(left, need)
        for to in _prefixes(right, need)
        if forced is None or forced in (at, to)
        if (score := _score(pair := (at, to), left, right)) >= need
    }
    good = [p for p in scores if not any(_within(p, other, scores) for other in scores)]
    if forced is not None:
        good = [pair for pair in good if pair[0] == pair[1]] or good
    # something before the names is likelier than something else in its place
    plain = max((scores[pair] for pair in good if "" in pair), default=0)
    good = [pair for pair in good if "" in pair or scores[pair] > plain]
    if not good:
        raise VerifyError(_other_model({n: n for n in left}, left, right, 0, sides))
    if len(good) > 1:
        side = 1 if len({to for _, to in good}) > 1 else 0
        places = {pair[side]: scores[pair] for pair in good}
        told = [f"under `{place}` ({n} names)" for place, n in places.items()]
        first = max(places).rstrip(".")
        raise SeveralPlacesError(
            f"{_upper(sides[1 - side])} stands at several places of {sides[side]}: {some(told)}. "
            f"Say which one you mean: `--prefix {shlex.quote(first)}`.",
            first,
        )
    return good[0]


def _names(pair: _Pair, left: Shapes, right: Shapes, side: str, *, forced: bool) -> dict[str, str]:
    """Every name -> that of the other side; exact ones first, unless the user has said where."""
    at, to = pair
    moved = {name: to + name[len(at) :] for name in left if name.startswith(at)}
    exact = {name: name for name in left if not (forced and name in moved)}
    legacy = {name: _modern(new) for name, new in moved.items()}
    found: dict[str, str] = {}
    taken: set[str] = set()
    rules = (moved, exact, legacy) if forced else (exact, moved, legacy)
    for rule in rules:
        for name, new in rule.items():
            if name not in found and new in right and new not in taken:
                found[name] = new
                taken.add(new)
    for name in left:
        if name not in found:
            new = moved.get(name, name)
            while new in right or new in taken:
                new = f"{side}:{new}"
            found[name] = new
            taken.add(new)
    return {name: found[name] for name in left}


def _modern(name: str) -> str:
    parent, _, last = name.rpartition(".")
    return f"{parent}.{_LEGACY[last]}" if parent and last in _LEGACY else name


def _prefixes(names: Shapes, need: int) -> list[str]:
    """What at least so many names begin with, in whole components; "" is first."""
    counts = Counter({"": len(names)})
    for name in names:
        end = -1
        for _ in range(_DEEPEST):
            end = name.find(".", end + 1)
            if end < 0:
                break
            counts[name[: end + 1]] += 1
    return [prefix for prefix, count in counts.items() if count >= need]


def _score(pair: _Pair, left: Shapes, right: Shapes) -> int:
    """How many names correspond under two prefixes, whatever their shapes."""
    at, to = pair
    return sum(name.startswith(at) and to + name[len(at) :] in right for name in left)


def _within(pair: _Pair, other: _Pair, scores: Mapping[_Pair, int]) -> bool:
    """Whether another pair strips less from the names and fits as many."""
    inside = pair != other and pair[0].startswith(other[0]) and pair[1].startswith(other[1])
    return inside and scores[other] >= scores[pair]


def _forced(prefix: str, left: Shapes, right: Shapes, sides: tuple[str, str]) -> str:
    forced = "".join(f"{part}." for part in prefix.split(".") if part)
    if not any(name.startswith(forced) for name in (*left, *right)):
        there = dict.fromkeys(name.partition(".")[0] for name in (*right, *left))
        raise VerifyError(
            f"`--prefix {escaped(prefix)}`: no name in {sides[0]} or {sides[1]} begins with "
            f"`{escaped(forced)}`. Names begin with {some([f'`{part}`' for part in there], 8)}."
        )
    return forced


def _other_model(
    names: Mapping[str, str], left: Shapes, right: Shapes, fitting: int, sides: tuple[str, str]
) -> str:
    one, two = sides
    text = _upper(
        f"{one} and {two} are different models{_OR if one == CERTIFICATE else ''}: {fitting} of "
        f"{len(left)} names of {one} are in {two} ({len(right)} names) with the same shape."
    )
    for name, new in names.items():
        if new in right and right[new] != left[name]:
            its = "" if name == new else f" (`{name}` in {one})"
            sizes = f"{size(left[name])} in {one} and {size(right[new])} in {two}"
            return f"{text} `{new}`{its} is {sizes}."
    first, other = (some([f"`{name}`" for name in side], most=2) for side in (left, right))
    return f"{text} {_upper(one)} has {first}; {two} has {other}."


_OR = ", or CHECKPOINT was saved without what was frozen"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def size(shape: tuple[int, ...]) -> str:
    """A shape for a message.

    >>> size((3, 2)), size(())
    ('3x2', 'a scalar')
    """
    return "x".join(map(str, shape)) or "a scalar"
