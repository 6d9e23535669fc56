"""Tensor -> 128 bits over its bytes, dtype and shape."""

from __future__ import annotations

import ctypes
from typing import Union, overload

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_freeze.errors import ArgumentError
from lightning_freeze.names import clean


@overload
def fingerprint(item: Tensor) -> str: ...
@overload
def fingerprint(item: nn.Module) -> dict[str, str]: ...


def fingerprint(item: Union[Tensor, nn.Module]) -> Union[str, dict[str, str]]:
    """Fingerprint a tensor, or every parameter and buffer of a module.

    Two tensors have one fingerprint exactly when dtype, shape and every bit agree (up to a chance
    of 2**-128); how they lie in memory doesn't matter. -0.0 differs from 0.0, and a NaN is equal
    to itself. The hash is XXH3-128 (https://xxhash.com): fast, not cryptographic.

    Args:
        item: a tensor of any dtype, or a module.

    Returns:
        32 hex digits for a tensor; for a module a dict from dotted name to them, buffers and
        tied names included.

    Raises:
        ArgumentError: a tensor has no bytes (meta, fake, lazy) or isn't dense.

    Example:
        >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2))
        True
        >>> fingerprint(torch.zeros(2)) == fingerprint(-torch.zeros(2))
        False
        >>> sorted(fingerprint(nn.Linear(1, 1)))
        ['bias', 'weight']
    """
    if isinstance(item, nn.Module):
        known: dict[int, str] = {}
        found: dict[str, str] = {}
        for source in (item.named_parameters, item.named_buffers):
            for name, tensor in source(remove_duplicate=False):
                if id(tensor) not in known:
                    known[id(tensor)] = _digest(tensor, name)
                found[clean(name)] = known[id(tensor)]
        return found
    if not isinstance(item, Tensor):
        raise ArgumentError(
            f"`fingerprint` got {type(item).__name__}. Give it a tensor or a module."
        )
    return _digest(item, "the tensor")


def _digest(tensor: Tensor, name: str) -> str:
    if is_lazy(tensor):
        raise ArgumentError(
            f"`{name}` belongs to a lazy module that has seen no input: it has no shape yet. Call "
            "`forward` once first."
        )
    local = getattr(tensor, "to_local", None)
    tensor = (local() if callable(local) else tensor).detach()
    if tensor.device.type == "meta" or type(tensor).__name__ == "FakeTensor":
        raise ArgumentError(
            f"`{name}` is on the meta device: it has a shape but no bytes. Load or initialise it "
            "first."
        )
    if tensor.layout != torch.strided:
        raise ArgumentError(
            f"`{name}` has the layout {tensor.layout}; only dense tensors have a fingerprint."
        )
    shape = ",".join(map(str, tensor.shape))
    hasher = xxhash.xxh3_128(f"{tensor.dtype}|{shape}|".encode())
    data = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    size = data.numel() * data.element_size()
    if size:
        # the memory itself: no copy, and unlike .numpy() safe on a live shard
        hasher.update((ctypes.c_char * size).from_address(data.data_ptr()))
    return hasher.hexdigest()
