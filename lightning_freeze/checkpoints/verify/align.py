"""How the names of two files correspond."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_freeze.checkpoints.verify.groups import stacks
from lightning_freeze.checkpoints.verify.spelling import unadapted
from lightning_freeze.errors import VerifyError
from lightning_freeze.model.index import some

Shapes = Mapping[str, tuple[int, ...]]
_Pair = tuple[str, str]

# what messages call the left side where it isn't BASE
CERTIFICATE = "the certificate"

# a second place with this share of the best one's tensors is as good a guess, however it overlaps
_AS_GOOD = 0.9
# components that a prefix may have
_DEEPEST = 32


class SeveralPlacesError(VerifyError):
    """One side stands at several places of the other.

    Attributes:
        place: one of the places, without a dot at its end.
    """

    def __init__(self, message: str, place: str) -> None:
        super().__init__(message)
        self.place = place


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
    ours, theirs = unadapted(left, right)
    found = _align(
        {ours[name]: shape for name, shape in left.items()},
        {theirs[name]: shape for name, shape in right.items()},
        prefix,
        sides,
    )
    raw = {short: name for name, short in theirs.items()}
    names = {name: found.names[ours[name]] for name in left}
    return Alignment(found.left, found.right, {n: raw.get(new, new) for n, new in names.items()})


def _align(left: Shapes, right: Shapes, prefix: str | None, sides: tuple[str, str]) -> Alignment:
    need = (min(len(left), len(right)) + 1) // 2
    forced = None if prefix is None else _forced(prefix, left, right, sides)
    scores = _scores(left, right, need, forced)
    most = max(scores.values(), default=0)
    if sides[0] == CERTIFICATE and forced is None:
        # a few names such as `weight` fit anywhere; what was saved without the rest isn't accused
        scores = {p: n for p, n in scores.items() if p[0] == p[1] or 2 * n >= len(left)}
    best = max(scores.values(), default=0)
    if best < need:
        raise VerifyError(_other_model(left, right, most, need, forced, sides))
    good = [pair for pair in scores if scores[pair] >= need]
    good = [pair for pair in good if not any(_within(pair, one, scores) for one in good)]
    top = max(good, key=lambda pair: scores[pair])
    good = [
        pair for pair in good if scores[pair] >= _AS_GOOD * best or _apart(pair, top, left, right)
    ]
    if forced is not None:
        good = [(at, to) for at, to in good if at == to] or good
    if len(good) > 1:
        places = (
            [to for _, to in good] if len({to for _, to in good}) > 1 else [at for at, _ in good]
        )
        raise SeveralPlacesError(_several_places(good, scores, sides), max(places).rstrip("."))
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
        for _ in range(_DEEPEST):
            if end < 0:
                break
            counts[name[: end + 1]] = counts.get(name[: end + 1], 0) + 1
            end = name.find(".", end + 1)
    return [prefix for prefix, count in counts.items() if count >= need]


def _scores(
    left: Shapes, right: Shapes, need: int, forced: str | None, shapes: bool = True
) -> dict[_Pair, int]:
    """Pairs of prefixes -> how many names fit under them."""
    places = _prefixes(right, need)
    return {
        (at, to): len(_fitting((at, to), left, right, shapes))
        for at in _prefixes(left, need)
        for to in places
        if forced is None or forced in (at, to)
    }


def _fitting(pair: _Pair, left: Shapes, right: Shapes, shapes: bool = True) -> list[str]:
    """What follows the prefixes in the names that fit."""
    at, to = pair
    return [
        name[len(at) :]
        for name, shape in left.items()
        if name.startswith(at)
        and (twin := right.get(to + name[len(at) :])) is not None
        and (twin == shape or not shapes)
    ]


def _apart(one: _Pair, two: _Pair, left: Shapes, right: Shapes) -> bool:
    """Whether two pairs fit different tensors of a side: of two copies, either may be meant."""
    rests = [_fitting(pair, left, right) for pair in (one, two)]
    return any(
        {one[side] + rest for rest in rests[0]}.isdisjoint(two[side] + rest for rest in rests[1])
        for side in (0, 1)
    )


def _within(pair: _Pair, other: _Pair, scores: Mapping[_Pair, int]) -> bool:
    """Whether another pair strips less from the names and fits as many."""
    inside = pair != other and pair[0].startswith(other[0]) and pair[1].startswith(other[1])
    return inside and scores[other] >= scores[pair]


def _forced(prefix: str, left: Shapes, right: Shapes, sides: tuple[str, str]) -> str:
    (bare,) = unadapted([prefix.strip(".")])
    forced = "".join(f"{part}." for part in bare.values() if part)
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
    told = [
        f"{f'under `{place}`' if place else 'as it is'} ({_tensors(count, 'tensor')})"
        for place, count in places.items()
    ]
    listed = " and ".join(told) if len(told) < 4 else some(told)
    first = next(iter(places)).rstrip(".") or '""'
    return _sentence(
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
    one, two = sides
    by_name = _scores(left, right, need, forced, shapes=False)
    pair = max(by_name, key=lambda pair: by_name[pair], default=("", ""))
    fit = by_name.get(pair, 0)
    if one == CERTIFICATE and (2 * fit < len(left) or not _only_wrapped(*pair)):
        many = f"at most {best}" if best else "none"
        renamed = " If they have other names there, say where: `--prefix`." if best else ""
        return _sentence(
            f"{one} and {two} are different models, or {two} was saved without what was frozen: "
            f"{two} has {many} of the {_tensors(len(left), 'certified tensor')}, such as "
            f"`{next(iter(left))}`. It has {_first(right)}.{renamed}"
        )
    count = "none" if not best else f"only {best}"
    text = _sentence(
        f"{one} and {two} are different models: {count} of the "
        f"{_tensors(min(len(left), len(right)), 'tensor')} of the smaller one "
        f"{'stands' if best == 1 else 'stand'} in the other with the same name and shape."
    )
    for rest in _fitting(pair, left, right, shapes=False) if fit >= need else ():
        name, twin = pair[0] + rest, pair[1] + rest
        if left[name] != right[twin]:
            its = "" if _only_wrapped(name, twin) else f" (`{name}` in {one})"
            return (
                f"{text} The names fit, but not the shapes: `{twin}`{its} is {_size(left[name])} "
                f"in {one} and {_size(right[twin])} in {two}, a model of another size."
            )
    return f"{text} The names differ: {one} has {_first(left)}; {two} has {_first(right)}."


def _only_wrapped(one: str, two: str) -> bool:
    """Whether a name or prefix is the other with something before it, and not in its place."""
    return one.endswith(two) or two.endswith(one)


def _first(names: Shapes) -> str:
    return some([f"`{name}`" for name in names], most=2)


def _tensors(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
