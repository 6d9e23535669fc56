"""Calls whose side effects are taken back: random generators, buffers and attributes of modules."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_TABLES = frozenset(vars(nn.Module())) | {"forward"}


def random_state(scope: nn.Module) -> list[Any]:
    """Of the generators of torch, Python and numpy."""
    numpy = sys.modules.get("numpy.random")
    return [
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        None if numpy is None else _hashable(numpy.get_state()),
        *(torch.cuda.get_rng_state(d).numpy().tobytes() for d in devices_of(scope)),
    ]


def set_random_state(scope: nn.Module, state: list[Any]) -> None:
    """Put the generators where they were."""
    here, python, arrays, *there = state
    torch.set_rng_state(_as_tensor(here))
    random.setstate(python)
    numpy = sys.modules.get("numpy.random")
    if numpy is not None and arrays is not None:
        kind, words, *rest = arrays
        numpy.set_state((kind, sys.modules["numpy"].frombuffer(words, dtype="uint32"), *rest))
    for device, one in zip(devices_of(scope), there):
        torch.cuda.set_rng_state(_as_tensor(one), device)


@contextmanager
def undone(
    scope: nn.Module, without: Collection[nn.Module] = (), devices: Sequence[int] = ()
) -> Iterator[Callable[[], None]]:
    """A function that puts back what calls in the block have changed beside their result.

    It is cheap where it isn't called: only buffers of what is in train mode are copied.

    Args:
        scope: the module that is called.
        without: modules in it that aren't called.
        devices: CUDA devices whose random generators are drawn from.
    """
    modules = list(_called(scope, without))
    torch_state = torch.get_rng_state()
    on_devices = [torch.cuda.get_rng_state(device) for device in devices]
    python = random.getstate()
    numpy = sys.modules.get("numpy.random")
    arrays = None if numpy is None else numpy.get_state()
    kept = [
        (module, name, buffer, buffer.clone())
        for module in modules
        if module.training and module._buffers
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    attributes = [(vars(m), _attributes(m)) for m in modules]

    def undo() -> None:
        torch.set_rng_state(torch_state)
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(arrays)
        for device, there in zip(devices, on_devices):
            torch.cuda.set_rng_state(there, device)
        with torch.no_grad():
            for module, name, buffer, copy in kept:
                module._buffers[name] = buffer
                buffer.copy_(copy)
        for owner, values in attributes:
            _restore(owner, values)

    yield undo


@contextmanager
def aside(scope: nn.Module) -> Iterator[None]:
    """Calls in the block draw from other random generators and write to other buffers.

    The buffers themselves stay as they are, to the version: a graph may have saved them.
    """
    state = random_state(scope)
    own_generators = [(one, _generator_state(one)) for one in _generators(scope)]
    buffers = [(module, dict(module._buffers)) for module in scope.modules() if module._buffers]
    attributes = [(vars(m), _attributes(m)) for m in scope.modules()]
    for module, own in buffers:
        for name, buffer in own.items():
            if module.training and buffer is not None:
                module._buffers[name] = buffer.clone()
    for owner, values in attributes:
        for name, (value, _) in values.items():
            if isinstance(value, Tensor) and not value.requires_grad:
                owner[name] = value.clone()
    try:
        yield
    finally:
        set_random_state(scope, state)
        for one, where in own_generators:
            _set_generator(one, where)
        for module, own in buffers:
            module._buffers.update(own)
        for owner, values in attributes:
            _restore(owner, values)


def _generators(scope: nn.Module) -> list[Any]:
    """Random generators that modules keep for themselves."""
    return [v for m in scope.modules() for v in vars(m).values() if _generator_state(v) is not None]


def _generator_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    return getattr(getattr(value, "bit_generator", None), "state", None)


def _set_generator(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Its attributes, and copies of the containers among them."""
    return {
        name: (value, value.copy() if isinstance(value, (list, dict, set)) else None)
        for name, value in vars(module).items()
        if name not in _TABLES
    }


def _restore(owner: dict[str, Any], values: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in owner if name not in values and name not in _TABLES]:
        del owner[name]
    for name, (value, copy) in values.items():
        owner[name] = value
        if copy is not None and value != copy:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(copy)


def _called(module: nn.Module, without: Collection[nn.Module]) -> Iterator[nn.Module]:
    found = {} if module in without else {module: None}
    open_modules = list(found)
    while open_modules:
        for inner in open_modules.pop()._modules.values():
            if inner is not None and inner not in found and inner not in without:
                found[inner] = None
                open_modules.append(inner)
    return iter(found)


def devices_of(module: nn.Module) -> list[int]:
    """The CUDA devices that a module is on."""
    return sorted({p.device.index for p in module.parameters() if p.is_cuda})


def _hashable(state: Any) -> Any:
    kind, words, *rest = state
    return (kind, words.tobytes(), *rest)


def _as_tensor(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
