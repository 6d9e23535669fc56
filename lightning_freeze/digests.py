"""Tensors -> 128 bits each, as fast as their memory can be read.

A digest is XXH3-128 over a header (dtype and shape) and the bytes in the order of the elements. A
tensor of more than `CHUNK` bytes is hashed in chunks and then over the chunks' digests: so both
cores can work on one tensor, and an audit can look at a slice of it.
"""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, count
from threading import Thread
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_freeze.errors import ArgumentError

CHUNK = 1 << 20
SIZE = 16

# below this a thread costs more than it saves
_ALONE = 1 << 16
_WORTH_A_THREAD = 1 << 22
# an address below this may be an offset into a storage that was freed
_LOW = 1 << 32
# sizes whose array types are kept, 3 kB each
_MOST_SIZES = 512
_PLAIN = (Tensor, nn.Parameter)

_arrays: dict[int, Any] = {}
_headers: dict[tuple[torch.dtype, torch.Size], Any] = {}


def digest(tensor: Tensor, name: str = "the tensor") -> bytes:
    """The 16 bytes of one tensor.

    Args:
        tensor: of any dtype and layout in memory; of a DTensor, the local shard.
        name: for the message.

    Raises:
        ArgumentError: it has no bytes (meta, fake, lazy).
    """
    return digests((tensor,), lambda position: name)[0]


def digests(
    tensors: Iterable[Tensor],
    name: Callable[[int], str] = str,
) -> list[bytes]:
    """The 16 bytes of each of several tensors, large ones on all cores.

    Args:
        tensors: as for `digest`.
        name: position -> name, for the message.

    Raises:
        ArgumentError: as for `digest`.
    """
    found: list[bytes] = []
    large: list[tuple[int, Tensor]] = []
    for position, tensor in enumerate(tensors):
        if (
            type(tensor) in _PLAIN
            and tensor.is_cpu
            and tensor.layout is torch.strided
            and not tensor.is_nested
            and tensor.is_contiguous()
        ):
            dtype = tensor.dtype
            if not dtype.is_complex and not tensor.is_neg():
                size = tensor.nbytes
                address = tensor.data_ptr()
                if size > _ALONE and address > _LOW:
                    found.append(b"")
                    large.append((position, tensor))
                    continue
                if address > _LOW or not size:
                    header = _headers.get((dtype, tensor.shape)) or _header(dtype, tensor.shape)
                    hasher = header.copy()
                    if size:
                        array = _arrays.get(size) or _array(size)
                        hasher.update(array.from_address(address))
                    found.append(hasher.digest())
                    continue
        flat = dense(tensor, partial(name, position))
        if isinstance(flat, bytes):
            found.append(flat)
        elif flat.nbytes <= _ALONE:
            found.append(_whole(flat))
        else:
            found.append(b"")
            large.append((position, flat))
    if large:
        _hash_large(found, large)
    return found


def dense(tensor: Tensor, name: Callable[[], str], *, here: bool = True) -> Tensor | bytes:
    """A tensor as contiguous memory, itself where it is that already.

    A wrapper around several tensors (quantised weights) gives the digest of all of them instead.

    Args:
        tensor: of any kind.
        name: for the message.
        here: in this process's memory; False leaves it on its device.
    """
    if is_lazy(tensor):
        raise ArgumentError(
            f"`{name()}` belongs to a lazy module that has seen no input: it has no shape yet. "
            "Call `forward` once first."
        )
    local = getattr(tensor, "to_local", None)
    if callable(local):
        tensor = local()
    tensor = tensor.detach()
    if tensor.device.type == "meta" or type(tensor).__name__ == "FakeTensor":
        raise ArgumentError(
            f"`{name()}` is on the meta device: it has a shape but no bytes. Load or initialise "
            "it first."
        )
    if tensor.is_nested:
        return _of_several("nested", list(tensor.unbind()), name)
    if tensor.layout != torch.strided:
        return _of_several(f"{tensor.layout}|{tuple(tensor.shape)}", _sparse_parts(tensor), name)
    if is_traceable_wrapper_subclass(tensor):
        return _of_parts(tensor, name)
    plain = tensor.resolve_conj().resolve_neg()
    if plain._is_zerotensor():
        plain = plain.clone()
    if plain.numel() and not plain.untyped_storage().nbytes():
        raise ArgumentError(
            f"`{name()}` has no bytes: its storage was freed (`untyped_storage().resize_(0)`), as "
            "sharded training does between two uses. Look at it where it is gathered."
        )
    return (plain.cpu() if here else plain).contiguous()


