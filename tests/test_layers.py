"""Layer groups: a golden file per model family, the rules one by one, and groups of a user's own.

Each golden file has the rule that found the backbone, then the groups from bottom to top with
their number of tensors, then what the head is made of.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_freeze.errors import ArgumentError, DiscoveryError, SelectorError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.layer_groups import (
    Anatomy,
    LayerGroup,
    backbone_at,
    discover,
    layer_groups,
)
from tests.goldens import assert_golden
from tests.zoo import TRANSFORMERS, tiny_bert, tiny_bert_lm

TORCHVISION = (
    "vgg16",
    "vgg16_bn",
    "resnet18",
    "vit_b_16",
    "mobilenet_v3_small",
    "densenet121",
    "swin_t",
    "convnext_tiny",
    "efficientnet_b0",
    "googlenet",
    "shufflenet_v2_x1_0",
    "maxvit_t",
)
TIMM = (
    "vit_tiny_patch16_224",
    "resnet18",
    "convnext_atto",
    "deit_tiny_distilled_patch16_224",
    "vgg11",
)


def anatomy_of(model: nn.Module) -> Anatomy:
    return discover(ModelIndex.of(model))


def described(model: nn.Module) -> str:
    found = anatomy_of(model)
    lines = [found.rule]
    lines += [f"{len(group.parameters):5}  {group.name}" for group in found.groups]
    for label, names in (("above", found.above), ("head", found.head)):
        owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
        lines.append(f"{label}: {', '.join(owners) or '-'}")
    return "\n".join(lines)


def assert_partition(model: nn.Module) -> None:
    index = ModelIndex.of(model)
    names = [name for group in layer_groups(model) for name in group.parameters]
    assert len(names) == len(set(names))
    assert set(names) == set(index.parameters)
    group_names = [group.name for group in layer_groups(model)]
    assert len(group_names) == len(set(group_names))


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers_family_has_its_golden_groups(family: str) -> None:
    model = TRANSFORMERS[family]()
    assert_partition(model)
    assert_golden(f"layers/transformers-{family}.txt", described(model))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_model_has_its_golden_groups(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = getattr(models, name)(**kwargs)
    assert_partition(model)
    assert_golden(f"layers/torchvision-{name}.txt", described(model))


@pytest.mark.parametrize("name", TIMM)
def test_timm_model_has_its_golden_groups(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    assert_partition(model)
    assert_golden(f"layers/timm-{name}.txt", described(model))


def test_bert_is_embeddings_then_layers_then_a_head_with_the_pooler() -> None:
    groups = layer_groups(tiny_bert(12))
    layers = [f"bert.encoder.layer.{i}" for i in range(12)]
    assert [group.name for group in groups] == ["bert.embeddings", *layers, "head"]
    assert groups[-1].parameters == (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    )


def test_a_tied_tensor_is_in_the_group_of_its_first_name() -> None:
    groups = layer_groups(tiny_bert_lm())
    assert "bert.embeddings.word_embeddings.weight" in groups[0].parameters
    assert not any("decoder" in name for group in groups for name in group.parameters)


class Head(nn.Module):
    """Holds a model of any kind, as a LightningModule does."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def mlp(*widths: int) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())))


def test_a_wrapped_model_has_the_same_groups_under_longer_names() -> None:
    plain, wrapped = layer_groups(tiny_bert()), layer_groups(Head(model=tiny_bert()))
    assert [f"model.{name}" for group in plain for name in group.parameters] == [
        name for group in wrapped for name in group.parameters
    ]
    names = [g.name if g.name == "head" else f"model.{g.name}" for g in plain]
    assert names == [group.name for group in wrapped]


def test_a_bare_encoder_beside_a_head_of_the_users_own() -> None:
    bert = TRANSFORMERS["bert-bare"]()
    found = anatomy_of(Head(encoder=bert, classifier=nn.Linear(16, 2), loss=nn.MSELoss()))
    assert found.head == ("classifier.weight", "classifier.bias")
    assert found.above == ("encoder.pooler.dense.weight", "encoder.pooler.dense.bias")
    assert [block.name for block in found.blocks] == [
        f"encoder.encoder.layer.{i}" for i in (0, 1, 2)
    ]


@pytest.mark.parametrize("attribute", ["backbone", "feature_extractor"])
def test_an_attribute_that_says_so_is_the_backbone(attribute: str) -> None:
    found = anatomy_of(Head(**{attribute: mlp(2, 3, 4), "head": nn.Linear(4, 1)}))
    assert found.rule == f"the attribute `{attribute}`"
    assert [block.name for block in found.blocks] == [f"{attribute}.0", f"{attribute}.2"]
    assert found.head == ("head.weight", "head.bias")


