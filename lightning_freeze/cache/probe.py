"""One real call -> whether leaving the prefix out gives the same, and which outputs that takes.

The call runs as it is, under observation. Then it is replayed until no stand-in is missed, and the
result has to be that of the real call, to the bit. Then the prefix runs for some of the samples
alone: a sample's output must not depend on the other samples.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_leaves

from lightning_freeze.cache.calls import foreign_hooks
from lightning_freeze.cache.content import version_of
from lightning_freeze.cache.keys import Call, autocasts
from lightning_freeze.cache.replay import Collected, Output, Replay
from lightning_freeze.cache.sideways import aside, random_state, set_random_state
from lightning_freeze.cache.skipped import Leaf, SkippedActivation

_MOST_OUTPUTS = 8
_PLAIN = (type(None), bool, int, float, complex, str)
# of the largest value: what another batch size may change by rounding; on accelerators other
# algorithms are chosen, with TF32
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_ON_ACCELERATORS = 2e-3
_COARSE = 5e-2


class Unfit(Exception):
    """The prefix can't be left out; the text says why."""


@dataclass(frozen=True)
class Fit:
    """What it takes.

    Attributes:
        needed: outputs of skipped calls that the rest of the model reads.
        batched: positions of the arguments with a row per sample.
        by_row: tensors among the skipped calls' outputs that have a row per sample.
        rows: samples that it was tried with.
        spec: the tree of arguments that it was tried with.
        outside: tensors that it reads beside its arguments and its layers' own.
        first: what it gave for the samples that it was tried with.
    """

    needed: frozenset[Leaf]
    batched: tuple[int, ...]
    by_row: frozenset[Leaf]
    rows: int
    spec: TreeSpec
    outside: tuple[Tensor, ...]
    first: Collected


