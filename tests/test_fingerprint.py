"""Fingerprints: equal exactly when dtype, shape and every bit agree."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_freeze import fingerprint
from lightning_freeze.errors import ArgumentError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
]  # fmt: skip

FLOATS = st.floats(width=32, allow_nan=True, allow_subnormal=True)
VECTORS = st.lists(FLOATS, min_size=1, max_size=40)


def vector(values: list[float]) -> Tensor:
    # through the bytes, so that a NaN keeps its payload
    data = bytearray(struct.pack(f"{len(values)}f", *values))
    return torch.frombuffer(data, dtype=torch.float32).clone()


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


# Different


@given(VECTORS, st.data())
def test_any_flipped_bit_shows(values: list[float], data: st.DataObject) -> None:
    tensor = vector(values)
    other = tensor.clone()
    position = data.draw(st.integers(0, len(values) - 1))
    bit = data.draw(st.integers(0, 31))
    bits(other)[position] ^= -(2**31) if bit == 31 else 2**bit
    assert fingerprint(other) != fingerprint(tensor)
    bits(other)[position] ^= -(2**31) if bit == 31 else 2**bit
    assert fingerprint(other) == fingerprint(tensor)


@given(VECTORS, st.data())
def test_two_unequal_elements_swapped_show(values: list[float], data: st.DataObject) -> None:
    tensor = vector(values)
    i, j = (data.draw(st.integers(0, len(values) - 1)) for _ in range(2))
    assume(bits(tensor)[i] != bits(tensor)[j])
    other = tensor.clone()
    bits(other)[i], bits(other)[j] = bits(tensor)[j], bits(tensor)[i]
    assert fingerprint(other) != fingerprint(tensor)


@given(st.lists(FLOATS, min_size=2, max_size=40), st.data())
def test_two_flipped_signs_show(values: list[float], data: st.DataObject) -> None:
    tensor = vector(values)
    pair = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=2, max_size=2, unique=True))
    other = tensor.clone()
    for position in pair:
        bits(other)[position] ^= -(2**31)
    assert fingerprint(other) != fingerprint(tensor)


@given(st.permutations(range(6)))
def test_permuted_rows_show(order: list[int]) -> None:
    tensor = torch.arange(24.0).view(6, 4)
    same = list(order) == list(range(6))
    assert (fingerprint(tensor[list(order)]) == fingerprint(tensor)) == same


def test_a_nan_payload_shows_and_a_nan_equals_itself() -> None:
    quiet = torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)
    other = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert math.isnan(quiet.item())
    assert math.isnan(other.item())
    assert fingerprint(quiet) != fingerprint(other)
    assert fingerprint(quiet) == fingerprint(quiet.clone())


def test_minus_zero_is_not_zero() -> None:
    assert fingerprint(torch.tensor([-0.0])) != fingerprint(torch.tensor([0.0]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.uint8, torch.complex64])
def test_the_same_bytes_as_another_dtype_differ(dtype: torch.dtype) -> None:
    tensor = torch.randn(8)
    other = tensor.view(dtype)
    assert other.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert fingerprint(other) != fingerprint(tensor)


def test_the_same_bytes_in_another_shape_differ() -> None:
    tensor = torch.randn(12)
    shapes = [(12,), (12, 1), (1, 12), (3, 4), (4, 3), (2, 6), (1, 1, 12)]
    assert len({fingerprint(tensor.view(shape)) for shape in shapes}) == len(shapes)


def test_empty_tensors_of_different_shape_differ() -> None:
    assert fingerprint(torch.zeros(0)) != fingerprint(torch.zeros(0, 3))
    assert fingerprint(torch.zeros(0, 3)) == fingerprint(torch.zeros(0, 3))


def test_a_scalar_is_not_a_vector_of_one() -> None:
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor([1.0]))


# Equal


@given(VECTORS)
def test_a_clone_is_equal(values: list[float]) -> None:
    tensor = vector(values)
    assert fingerprint(tensor) == fingerprint(tensor.clone())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_one(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    found = fingerprint(tensor)
    assert len(found) == 32
    assert int(found, 16) >= 0
    assert found == fingerprint(tensor.clone())
    other = tensor.clone()
    other.view(torch.uint8)[0, 0] ^= 1
    assert found != fingerprint(other)


def test_every_dtype_has_its_own() -> None:
    found = {fingerprint(torch.zeros(2, 2).to(dtype)) for dtype in DTYPES}
    assert len(found) == len(DTYPES)


def views() -> list[tuple[str, Tensor]]:
    base = torch.randn(6, 8)
    conjugated = torch.view_as_complex(torch.randn(4, 2)).conj()
    return [
        ("transposed", base.t()),
        ("strided", base[::2, 1::3]),
        ("offset", base[3:]),
        ("expanded", base[:1].expand(5, 8)),
        ("channels last", torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        ("conjugated", conjugated),
        ("negative view", conjugated.imag),
        ("needs a gradient", nn.Parameter(base).t()),
    ]


@pytest.mark.parametrize(("how", "view"), views(), ids=[how for how, _ in views()])
def test_how_a_tensor_lies_in_memory_does_not_matter(how: str, view: Tensor) -> None:
    plain = torch.empty(view.shape, dtype=view.dtype).copy_(view.detach())
    assert plain.is_contiguous()
    assert torch.equal(plain, view)
    assert fingerprint(view) == fingerprint(plain)


def test_it_survives_a_trip_through_safetensors(tmp_path: Path) -> None:
    state = {str(dtype): torch.randn(5, 3).to(dtype) for dtype in DTYPES if dtype.is_floating_point}
    state["nan"] = torch.tensor([math.nan, -0.0, math.inf])
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_file(tmp_path / "w.safetensors")
    assert {n: fingerprint(t) for n, t in loaded.items()} == {
        n: fingerprint(t) for n, t in state.items()
    }


def test_it_survives_a_trip_through_torch_save(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    other = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert fingerprint(other) != fingerprint(model)
    other.load_state_dict(torch.load(tmp_path / "w.pt"))
    assert fingerprint(other) == fingerprint(model)


def test_it_is_the_same_in_every_process_and_version() -> None:
    """A report is compared with one from another machine: the digest itself is a contract."""
    assert fingerprint(torch.arange(4, dtype=torch.float32)) == "aa2de1ce180f9a1c41f8bf908d19ea9c"
    assert fingerprint(torch.zeros(0, 3, dtype=torch.int64)) == "6a098c3d49ea8f2d93777fee51cd5dc6"


def test_the_tensor_is_left_alone() -> None:
    tensor = nn.Parameter(torch.randn(4, 4))
    version, value = tensor._version, tensor.detach().clone()
    fingerprint(tensor)
    fingerprint(tensor.t())
    assert tensor._version == version
    assert tensor.requires_grad
    assert torch.equal(tensor, value)


# Modules


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.decoder = nn.Linear(2, 3, bias=False)
        self.decoder.weight = self.embed.weight


def test_a_module_gives_parameters_buffers_and_tied_names() -> None:
    found = fingerprint(Tied())
    assert list(found) == [
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "decoder.weight",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]
    assert found["embed.weight"] == found["decoder.weight"]


def test_names_are_free_of_wrappers() -> None:
    model = Tied()
    assert fingerprint(torch.compile(model, backend="eager")) == fingerprint(model)


def test_one_changed_tensor_changes_one_entry() -> None:
    model = Tied()
    before = fingerprint(model)
    model.norm.running_mean.add_(1)
    after = fingerprint(model)
    assert {name for name in after if after[name] != before[name]} == {"norm.running_mean"}


# Refused


def test_a_meta_tensor_has_no_bytes() -> None:
    with pytest.raises(ArgumentError, match="`the tensor` is on the meta device: it has a shape"):
        fingerprint(torch.zeros(2, device="meta"))
    with pytest.raises(ArgumentError, match="`weight` is on the meta device"):
        fingerprint(nn.Linear(2, 2, device="meta"))


def test_a_fake_tensor_has_no_bytes() -> None:
    with FakeTensorMode():
        tensor = torch.zeros(2)
    with pytest.raises(ArgumentError, match="is on the meta device"):
        fingerprint(tensor)


@pytest.mark.parametrize("convert", ["to_sparse_coo", "to_sparse_csr", "to_sparse_csc"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_of_a_sparse_tensor_indices_and_values_count(convert: str) -> None:
    def sparse(scale: float, turned: bool = False) -> Tensor:
        dense = torch.eye(3).roll(1, 1) * scale
        return getattr(dense.t() if turned else dense, convert)()

    assert fingerprint(sparse(1.0)) == fingerprint(sparse(1.0))
    others = [sparse(2.0), sparse(1.0, turned=True), sparse(1.0).to_dense(), sparse(0.0)]
    assert len({fingerprint(t) for t in (sparse(1.0), *others)}) == 5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_of_a_nested_tensor_each_part_counts() -> None:
    def nested(*sizes: int) -> Tensor:
        return torch.nested.nested_tensor([torch.ones(size) for size in sizes])

    assert fingerprint(nested(2, 3)) == fingerprint(nested(2, 3))
    assert fingerprint(nested(2, 3)) != fingerprint(nested(3, 2))


@pytest.mark.parametrize("size", [1, 1000, 10**7])
def test_freed_memory_is_refused_and_not_read(size: int) -> None:
    tensor = torch.ones(size)
    assert fingerprint(tensor)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ArgumentError, match="`the tensor` has no bytes: its storage was freed"):
        fingerprint(tensor)


def test_freed_memory_is_named_also_behind_an_offset() -> None:
    model = nn.Linear(3, 2, bias=False)
    whole = torch.ones(100)
    model.weight = nn.Parameter(whole[40:46].view(2, 3))
    whole.untyped_storage().resize_(0)
    with pytest.raises(ArgumentError, match="`weight` has no bytes"):
        fingerprint(model)


def test_a_tensor_of_implicit_zeros_is_one_of_zeros() -> None:
    assert fingerprint(torch._efficientzerotensor((4,))) == fingerprint(torch.zeros(4))


def test_a_lazy_parameter_is_refused() -> None:
    with pytest.raises(ArgumentError, match="`weight` belongs to a lazy module that has seen no"):
        fingerprint(nn.LazyLinear(2))


@pytest.mark.parametrize("item", [None, 3, "weight", [1.0]])
def test_what_is_neither_tensor_nor_module_is_refused(item: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`fingerprint` got .*Give it a tensor or a module"):
        fingerprint(item)
