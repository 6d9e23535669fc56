"""Frozen views of a trainable tensor are named with it, wherever they lie in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_freeze import FrozenWeightsChanged, assert_frozen, audit_parameters


class Views(nn.Module):
    """One flat tensor that trains, and frozen Parameters in its memory."""

    def __init__(self, *views: Tensor, flat: Tensor) -> None:
        super().__init__()
        self.flat = nn.Parameter(flat)
        self.views = nn.ParameterList(nn.Parameter(v, requires_grad=False) for v in views)


FLAT = 24
CASES = {
    "side by side": lambda flat: (flat[:8], flat[8:16]),
    "apart": lambda flat: (flat[2:6], flat[12:20]),
    "one in the other": lambda flat: (flat[2:20], flat[4:8]),
    "strided": lambda flat: (flat[::2], flat[1::2]),
    "columns": lambda flat: (flat.view(4, 6)[:, :2], flat.view(4, 6)[:, 3:5]),
}


@pytest.mark.parametrize("case", CASES)
def test_two_frozen_views_of_a_trainable_tensor_are_both_named_with_it(case: str) -> None:
    flat = torch.randn(FLAT)
    model = Views(*CASES[case](flat), flat=flat)
    optimizer = SGD([model.flat], lr=0.1)
    names = {name for found in audit_parameters(model, optimizer) for name in found.names}
    assert names >= {"views.0", "views.1"}
    model.flat.grad = torch.ones(FLAT)
    with pytest.raises(FrozenWeightsChanged, match=r"views\.0") as caught, assert_frozen(model):
        optimizer.step()
    changed = [f for f in caught.value.findings if f.code == "frozen-changed"]
    assert {name for f in changed for name in f.names} == {"views.0", "views.1"}
    assert all("shares its memory with `flat`" in f.cause for f in changed)


def test_columns_of_one_matrix_that_are_not_the_same_share_nothing() -> None:
    whole = torch.randn(4, 6)
    model = Views(whole[:, :2], flat=whole[:, 2:])
    optimizer = SGD([model.flat], lr=0.1)
    assert audit_parameters(model, optimizer) == []
    model.flat.grad = torch.ones(4, 4)
    before = model.views[0].clone()
    with assert_frozen(model):
        optimizer.step()
    assert torch.equal(model.views[0], before)
