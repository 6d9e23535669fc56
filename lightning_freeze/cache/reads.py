"""Which attributes of a module its `forward` can read, as far as its code says."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

_NAMED = frozenset(dis.hasname)
# what `log` and its like read is the state of the fit
_FRAMEWORKS = ("lightning", "pytorch_lightning", "lightning_fabric")


@cache
def names_read(kind: Any) -> frozenset[str]:
    """Names and texts in the code of `forward`, and of the methods that it names.

    >>> from torch import nn
    >>> class Scaled(nn.Module):
    ...     def forward(self, x):
    ...         self.last = y = self.double(x) * self.scale
    ...         return y
    ...     def double(self, x): return x * self.factor
    ...     def fit(self): self.loss = 0.0
    >>> sorted(names_read(Scaled) & {"scale", "factor", "loss", "last"})
    ['factor', 'scale']
    """
    found: set[str] = set()
    open_names = ["forward"]
    while open_names:
        name = open_names.pop()
        new = set()
        for owner in kind.__mro__:
            if owner.__module__.partition(".")[0] in _FRAMEWORKS:
                continue
            value = vars(owner).get(name)
            if isinstance(value, property):
                value = value.fget
            function = getattr(value, "__func__", value)
            function = getattr(function, "__wrapped__", function)
            if isinstance(function, FunctionType):
                here = set(_names(function.__code__))
                new |= here - found
                if not here & {"super", name}:
                    break  # those of base classes aren't called
        found |= new
        open_names += new
    return frozenset(found)


def _names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        # what is only written isn't read; one of the same name elsewhere is found there
        if instruction.opcode in _NAMED and not instruction.opname.startswith(("STORE", "DELETE")):
            yield name
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant  # getattr(self, "scale")
