"""Names: wrappers stripped, ties resolved by identity, roots and children."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_freeze.model.index import ModelIndex, clean, some, unwrap


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")  # no need to load the compiler itself


class Tied(nn.Module):
    """An input embedding and a decoder that are one tensor, and a parameter on a non-leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(2))
        self.embed = nn.Embedding(5, 2)
        self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.decoder = nn.Linear(2, 5, bias=False)
        self.decoder.weight = self.embed.weight


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("weight", "weight"),
        ("_orig_mod.layer.weight", "layer.weight"),
        ("a._fsdp_wrapped_module.b._orig_mod.c", "a.b.c"),
        ("a._checkpoint_wrapped_module.b", "a.b"),
        ("my_orig_mod.b", "my_orig_mod.b"),
        ("_orig_mod", ""),
    ],
)
def test_clean_drops_whole_components_of_wrappers(raw: str, expected: str) -> None:
    assert clean(raw) == expected


def test_a_tied_tensor_is_indexed_once_under_its_first_name() -> None:
    index = ModelIndex.of(Tied())
    assert list(index.parameters) == ["token", "embed.weight", "body.0.weight", "body.0.bias"]
    assert index.canonical["decoder.weight"] == "embed.weight"
    assert index.aliases == {"embed.weight": ("decoder.weight",)}


def test_equal_values_are_not_a_tie() -> None:
    index = ModelIndex.of(nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3)))
    assert index.aliases == {}
    assert len(index.parameters) == 4


def test_within_names_a_subtree_by_canonical_names() -> None:
    model = Tied()
    index = ModelIndex.of(model)
    assert index.within(model.decoder) == ("embed.weight",)
    assert index.within(model.body) == ("body.0.weight", "body.0.bias")
    assert index.within(model) == tuple(index.parameters)


def test_a_parameter_on_a_non_leaf_module_is_indexed() -> None:
    index = ModelIndex.of(Tied())
    assert "token" in index.parameters
    assert index.owner("token") == ""


@pytest.mark.parametrize(
    "wrap",
    [torch.nn.DataParallel, compiled, torch.optim.swa_utils.AveragedModel],
)
def test_a_wrapped_model_has_the_names_of_what_it_wraps(wrap: Any) -> None:
    model = Tied()
    assert list(ModelIndex.of(wrap(model)).parameters) == list(ModelIndex.of(model).parameters)


def test_a_users_own_attribute_called_module_stays_in_the_names() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1)

    assert list(ModelIndex.of(Mine()).parameters) == ["module.weight", "module.bias"]


def test_a_compiled_submodule_is_found_under_its_clean_name() -> None:
    model = Tied()
    plain = model.body
    model.body = compiled(model.body)
    index = ModelIndex.of(model)
    assert "body.0.weight" in index.parameters
    assert index.modules["body"] is plain
    assert unwrap(model.body) is plain
    assert index.path(model.body) == index.path(plain) == "body"
    assert index.within(model.body) == ("body.0.weight", "body.0.bias")
    assert [name for name, _ in index.children("")] == ["embed", "body", "decoder"]


def test_children_are_those_that_hold_parameters() -> None:
    index = ModelIndex.of(Tied())
    assert [name for name, _ in index.children("")] == ["embed", "body", "decoder"]
    assert [name for name, _ in index.children("body")] == ["body.0"]


def test_roots_go_down_to_the_first_model_with_several_parts() -> None:
    inner = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    outer = nn.ModuleDict({"model": nn.ModuleDict({"net": inner}), "loss": nn.MSELoss()})
    assert ModelIndex.of(outer).roots == ["", "model", "model.net"]


def test_roots_stop_at_a_module_with_parameters_of_its_own() -> None:
    assert ModelIndex.of(nn.ModuleDict({"net": Tied()})).roots == ["", "net"]


def test_tensors_are_the_parameters_themselves() -> None:
    model = Tied()
    assert ModelIndex.of(model).tensors(["token"]) == [model.token]


def test_some_counts_what_it_leaves_out() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdef")) == "a, b, c, d and 2 more"
