"""Tensor -> 128 bits over its bytes, dtype and shape."""

from __future__ import annotations

from typing import Union, overload

from torch import Tensor, nn

from lightning_freeze.digests import digest, digests
from lightning_freeze.errors import ArgumentError
from lightning_freeze.model.index import named_tensors


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
        item: a tensor of any dtype and layout, or a module. Of a sparse tensor, indices and values
            count as they are stored.

    Returns:
        32 hex digits for a tensor; for a module a dict from dotted name to them, buffers and
        tied names included.

    Raises:
        ArgumentError: a tensor has no bytes (meta, fake, lazy).

    Example:
        >>> import torch
        >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2))
        True
        >>> fingerprint(torch.zeros(2)) == fingerprint(-torch.zeros(2))
        False
        >>> sorted(fingerprint(nn.Linear(1, 1)))
        ['bias', 'weight']
    """
    if isinstance(item, nn.Module):
        names, tensors = named_tensors(item)
        first: dict[int, int] = {}
        for position, tensor in enumerate(tensors):
            first.setdefault(id(tensor), position)
        known = list(first.values())
        found = digests([tensors[p] for p in known], lambda p: names[known[p]])
        digest_of = {id(tensors[p]): value.hex() for p, value in zip(known, found)}
        return {name: digest_of[id(tensor)] for name, tensor in zip(names, tensors)}
    if not isinstance(item, Tensor):
        raise ArgumentError(
            f"`fingerprint` got {type(item).__name__}. Give it a tensor or a module."
        )
    return digest(item).hex()
