"""Selectors -> parameter names.

A selector is a module or parameter path, a glob over whole path components (`*` spans one,
`**` any number), `re:` and a regular expression that is searched in the full name, `type:` and the
name of a module's class (`type:LayerNorm`; subclasses count, `*` is any text, `|` stands between
alternatives), or a callable ``(name, parameter) -> bool``. Paths and globs may start at the model,
at the model that a LightningModule wraps, or anywhere inside if that is one place only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, Union

from torch import nn

from lightning_freeze.errors import ArgumentError, SelectorError
from lightning_freeze.model.index import ModelIndex, class_names, clean, some

Selector = Union[str, Callable[[str, nn.Parameter], bool]]
Selectors = Union[Selector, Iterable[Selector]]

_GLOB = {"*": "[^.]*", "?": "[^.]"}


def as_selectors(selectors: Selectors, argument: str = "selectors") -> tuple[Selector, ...]:
    """One selector or many, as a tuple of checked selectors.

    >>> as_selectors("encoder")
    ('encoder',)

    Raises:
        ArgumentError: something in it is neither a string nor a callable, or doesn't compile.
    """
    items: Any = selectors
    if isinstance(items, str) or callable(items) or not isinstance(items, Iterable):
        items = (items,)
    listed: tuple[Selector, ...] = tuple(items)
    for selector in listed:
        if isinstance(selector, str):
            if not selector.strip():
                raise ArgumentError(
                    f"`{argument}` holds an empty selector. Write a path such as "
                    "`encoder.layer.0`, or `**` for everything."
                )
            if selector.startswith("re:"):
                try:
                    re.compile(selector[3:])
                except re.error as error:
                    raise ArgumentError(
                        f"`{argument}` holds `{selector}`, which is not a regular expression: "
                        f"{error}."
                    ) from error
        elif not callable(selector):
            raise ArgumentError(
                f"`{argument}` holds {selector!r}. A selector is a path, a glob, `re:` and a "
                "regular expression, or a callable (name, parameter) -> bool."
            )
    return listed


def select(index: ModelIndex, selectors: Selectors) -> tuple[str, ...]:
    """Canonical names of the parameters that any of `selectors` matches, in model order.

    >>> model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    >>> select(ModelIndex.of(model), "head")
    ('head.weight', 'head.bias')
    >>> select(ModelIndex.of(model), "backbnoe.*")
    Traceback (most recent call last):
    ...
    lightning_freeze.errors.SelectorError: No parameter matches `backbnoe.*`. Top-level modules: \
