"""Numbers of dense, sparse and distributed tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_freeze.audit.numbers import all_zero, local

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "transposed": lambda t: t.t(),
    "COO": lambda t: t.to_sparse(),
    "CSC": lambda t: t.to_sparse_csc(),
}


pytestmark = pytest.mark.filterwarnings("ignore:Sparse:UserWarning")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_are_told_in_any_layout(layout: str) -> None:
    some = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert all_zero(LAYOUTS[layout](torch.zeros(2, 2)))
    assert not all_zero(LAYOUTS[layout](some))
    assert torch.equal(local(LAYOUTS[layout](some)).sum(), some.sum())


def test_entries_that_cancel_are_zero_and_stored_zeros_too() -> None:
    twice = torch.sparse_coo_tensor([[1, 1]], [1.0, -1.0], (3,))
    assert all_zero(twice)
    assert all_zero(torch.sparse_coo_tensor([[1]], [0.0], (3,)))
    assert not all_zero(torch.sparse_coo_tensor([[1]], [1.0], (3,)))
