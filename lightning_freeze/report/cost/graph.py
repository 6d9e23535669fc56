"""The graph of one forward pass -> FLOPs of the backward pass, for many choices of what trains.

A backward pass per stage would be exact and slow: 127 of them for a model with 126 layers. What an
operation costs in it depends only on its own shapes and on which of its inputs need a gradient. So
each kind of operation is run once, by autograd itself and alone, for each such choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

_ORDINARY = re.compile(r"Backward\d+$")
_LEAF = "torch::autograd::AccumulateGrad"


class Unpredictable(Exception):
    """The backward pass can't be taken apart: its operations depend on more than their shapes."""


class Backward:
    """The backward pass from some outputs.

    Args:
        roots: outputs that require a gradient.
        flops: counted so far, by a counter that is active.
    """

    def __init__(self, roots: Sequence[Tensor], flops: Callable[[], int]) -> None:
        self._flops = flops
        self._seen: dict[Any, int] = {}
        self._nodes: list[Any] = []
        self._used: dict[Any, set[int]] = {}
        for root in roots:
            self._used.setdefault(root.grad_fn, set()).add(root.output_nr)
        self._sort([root.grad_fn for root in roots])

    def _sort(self, roots: list[Any]) -> None:
        """Sort operations: those that get an operation's gradients stand before it."""
        entered: set[Any] = set()
        stack = [(node, False) for node in roots]
        while stack:
            node, done = stack.pop()
            if done:
                self._nodes.append(node)
            elif node not in entered:
                entered.add(node)
                stack.append((node, True))
                for below, number in node.next_functions:
                    if below is not None:
                        self._used.setdefault(below, set()).add(number)
                        stack.append((below, False))

    def leaves(self) -> set[int]:
        """Ids of the tensors that it reaches."""
        return {id(node.variable) for node in self._nodes if node.name() == _LEAF}

    def count(self, stages_of: Mapping[int, int], stages: int) -> list[int]:
        """FLOPs in each stage.

        Args:
            stages_of: id of a tensor -> the stages in which it trains, as bits of a number.
            stages: how many there are.

        Raises:
            Unpredictable: only a real backward pass would tell.
        """
        total = [0] * stages
        needed: dict[Any, int] = {}
        for node in self._nodes:
            if node.name() == _LEAF:
                needed[node] = stages_of.get(id(node.variable), 0)
                continue
            edges = [below for below, _ in node.next_functions]
            wanted = [needed.get(below, 0) if below is not None else 0 for below in edges]
            here = 0
            for bits in wanted:
                here |= bits
            needed[node] = here
            if not here:
                continue
            if hasattr(node, "block"):  # a whole block, run elsewhere
                counted = node.block.count(sorted(self._used[node]), wanted, stages)
                total = [old + new for old, new in zip(total, counted)]
                continue
            kind = self._kind(node)
            if not self._cost(node, kind, [below is not None for below in edges]):
                continue  # nor does a part of it cost anything
            if kind is None:
                raise Unpredictable
            for bits, pattern in _patterns(wanted, here):
                cost = self._cost(node, kind, pattern)
                for stage in range(stages):
                    if bits >> stage & 1:
                        total[stage] += cost
        return total

    def _kind(self, node: Any) -> Any:
        """All that its cost can depend on; None for what is opaque: a user's function."""
        if not _ORDINARY.search(node.name()) or isinstance(node, BackwardCFunction):
            return None
        before = self._flops()
        try:
            saved = tuple(_shape(getattr(node, name)) for name in _saved(type(node)))
        except RuntimeError as error:  # what was saved has been written to
            raise Unpredictable from error
        if self._flops() != before:
            raise Unpredictable  # what was saved is computed anew: a checkpoint
        grads = tuple((tuple(m.shape), m.dtype) for m in node._input_metadata)
        edges = tuple(below is not None for below, _ in node.next_functions)
        return node.name(), saved, grads, edges, tuple(sorted(self._used[node]))

    def _cost(self, node: Any, kind: Any, pattern: Sequence[bool]) -> int:
        """Run one operation backwards, for some of its inputs."""
        key = (node if kind is None else kind, tuple(pattern))
        if key not in self._seen:
            made = list(node._input_metadata)
            used = sorted(self._used[node])
            inputs = {
                below: GradientEdge(below, number)
                for (below, number), wanted in zip(node.next_functions, pattern)
                if wanted and below is not None
            }
            counted = [0, 0]
            # by hooks: one input may be reached through another, and then what is between runs, too
            hooks = (
                node.register_prehook(lambda *_: counted.__setitem__(0, self._flops())),
                node.register_hook(lambda *_: counted.__setitem__(1, self._flops())),
            )
            try:
                torch.autograd.grad(
                    [GradientEdge(node, number) for number in used],
                    list(inputs.values()),
                    [_empty(made[number]) for number in used],
                    retain_graph=True,
                    allow_unused=True,
                )
            finally:
                for hook in hooks:
                    hook.remove()
            self._seen[key] = counted[1] - counted[0]
        return self._seen[key]


def _patterns(wanted: Sequence[int], stages: int) -> Iterator[tuple[int, tuple[bool, ...]]]:
    """Split stages by which inputs need a gradient in them."""
    split: list[tuple[int, tuple[bool, ...]]] = [(stages, ())]
    for bits in wanted:
        split = [
            (part, (*pattern, need))
            for old, pattern in split
            for part, need in ((old & bits, True), (old & ~bits, False))
            if part
        ]
    yield from split


def _empty(like: Any) -> Tensor:
    return torch.empty(tuple(like.shape), dtype=like.dtype, device=like.device)


_names: dict[type, tuple[str, ...]] = {}


def _saved(kind: type) -> tuple[str, ...]:
    """What a kind of operation keeps from the forward pass."""
    if kind not in _names:
        _names[kind] = tuple(name for name in dir(kind) if name.startswith("_saved_"))
    return _names[kind]


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_shape(item) for item in value)
    return str(value)
