"""Tensors on an accelerator -> 128 bits each, reduced where they are: only digests are copied.

A tensor's bytes are read once, as rows of 4,096 numbers of 8 bits, and each row is multiplied with
16 fixed random columns in integers (`torch._int_mm`). Whatever changes in a row, and wherever, one
such product misses it with a chance of 2**-8 at most, all 16 with 2**-128; an XOR or a sum would
miss a permutation or two flipped signs altogether. The products, a 64th of the size, are reduced
in the same way until 64 bytes are left. (Multilinear hashing: Carter and Wegman 1979,
https://doi.org/10.1016/0022-0000(79)90044-8.)

These digests are compared with each other alone; a fingerprint that leaves the process is that of
`lightning_freeze.fingerprint`, whatever the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import cast

import torch
import xxhash
from torch import Tensor
from torch.nn import functional

ROW = 4096
LANES = 16
# torch._int_mm wants more than 16 rows on CUDA
_ROWS = 32
_LEFT = 4 * LANES


def served(device: torch.device) -> bool:
    """Whether tensors on a device are reduced there; from other accelerators they are copied."""
    return device.type == "cuda"


def reduced(tensors: Sequence[Tensor]) -> list[bytes]:
    """16 bytes for each of some dense tensors that are on one device.

    Args:
        tensors: contiguous, with resolved conjugation and sign.

    Returns:
        Digests that are equal exactly when dtype, shape and every bit agree, up to chance.
    """
    if not tensors:
        return []
    columns = _columns(tensors[0].device)
    left: list[Tensor | None] = [None] * len(tensors)
    for members in _alike(tensors):
        rows = torch.stack([_as_bytes(tensors[position]) for position in members])
        for position, row in zip(members, _products(_padded(rows, ROW), columns)):
            left[position] = row
    for position, tensor in enumerate(tensors):
        if left[position] is None:
            left[position] = _fold(_as_bytes(tensor), columns)
    values = torch.stack(cast("list[Tensor]", left)).view(torch.uint8).cpu().tolist()
    found = []
    for tensor, value in zip(tensors, values):
        text = f"{tensor.dtype}|{','.join(map(str, tensor.shape))}|"
        found.append(bytes(xxhash.xxh3_128_digest(text.encode() + bytes(value))))
    return found


def _alike(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions of small tensors of one size: they go through one product together."""
    sizes: dict[int, list[int]] = {}
    for position, tensor in enumerate(tensors):
        if tensor.nbytes <= ROW:
            sizes.setdefault(tensor.nbytes, []).append(position)
    yield from sizes.values()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.int8)


def _fold(data: Tensor, columns: Tensor) -> Tensor:
    """All of a tensor's bytes down to 64."""
    while True:
        whole = data.numel() // (ROW * _ROWS) * ROW * _ROWS
        parts = []
        if whole:
            parts.append(_products(data[:whole].view(-1, ROW), columns))
        if whole < data.numel():
            rest = _padded(data[whole:].unsqueeze(0), ROW)
            parts.append(_products(rest.view(-1, ROW), columns))
        data = torch.cat(parts).reshape(-1)
        if data.numel() == _LEFT:
            return data


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """(n, 4096) bytes times (4096, 16) -> (n, 64) bytes."""
    count = rows.shape[0]
    if count < _ROWS:
        rows = functional.pad(rows, (0, 0, 0, _ROWS - count))
    product = torch._int_mm(rows, columns)[:count]
    return product.contiguous().view(torch.int8).reshape(count, _LEFT)


def _padded(rows: Tensor, multiple: int) -> Tensor:
    missing = -rows.shape[1] % multiple or (multiple if not rows.shape[1] else 0)
    return functional.pad(rows, (0, missing)) if missing else rows


@cache
def _columns(device: torch.device) -> Tensor:
    """The random columns, the same in every process: drawn by the hash itself."""
    stream = b"".join(xxhash.xxh3_128_digest(b"", seed=i) for i in range(ROW * LANES // 16))
    values = torch.frombuffer(bytearray(stream), dtype=torch.int8)
    # cuBLAS wants the second factor column by column
    return values.reshape(LANES, ROW).to(device).t()