def test_the_backbone_attribute_wins_over_the_library_inside() -> None:
    bert = tiny_bert()
    found = anatomy_of(Head(backbone=bert, head=nn.Linear(2, 1)))
    assert found.rule == "the attribute `backbone`"
    assert "backbone.classifier.weight" in found.backbone
    assert found.head == ("head.weight", "head.bias")
    assert len(found.blocks) == 3


def test_a_backbone_without_anything_beside_it_is_no_answer() -> None:
    found = anatomy_of(Head(backbone=tiny_bert()))
    assert found.rule == "transformers' `base_model` (`backbone.bert`)"
    assert found.head == ("backbone.classifier.weight", "backbone.classifier.bias")


def test_a_backbone_on_a_module_inside_is_found() -> None:
    found = anatomy_of(Head(net=Head(backbone=mlp(2, 3), head=nn.Linear(3, 1))))
    assert found.rule == "the attribute `net.backbone`"
    assert found.head == ("net.head.weight", "net.head.bias")


def test_an_encoder_attribute_is_the_backbone_of_a_plain_module() -> None:
    found = anatomy_of(Head(encoder=mlp(2, 3, 4), top=nn.Linear(4, 1)))
    assert found.rule == "the attribute `encoder`"
    assert found.head == ("top.weight", "top.bias")


def test_the_longest_list_of_like_modules_holds_the_blocks() -> None:
    parts: dict[str, nn.Module] = {
        "embed": nn.Embedding(3, 4),
        "short": nn.ModuleList(nn.Linear(4, 4) for _ in range(2)),
        "long": nn.ModuleList(nn.Linear(4, 4) for _ in range(3)),
        "out": nn.Linear(4, 1),
    }
    found = anatomy_of(Head(**parts))
    assert found.rule == "the list of like modules `long`"
    assert [block.name for block in found.blocks] == ["long.0", "long.1", "long.2"]
    assert found.stem is not None
    assert found.stem.name == "embed+short"
    assert found.head == ("out.weight", "out.bias")


def test_a_plain_sequential_has_its_last_layer_as_head() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    found = anatomy_of(model)
    assert found.rule == "the order of the Sequential `Sequential`"
    assert [group.name for group in found.groups] == ["0", "head"]
    assert found.groups[0].parameters == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert found.head == ("3.weight", "3.bias")


def test_a_torchvision_like_model_of_the_users_own() -> None:
    model = Head(features=mlp(2, 3, 4), classifier=nn.Linear(4, 2))
    found = anatomy_of(model)
    assert found.rule == "torchvision's `classifier` on `Head`"
    assert [group.name for group in found.groups] == ["features.0", "features.2", "head"]


def test_a_model_with_its_head_cut_off_beside_a_head() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        net = models.resnet18()
    net.fc = nn.Identity()
    found = anatomy_of(Head(net=net, head=nn.Linear(512, 3)))
    assert found.head == ("head.weight", "head.bias")
    assert [block.name for block in found.blocks] == [f"net.layer{i}" for i in (1, 2, 3, 4)]


def test_a_timm_model_without_a_classifier_is_all_backbone() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0)
    found = anatomy_of(Head(net=net, head=nn.Linear(192, 3)))
    assert found.head == ("head.weight", "head.bias")
    assert len(found.blocks) == 12


def test_albert_says_that_its_layers_share_one_block() -> None:
    assert anatomy_of(TRANSFORMERS["albert"]()).rule.endswith(
        "whose 3 layers share the weights of 1"
    )


def test_a_compiled_backbone_is_found() -> None:
    model = tiny_bert()
    plain = anatomy_of(model)
    model.bert = torch.compile(model.bert, backend="eager")
    assert anatomy_of(model) == plain
    assert anatomy_of(torch.compile(model, backend="eager")) == plain


def test_a_toy_without_backbone_lists_the_candidates() -> None:
    model = Head(first=nn.Linear(2, 2), second=nn.Conv1d(1, 1, 1))
    message = re.escape(
        "No backbone was found: there is no timm, transformers or torchvision model, no attribute "
        "`backbone`, `feature_extractor` or `encoder` with a head beside it, and no list of like "
        "layers below a head. The model has: `first` (Linear), `second` (Conv1d). Say it yourself: "
        '`FreezeBackbone(backbone="first")`, or '
        "`GradualUnfreeze(groups=['first', 'second'])`, bottom to top."
    )
    with pytest.raises(DiscoveryError, match=message):
        layer_groups(model)


def test_lists_that_were_no_answer_are_listed() -> None:
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    with pytest.raises(DiscoveryError, match="Lists of like modules: `layers`"):
        layer_groups(Head(embed=nn.Linear(2, 2), layers=layers))


def test_a_model_without_parameters_says_so() -> None:
    with pytest.raises(DiscoveryError, match="The model has: no parameters"):
        layer_groups(nn.ReLU())


