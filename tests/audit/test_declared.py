"""What is declared of a model, and what is left out of it."""

from __future__ import annotations

import pytest
import torch

from lightning_freeze import FrozenWeightsChanged, SelectorError, assert_frozen
from lightning_freeze.audit.declared import Declared, ignored_by
from lightning_freeze.model.index import ModelIndex
from tests.audit.nets import frozen_net


def test_a_module_that_is_left_out_whole_is_neither_quiet_nor_still() -> None:
    index = ModelIndex.of(frozen_net())
    declared = Declared.by_flags(index)
    assert {"body", "body.0", "body.1"} <= set(declared.still)
    less = declared.without(ignored_by(index, "body.1"), index)
    assert less.frozen == {"body.0.weight", "body.0.bias"}
    assert "body.1" not in less.still
    assert "body.0" in less.still
    assert declared.without(frozenset(), index) is declared


def test_parameters_and_buffers_are_selected_alike() -> None:
    index = ModelIndex.of(frozen_net())
    assert ignored_by(index, ["body.1.running_mean", "body.0.bias"]) == {
        "body.1.running_mean",
        "body.0.bias",
    }
    assert ignored_by(index, "body.1") >= {"body.1.weight", "body.1.num_batches_tracked"}
    assert ignored_by(index, ()) == frozenset()
    with pytest.raises(SelectorError, match=r"running_men"):
        ignored_by(index, "body.1.running_men")


def test_assert_frozen_leaves_out_what_may_change() -> None:
    model = frozen_net()
    with assert_frozen(model, ignore="body.1"), torch.no_grad():
        model.body[1].running_mean.add_(1)
        model.body[1].weight.add_(1)
    control = pytest.raises(FrozenWeightsChanged, match=r"body\.0\.bias changed")
    with control, assert_frozen(model, ignore="body.1"), torch.no_grad():
        model.body[0].bias.add_(1)
    with pytest.raises(SelectorError, match="bdoy"), assert_frozen(model, ignore="bdoy"):
        pass
