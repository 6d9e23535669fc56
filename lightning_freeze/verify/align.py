"""How the names of two files correspond."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_freeze.errors import VerifyError
from lightning_freeze.names import clean, some
from lightning_freeze.verify.groups import stacks

Shapes = Mapping[str, tuple[int, ...]]
_Pair = tuple[str, str]

# a second place with this share of the best one's tensors is as good a guess
_AS_GOOD = 0.9


def tidy(names: Iterable[str]) -> dict[str, str]:
    """Raw name -> name without the components that wrappers put into it.

    `module` is such a component where it is all that its parent holds, as DDP leaves it.

    >>> tidy(["module.fc.weight", "module._orig_mod.conv.weight"])
    {'module.fc.weight': 'fc.weight', 'module._orig_mod.conv.weight': 'conv.weight'}
    """
    raw = list(names)
    short = {name: clean(name) for name in raw}
    below: dict[str, set[str]] = {}
    for name in short.values():
        parts = name.split(".")
        for depth, part in enumerate(parts):
            below.setdefault(".".join(parts[:depth]), set()).add(part)
    for name, cleaned in short.items():
        parts = cleaned.split(".")
        kept = [
            part
            for depth, part in enumerate(parts)
            if part != "module"
            or depth == len(parts) - 1
            or below[".".join(parts[:depth])] != {"module"}
        ]
        short[name] = ".".join(kept)
    # two names that become one stay as they are
    unique = len(set(short.values())) == len(raw)
    return short if unique else {name: name for name in raw}


@dataclass(frozen=True)
class Alignment:
    """Which name of one side is which of the other.

    Attributes:
        left: what the names of the left side begin with where the models correspond.
        right: the same for the right side.
        names: every name of the left side -> what it is, or would be, called on the right.
    """

    left: str
    right: str
    names: Mapping[str, str]


def align(
    left: Shapes,
    right: Shapes,
    prefix: str | None = None,
    sides: tuple[str, str] = ("BASE", "CHECKPOINT"),
) -> Alignment:
    """Find one prefix per side under which the most names have equal shapes.

    Args:
        left: name -> shape.
        right: the same for the other side.
        prefix: where the common part begins, in whichever side holds it several times.
        sides: what messages call them.

    Raises:
        VerifyError: they are different models, or one stands at several places of the other.

    Example:
        >>> found = align({"bert.w": (2,)}, {"model.bert.w": (2,), "model.head.w": (3,)})
        >>> found.left, found.right, found.names
        ('', 'model.', {'bert.w': 'model.bert.w'})
    """
    need = (min(len(left), len(right)) + 1) // 2
    forced = None if prefix is None else _forced(prefix, left, right, sides)
    scores = _scores(left, right, need, forced)
    best = max(scores.values(), default=0)
    if best < need:
        raise VerifyError(_other_model(left, right, best, need, forced, sides))
    good = [pair for pair in scores if scores[pair] >= _AS_GOOD * best]
    good = [pair for pair in good if not any(_within(pair, one, scores) for one in good)]
    if forced is not None:
        good = [(at, to) for at, to in good if at == to] or good
    if len(good) > 1:
        raise VerifyError(_several_places(good, scores, sides))
    at, to = good[0]
    names = {name: to + name[len(at) :] if name.startswith(at) else name for name in left}
    if len(set(names.values())) < len(names):
        # what stands beside the common part can't be what is in it
        taken = {new for name, new in names.items() if name.startswith(at)}
        beside = {name for name in names if not name.startswith(at) and names[name] in taken}
        names |= {name: f"{sides[0]}:{name}" for name in beside}
    return Alignment(at, to, names)


def check_stacks(alignment: Alignment, left: Shapes, right: Shapes) -> None:
    """Refuse models whose main numbered stack has another number of layers.

    Raises:
        VerifyError: it does.
    """
    ours = set(alignment.names.values())
    stack = stacks([*right, *(name for name in alignment.names.values() if name not in right)])
    layers: dict[str, tuple[set[str], set[str]]] = {}
    sizes: dict[str, int] = {}
    for name, path in stack.items():
        number = name[len(path) + 1 :].partition(".")[0] if path else name.partition(".")[0]
        at = layers.setdefault(path, (set(), set()))
        sizes[path] = sizes.get(path, 0) + 1
        if name in ours:
            at[0].add(number)
        if name in right:
            at[1].add(number)
    shared = [path for path, (one, two) in layers.items() if one and two]
    if not shared:
        return
    main = max(shared, key=lambda path: sizes[path])
    one, two = layers[main]
    if len(one) != len(two):
        raise VerifyError(
            f"BASE and CHECKPOINT are different models: `{main or '(the model itself)'}` has "
            f"{len(one)} layers in BASE and {len(two)} in CHECKPOINT. Name the weights that the "
            "run began with as BASE."
        )


def _prefixes(names: Shapes, need: int) -> list[str]:
    """What at least so many names begin with, in whole components; "" is first."""
    counts: dict[str, int] = {"": len(names)}
    for name in names:
        end = name.find(".")
        while end >= 0:
            counts[name[: end + 1]] = counts.get(name[: end + 1], 0) + 1
            end = name.find(".", end + 1)
    return [prefix for prefix, count in counts.items() if count >= need]


def _scores(
    left: Shapes, right: Shapes, need: int, forced: str | None, shapes: bool = True
) -> dict[_Pair, int]:
    """Pairs of prefixes -> how many names fit under them."""
    scores: dict[_Pair, int] = {}
    places = _prefixes(right, need)
    for at in _prefixes(left, need):
        below = {name[len(at) :]: shape for name, shape in left.items() if name.startswith(at)}
        for to in places:
            if forced is None or forced in (at, to):
                scores[at, to] = sum(
                    right.get(to + rest) == shape if shapes else to + rest in right
                    for rest, shape in below.items()
                )
    return scores


def _within(pair: _Pair, other: _Pair, scores: Mapping[_Pair, int]) -> bool:
    """Whether another pair strips less from the names and fits as many."""
    inside = pair != other and pair[0].startswith(other[0]) and pair[1].startswith(other[1])
    return inside and scores[other] >= scores[pair]


def _forced(prefix: str, left: Shapes, right: Shapes, sides: tuple[str, str]) -> str:
    forced = f"{prefix.strip('.')}." if prefix.strip(".") else ""
    if not any(name.startswith(forced) for name in (*left, *right)):
        there = dict.fromkeys(name.partition(".")[0] for name in (*right, *left))
        raise VerifyError(
            f"`--prefix {prefix}`: no name in {sides[0]} or {sides[1]} begins with "
            f"`{forced}`. Names begin with {some([f'`{part}`' for part in there], most=8)}."
        )
    return forced


def _several_places(good: list[_Pair], scores: Mapping[_Pair, int], sides: tuple[str, str]) -> str:
    side = 0 if len({at for at, _ in good}) > 1 else 1
    places = {pair[side]: scores[pair] for pair in good}
    listed = " and ".join(
        f"under `{place}` ({count} tensors)" if place else f"as it is ({count} tensors)"
        for place, count in places.items()
    )
    first = next(iter(places)).rstrip(".") or '""'
    return (
        f"{sides[1 - side]} stands at several places of {sides[side]}: {listed}. Say which one you "
        f"mean: `--prefix {first}`."
    )


def _other_model(
    left: Shapes,
    right: Shapes,
    best: int,
    need: int,
    forced: str | None,
    sides: tuple[str, str],
) -> str:
    one, two = sides[0], sides[1]
    same = "none" if not best else f"only {best}"
    text = (
        f"{one} and {two} are different models: {same} of the {min(len(left), len(right))} tensors "
        "of the smaller one stand in the other with the same name and shape."
    )
    by_name = _scores(left, right, need, forced, shapes=False)
    if by_name and max(by_name.values()) >= need:
        at, to = max(by_name, key=lambda pair: by_name[pair])
        for name, shape in left.items():
            twin = to + name[len(at) :]
            if name.startswith(at) and twin in right and right[twin] != shape:
                return (
                    f"{text} The names fit, but not the shapes: `{twin}` is {_size(shape)} in "
                    f"{one} and {_size(right[twin])} in {two}, a model of another size."
                )
    return (
        f"{text} The names differ: {one} has {some([f'`{n}`' for n in left], most=2)}; {two} has "
        f"{some([f'`{n}`' for n in right], most=2)}."
    )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
