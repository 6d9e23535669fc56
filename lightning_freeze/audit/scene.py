"""What stands around a model when it is looked at: optimizers, notes, averages, callbacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

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
    spans: list[tuple[int, int, str]] = []
    for name, parameter in index.parameters.items():
        if is_lazy(parameter) or parameter.device.type == "meta" or not parameter.numel():
            continue
        begin = address(parameter)
        if begin:
            spans.append((begin, begin + parameter.nbytes, name))
    spans.sort()
    found: dict[str, str] = {}
    twins: dict[str, str] = {}
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin >= end:
            continue
        pair = {index.parameters[n].requires_grad: n for n in (name, other)}
        if len(pair) == 2:
            found[pair[False]] = pair[True]
        elif False in pair:
            twins |= {name: other, other: name}
    return found, twins
