"""Calls a module with its frozen prefix left out: values from the store, stand-ins for the rest.

In the pass for samples that are missing the prefix runs alone and ends at its last output that
anybody needs. In the replay every skipped module returns what it would have: the stored values
where they are needed, stand-ins elsewhere. What goes wrong in a replay is undone, and the module
is called as it is.
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from lightning_freeze.cache.calls import Prefix
from lightning_freeze.cache.keys import Call
from lightning_freeze.cache.skipped import Layout, Leaf, Skipped, SkippedActivation, stand_ins

PLAIN, COLLECT, REPLAY = "plain", "collect", "replay"


class _Enough(BaseException):
    """All that is wanted of a pass has been seen. No `except Exception` of a model catches it."""


@dataclass(frozen=True)
class Output:
    """What one skipped call returned, without the values.

    Attributes:
        spec: its tree.
        leaves: a `Layout` for each tensor, anything else as it is.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, value: Any) -> tuple[Output, list[Any]]:
        """Take the values out of what a module returned."""
        leaves, spec = tree_flatten(value)
        layouts = tuple(Layout.of(x) if isinstance(x, Tensor) else x for x in leaves)
        return cls(spec, layouts), leaves


@dataclass
class Collected:
    """A pass through the prefix.

    Attributes:
        outputs: number of the skipped call -> what it returned, without the values.
        values: the tensors that were asked for.
        seconds: how long it took.
    """

    outputs: dict[int, Output] = field(default_factory=dict)
    values: dict[Leaf, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Start:
    """Where to begin within the prefix.

    Attributes:
        replayed: a shorter prefix of the same scope.
        outputs: what its calls return, without the values.
        values: the values there are.
    """

    replayed: Replay
    outputs: dict[int, Output]
    values: dict[Leaf, Tensor]


class Replay:
    """The calls of one scope.

    Args:
        prefix: what can be skipped.
        inner: modules inside whose outputs may be collected as well, for later stages.
    """

    def __init__(self, prefix: Prefix, inner: Sequence[nn.Module] = ()) -> None:
        self.prefix = prefix
        self.modules = (*prefix.skipped, *inner)
        # calls that run in a replay, too: what they return has no row per sample
        self.free: frozenset[int] = frozenset()
        self._skipped = len(prefix.skipped)
        self._last = self._skipped - 1
        self._mode = PLAIN
        self._original: Callable[..., Any] = prefix.scope.forward
        self._wanted: frozenset[Leaf] = frozenset()
        self._collected = Collected()
        self._answers: dict[int, Any] = {}
        self._next = 0
        self._watch: Callable[[int, Any, Any], Any] | None = None
        self._entry: Entry | None = None
        self._handler: Callable[..., Any] = self._scoped

    # -- installing

    def install(self, handler: Callable[..., Any]) -> None:
        """Have the scope's calls go to `handler(*args, **kwargs)`."""
        scope = self.prefix.scope
        self._handler = handler
        self._original = scope.forward
        entry = Entry(scope, self._original, self._scoped)
        self._entry = entry
        vars(scope)["forward"] = entry

    def remove(self) -> None:
        """Put the scope's own `forward` back."""
        entry, self._entry = self._entry, None
        if entry is None:
            return
        original = entry.original
        entry.handler = None  # somebody may have wrapped it meanwhile
        if vars(self.prefix.scope).get("forward") is entry:
            _put(self.prefix.scope, original)

    def _scoped(self, *args: Any, **kwargs: Any) -> Any:
        if self._mode != PLAIN:  # it calls itself
            return self._original(*args, **kwargs)
        return self._handler(*args, **kwargs)

    def _standing_in(self, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        inner = None if module in self.prefix.skipped else self.modules.index(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            # behind the prefix a module that is called again is called as it is
            if self._mode == PLAIN or self._next == self._skipped:
                return original(*args, **kwargs)
            if inner is not None:
                if self._mode == COLLECT and self._watch is None:
                    return self._seen(inner, original, args, kwargs)
                return original(*args, **kwargs)
            if module is not self.prefix.skipped[self._next]:
                raise SkippedActivation("layers are called in another order", frozenset())
            if self._mode == REPLAY and self._next in self.free:
                self._next += 1
                return original(*args, **kwargs)
            if self._mode == REPLAY:
                return self._answer(args, kwargs)
            return self._seen(self._next, original, args, kwargs)

        return forward

    # -- the ways to call

    def plain(self, call: Call) -> Any:
        """As if nothing were installed."""
        args, kwargs = call.given
        return self._original(*args, **kwargs)

    def watched(self, call: Call, watch: Callable[[int, Any, Any], Any]) -> Any:
        """As it is, with each skipped call made by `watch(number, original, arguments)`."""
        self._watch = watch
        try:
            with self._in(COLLECT):
                args, kwargs = call.given
                if self.whole:
                    return watch(0, self._original, (args, kwargs))
                return self._original(*args, **kwargs)
        finally:
            self._watch = None

    @property
    def whole(self) -> bool:
        """Whether the scope itself is what is skipped."""
        return self.prefix.skipped[0] is self.prefix.scope

    def collect(
        self,
        call: Call,
        rows: Sequence[int],
        wanted: frozenset[Leaf],
        start: Start | None = None,
    ) -> Collected:
        """Run the prefix alone, for some samples.

        Args:
            call: the call.
            rows: which of its samples.
            wanted: which outputs to bring back.
            start: where to begin.

        Raises:
            SkippedActivation: one of them requires a gradient: something in the prefix trains; or
                what stands in front of `start` is read elsewhere.
        """
        self._wanted = wanted
        self._collected = found = Collected()
        began = time.perf_counter()
        args, kwargs = call.take(rows)
        made: list[weakref.ref[Skipped]] = []
        with ExitStack() as stack:
            if start is not None:
                made = stack.enter_context(start.replayed.answering(start.outputs, start.values))
            stack.enter_context(self._in(COLLECT))
            try:
                if self.whole:
                    self._seen(0, self._original, args, kwargs)
                else:
                    self._original(*args, **kwargs)
            except _Enough:
                pass
        if any(ref() is not None for ref in made):
            raise SkippedActivation("they are kept after the call", frozenset())
        if self._next != self._skipped:
            raise SkippedActivation("not all of its layers are called", frozenset())
        _wait(found.values)
        found.seconds = time.perf_counter() - began
        self._collected = Collected()
        return found

    def replay(self, call: Call, outputs: dict[int, Output], values: dict[Leaf, Tensor]) -> Any:
        """Call the scope with the prefix left out.

        Args:
            call: the call.
            outputs: what each skipped call returns, without the values.
            values: the values there are.

        Raises:
            SkippedActivation: a value is needed that isn't in `values`, or a stand-in is kept
                somewhere when the call is over.
        """
        args, kwargs = call.take(range(call.rows))
        with self.answering(outputs, values) as made:
            result = self._answer(args, kwargs) if self.whole else self._original(*args, **kwargs)
        left = frozenset().union(*(s.leaves for s in stand_ins(result)))
        if left:
            raise SkippedActivation("the result is made of them", left)
        kept = [ref for ref in made if ref() is not None]
        if kept:
            raise SkippedActivation("they are kept after the call", frozenset())
        return result

    @contextmanager
    def answering(
        self, outputs: dict[int, Output], values: dict[Leaf, Tensor]
    ) -> Iterator[list[weakref.ref[Skipped]]]:
        """Skipped calls in the block return what is stored, and stand-ins for the rest.

        Raises:
            SkippedActivation: a value was needed that isn't in `values`, be it that the model went
                on without it; or not all of the calls were made.
        """
        made: list[weakref.ref[Skipped]] = []
        SkippedActivation.last = None
        self._answers = {
            number: _answer(number, output, values) for number, output in outputs.items()
        }
        Skipped.births = made
        made += [weakref.ref(stand_in) for stand_in in stand_ins(list(self._answers.values()))]
        try:
            with self._in(REPLAY):
                yield made
            caught = SkippedActivation.last
        finally:
            Skipped.births = None
            self._answers = {}
            SkippedActivation.last = None
        if caught is not None:
            raise SkippedActivation(str(caught), caught.leaves)
        if self._next != self._skipped:
            raise SkippedActivation("not all of its layers are called", frozenset())

    @contextmanager
    def _in(self, mode: str) -> Iterator[None]:
        self._mode, self._next = mode, 0
        scope = self.prefix.scope
        inner = [module for module in dict.fromkeys(self.modules) if module is not scope]
        # layers are replaced only for as long as the call takes: nobody copies them meanwhile
        originals = [module.forward for module in inner]
        for module, original in zip(inner, originals):
            module.__dict__["forward"] = self._standing_in(module, original)
        try:
            yield
        finally:
            for module, original in zip(inner, originals):
                _put(module, original)
            self._mode = PLAIN

    def _answer(self, args: Any, kwargs: Any) -> Any:
        number = self._next
        self._next += 1
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                raise SkippedActivation("an input of a frozen layer needs a gradient", frozenset())
        return self._answers.pop(number)

    def _seen(self, number: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._watch is not None:
            result = self._watch(number, original, (args, kwargs))
            self._next += 1
            return result
        result = original(*args, **kwargs)
        output, leaves = Output.of(result)
        found = self._collected
        if number < self._skipped:
            found.outputs[number] = output
        for position, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            if leaf.requires_grad:
                raise SkippedActivation("a frozen layer's output needs a gradient", frozenset())
            if (number, position) in self._wanted:
                # what comes next may write to it
                found.values[number, position] = leaf if number == self._last else leaf.clone()
        if number < self._skipped:
            self._next += 1
        if number == self._last:
            raise _Enough
        return result


class Entry:
    """What stands for a module's `forward`. Copies of the module have their own instead."""

    def __init__(
        self, module: nn.Module, original: Callable[..., Any], handler: Callable[..., Any]
    ) -> None:
        self.module = module
        self.original = original
        self.handler: Callable[..., Any] | None = handler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module is called now."""
        return (self.handler or self.original)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What the copy of the module would have without a cache."""
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        """The same, for pickle."""
        if _bound(self.original, self.module):
            return getattr, (self.module, "forward")
        return _itself, (self.original,)


def _itself(function: Any) -> Any:
    return function


def _bound(function: Any, module: nn.Module) -> bool:
    return getattr(function, "__self__", None) is module


def _put(module: nn.Module, original: Callable[..., Any]) -> None:
    if _bound(original, module):
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = original


def _wait(values: dict[Leaf, Tensor]) -> None:
    for device in {value.device for value in values.values() if value.is_cuda}:
        torch.cuda.synchronize(device)


def _answer(number: int, output: Output, values: dict[Leaf, Tensor]) -> Any:
    leaves = []
    for position, leaf in enumerate(output.leaves):
        if isinstance(leaf, Layout):
            value = values.get((number, position))
            leaves.append(Skipped.like(leaf, (number, position)) if value is None else value)
        else:
            leaves.append(leaf)
    return tree_unflatten(leaves, output.spec)
