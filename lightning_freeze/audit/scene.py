"""What stands around a model when it is looked at: optimizers, notes, averages, callbacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_freeze.audit.baseline import address
from lightning_freeze.audit.trace import Trace
from lightning_freeze.model.index import ModelIndex, named_tensors


@dataclass(frozen=True)
class Average:
    """A copy of the model that some callback averages weights in.

    Attributes:
        label: the callback's class.
        module: the copy.
        used: whether it has averaged anything yet; before, it holds what it was made with.
        written: whether it may have been written back into the model by now.
    """

    label: str
    module: nn.Module
    used: bool = True
    written: bool = True

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of the copy."""
        return dict(zip(*named_tensors(self.module)))


def nobody(after: str, before: str) -> str:
    """Who runs between two looks, where nobody knows."""
    return ""


@dataclass(frozen=True)
class Scene:
    """What can be looked at to find out why a frozen tensor changed.

    Attributes:
        optimizers: of the loop.
        trace: notes that were taken while it ran; without them, what can be told afterwards.
        averages: copies of the model in callbacks that average weights.
        who: says, for two looks, which code of the user's runs between them.
        shared: name of a frozen tensor -> name of a trainable one in the same memory.
        twins: name of a frozen tensor -> name of another frozen one in the same memory.
        reduced: names of what DistributedDataParallel gives a gradient.
    """

    optimizers: Sequence[Optimizer] = ()
    trace: Trace | None = None
    averages: Sequence[Average] = ()
    who: Callable[[str, str], str] = nobody
    shared: Mapping[str, str] = field(default_factory=dict)
    reduced: Collection[str] = ()
    twins: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _held(self) -> dict[int, tuple[Optimizer, Mapping[str, Any]]]:
        """Id of a parameter -> the first optimizer that holds it, and the group."""
        found: dict[int, tuple[Optimizer, Mapping[str, Any]]] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    found.setdefault(id(parameter), (optimizer, group))
        return found

    def holder(self, parameter: Tensor) -> Optimizer | None:
        """The first optimizer that holds a parameter."""
        held = self._held.get(id(parameter))
        return None if held is None else held[0]

    def learning_rate(self, parameter: Tensor) -> float:
        """What a parameter is stepped with; 0 where no optimizer holds it."""
        held = self._held.get(id(parameter))
        return 0.0 if held is None else float(held[1].get("lr") or 0.0)


def shared_memory(index: ModelIndex) -> tuple[dict[str, str], dict[str, str]]:
    """Parameters that overlap in memory.

    Returns:
        Name of a frozen one -> name of a trainable one, and of a frozen one -> another frozen one.
    """
    spans: list[tuple[int, int, str, nn.Parameter]] = []
    for name, parameter in index.parameters.items():
        if is_lazy(parameter) or parameter.device.type == "meta" or not parameter.numel():
            continue
        begin = address(parameter)
        if begin:
            spans.append((begin, begin + _extent(parameter), name, parameter))
    spans.sort(key=lambda span: span[:3])
    found: dict[str, str] = {}
    twins: dict[str, str] = {}
    around: list[tuple[int, int, str, nn.Parameter]] = []
    for begin, end, name, parameter in spans:
        around = [span for span in around if span[1] > begin]
        for _, _, other, partner in around:
            if parameter.requires_grad and partner.requires_grad:
                continue
            if not _overlap(parameter, partner):
                continue
            if parameter.requires_grad or partner.requires_grad:
                pair = {parameter.requires_grad: name, partner.requires_grad: other}
                found.setdefault(pair[False], pair[True])
            else:
                twins |= {name: other, other: name}
        around.append((begin, end, name, parameter))
    return found, twins


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last; it may leave some out between."""
    if tensor.layout is not torch.strided:
        return tensor.nbytes
    steps = zip(tensor.shape, tensor.stride())
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose extents overlap have an element in common."""
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return True
    if one.is_contiguous() and other.is_contiguous():
        return True
    size = one.element_size()
    if other.element_size() != size or (address(one) - address(other)) % size:
        return True
    first = min(address(one), address(other))
    places = []
    for tensor in (one, other):
        inside = torch.arange(_extent(tensor) // size).as_strided(tensor.shape, tensor.stride())
        places.append(inside.flatten() + (address(tensor) - first) // size)
    return bool(torch.isin(*places).any())
