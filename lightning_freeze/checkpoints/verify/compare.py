"""Two tensors -> identical to the bit, or by how much they differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# elements at a time; a difference is worked out in float64
_CHUNK = 1 << 20
_SIGN = -(1 << 63)


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


def converted(one: Tensor, two: Tensor) -> bool:
    """Whether one tensor, converted to the dtype of another, is identical to that.

    >>> half = torch.tensor([0.1], dtype=torch.float16)
    >>> converted(torch.tensor([0.1]), half), converted(torch.tensor([0.2]), half)
    (True, False)
    """
    kinds = [(t.is_floating_point(), t.is_complex()) for t in (one, two)]
    if (
        one.dtype == two.dtype
        or one.shape != two.shape
        or kinds[0] != kinds[1]
        or not any(kinds[0])
    ):
        return False
    try:
        return identical(one.to(two.dtype), two)
    except NotImplementedError:  # numbers of four bits
        return False


def largest_difference(one: Tensor, two: Tensor) -> float | None:
    """The largest absolute difference of two tensors of one shape.

    Returns:
        0.0 where only bits differ that don't change a value (-0.0 and 0.0, two kinds of NaN), NaN
        where one has a NaN and the other a number, None where torch can't count in a dtype.

    Example:
        >>> largest_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
        0.5
        >>> largest_difference(torch.tensor([float("nan")]), torch.tensor([1.0]))
        nan
    """
    left, right = one.reshape(-1), two.reshape(-1)
    largest = _largest_of_integers if _countable(one, two) else _largest
    worst = 0.0
    for start in range(0, left.numel(), _CHUNK):
        try:
            gap = largest(*(side[start : start + _CHUNK] for side in (left, right)))
        except NotImplementedError:
            return None
        if math.isnan(gap):
            return math.nan
        worst = max(worst, gap)
    return worst


def _largest(one: Tensor, two: Tensor) -> float:
    exact = torch.complex128 if one.is_complex() or two.is_complex() else torch.float64
    a, b = one.to(exact), two.to(exact)
    gap = (a - b).abs()
    gap[(a == b) | (a.isnan() & b.isnan())] = 0.0
    return math.nan if gap.isnan().any() else float(gap.max())


def _countable(one: Tensor, two: Tensor) -> bool:
    """Whether both hold integers whose differences 64 bits can hold."""
    kinds = {one.dtype, two.dtype}
    if any(t.is_floating_point() or t.is_complex() for t in (one, two)):
        return False
    return torch.uint64 not in kinds or len(kinds) == 1


def _largest_of_integers(one: Tensor, two: Tensor) -> float:
    """Exact, where float64 would round: 2**60 and 2**60 + 1 differ by 1."""
    a, b = (_ordered(side) for side in (one, two))
    # wraps around, and is right when it is read without a sign
    gap = torch.maximum(a, b) - torch.minimum(a, b)
    return float(int((gap ^ _SIGN).max()) - _SIGN)


def _ordered(tensor: Tensor) -> Tensor:
    """As int64; torch can't compare uint64, so its numbers are shifted."""
    return tensor.view(torch.int64) ^ _SIGN if tensor.dtype == torch.uint64 else tensor.long()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