def test_two_library_models_are_a_question() -> None:
    message = r"Several models could hold the backbone: `teacher`, `student`.*backbone=\"teacher\""
    with pytest.raises(DiscoveryError, match=message):
        layer_groups(Head(teacher=tiny_bert(), student=tiny_bert()))


def names_of(groups: list[LayerGroup]) -> dict[str, int]:
    return {group.name: len(group.parameters) for group in groups}


def test_groups_of_the_users_own_take_in_what_they_leave_out() -> None:
    model = tiny_bert()
    assert names_of(layer_groups(model, ["layer.0", ["layer.1", "layer.2"]])) == {
        "bottom": 5,
        "layer.0": 16,
        "layer.1+layer.2": 32,
        "head": 4,
    }


def test_what_stands_between_two_groups_joins_the_lower() -> None:
    found = layer_groups(tiny_bert(), ["bert.embeddings", "layer.2", "classifier"])
    assert names_of(found) == {"bert.embeddings": 37, "layer.2": 18, "classifier": 2}


def test_groups_keep_the_users_order() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert [g.name for g in layer_groups(model, ["1", "0"])] == ["1", "0"]


def test_groups_of_one_label_are_numbered() -> None:
    model = Head(a=nn.Linear(1, 1), head=nn.Linear(1, 1), z=nn.Linear(1, 1))
    picks: list[Any] = [lambda name, p: name[0] == "a", lambda name, p: name[0] == "h", "z"]
    assert [g.name for g in layer_groups(model, picks)] == ["callable", "callable (2)", "z"]
    assert [g.name for g in layer_groups(model, ["a", "head"])] == ["a", "head", "head (2)"]


@pytest.mark.parametrize("patterns", ["bert", [], ()])
def test_groups_are_a_list(patterns: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`groups` is .*Write a list, bottom to top"):
        layer_groups(tiny_bert(), patterns)


def test_overlapping_groups_are_refused() -> None:
    message = "`bert.encoder.layer.0.attention.self.query.weight` is in two layer groups: bert and "
    with pytest.raises(ArgumentError, match=re.escape(message + "layer.0. Layer groups must be")):
        layer_groups(tiny_bert(), ["bert", "layer.0"])


def test_a_group_that_matches_nothing_is_refused() -> None:
    with pytest.raises(SelectorError, match=r"No parameter matches `layer\.7`"):
        layer_groups(tiny_bert(), ["layer.7", "classifier"])


@pytest.mark.parametrize(
    ("backbone", "blocks"),
    [
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.encoder.layer.2"]),
        ("bert.encoder", ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.encoder.layer.2"]),
        (["layer.0", "layer.1"], ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("bert.embeddings.word_embeddings", ["bert.embeddings.word_embeddings"]),
    ],
)
def test_a_named_backbone_keeps_the_blocks_inside_it(backbone: Any, blocks: list[str]) -> None:
    index = ModelIndex.of(tiny_bert())
    found = backbone_at(index, backbone)
    assert [block.name for block in found.blocks] == blocks or not found.blocks
    assert set(found.backbone) | set(found.head) == set(index.parameters)
    assert not set(found.backbone) & set(found.head)


def test_a_named_backbone_of_an_unknown_model_has_its_list_as_blocks() -> None:
    body = Head(embed=nn.Linear(2, 2), layers=nn.ModuleList(nn.Linear(2, 2) for _ in range(3)))
    index = ModelIndex.of(Head(body=body, other=nn.Linear(2, 2), out=nn.Linear(2, 1)))
    found = backbone_at(index, "body")
    assert [block.name for block in found.blocks] == [f"body.layers.{i}" for i in range(3)]
    assert found.stem is not None
    assert found.stem.name == "body.embed"


def test_a_head_of_bare_parameters_is_a_head() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = mlp(2, 3)
            self.scale = nn.Parameter(torch.ones(1))

    assert anatomy_of(Bare()).head == ("scale",)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True))
def test_any_groups_are_disjoint_and_cover_the_model(chosen: list[str]) -> None:
    model = nn.ModuleDict({name: nn.Linear(1, 1) for name in "abcdef"})
    groups = layer_groups(model, chosen)
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [group.name for group in groups if group.name in chosen] == chosen


FACTORIES: list[Callable[[], nn.Module]] = [tiny_bert, tiny_bert_lm, TRANSFORMERS["t5-generation"]]


@pytest.mark.parametrize("factory", FACTORIES)
def test_looking_changes_nothing(factory: Callable[[], nn.Module]) -> None:
    model = factory()
    before = {name: (p, p.requires_grad, p._version) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    layer_groups(model)
    assert {n: (p, p.requires_grad, p._version) for n, p in model.named_parameters()} == before
    assert [module.training for module in model.modules()] == modes
