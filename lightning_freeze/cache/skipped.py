"""Stand-ins for what skipped modules would have returned: shape, dtype and device, no values.

Operations on stand-ins give stand-ins, worked out on torch's meta device. Where a number would be
needed, they raise. So a value that wasn't computed can't reach a loss: it is a stand-in to the end.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

# what a module returned: its number in the order of calls, and the number of the tensor in it
Leaf = tuple[int, int]

# their result doesn't depend on the values of what they are given
_BY_SHAPE = frozenset(
    {
        torch.ops.aten.zeros_like.default,
        torch.ops.aten.ones_like.default,
        torch.ops.aten.full_like.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_zeros.default,
        torch.ops.aten.new_ones.default,
        torch.ops.aten.new_full.default,
        torch.ops.aten.new_empty.default,
    }
)


class SkippedActivation(Exception):
    """A value was asked for that wasn't computed.

    Attributes:
        leaves: the outputs of skipped modules that it would be made of.
    """

    # the last one in a replay: a model may catch it
    last: ClassVar[SkippedActivation | None] = None

    def __init__(self, what: str, leaves: frozenset[Leaf]) -> None:
        super().__init__(what)
        self.leaves = leaves
        SkippedActivation.last = self


@dataclass(frozen=True)
class Layout:
    """What is known of a tensor without its values.

    Attributes:
        order: its dimensions, from the one with the widest steps in memory on; None as usual.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of a tensor."""
        order = None
        if not tensor.is_contiguous():
            strides = tensor.stride()
            order = tuple(sorted(range(tensor.dim()), key=lambda d: (-strides[d], d)))
        return cls(tensor.shape, tensor.dtype, tensor.device, order)

    def arranged(self, tensor: Tensor) -> Tensor:
        """A tensor with its dimensions in this order in memory, such as channels last."""
        if self.order is None:
            return tensor
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return tensor.permute(self.order).contiguous().permute(back)


class Skipped(Tensor):
    """A tensor without values."""

    _meta: Tensor
    leaves: frozenset[Leaf]
    # where stand-ins that operations make are noted, while a module is called with them
    births: ClassVar[list[weakref.ref[Skipped]] | None] = None

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device, leaves: frozenset[Leaf]) -> Skipped:
        """Wrap a meta tensor, as if it were on `device`."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        made._meta = meta
        made.leaves = leaves
        if Skipped.births is not None:
            Skipped.births.append(weakref.ref(made))
        return made

    @classmethod
    def like(cls, layout: Layout, leaf: Leaf) -> Skipped:
        """A stand-in for one output of a module."""
        meta = torch.empty(layout.shape, dtype=layout.dtype, device="meta")
        return cls(meta, layout.device, frozenset({leaf}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Skipped({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """Raises: there are no values."""
        raise SkippedActivation("tolist", self.leaves)

    def numpy(self, *, force: bool = False) -> Any:
        """Raises: there are no values."""
        raise SkippedActivation("numpy", self.leaves)

    def data_ptr(self) -> int:
        """Raises: there are no values."""
        raise SkippedActivation("data_ptr", self.leaves)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Work out the shape of what an operation would give."""
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        skipped = [tensor for tensor in given if isinstance(tensor, Skipped)]
        leaves = frozenset().union(*(tensor.leaves for tensor in skipped))
        device = kwargs.get("device") or skipped[0].device
        if _writes_to_values(func, args, kwargs):
            raise SkippedActivation(f"`{func}` writes it to a tensor with values", leaves)
        if func in _BY_SHAPE:
            return func(*_as(torch.empty, args), **{**_as(torch.empty, kwargs), "device": device})
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        try:
            result = func(*_on_meta(args), **_on_meta(kwargs))
        except Exception as error:
            # `.item()`, `nonzero`, a mask as an index: the shape or the way on is in the values
            raise SkippedActivation(f"`{func}` needs its values ({error})", leaves) from error
        written = {id(_meta_of(tensor)): tensor for tensor in skipped}

        def wrap(meta: Tensor) -> Tensor:
            return written.get(id(meta)) or cls(meta, torch.device(device), leaves)

        return tree_map_only(Tensor, wrap, result)


def _meta_of(tensor: Skipped) -> Tensor:
    return tensor._meta


def _on_meta(tree: Any) -> Any:
    def meta(tensor: Tensor) -> Tensor:
        if isinstance(tensor, Skipped):
            return tensor._meta
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    return tree_map_only(Tensor, meta, tree)


def _as(make: Callable[..., Tensor], tree: Any) -> Any:
    """Stand-ins replaced by tensors whose values nobody reads."""

    def real(tensor: Skipped) -> Tensor:
        empty = make((1,), dtype=tensor.dtype, device=tensor.device)
        return empty.as_strided(tensor.shape, [0] * tensor.dim())

    return tree_map_only(Skipped, real, tree)


def _writes_to_values(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation would write to a tensor that has values."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        if any(isinstance(t, Tensor) and not isinstance(t, Skipped) for t in tree_leaves(given)):
            return True
    return False


def leaves_in(tree: Any) -> frozenset[Leaf]:
    """The outputs of skipped modules that anything in a tree is made of."""
    return frozenset().union(*(t.leaves for t in stand_ins(tree)))


def stand_ins(tree: Any) -> Iterator[Skipped]:
    """The stand-ins in a tree of values."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Skipped))