backbone, head. Did you mean `backbone.*`?

    Raises:
        SelectorError: one of them matches nothing, or a path stands at several places.
    """
    chosen: set[str] = set()
    for selector in as_selectors(selectors):
        chosen |= {index.canonical[name] for name in _match(index, selector)}
    return tuple(name for name in index.parameters if name in chosen)


def _match(index: ModelIndex, selector: Selector) -> list[str]:
    """All names, aliases included, that one selector matches."""
    if not isinstance(selector, str):
        hits = [
            name
            for name, first in index.canonical.items()
            if selector(name, index.parameters[first])
        ]
        if hits:
            return hits
        raise SelectorError(
            f"The callable selector `{describe(selector)}` is true for none of the "
            f"{len(index.parameters)} parameters. {_top_level(index)}"
        )
    if selector.startswith("re:"):
        pattern = re.compile(selector[3:])
        hits = [name for name in index.canonical if pattern.search(name)]
        hits = hits or [name for name in index.canonical if pattern.search(name.partition(".")[2])]
        if hits:
            return hits
        raise SelectorError(f"No parameter name holds `{selector}`. {_top_level(index)}")
    if selector.startswith("type:"):
        return _match_type(index, selector)
    for spelling in _spellings(selector):
        hits = _match_path(index, spelling)
        if hits:
            return hits
    raise _nothing(index, selector)


def _match_type(index: ModelIndex, selector: str) -> list[str]:
    """All that hangs from modules of some classes, by the names of these and of their bases."""
    wanted = [text.strip() for text in selector[5:].split("|")]
    found: dict[str, None] = {}
    for path, module in index.modules.items():
        names = class_names(module)
        if path and any(fnmatchcase(name, text) for name in names for text in wanted):
            found.update(dict.fromkeys(n for n in index.canonical if n.startswith(f"{path}.")))
    if found:
        return list(found)
    kinds = sorted({class_names(m)[0] for path, m in index.modules.items() if index.within(m)})
    raise SelectorError(
        f"No module with parameters is of the class that `{selector}` names. Classes that exist: "
        f"{some(kinds, 12)}."
    )


def describe(selector: str | Callable[..., Any]) -> str:
    """A selector as a stable text: callables by their qualified name."""
    if isinstance(selector, str):
        return selector
    return str(getattr(selector, "__qualname__", type(selector).__qualname__))


def label_of(selectors: Selectors) -> str:
    """Selectors as a short name for a layer group.

    >>> label_of(["layer.0", "layer.1"])
    'layer.0+layer.1'
    """
    parts = [s if isinstance(s, str) else "callable" for s in as_selectors(selectors)]
    return "+".join(parts)


def _spellings(selector: str) -> list[str]:
    cleaned = clean(selector)
    short = cleaned.removeprefix("module.")
    return [cleaned] if short == cleaned else [cleaned, short]


def _compile(selector: str) -> re.Pattern[str]:
    """A regular expression over ``name + "."`` that ends on a whole component."""
    body = ""
    for part in selector.split("."):
        if part == "**":
            body += r"(?:[^.]+\.)*"
        else:
            pieces = re.split(r"(\*|\?|\[[^\]]+\])", part)
            body += "".join(_GLOB.get(piece) or _piece(piece) for piece in pieces)
            body += r"\."
    return re.compile(body)


def _piece(piece: str) -> str:
    """A character class of a glob, where `!` negates, or plain text."""
    if not piece.startswith("["):
        return re.escape(piece)
    return "[^" + piece[2:] if piece[1] == "!" else piece


def _match_path(index: ModelIndex, selector: str) -> list[str]:
    pattern = _compile(selector)
    hits = [name for name in index.canonical if pattern.match(name + ".")]
    if hits:
        return hits
    by_anchor: dict[str, list[str]] = {}
    for name in index.canonical:
        text = name + "."
        at = text.find(".") + 1
        while at < len(text):
            if pattern.match(text, at):
                by_anchor.setdefault(text[: at - 1], []).append(name)
                break
            at = text.find(".", at) + 1
    wrapped = [anchor for anchor in by_anchor if "." not in anchor]
    if len(wrapped) == 1:
        return by_anchor[wrapped[0]]
    if len(by_anchor) > 1:
        places = [f"{anchor}.{selector}" for anchor in by_anchor]
        raise SelectorError(
            f"`{selector}` stands at {len(places)} places: {some(places, 5)}. Write one of them, "
            f"or `**.{selector}` for all."
        )
    return next(iter(by_anchor.values()), [])


def _nothing(index: ModelIndex, selector: str) -> SelectorError:
    pattern = _compile(clean(selector))
    empty = [name for name in index.modules if name and pattern.fullmatch(name + ".")]
    empty = empty or [
        name for name in index.modules if (name + ".").endswith("." + clean(selector) + ".")
    ]
    if empty:
        return SelectorError(
            f"`{selector}` matches the module {some(empty, 5)}, which has no parameters: there is "
            "nothing to freeze or train in it."
        )
    message = f"No parameter matches `{selector}`. {_what_exists(index, selector)}"
    close = _closest(index, selector)
    if close:
        message += f" Did you mean {' or '.join(f'`{name}`' for name in close)}?"
    return SelectorError(message)


def _top_level(index: ModelIndex) -> str:
    names = [name for root in index.roots for name, _ in index.children(root)]
    listed = [n for n in names if not any(other.startswith(n + ".") for other in names)]
    return f"Top-level modules: {some(listed, 12)}."


def _what_exists(index: ModelIndex, selector: str) -> str:
    """The children of the deepest module that the selector reaches."""
    parts = clean(selector).split(".")
    for depth in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:depth])
        for name in index.modules:
            if name == prefix or name.endswith("." + prefix):
                own = [n for n in index.canonical if index.owner(n) == name]
                parts_of = [*own, *(child for child, _ in index.children(name))]
                inside = [part.rpartition(".")[2] for part in parts_of]
                if inside:
                    return f"`{name}` has: {some(inside, 12)}."
    return _top_level(index)


def _closest(index: ModelIndex, selector: str) -> list[str]:
    known = {part for name in (*index.canonical, *index.modules) for part in name.split(".")}
    options: list[list[str]] = [[]]
    for part in clean(selector).split("."):
        if part in known or any(c in part for c in "*?["):
            near = [part]
        else:
            near = difflib.get_close_matches(part, sorted(known - {""}), n=2, cutoff=0.6)
        options = [[*option, name] for option in options for name in near][:8]
    found = []
    for option in options:
        candidate = ".".join(option)
        if candidate and candidate != selector:
            try:
                hits = _match_path(index, candidate)
            except SelectorError:
                continue
            if hits:
                found.append(candidate)
    return found[:2]
