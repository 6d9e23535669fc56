"""Two tensors -> identical to the bit, or by how much they differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# elements at a time; a difference is worked out in float64
_CHUNK = 1 << 20


def identical(one: Tensor, two: Tensor) -> bool:
    """Equal in dtype, shape and every bit: NaN equals itself, -0.0 differs from 0.0.

    >>> identical(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    True
    >>> identical(torch.tensor([0.0]), torch.tensor([-0.0]))
    False
    """
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    left, right = _bytes(one), _bytes(two)
    if all(part.storage_offset() % 8 == part.numel() % 8 == 0 for part in (left, right)):
        # eight bytes at a time are eight times as fast
        left, right = left.view(torch.int64), right.view(torch.int64)
    return torch.equal(left, right)


def largest_difference(one: Tensor, two: Tensor) -> float:
    """The largest absolute difference of two tensors of one shape.

    Returns:
        0.0 where only bits differ that don't change a value (-0.0 and 0.0, two kinds of NaN), NaN
        where one has a NaN and the other a number.

    Example:
        >>> largest_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
        0.5
        >>> largest_difference(torch.tensor([float("nan")]), torch.tensor([1.0]))
        nan
    """
    left, right = one.reshape(-1), two.reshape(-1)
    exact = torch.complex128 if one.is_complex() or two.is_complex() else torch.float64
    worst = 0.0
    for start in range(0, left.numel(), _CHUNK):
        a, b = (side[start : start + _CHUNK].to(exact) for side in (left, right))
        gap = (a - b).abs()
        gap[(a == b) | (a.isnan() & b.isnan())] = 0.0
        if gap.isnan().any():
            return math.nan
        worst = max(worst, float(gap.max()))
    return worst


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