def _of_parts(tensor: Any, name: Callable[[], str]) -> bytes:
    parts, context = tensor.__tensor_flatten__()
    what = f"{type(tensor).__name__}|{context}|{parts}"
    return _of_several(what, [getattr(tensor, part) for part in parts], name)


def _of_several(what: str, parts: Sequence[Tensor], name: Callable[[], str]) -> bytes:
    hasher = xxhash.xxh3_128(f"{what}|".encode())
    for inner in digests(parts, lambda _: name()):
        hasher.update(inner)
    return hasher.digest()


def _sparse_parts(tensor: Tensor) -> list[Tensor]:
    """Indices and values, as they are stored."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def chunks(size: int) -> int:
    """How many chunks a tensor of so many bytes is hashed in; 1 for a small or empty one."""
    return -(-size // CHUNK) or 1


def chunk_digest(flat: Tensor, number: int) -> bytes:
    """The digest of one chunk of dense memory; of a tensor with one chunk, that of the tensor."""
    size = flat.nbytes
    if size <= CHUNK:
        return _whole(flat)
    return _of_memory(flat.data_ptr() + number * CHUNK, min(CHUNK, size - number * CHUNK))


def _whole(flat: Tensor) -> bytes:
    hasher = _header_of(flat).copy()
    size = flat.nbytes
    if size:
        hasher.update(_memory(flat.data_ptr(), size))
    return bytes(hasher.digest())


def _hash_large(found: list[bytes], large: Sequence[tuple[int, Tensor]]) -> None:
    """Hash the chunks of large tensors, on as many threads as there are cores."""
    ends = list(accumulate(chunks(flat.nbytes) for _, flat in large))
    of_chunks = bytearray(SIZE * ends[-1])
    turn = count()

    def hash_some() -> None:
        while (chunk := next(turn)) < ends[-1]:
            index = bisect_right(ends, chunk)
            flat = large[index][1]
            value = chunk_digest(flat, chunk - ends[index] + chunks(flat.nbytes))
            of_chunks[chunk * SIZE : (chunk + 1) * SIZE] = value

    total = sum(flat.nbytes for _, flat in large)
    # threads rather than a pool: a pool's threads would be missing after a fork
    helpers = [
        Thread(target=hash_some)
        for _ in range(min(cores(), 1 + total // _WORTH_A_THREAD, ends[-1]) - 1)
    ]
    for helper in helpers:
        helper.start()
    hash_some()
    for helper in helpers:
        helper.join()
    for (position, flat), end in zip(large, ends):
        own = bytes(of_chunks[(end - chunks(flat.nbytes)) * SIZE : end * SIZE])
        if len(own) > SIZE:
            hasher = _header_of(flat).copy()
            hasher.update(own)
            own = bytes(hasher.digest())
        found[position] = own


def cores() -> int:
    """How many cores this process may use, shared evenly with the other ranks on this machine."""
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        available = os.cpu_count() or 1
    return max(1, min(8, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _of_memory(address: int, size: int) -> bytes:
    return bytes(xxhash.xxh3_128_digest(_memory(address, size)))


def _memory(address: int, size: int) -> Any:
    # the memory itself: no copy, and unlike .numpy() safe on a live shard
    return (_arrays.get(size) or _array(size)).from_address(address)


def _array(size: int) -> Any:
    if len(_arrays) >= _MOST_SIZES:
        _arrays.clear()
    kind = _arrays[size] = ctypes.c_char * size
    return kind


def _header_of(tensor: Tensor) -> Any:
    return _headers.get((tensor.dtype, tensor.shape)) or _header(tensor.dtype, tensor.shape)


def _header(dtype: torch.dtype, shape: torch.Size) -> Any:
    """A hasher that has read dtype and shape; the same few occur again and again."""
    if len(_headers) > 4096:
        _headers.clear()
    text = f"{dtype}|{','.join(map(str, shape))}|"
    hasher = _headers[dtype, shape] = xxhash.xxh3_128(text.encode())
    return hasher
