"""One real call -> whether leaving the prefix out gives the same, and which outputs that takes.

The call runs as it is, under observation. Then it is replayed until no stand-in is missed, and the
result has to be that of the real call, to the bit. Then the prefix runs for some of the samples
alone: a sample's output must not depend on the other samples.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_freeze.cache.calls import foreign_hooks
from lightning_freeze.cache.keys import Call
from lightning_freeze.cache.replay import Output, Replay, aside
from lightning_freeze.cache.skipped import Leaf, SkippedActivation

_MOST_OUTPUTS = 8
_PLAIN = (type(None), bool, int, float, complex, str)
# of the largest value: what another batch size may change by rounding
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
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
    """

    needed: frozenset[Leaf]
    batched: tuple[int, ...]
    by_row: frozenset[Leaf]
    rows: int


class _Births(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the tensors that are made while a skipped call runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: int | None = None
        self.made: list[tuple[int, weakref.ref[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.inside is not None:
            made = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
            self.made += [(self.inside, weakref.ref(tensor)) for tensor in made]
        return result


class _Watch:
    """Keeps what skipped calls return in a real call, and what changes while they run."""

    def __init__(self, replay: Replay) -> None:
        self.scope = replay.prefix.scope
        self.modules = replay.modules
        self.births = _Births()
        self.outputs: dict[int, Output] = {}
        self.values: dict[Leaf, Tensor] = {}
        self.random: list[Any] = []
        self.unfit: Unfit | None = None

    def __call__(self, number: int, original: Any, arguments: Any) -> Any:
        module = self.modules[number]
        before = _state(module)
        self.births.inside = number
        try:
            result = original(*arguments[0], **arguments[1])
        finally:
            self.births.inside = None
        if before != _state(module):
            self._is(f"a frozen {type(module).__name__} changes itself as it is called")
        self.outputs[number], leaves = Output.of(result)
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if leaf.requires_grad:
                    self._is(f"the output of a frozen {type(module).__name__} needs a gradient")
                # what comes next may write to it
                self.values[number, position] = leaf.detach().clone()
            elif not isinstance(leaf, _PLAIN):
                self._is(f"a frozen layer returns a {type(leaf).__name__}")
        self.random = _random(self.scope)
        return result

    def _is(self, reason: str) -> None:
        self.unfit = self.unfit or Unfit(reason)


def probe(replay: Replay, call: Call) -> tuple[Any, Fit | Unfit]:
    """Call the scope for real, and find out whether its prefix can be left out.

    Returns:
        What the call returns, and what was found.
    """
    scope = replay.prefix.scope
    if any(foreign_hooks(module) for module in scope.modules()):
        return replay.plain(call), Unfit(f"there are hooks on layers in {type(scope).__name__}")
    watch = _Watch(replay)
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
    versions = [tensor._version for tensor in tensors]
    random = _random(scope)
    with watch.births:
        result = replay.watched(call, watch)
    if watch.unfit is not None:
        return result, watch.unfit
    try:
        if versions != [tensor._version for tensor in tensors]:
            raise Unfit("the frozen part changes its input in place")
        if watch.random != random:
            raise Unfit("the frozen part draws random numbers")
        return result, _find(replay, call, watch, result, random)
    except Unfit as unfit:
        return result, unfit


def _find(replay: Replay, call: Call, watch: _Watch, real: Any, random: list[Any]) -> Fit:
    by_row = frozenset(
        leaf for leaf, value in watch.values.items() if value.dim() and value.shape[0] == call.rows
    )
    replay.free = frozenset(number for number, _ in watch.values.keys() - by_row)
    needed: frozenset[Leaf] = frozenset()
    while True:
        values = {leaf: watch.values[leaf].clone() for leaf in needed}
        try:
            with aside(replay.prefix.scope):
                _set_random(replay.prefix.scope, random)
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
        raise Unfit("leaving it out gives another result")
    del result, values
    _check_kept(watch, real, needed, replay.free)
    if call.rows > 1:
        _check_rows(replay, call, watch, needed)
    return Fit(needed, call.batched, by_row, call.rows)


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


def _check_rows(replay: Replay, call: Call, watch: _Watch, needed: frozenset[Leaf]) -> None:
    rows = list(range(1, call.rows, 2)) if call.rows > 2 else [1]
    try:
        with aside(replay.prefix.scope):
            alone = replay.collect(call, rows, needed)
    except Exception as error:
        raise Unfit(f"it can't run for some samples alone: {error}") from None
    for leaf in needed:
        got, whole = alone.values[leaf], watch.values[leaf][rows]
        if not close(got, whole):
            raise Unfit("the samples of a batch influence each other in it")


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.numel() or torch.equal(one, other):
        return True
    if not one.dtype.is_floating_point:
        return False
    scale = other.abs().nan_to_num(0.0).max()
    tolerance = _TOLERANCE.get(one.dtype, _COARSE) * float(scale)
    return bool(torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True))


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


def _random(module: nn.Module) -> list[Any]:
    state = [torch.get_rng_state().numpy().tobytes()]
    return state + [torch.cuda.get_rng_state(d).numpy().tobytes() for d in _devices(module)]


def _set_random(module: nn.Module, state: list[Any]) -> None:
    here, *there = (torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in state)
    torch.set_rng_state(here)
    for device, one in zip(_devices(module), there):
        torch.cuda.set_rng_state(one, device)


def _devices(module: nn.Module) -> list[int]:
    return sorted({p.device.index for p in module.parameters() if p.is_cuda})
