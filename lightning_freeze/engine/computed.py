"""Tensors that a module computes from others: a weight under a weight norm or a parametrization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import (
    ParametrizationList,
    is_parametrized,
    type_before_parametrizations,
)
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# of a power method, as many as torch makes for a new spectral norm
_ITERATIONS = 15


@dataclass(frozen=True)
class Computed:
    """One such tensor.

    Attributes:
        name: the module's attribute.
        like: a tensor of its shape.
        sources: the parameters that it is computed from.
        buffers: state of the computation, such as a spectral norm's vectors.
        invert: value -> one for each of the sources, from which about that value is computed.
        settle: brings the state up to what the sources are now.
    """

    name: str
    like: Tensor
    sources: tuple[nn.Parameter, ...]
    buffers: tuple[Tensor, ...]
    invert: Callable[[Tensor], Iterable[Tensor]]
    settle: Callable[[], None]

    def write(self, value: Tensor | None, marked: set[int]) -> None:
        """Have it computed as a new value.

        Args:
            value: the new one.
            marked: ids of the sources that may be written.
        """
        assert value is not None
        if marked.isdisjoint(map(id, self.sources)):
            return
        for source, new in zip(self.sources, self.invert(value.detach())):
            if id(source) in marked:
                source.copy_(new)
        self.settle()


def computed_in(module: nn.Module) -> list[Computed]:
    """The tensors that a module itself computes."""
    return [*_parametrized(module), *_normed(module)]


def stand_in(module: nn.Module, computed: Iterable[Computed]) -> nn.Module:
    """What an init function is given: the module, or its like with plain tensors for computed ones.

    All else of it are the module's own objects.
    """
    if not computed:
        return module
    kind: Any = type_before_parametrizations(module)
    plain: nn.Module = kind.__new__(kind)
    names = {tensor.name for tensor in computed}
    hidden = {id(source) for tensor in computed for source in tensor.sources}
    own = {key: p for key, p in module._parameters.items() if id(p) not in hidden}
    fresh = {t.name: nn.Parameter(torch.full_like(t.like, torch.nan)) for t in computed}
    inside = {key: m for key, m in module._modules.items() if key != "parametrizations"}
    vars(plain).update({key: value for key, value in vars(module).items() if key not in names})
    vars(plain).update(_parameters={**fresh, **own}, _modules=inside)
    return plain


def _parametrized(module: nn.Module) -> Iterator[Computed]:
    """By torch.nn.utils.parametrize."""
    if not is_parametrized(module):
        return
    assert isinstance(module.parametrizations, nn.ModuleDict)
    for name, parts in module.parametrizations.items():
        assert isinstance(parts, ParametrizationList)
        buffers = tuple(parts.buffers())
        like = _in_eval(parts)
        sources = tuple(p for p in parts._parameters.values() if p is not None)
        yield Computed(name, like, sources, buffers, _inverse(parts), _settling(parts))


def _in_eval(parts: ParametrizationList) -> Tensor:
    """The tensor as it is, without a step of a power method."""
    modes = {part: part.training for part in parts.modules()}
    for part in modes:
        part.training = False
    try:
        value: Tensor = parts()
        return value
    finally:
        for part, mode in modes.items():
            part.training = mode


def _inverse(parts: ParametrizationList) -> Callable[[Tensor], Iterable[Tensor]]:
    def invert(value: Tensor) -> Iterable[Tensor]:
        found: Tensor | Iterable[Tensor] = value
        part: Any
        for part in reversed(list(parts)):
            # as where a parametrization is registered: without an inverse, the value itself
            with suppress(NotImplementedError):
                found = part.right_inverse(found) if hasattr(part, "right_inverse") else found
        return (found,) if isinstance(found, Tensor) else found

    return invert


def _settling(parts: ParametrizationList) -> Callable[[], None]:
    def settle() -> None:
        modes = {part: part.training for part in parts.modules()}
        for part in modes:
            part.training = True
        for _ in range(_ITERATIONS):
            before = [buffer.clone() for buffer in parts.buffers()]
            parts()
            if all(map(torch.equal, before, parts.buffers())):
                break
        for part, mode in modes.items():
            part.training = mode

    return settle


def _normed(module: nn.Module) -> Iterator[Computed]:
    """By a hook before the forward pass: torch.nn.utils.weight_norm and spectral_norm."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield _weight_norm(module, hook)
        elif isinstance(hook, SpectralNorm):
            yield _spectral_norm(module, hook)


def _weight_norm(module: nn.Module, hook: WeightNorm) -> Computed:
    size, direction = (module.get_parameter(f"{hook.name}_{part}") for part in "gv")
    return Computed(
        hook.name,
        direction,
        (size, direction),
        (),
        lambda value: (torch.norm_except_dim(value, 2, hook.dim), value),
        partial(hook.__call__, module, None),
    )


def _spectral_norm(module: nn.Module, hook: SpectralNorm) -> Computed:
    weight = module.get_parameter(f"{hook.name}_orig")

    def settle() -> None:
        for _ in range(_ITERATIONS):
            hook.compute_weight(module, do_power_iteration=True)
        hook(module, None)

    buffers = tuple(module.get_buffer(f"{hook.name}_{part}") for part in "uv")
    return Computed(hook.name, weight, (weight,), buffers, lambda value: (value,), settle)
