"""Names as they are compared and shown: without wrappers, and without what a terminal obeys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lightning_freeze.model.index import clean

# PEFT moves what it adapts under this name: `query.weight` becomes `query.base_layer.weight`
_ADAPTED = "base_layer"


def tidy(names: Iterable[str]) -> dict[str, str]:
    """Raw name -> name without the components that wrappers put into it, fit to be printed.

    `module` is such a component where it is all that its parent holds, as DDP leaves it.

    >>> tidy(["module.fc.weight", "module._orig_mod.conv.weight"])
    {'module.fc.weight': 'fc.weight', 'module._orig_mod.conv.weight': 'conv.weight'}
    """
    raw = {name: printable(name) for name in names}
    short = {name: clean(shown) for name, shown in raw.items()}
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
    return short if len(set(short.values())) == len(raw) else raw


def unadapted(*sides: Iterable[str]) -> list[dict[str, str]]:
    """Name -> name without the component `base_layer`, for the names of each side.

    It stays where a side would have two tensors of one name without it.

    >>> unadapted(["query.weight"], ["query.base_layer.weight", "query.lora_A.weight"])[1]
    {'query.base_layer.weight': 'query.weight', 'query.lora_A.weight': 'query.lora_A.weight'}
    """
    short = [{name: _without(name) for name in side} for side in sides]
    twice = {name for side in short for name, n in Counter(side.values()).items() if n > 1}
    return [
        {name: name if bare in twice else bare for name, bare in side.items()} for side in short
    ]


def _without(name: str) -> str:
    if _ADAPTED not in name:
        return name
    return ".".join(part for part in name.split(".") if part != _ADAPTED)


def printable(text: str) -> str:
    r"""A text on one line in which nothing acts on a terminal; different ones stay different.

    >>> print(printable("layer.\x1b[31m.weight"))
    layer.\x1b[31m.weight
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(c if c.isprintable() and c != "\\" else _escaped(c) for c in text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines, which keeps them."""
    lines = text.split("\n")
    return "\n".join(
        line if line.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in line)
        for line in lines
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
