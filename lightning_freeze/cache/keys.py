"""What a module is called with -> one 128-bit key per sample.

Rows of the tensors whose first dimension is the batch are hashed sample by sample; all else that
the call is given (other tensors, numbers, flags, autocast) is hashed once, into the name of the
space that the keys are in. Keys are content: shuffling, several workers and repeated samples hit,
augmented samples miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_freeze.cache.opened import opened

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class Unkeyable(Exception):
    """A call whose arguments can't be told apart by content; the text says why."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call.

    Attributes:
        leaves: of the tree of arguments, in order.
        spec: the tree.
        batched: positions of the tensors that have one row per sample.
        rows: number of samples.
        given: the arguments themselves, by position and by name.
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec
    batched: tuple[int, ...]
    rows: int
    given: tuple[Sequence[Any], dict[str, Any]] = ((), {})

    @classmethod
    def of(
        cls,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        batched: Sequence[int] | None = None,
    ) -> Call:
        """Look at the arguments of a call.

        Args:
            args: by position.
            kwargs: by name.
            batched: which tensors have a row per sample; where None, those whose first dimension
                is as long as that of the first tensor.

        Raises:
            Unkeyable: an argument isn't plain, or requires a gradient.
        """
        leaves, spec = _flat(args, kwargs)
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for position in tensors:
            tensor = leaves[position]
            if tensor.requires_grad:
                raise Unkeyable("an input of the frozen part requires a gradient")
            if type(tensor) is not Tensor or tensor.layout is not torch.strided:
                raise Unkeyable(f"an input of the frozen part is a {type(tensor).__name__}")
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise Unkeyable(f"an input of the frozen part is a {type(leaf).__name__}")
        if batched is None:
            sized = [i for i in tensors if leaves[i].dim()]
            rows = leaves[sized[0]].shape[0] if sized else 0
            batched = [i for i in sized if leaves[i].shape[0] == rows]
        if not batched:
            raise Unkeyable("no input of the frozen part is a tensor with a row per sample")
        counts = {leaves[i].shape[0] if i in tensors and leaves[i].dim() else -1 for i in batched}
        if len(counts) > 1 or -1 in counts:
            raise Unkeyable("the inputs of the frozen part have different numbers of rows")
        return cls(tuple(leaves), spec, tuple(batched), counts.pop(), (args, kwargs))

    def untouched(self) -> bool:
        """Whether the arguments still hold what they did: a model may write to a dict."""
        leaves, spec = _flat(*self.given)
        return spec == self.spec and all(map(is_, leaves, self.leaves))

    def keys(self, beside: str = "") -> tuple[bytes, list[bytes]]:
        """The space, and a key for each sample in it.

        Args:
            beside: what else the output depends on.
        """
        space = xxhash.xxh3_128()
        space.update(f"{self.batched}|{self.spec}|{_modes()}|{beside}".encode())
        for position, leaf in enumerate(self.leaves):
            if not isinstance(leaf, Tensor):
                space.update(f"|{position}:{type(leaf).__name__}:{leaf!r}".encode())
                continue
            shape = leaf.shape[1:] if position in self.batched else leaf.shape
            space.update(f"|{position}:{leaf.dtype}:{tuple(shape)}:{leaf.device}".encode())
            if position not in self.batched:
                space.update(_bytes_of(leaf).numpy().data)
        if not self.rows:
            return space.digest(), []
        parts = [_bytes_of(self.leaves[i]).view(self.rows, -1) for i in self.batched]
        found = []
        if sum(part.shape[1] for part in parts) > 1 << 16:
            views = [part.numpy() for part in parts]
            for row in range(self.rows):
                hasher = xxhash.xxh3_128()
                for view in views:
                    hasher.update(view[row].data)
                found.append(hasher.digest())
        else:
            joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            data, size = joined.numpy().reshape(-1).data, joined.shape[1]
            digest = xxhash.xxh3_128_digest
            found = [digest(data[i * size : i * size + size]) for i in range(self.rows)]
        return space.digest(), found

    def take(self, rows: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with some of the samples, in containers of its own."""
        leaves = list(self.leaves)
        if len(rows) < self.rows:
            for position in self.batched:
                tensor = leaves[position]
                leaves[position] = tensor[torch.tensor(rows, device=tensor.device)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


def _flat(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
    tree = (tuple(args), dict(sorted(kwargs.items())))
    leaves, spec = tree_flatten(tree)
    if all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
        return leaves, spec
    return tree_flatten(opened(tree))


def _bytes_of(tensor: Tensor) -> Tensor:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if not flat.numel():
        return torch.empty((flat.shape[0] if flat.dim() else 1, 0), dtype=torch.uint8)
    return flat.reshape(-1).view(torch.uint8)


def autocasts() -> list[str]:
    """Devices for which autocast is on."""
    return [kind for kind in ("cpu", "cuda", "xpu", "mps") if _enabled(kind)]


def _modes() -> str:
    """What torch itself would compute otherwise in."""
    cast = "|".join(f"{kind}:{torch.get_autocast_dtype(kind)}" for kind in autocasts())
    gradients = torch.is_grad_enabled()
    return f"{cast}|{gradients}|{torch.get_float32_matmul_precision()}|{torch.get_default_dtype()}"


def _enabled(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except (RuntimeError, ValueError):
        return False
