"""Reduction where a tensor is: the same properties as the hash, tried on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_freeze import accelerator, fingerprint
from lightning_freeze.accelerator import ROW, reduced, served
from lightning_freeze.audit.baseline import Baseline
from tests.test_fingerprint import DTYPES

# small and large, on and off the borders of rows and of blocks of rows
SIZES = [1, 7, 1023, 1024, 1025, 4 * ROW, 32 * ROW // 4, 32 * ROW // 4 + 3, 100_000]


def one(tensor: Tensor) -> bytes:
    return reduced([tensor])[0]


@given(st.sampled_from(SIZES), st.data())
@settings(max_examples=60)
def test_any_flipped_bit_shows(size: int, data: st.DataObject) -> None:
    tensor = torch.arange(size, dtype=torch.int32) * 7919
    position, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 31))
    other = tensor.clone()
    other[position] ^= -(2**31) if bit == 31 else 2**bit
    assert one(other) != one(tensor)
    assert one(tensor.clone()) == one(tensor)


@given(st.sampled_from(SIZES[1:]), st.data())
@settings(max_examples=40)
def test_two_unequal_elements_swapped_show(size: int, data: st.DataObject) -> None:
    tensor = torch.arange(size, dtype=torch.int32) % 13
    i, j = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    assume(int(tensor[i]) != int(tensor[j]))
    other = tensor.clone()
    other[i], other[j] = tensor[j], tensor[i]
    assert one(other) != one(tensor)


@given(st.permutations(range(5)))
@settings(max_examples=20)
def test_permuted_rows_show(order: list[int]) -> None:
    tensor = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0))
    same = list(order) == list(range(5))
    assert (one(tensor[list(order)]) == one(tensor)) == same


@pytest.mark.parametrize("rows", [(0, 1), (0, 1, 2, 3), (2, 77)])
def test_flipped_signs_show_where_a_sum_or_an_xor_would_miss_them(rows: tuple[int, ...]) -> None:
    tensor = torch.randn(128, 1024)
    other = tensor.clone()
    other[list(rows)] *= -1
    words, changed = (t.view(torch.int32).long() for t in (tensor, other))
    assert int(words.sum() - changed.sum()) % 2**32 == 0 or len(rows) % 2
    assert one(other) != one(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_one(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    other = tensor.clone()
    other.view(torch.uint8)[0, 0] ^= 1
    assert len(one(tensor)) == 16
    assert one(tensor) == one(tensor.clone()) != one(other)


def test_shape_and_dtype_show() -> None:
    tensor = torch.zeros(12)
    others = [tensor.view(3, 4), tensor.view(12, 1), tensor.view(torch.int32), tensor[:11]]
    assert len({one(t.contiguous()) for t in [tensor, *others]}) == 5
    assert one(torch.zeros(0)) != one(torch.zeros(0, 3))


def test_many_at_once_are_as_one_by_one() -> None:
    tensors = [torch.randn(n) for n in (1, 5, 5, 1024, 2000, 50_000, 0, 5)]
    assert reduced(tensors) == [one(tensor) for tensor in tensors]
    assert reduced([]) == []


def test_only_digests_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    plain = Tensor.cpu

    def counting(self: Tensor, *rest: Any) -> Tensor:
        copied.append(self.numel() * self.element_size())
        return plain(self, *rest)

    monkeypatch.setattr(Tensor, "cpu", counting)
    reduced([torch.randn(100_000), torch.randn(10)])
    assert copied == [2 * 64]


def test_only_devices_with_integer_products_reduce_in_place() -> None:
    assert served(torch.device("cuda", 1))
    assert not served(torch.device("cpu"))
    assert not served(torch.device("mps"))


def test_a_baseline_of_reduced_tensors_compares_and_certifies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Elsewhere(torch.nn.Parameter):
        """A tensor on the CPU that says it is on another device."""

        is_cpu = property(lambda self: False)

    weight = Elsewhere(torch.randn(8, 4), requires_grad=False)
    monkeypatch.setattr(accelerator, "served", lambda device: True)
    baseline = Baseline.of([("weight", weight)], (0, 0))
    assert not baseline.here(0)
    assert baseline.changed() == []
    assert baseline.digest(0) == one(weight.data)
    assert baseline.fingerprints() == [fingerprint(weight.data)]
    weight.data[3, 1] += 1
    assert baseline.changed() == [0]
    baseline.renew([0], (1, 4))
    assert baseline.changed() == []
    assert baseline.since == [(1, 4)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    tensors = [torch.randn(n, dtype=torch.bfloat16) for n in (1, 1000, 100_003)]
    assert reduced([t.cuda() for t in tensors]) == reduced(tensors)
    assert [fingerprint(t.cuda()) for t in tensors] == [fingerprint(t) for t in tensors]