class _Births(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes tensors that are made while a skipped call runs, and what is read from elsewhere.

    Args:
        known: tensors that may be read.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: int | None = None
        self.made: list[tuple[int, weakref.ref[Tensor]]] = []
        self.outside: dict[int, Tensor] = {}
        self.numbers = False
        self.paused = False
        self._known = {id(tensor): weakref.ref(tensor) for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.paused:
            return result
        # a literal in the code comes into being with `lift_fresh`
        given = () if func is torch.ops.aten.lift_fresh.default else tree_leaves((args, kwargs))
        for leaf in given:
            if isinstance(leaf, Tensor) and not self._knows(leaf):
                self.outside[id(leaf)] = leaf
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._known.update((id(tensor), weakref.ref(tensor)) for tensor in made)
        if self.inside is not None:
            self.made += [(self.inside, weakref.ref(tensor)) for tensor in made]
            self.numbers |= func is torch.ops.aten._local_scalar_dense.default
        return result

    def _knows(self, tensor: Tensor) -> bool:
        ref = self._known.get(id(tensor))
        return ref is not None and ref() is tensor


@contextmanager
def _written() -> Iterator[list[nn.Module]]:
    """Modules of which an attribute is set, be it to what it was."""
    found: list[nn.Module] = []
    original = nn.Module.__setattr__

    def noted(self: nn.Module, name: str, value: Any) -> None:
        found.append(self)
        original(self, name, value)

    nn.Module.__setattr__ = noted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]


class _Watch:
    """Keeps what skipped calls return in a real call, and what changes while they run."""

    def __init__(self, replay: Replay, call: Call) -> None:
        self.scope = replay.prefix.scope
        self.modules = replay.modules
        self.last = len(replay.prefix.skipped) - 1
        own = [t for m in replay.prefix.skipped for t in (*m.parameters(), *m.buffers())]
        given = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
        self.births = _Births([*own, *given])
        self.outputs: dict[int, Output] = {}
        self.values: dict[Leaf, Tensor] = {}
        self.random: list[Any] = []
        self.unfit: Unfit | None = None

    def __call__(self, number: int, original: Any, arguments: Any) -> Any:
        module = self.modules[number]
        before = _state(module)
        self.births.inside, self.births.paused = number, False
        try:
            with _written() as written:
                result = original(*arguments[0], **arguments[1])
        finally:
            self.births.inside = None
            self.births.paused = True
        if before != _state(module) or set(written) & set(module.modules()):
            self._is(f"a frozen {type(module).__name__} changes itself as it is called")
        self.outputs[number], leaves = Output.of(result)
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if leaf.requires_grad:
                    self._is(f"the output of a frozen {type(module).__name__} needs a gradient")
                # what comes next may write to it
                self.values[number, position] = leaf.detach().clone()
            elif not isinstance(leaf, _PLAIN):
                self._is(f"a frozen layer returns a {type(leaf).__name__}{_advice(leaf)}")
            elif leaf is not None and (self.births.numbers or isinstance(leaf, (float, complex))):
                self._is("a frozen layer returns a number that depends on the samples")
        self.random = random_state(self.scope)
        self.births.paused = number == self.last
        return result

    def _is(self, reason: str) -> None:
        self.unfit = self.unfit or Unfit(reason)


def probe(replay: Replay, call: Call) -> tuple[Any, Fit | Unfit]:
    """Call the scope for real, and find out whether its prefix can be left out.

    Returns:
        What the call returns, and what was found.
    """
    scope = replay.prefix.scope
    if any(foreign_hooks(module) for module in scope.modules() if module is not scope):
        return replay.plain(call), Unfit(f"there are hooks on layers in {type(scope).__name__}")
    watch = _Watch(replay, call)
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
    versions = [version_of(tensor) for tensor in tensors]
    random = random_state(scope)
    with watch.births:
        result = replay.watched(call, watch)
    if watch.unfit is not None:
        return result, watch.unfit
    try:
        if versions != [version_of(tensor) for tensor in tensors]:
            raise Unfit("the frozen part changes its input in place")
        if not call.untouched():
            raise Unfit("the model changes what is in the batch that it is given")
        if watch.random != random:
            raise Unfit("the frozen part draws random numbers")
        _check_outside(replay, watch)
        return result, _find(replay, call, watch, result, random)
    except Unfit as unfit:
        return result, unfit


def _advice(leaf: Any) -> str:
    """What to write where a layer fills a cache of keys and values, as decoders do by default."""
    name = type(leaf).__name__
    if isinstance(leaf, (Tensor, *_PLAIN)) or not name.endswith("Cache"):
        return ""
    return f" (a {name} is for generating text: write `model.config.use_cache = False`)"


def _find(replay: Replay, call: Call, watch: _Watch, real: Any, random: list[Any]) -> Fit:
    by_row = frozenset(
        leaf for leaf, value in watch.values.items() if value.dim() and value.shape[0] == call.rows
    )
    rows = list(range(1, call.rows, 2)) if call.rows > 2 else [call.rows - 1]
    alone = _alone(replay, call, rows, by_row)
    if len(rows) < call.rows:  # a table of positions may be as long as the batch
        by_row = frozenset(
            leaf for leaf in by_row if alone[leaf].dim() and alone[leaf].shape[0] == len(rows)
        )
    replay.free = frozenset(number for number, _ in watch.values.keys() - by_row)
    needed: frozenset[Leaf] = frozenset()
    while True:
        values = {leaf: watch.values[leaf].clone() for leaf in needed}
        try:
            with aside(replay.prefix.scope):
                set_random_state(replay.prefix.scope, random)
                result = replay.replay(call, watch.outputs, values)
            break
        except SkippedActivation as missed:
            more = missed.leaves - needed
            if not more:
                raise Unfit(f"{missed}") from None
            needed |= more
        except Exception as error:
            raise Unfit(f"leaving it out fails with {type(error).__name__}: {error}") from None
        if len(needed) > _MOST_OUTPUTS:
            raise Unfit(f"more than {_MOST_OUTPUTS} of its activations are used elsewhere")
    if not needed:
        raise Unfit("nothing of it is used")
    if needed - by_row:
        raise Unfit("what it returns has no row per sample")
    if not _same(result, real):
        kept = "".join(map(_advice, tree_leaves(real)))
        raise Unfit(f"leaving it out gives another result{kept}")
    del result, values
    _check_kept(watch, real, needed, replay.free)
    _check_rows(replay, watch, needed, rows, alone)
    outside = tuple(watch.births.outside.values())
    values = {leaf: value for leaf, value in watch.values.items() if leaf in by_row}
    first = Collected(watch.outputs, values)
    return Fit(needed, call.batched, by_row, call.rows, call.spec, outside, first)


def _check_outside(replay: Replay, watch: _Watch) -> None:
    """What the frozen part reads beside its input has to be under observation."""
    scope, around = replay.prefix.scope, replay.prefix.around
    within = {id(t) for t in (*scope.parameters(), *scope.buffers())}
    inner = (m for module in replay.prefix.skipped for m in module.modules())
    within |= {id(t) for m in (*around, *inner) for t in vars(m).values() if isinstance(t, Tensor)}
    for tensor in watch.births.outside.values():
        if tensor.requires_grad:
            raise Unfit("it reads a parameter that trains")
        if id(tensor) not in within:
            raise Unfit("it reads a tensor that is neither an argument nor of the model")


def _check_kept(watch: _Watch, real: Any, needed: Iterable[Leaf], free: frozenset[int]) -> None:
    """What a skipped layer puts aside wouldn't be there, or would be an earlier batch's."""
    allowed = {_place(leaf) for leaf in tree_leaves(real) if isinstance(leaf, Tensor)}

    def kept() -> int:
        alive = [ref() for number, ref in watch.births.made if number not in free]
        return sum(1 for t in alive if t is not None and _place(t) not in allowed)

    # what is needed may be saved for the backward pass of what trains
    allowed |= _places(watch, needed)
    if kept():
        gc.collect()
        if kept():
            raise Unfit("activations of frozen layers are kept somewhere")


def _places(watch: _Watch, needed: Iterable[Leaf]) -> set[Any]:
    """Where the needed outputs of the real call lie, if anything still holds them."""
    found = set()
    for leaf in needed:
        value = watch.values[leaf]
        for _, ref in watch.births.made:
            tensor = ref()
            if (
                tensor is not None
                and tensor.numel() == value.numel()
                and tensor.dtype == value.dtype
                and torch.equal(tensor.reshape(-1), value.reshape(-1))
            ):
                found.add(_place(tensor))
    return found


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _alone(
    replay: Replay, call: Call, rows: Sequence[int], wanted: frozenset[Leaf]
) -> dict[Leaf, Tensor]:
    """The prefix for some of the samples. Twice: what draws from anywhere isn't the same again."""
    try:
        with aside(replay.prefix.scope):
            first = replay.collect(call, rows, wanted)
            again = replay.collect(call, rows, wanted)
    except Exception as error:
        raise Unfit(f"it can't run for some samples alone: {error}") from None
    for leaf, value in first.values.items():
        same = close if value.is_cuda else _equal
        if value.shape != again.values[leaf].shape or not same(value, again.values[leaf]):
            raise Unfit("it gives something else each time")
    return first.values


def _check_rows(
    replay: Replay,
    watch: _Watch,
    needed: frozenset[Leaf],
    rows: Sequence[int],
    alone: dict[Leaf, Tensor],
) -> None:
    tolerance = tolerance_of(replay.prefix.skipped)
    for leaf in needed:
        if not close(alone[leaf], watch.values[leaf][rows], tolerance):
            raise Unfit("the samples of a batch influence each other in it")


def tolerance_of(modules: Iterable[nn.Module]) -> float:
    """What another batch size may change by rounding, at least."""
    narrow = (torch.bfloat16, torch.float16)
    if autocasts() or any(p.dtype in narrow for m in modules for p in m.parameters()):
        return _COARSE
    return 0.0


def close(one: Tensor, other: Tensor, tolerance: float = 0.0) -> bool:
    """Whether two outputs are the same but for rounding.

    Args:
        one: an output.
        other: another one.
        tolerance: in units of the largest value; more where their type needs it.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.numel() or torch.equal(one, other):
        return True
    if not one.dtype.is_floating_point:
        return False
    scale = other.abs().nan_to_num(0.0).max()
    tolerance = max(tolerance, _TOLERANCE.get(one.dtype, _COARSE))
    if one.device.type != "cpu" and one.dtype != torch.float64:
        tolerance = max(tolerance, _ON_ACCELERATORS)
    atol = tolerance * float(scale)
    return bool(torch.allclose(one, other, rtol=0.0, atol=atol, equal_nan=True))


def _same(one: Any, other: Any, depth: int = 4) -> bool:
    """Whether two results are equal to the bit; what no tree knows is compared by attributes."""
    left, right = tree_leaves(one), tree_leaves(other)
    if len(left) != len(right):
        return False
    for a, b in zip(left, right):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype or not _equal(a, b):
                return False
        elif type(a) is not type(b):
            return False
        elif isinstance(a, _PLAIN):
            if a != b:
                return False
        elif not _same_attributes(a, b, depth):
            return False
    return True


def _same_attributes(one: Any, other: Any, depth: int) -> bool:
    if not depth or not hasattr(one, "__dict__"):
        return one is other
    left, right = vars(one), vars(other)
    return left.keys() == right.keys() and all(
        _same(left[key], right[key], depth - 1) for key in left
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _state(module: nn.Module) -> list[Any]:
    """What a module and those in it hold beside parameters: numbers, tensors, buffers."""
    found: list[Any] = []
    for inner in module.modules():
        for name, value in vars(inner).items():
            if isinstance(value, _PLAIN):
                found.append((name, value))
            elif isinstance(value, Tensor):
                found.append((name, id(value), value._version))
            elif isinstance(value, (list, dict, set)) and not name.startswith("_"):
                found.append((name, len(value)))
        found += [(id(b), b._version) for b in inner._buffers.values() if b is not None]
    return found
