from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_freeze.checkpoints.verify import compare
from lightning_freeze.checkpoints.verify.compare import converted, identical, largest_difference

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
]
NAN, INF = math.nan, math.inf


def flipped(tensor: Tensor, bit: int) -> Tensor:
    """The same tensor with one bit changed."""
    raw = tensor.clone().contiguous().reshape(-1).view(torch.uint8)
    raw[bit // 8] ^= 1 << (bit % 8)
    return raw.view(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (4, 2), (0, 3)], ids=str)
def test_a_copy_is_identical_and_one_with_a_flipped_bit_is_not(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.ones(shape).to(dtype)
    assert identical(tensor, tensor.clone())
    if tensor.numel():
        assert not identical(tensor, flipped(tensor, 0))


@given(st.integers(1, 40), st.integers(0, 7), st.data())
def test_any_flipped_bit_is_seen_wherever_the_memory_begins(
    size: int, offset: int, data: st.DataObject
) -> None:
    memory = torch.arange(64, dtype=torch.uint8)
    tensor = memory[offset : offset + size]
    bit = data.draw(st.integers(0, 8 * size - 1))
    assert identical(tensor, tensor.clone())
    assert not identical(tensor, flipped(tensor, bit))


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        (torch.tensor([NAN, INF]), torch.tensor([NAN, INF]), True),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), False),
        (torch.zeros(2), torch.zeros(1, 2), False),
        (torch.arange(6.0).reshape(2, 3).t(), torch.arange(6.0).reshape(2, 3).t().clone(), True),
        (torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2, dtype=torch.complex64), False),
    ],
)
def test_identical_means_dtype_shape_and_every_bit(
    one: Tensor, two: Tensor, expected: bool
) -> None:
    assert identical(one, two) is expected


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ([1.0, 5.0], [1.0, 2.0], 3.0),
        ([INF, 1.0], [INF, 1.5], 0.5),
        ([INF], [1.0], INF),
        ([NAN, 1.0], [NAN, 1.25], 0.25),
        ([NAN], [1.0], NAN),
        ([0.0], [-0.0], 0.0),
        ([], [], 0.0),
    ],
)
def test_the_largest_difference_copes_with_nan_and_infinity(
    one: list[float], two: list[float], expected: float
) -> None:
    found = largest_difference(torch.tensor(one), torch.tensor(two))
    assert found is not None
    assert found == expected or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floats_of_every_kind_have_a_difference_and_nothing_is_said_of_other_numbers(
    dtype: torch.dtype,
) -> None:
    one, two = torch.zeros(3).to(dtype), torch.tensor([0.0, 1.0, 0.0]).to(dtype)
    assert largest_difference(one, two) == (1.0 if dtype.is_floating_point else None)


def test_a_difference_in_the_last_chunk_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_CHUNK", 4)
    one, two = torch.zeros(3, 3), torch.zeros(3, 3)
    two[2, 2], one[0, 0] = 0.5, -0.25
    assert largest_difference(one, two) == 0.5


def test_a_dtype_that_torch_cannot_count_in_has_no_difference() -> None:
    pair = [torch.full((4,), value, dtype=torch.uint8) for value in (0, 1)]
    dtype = getattr(torch, "float4_e2m1fn_x2", None)
    if dtype is None:
        pytest.skip("this torch has no numbers of four bits")
    one, two = (tensor.view(dtype) for tensor in pair)
    assert not identical(one, two)
    assert largest_difference(one, two) is None
    assert not converted(torch.zeros(4), one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_tensor_in_another_dtype_is_as_the_first_where_converting_that_gives_it(
    dtype: torch.dtype,
) -> None:
    one = torch.randn(50)
    two = one.to(dtype)
    assert converted(one, two)
    assert not converted(one, one)
    assert not converted(one, flipped(two, 0))
    assert not converted(one, two.reshape(5, 10))


def test_only_numbers_of_one_kind_are_converted() -> None:
    assert not converted(torch.tensor([1.0]), torch.tensor([1]))
    assert not converted(torch.tensor([1]), torch.tensor([1], dtype=torch.int32))
    assert not converted(torch.tensor([1j]), torch.tensor([0.0]))
