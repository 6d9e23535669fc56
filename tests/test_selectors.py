"""Selectors: paths, globs, regular expressions, callables, and errors that teach."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_freeze.errors import ArgumentError, FreezeError, SelectorError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.selectors import as_selectors, describe, select

CONFIG = BertConfig(
    hidden_size=8, num_hidden_layers=12, num_attention_heads=2, intermediate_size=8, vocab_size=11
)


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(CONFIG)


INDEX = ModelIndex.of(bert())
LIT = ModelIndex.of(nn.ModuleDict({"model": bert()}))  # as a LightningModule holds it


def under(*paths: str, index: ModelIndex = INDEX) -> tuple[str, ...]:
    prefixes = tuple(path + "." for path in paths)
    return tuple(name for name in index.parameters if name.startswith(prefixes))


def test_a_path_selects_its_whole_subtree() -> None:
    assert select(INDEX, "bert.pooler") == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")


def test_a_path_may_name_one_tensor() -> None:
    assert select(INDEX, "classifier.bias") == ("classifier.bias",)


def test_layer_1_is_not_layer_10() -> None:
    assert select(INDEX, "bert.encoder.layer.1") == under("bert.encoder.layer.1")
    assert len(select(INDEX, "bert.encoder.layer.1")) == 16


def test_a_path_may_start_at_the_wrapped_model() -> None:
    expected = under("model.bert.encoder.layer.0", index=LIT)
    assert select(LIT, "bert.encoder.layer.0") == expected
    assert select(LIT, "model.bert.encoder.layer.0") == expected
    assert len(expected) == 16


def test_a_path_may_start_anywhere_if_that_is_one_place() -> None:
    assert select(INDEX, "layer.11") == under("bert.encoder.layer.11")


def test_a_path_at_several_places_is_refused_and_all_are_offered() -> None:
    message = re.escape(
        "`LayerNorm` stands at 25 places: bert.embeddings.LayerNorm, "
        "bert.encoder.layer.0.attention.output.LayerNorm"
    )
    with pytest.raises(SelectorError, match=message + r".*or `\*\*\.LayerNorm` for all"):
        select(INDEX, "LayerNorm")
    assert len(select(INDEX, "**.LayerNorm")) == 50


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_prefixes_of_wrappers_are_ignored(prefix: str) -> None:
    assert select(INDEX, prefix + "classifier") == ("classifier.weight", "classifier.bias")


@pytest.mark.parametrize(
    ("glob", "count"),
    [
        ("**", 201),
        ("bert.**", 199),
        ("bert.encoder.layer.*", 192),
        ("bert.encoder.layer.*.attention", 120),
        ("bert.encoder.layer.1?", 32),
        ("bert.encoder.layer.1*", 48),
        ("bert.encoder.layer.[0-2]", 48),
        ("bert.encoder.layer.[!0-2]", 112),
        ("**.LayerNorm.*", 50),
        ("**.query.weight", 12),
        ("*.weight", 1),
        ("bert.*.LayerNorm", 2),
        ("layer.*.output.dense.bias", 12),
    ],
)
def test_globs_match_whole_components(glob: str, count: int) -> None:
    assert len(select(INDEX, glob)) == count


def test_one_star_spans_one_component() -> None:
    assert select(INDEX, "*.weight") == ("classifier.weight",)


def test_a_regular_expression_is_searched_in_the_full_name() -> None:
    assert select(INDEX, "re:bias$") == tuple(n for n in INDEX.parameters if n.endswith("bias"))
    assert len(select(INDEX, r"re:layer\.(8|9)\.")) == 32


def test_an_anchored_expression_may_start_at_the_wrapped_model() -> None:
    assert select(LIT, "re:^classifier") == ("model.classifier.weight", "model.classifier.bias")


def test_a_callable_gets_name_and_parameter() -> None:
    found = select(INDEX, lambda name, p: p.ndim == 1 and name.startswith("classifier"))
    assert found == ("classifier.bias",)


def test_several_selectors_are_a_union_in_model_order() -> None:
    both = select(INDEX, ["classifier", "bert.embeddings", "classifier.bias"])
    assert both == under("bert.embeddings", "classifier")


def test_an_alias_selects_the_tied_tensor() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "decoder": nn.Linear(2, 3)})
    model["decoder"].weight = model["embed"].weight
    assert select(ModelIndex.of(model), "decoder") == ("embed.weight", "decoder.bias")


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (
            "bert.encodr.layer.0",
            "No parameter matches `bert.encodr.layer.0`. `bert` has: embeddings, encoder, pooler. "
            "Did you mean `bert.encoder.layer.0`?",
        ),
        (
            "classifer",
            "No parameter matches `classifer`. Top-level modules: bert, classifier. "
            "Did you mean `classifier`?",
        ),
        (
            "bert.encoder.layer.12",
            "No parameter matches `bert.encoder.layer.12`. `bert.encoder.layer` has: 0, 1, 2, 3, "
            "4, 5, 6, 7, 8, 9, 10, 11.",
        ),
        ("re:nothing", "No parameter name holds `re:nothing`. Top-level modules: bert, classifier"),
        ("xyz", "No parameter matches `xyz`. Top-level modules: bert, classifier."),
    ],
)
def test_a_selector_without_a_match_says_what_exists(selector: str, message: str) -> None:
    with pytest.raises(SelectorError, match=re.escape(message)):
        select(INDEX, selector)


def test_a_module_without_parameters_is_told_from_a_typo() -> None:
    message = "`bert.embeddings.dropout` matches the module bert.embeddings.dropout, which has no p"
    with pytest.raises(SelectorError, match=re.escape(message)):
        select(INDEX, "bert.embeddings.dropout")


def test_a_callable_that_is_never_true_is_named() -> None:
    def nothing(name: str, parameter: Any) -> bool:
        return False

    with pytest.raises(SelectorError, match=r"`.*nothing` is true for none of the 201 parameters"):
        select(INDEX, nothing)


def test_the_error_is_a_freeze_error_and_a_lookup_error() -> None:
    for kind in (FreezeError, LookupError):
        with pytest.raises(kind, match="No parameter matches `x`"):
            select(INDEX, "x")


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ("", "`trainable` holds an empty selector"),
        (["a", " "], "`trainable` holds an empty selector"),
        ("re:(", r"`trainable` holds `re:\(`, which is not a regular expression"),
        ([3], "`trainable` holds 3. A selector is a path, a glob"),
        (3, "`trainable` holds 3"),
        ([None], "`trainable` holds None"),
    ],
)
def test_what_is_no_selector_is_refused_without_a_model(selectors: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        as_selectors(selectors, "trainable")


def test_one_selector_and_a_list_of_one_are_the_same() -> None:
    assert as_selectors("a") == as_selectors(["a"]) == ("a",)
    assert as_selectors(iter(["a", "b"])) == ("a", "b")


def test_describe_is_stable_text() -> None:
    class Pick:
        def __call__(self, name: str, parameter: Any) -> bool:
            return True

    assert describe("a.b") == "a.b"
    assert describe(torch.nn.init.normal_) == "normal_"
    assert describe(Pick()).endswith("Pick")


PARTS = st.sampled_from(["a", "b", "layer", "1", "10", "11", "weight"])


@given(st.lists(PARTS, min_size=1, max_size=3))
def test_a_path_selects_exactly_what_begins_with_its_components(parts: list[str]) -> None:
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"1": nn.Linear(1, 1), "10": nn.Linear(1, 1), "11": nn.Linear(1, 1)})

    tree = {"a": nn.ModuleDict({"layer": block()}), "b": nn.ModuleDict({"layer": block()})}
    index = ModelIndex.of(nn.ModuleDict(tree))
    path = ".".join(parts)
    expected = tuple(n for n in index.parameters if n.split(".")[: len(parts)] == parts)
    if expected:
        assert select(index, path) == expected
    else:
        with pytest.raises(SelectorError, match=re.escape(f"`{path}`")):
            select(index, path)


@pytest.mark.parametrize("name", list(INDEX.parameters)[::13])
def test_every_parameter_name_selects_itself_alone(name: str) -> None:
    assert select(INDEX, name) == (name,)
    assert select(LIT, name) == (f"model.{name}",)


# By class


def test_a_class_selects_all_that_hangs_from_its_modules() -> None:
    found = select(INDEX, "type:LayerNorm")
    assert found == tuple(name for name in INDEX.parameters if "LayerNorm" in name)
    assert select(LIT, "type:LayerNorm") == tuple(f"model.{name}" for name in found)
    assert select(INDEX, "type:BertPooler") == under("bert.pooler")


def test_a_class_may_be_a_base_class_a_glob_or_one_of_several() -> None:
    norms = nn.ModuleDict({"a": nn.BatchNorm2d(2), "b": nn.SyncBatchNorm(2), "c": nn.LayerNorm(2)})
    index = ModelIndex.of(norms)
    batch = ("a.weight", "a.bias", "b.weight", "b.bias")
    assert select(index, "type:_BatchNorm") == select(index, "type:*BatchNorm*") == batch
    assert select(index, "type:BatchNorm2d | LayerNorm") == (*batch[:2], "c.weight", "c.bias")
    assert select(index, ["type:LayerNorm", "a.bias"]) == ("a.bias", "c.weight", "c.bias")


def test_a_tied_tensor_is_selected_by_the_class_of_any_holder() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "out": nn.Linear(2, 3)})
    model["out"].weight = model["embed"].weight
    assert select(ModelIndex.of(model), "type:Linear") == ("embed.weight", "out.bias")


def test_a_class_that_is_not_there_is_answered_with_those_that_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    message = r"No module with parameters is of the class that `type:BatchNorm1d` names. Classes th"
    with pytest.raises(SelectorError, match=message + r"at exist: Linear, Sequential\."):
        select(ModelIndex.of(model), "type:BatchNorm1d")
    with pytest.raises(SelectorError, match="`type:ReLU` names"):
        select(ModelIndex.of(model), "type:ReLU")
