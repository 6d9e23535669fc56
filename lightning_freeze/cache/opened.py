"""Arguments that torch's trees don't look into: dataclasses, `BatchEncoding`, plain objects.

What such an object is made of stands in its `__dict__`, so it is taken apart and put together
from there. Objects that may keep something elsewhere (slots, a builtin or compiled base) stay
whole, and nothing is cached of calls with them.
"""

from __future__ import annotations

import enum
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_map

_HEAP_TYPE = 1 << 9  # made by a `class` statement
_MOST_NESTED = 4


class _Opened:
    """Stands for an object, with what it holds as its children in a tree."""

    def __init__(self, kind: type, held: dict[str, Any]) -> None:
        self.kind = kind
        self.held = held


def _close(children: Any, context: Any) -> Any:
    kind, names = context
    made = object.__new__(kind)
    vars(made).update(zip(names, children))
    return made


register_pytree_node(
    _Opened,
    lambda one: (list(one.held.values()), (one.kind, tuple(one.held))),
    _close,
)


def opened(tree: Any, depth: int = _MOST_NESTED) -> Any:
    """A tree of values with such objects taken apart; flattened and built up, they are whole.

    >>> from dataclasses import dataclass
    >>> from torch.utils._pytree import tree_flatten, tree_unflatten
    >>> @dataclass
    ... class Batch:
    ...     words: list
    ...     length: int
    >>> leaves, spec = tree_flatten(opened({"batch": Batch(["a", "b"], 2)}))
    >>> leaves, tree_unflatten(leaves, spec)["batch"].length
    (['a', 'b', 2], 2)
    """

    def open_one(leaf: Any) -> Any:
        if not depth or not _stands_in_its_dict(leaf):
            return leaf
        held = {name: opened(value, depth - 1) for name, value in vars(leaf).items()}
        return _Opened(type(leaf), held)

    return tree_map(open_one, tree)


def _stands_in_its_dict(value: Any) -> bool:
    if isinstance(value, (Tensor, nn.Module, enum.Enum, type)) or not hasattr(value, "__dict__"):
        return False
    kind: Any = type(value)
    try:
        object.__new__(kind)  # refused where a compiled base makes it otherwise
    except TypeError:
        return False
    bases = kind.__mro__[:-1]
    return all(base.__flags__ & _HEAP_TYPE and not vars(base).get("__slots__") for base in bases)
