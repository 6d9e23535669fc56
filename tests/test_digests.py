"""Digests of large tensors: in chunks, on several threads, of wrappers and of shards."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from lightning_freeze import digests as module
from lightning_freeze import fingerprint
from lightning_freeze.digests import CHUNK, chunks, cores, digest, digests

ELEMENTS = CHUNK // 4


def large(extra: int = 5) -> Tensor:
    return torch.arange(2 * ELEMENTS + extra, dtype=torch.float32)


def test_a_large_tensor_is_hashed_over_the_digests_of_its_chunks() -> None:
    tensor = large()
    data = bytes(tensor.view(torch.uint8).tolist())
    parts = [xxhash.xxh3_128_digest(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)]
    whole = xxhash.xxh3_128(f"torch.float32|{len(tensor)}|".encode() + b"".join(parts))
    assert len(parts) == chunks(tensor.nbytes) == 3
    assert digest(tensor) == whole.digest()


def test_up_to_one_chunk_it_is_hashed_in_one_go() -> None:
    tensor = torch.arange(ELEMENTS, dtype=torch.float32)
    data = bytes(tensor.view(torch.uint8).tolist())
    whole = xxhash.xxh3_128(f"torch.float32|{ELEMENTS}|".encode() + data)
    assert digest(tensor) == whole.digest()


@given(st.integers(0, 2 * ELEMENTS + 4), st.integers(0, 31))
@settings(max_examples=25)
def test_any_flipped_bit_of_a_large_tensor_shows(position: int, bit: int) -> None:
    tensor = large()
    before = digest(tensor)
    tensor.view(torch.int32)[position] ^= -(2**31) if bit == 31 else 2**bit
    assert digest(tensor) != before


def test_chunks_that_change_places_show() -> None:
    tensor = torch.arange(4 * ELEMENTS, dtype=torch.float32).view(4, -1)
    assert digest(tensor) != digest(tensor[[1, 0, 2, 3]])
    assert digest(tensor) == digest(tensor.t().contiguous().t())
    assert digest(tensor) != digest(tensor.view(2, -1))


def test_one_thread_and_several_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(3 * ELEMENTS), torch.randn(5), torch.randn(2 * ELEMENTS, 3)]
    used: set[int] = set()
    hash_chunk = module.chunk_digest

    def noting(flat: Tensor, number: int) -> bytes:
        used.add(threading.get_ident())
        return hash_chunk(flat, number)

    monkeypatch.setattr(module, "chunk_digest", noting)
    monkeypatch.setattr(module, "cores", lambda: 1)
    alone = digests(tensors)
    assert used == {threading.get_ident()}
    monkeypatch.setattr(module, "cores", lambda: 2)
    assert digests(tensors) == alone
    before = threading.active_count()
    digests(tensors)
    assert threading.active_count() == before


def test_ranks_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores() == 1


def test_a_wrapper_around_several_tensors_is_all_of_them() -> None:
    a, b = torch.randn(3), torch.randn(3)
    before = digest(TwoTensor(a, b))
    assert digest(TwoTensor(a.clone(), b.clone())) == before
    assert digest(TwoTensor(b, a)) != before
    b[1] += 1
    assert digest(TwoTensor(a, b)) != before


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_of_a_distributed_tensor_it_is_the_local_shard(mesh: Any) -> None:
    whole = torch.randn(4, 3)
    shard = distribute_tensor(whole.clone(), mesh, [Shard(0)])
    assert isinstance(shard, DTensor)
    assert fingerprint(shard) == fingerprint(whole)
    parameter = nn.Parameter(shard)
    assert fingerprint(parameter) == fingerprint(whole)
    shard.to_local()[1, 1] += 1
    assert fingerprint(shard) != fingerprint(whole)
    assert torch.equal(shard.to_local(), shard.full_tensor())  # a live shard goes on working
