"""Names alone -> layer groups: there is no model to ask."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

# component -> what is below it; a tensor has nothing below
_Tree = dict[str, Any]
_DEEPEST = 100


def group_names(names: Iterable[str]) -> dict[str, str]:
    """The layer group of each tensor.

    The layers of a numbered stack (`encoder.layer.3`, `features.0`) are a group each. A module
    that contains a stack is split; any other is one group.

    >>> names = ["net.embed.w", "net.layer.0.a.w", "net.layer.1.a.w", "net.layer.1.b.0.w", "head.w"]
    >>> list(dict.fromkeys(group_names(names).values()))
    ['net.embed', 'net.layer.0', 'net.layer.1', 'head']
    """
    names = list(names)
    found: dict[str, str] = {}
    for group, members in _split(_tree(names), ""):
        found.update(dict.fromkeys(members, group))
    return {name: found[name] for name in names}


def stacks(names: Iterable[str]) -> dict[str, str]:
    """Tensor -> its numbered stack, for those that are in one.

    >>> stacks(["embed.w", "layer.0.w", "layer.1.w"])
    {'layer.0.w': 'layer', 'layer.1.w': 'layer'}
    """
    groups = group_names(names)
    return {
        name: group.rpartition(".")[0]
        for name, group in groups.items()
        if group != name and group.rpartition(".")[2].isdigit()
    }


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sorted, with `layer.2` before `layer.10`.

    >>> in_natural_order(["layer.10", "layer.2"])
    ['layer.2', 'layer.10']
    """
    return sorted(names, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


def _tree(names: Iterable[str]) -> _Tree:
    root: _Tree = {}
    for name in names:
        node = root
        # what is deeper than any model needs no groups, and would exhaust the stack
        for part in name.split(".", _DEEPEST):
            node = node.setdefault(part, {})
    return root


def _split(node: _Tree, path: str) -> Iterator[tuple[str, list[str]]]:
    numbered = [part for part, below in node.items() if part.isdigit() and below]
    for part, below in node.items():
        full = f"{path}.{part}" if path else part
        # a number alone holds a whole model at times: `0.auto_model.encoder.layer.3`
        is_layer = part in numbered and len(numbered) > 1
        wraps = not path and len(node) == 1 and any(below.values())
        if below and not is_layer and (_has_stack(below) or wraps):
            yield from _split(below, full)
        else:
            yield full, list(_tensors(below, full))


def _has_stack(node: _Tree) -> bool:
    return any((part.isdigit() and below) or _has_stack(below) for part, below in node.items())


def _tensors(node: _Tree, path: str) -> Iterator[str]:
    if not node:
        yield path
    for part, below in node.items():
        yield from _tensors(below, f"{path}.{part}")
